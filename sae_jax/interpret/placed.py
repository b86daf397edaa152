"""An SAE at its place in a language model: the site that it reads and the one that it writes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.sae import SAE
from sae_jax.sae.config import TRANSCODERS

_LATENTS = 2**25  # elements of the dense latents that exist at once


@dataclasses.dataclass(frozen=True)
class Placed:
    """An autoencoder or a transcoder, and where in a model it is.

    Attributes:
      sae: the SAE.
      site: the site that it reads.
      target_site: the site that a transcoder writes; None for an autoencoder.
      name: what it is called.
    """

    sae: SAE
    site: str
    target_site: str | None = None
    name: str = ""

    @property
    def written(self) -> str:
        """The site that it writes."""
        return self.target_site or self.site

    def check(self, model: lm.LanguageModel) -> None:
        """Raises UserError unless the SAE is of the kind and widths that its place needs."""
        config = self.sae.config
        if config.kind == "crosscoder":
            raise UserError(
                "a crosscoder writes to several sites at once, so a latent of it has no one place "
                "to be taken out at; give an autoencoder or a transcoder"
            )
        if (config.kind in TRANSCODERS) != (self.target_site is not None):
            wrong = "an autoencoder has no" if self.target_site else "a transcoder needs a"
            raise UserError(f"{wrong} target site; this one reads {self.site}")
        for site, width in ((self.site, config.d_in), (self.written, config.d_out)):
            if model.site_width(site) != width:
                raise UserError(
                    f"the SAE is of width {width}, but {site} of this model has "
                    f"{model.site_width(site)}; give the model and site that it was trained on"
                )

    def rows_at_once(self, rows: int) -> int:
        """Returns how many of `rows` rows are encoded at once, so that their latents fit."""
        return max(1, min(rows, _LATENTS // self.sae.config.d_sae))


def check_ids(model: lm.LanguageModel, ids) -> np.ndarray:
    """Returns token ids (..., T) as int32. Raises UserError for what is none of the model's."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" or ids.size == 0:
        raise UserError(
            "token ids are whole numbers, one or more, such as tokenizer.encode gives; got "
            f"{ids.shape} of {ids.dtype}"
        )
    wrong = ids[(ids < 0) | (ids >= model.vocab_size)]
    if wrong.size:
        raise UserError(f"token {wrong[0]} is not of the model's {model.vocab_size}")
    return ids.astype(np.int32)


def unit_directions(sae: SAE, latents) -> jax.Array:
    """Returns what a unit of activation of each latent adds, (..., d_out), a vector of length 1.

    It is the decoder's row, over its length; a row of zeros stays one.
    """
    rows = sae.direction(latents)
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
