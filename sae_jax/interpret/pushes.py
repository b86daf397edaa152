"""Pushes: changes of activations by as much as a factor says, of latents or along directions.

A latent's push sets it to the factor times its maximum (Templeton et al. 2024, "Scaling
Monosemanticity"). What an SAE is worth for steering shows only beside directions that need none, of
the same length: the difference of the means of two texts' activations, which often does better
(Wu et al. 2025, "AxBench", arXiv:2501.17148), and a random one.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.errors import UserError, choose
from sae_jax.evaluate.batching import rows_at_once
from sae_jax.evaluate.metrics import activation_scale
from sae_jax.evaluate.padding import IGNORED
from sae_jax.evaluate.sources import HeldOutRows, ModelRows
from sae_jax.interpret.placed import unit_directions
from sae_jax.progress_bar import progress
from sae_jax.sae import SAE

MODES = ("clamp", "add", "ablate", "pin")
FIXED_FACTORS = {"ablate": 0.0, "pin": 1.0}
"""The only factor of the modes that have one: ablated latents are 0, pinned ones at their
maximum."""

_ROWS = 4096  # of a batch


@dataclasses.dataclass(frozen=True)
class Push:
    """A change of activations.

    Attributes:
      name: what it is called in tables.
      edits: makes the edits, by site, from a factor and the activations of `reads`.
      reads: the sites whose activations (B, T, width) in the untouched model, on the same tokens,
        `edits` takes as {site: activations}. Those of a crosscoder are all its sites.
    """

    name: str
    edits: Callable[[float, dict[str, jax.Array]], dict[str, Callable]]
    reads: tuple[str, ...] = ()


def latent_push(
    sae: SAE, sites: Sequence[str], latents: Sequence[int], maxima, mode: str = "clamp"
) -> Push:
    """Returns the push that sets latents, all at once, to a factor times their maxima.

    Raises UserError for a mode or a latent that there is not, for a latent whose maximum is 0, and
    for sites that are not as many as the SAE's.

    Args:
      sae: the SAE.
      sites: its sites, a transcoder's target last.
      latents: the latents' indices.
      maxima: the maxima of their activations, (latents,), as `sae-jax eval` has them.
      mode: one of `MODES`. clamp sets them, add adds as much to what is there, ablate (at factor 0)
        and pin (at factor 1) are clamps at nothing and at the maximum.
    """
    choose(mode, MODES, "the mode")
    maxima = np.asarray(maxima, np.float32)
    for latent, maximum in zip(latents, maxima, strict=True):
        if not maximum > 0:
            raise UserError(
                f"latent {latent} never fired on what its maximum is of, so there is nothing to "
                "scale; choose another latent, or measure its maximum on other text (--text)"
            )

    def edits(factor: float, clean: dict) -> dict[str, Callable]:
        return lm.latent_edits(
            sae, sites, latents, factor * maxima, add=mode == "add", clean=clean or None
        )

    is_crosscoder = sae.config.kind == "crosscoder"
    if not is_crosscoder:
        edits(0.0, {})  # refused now, and not after the untouched model has run
    name = f"latent {latents[0]}" if len(latents) == 1 else f"latents {','.join(map(str, latents))}"
    return Push(name, edits, tuple(sites) if is_crosscoder else ())


def direction_push(
    name: str, sae: SAE, sites: Sequence[str], direction: np.ndarray, length: float
) -> Push:
    """Returns the push that adds a factor times `length` along a direction.

    It writes the sites that the SAE's latents write. A crosscoder's all become what they are in
    the untouched model and what is added, as with its latents (`lm.latent_edits`).

    Args:
      name: what it is called.
      sae: the SAE, of which only its kind and widths are asked.
      sites: its sites, a transcoder's target last.
      direction: (d_out,), of any norm but 0.
      length: the norm of what is added at factor 1, over all sites that are written.
    """
    vector = np.asarray(direction, np.float32)
    vector = vector * np.float32(length / np.linalg.norm(vector))
    if sae.config.kind != "crosscoder":
        return Push(name, lambda factor, _: {sites[-1]: lm.add_direction(vector, factor)})
    parts = dict(zip(sites, np.split(vector, np.cumsum(sae.config.site_widths)[:-1]), strict=True))

    def edits(factor: float, clean: dict) -> dict[str, Callable]:
        return {
            site: lm.put(clean[site].astype(jnp.float32) + factor * part)
            for site, part in parts.items()
        }

    return Push(name, edits, tuple(sites))


def written_length(sae: SAE, latents: Sequence[int], maxima) -> float:
    """Returns the norm of what latents at their maxima add together, which directions are given.

    Args:
      sae: the SAE.
      latents: the latents' indices.
      maxima: the maxima of their activations, (latents,).
    """
    units = np.asarray(unit_directions(sae, np.asarray(latents)))
    return float(np.linalg.norm(np.asarray(maxima) @ units))


def random_direction(width: int, seed: int) -> np.ndarray:
    """Returns a random direction (width,) of norm 1."""
    vector = np.random.default_rng(seed).normal(size=width)
    return vector / np.linalg.norm(vector)


def difference_of_means(
    sae: SAE, positive: HeldOutRows | ModelRows, negative: HeldOutRows | ModelRows
) -> np.ndarray:
    """Returns the mean of what the SAE writes on some texts, less that on others, (d_out,).

    Args:
      sae: the SAE, which says which columns of a row it writes.
      positive: rows of the texts with what is to be steered to.
      negative: rows of texts without it.
    """
    means = []
    for source in (positive, negative):
        total, count = 0.0, 0
        for rows, used in source.batches(_ROWS):
            _, y = sae.split(np.asarray(rows, np.float32)[used])
            total, count = total + y.sum(axis=0, dtype=np.float64), count + len(y)
        means.append(total / max(count, 1))
    return means[0] - means[1]


def difference_at_examples(
    sae: SAE, source: HeldOutRows | ModelRows, latents: Sequence[int]
) -> np.ndarray | None:
    """Returns the difference of means (d_out,) that the latents' own examples give.

    It is the mean of what the SAE writes where the latents are active, weighed by their
    activations, less that where none of them is. It is None where they are active nowhere, or
    everywhere.

    Args:
      sae: the SAE.
      source: rows to look at.
      latents: the latents' indices.
    """
    scale = activation_scale(sae)[np.asarray(latents)]
    sums = [np.zeros(sae.config.d_out) for _ in range(2)]
    weights = [0.0, 0.0]
    size = rows_at_once(sae.config.d_sae)
    batches = progress(source.batches(size), "examples' means", source.num_batches(size))
    for rows, used in batches:
        # Rows that do not count may hold NaN, and 0 times NaN is NaN.
        x, y = sae.split(np.where(used[:, None], np.asarray(rows, np.float32), 0))
        activation = np.asarray(_encode(sae, x)[:, np.asarray(latents)] * scale).sum(axis=1)
        for i, weight in enumerate((activation * used, (activation == 0) & used)):
            sums[i] += weight.astype(np.float64) @ y
            weights[i] += float(weight.sum())
    if not all(weights):
        return None
    return sums[0] / weights[0] - sums[1] / weights[1]


def text_rows(
    model: lm.LanguageModel,
    sites: Sequence[str],
    texts: Sequence[str],
    what: str,
    context_length: int = 256,
) -> ModelRows:
    """Returns rows of the model's activations on texts, each after BOS and by itself.

    Special tokens do not count. Raises UserError if there is no text.

    Args:
      model: the language model.
      sites: the sites.
      texts: the texts, of which no more than the context is read.
      what: what messages call them.
      context_length: the most tokens of a text, BOS included.
    """
    tokenizer = model.tokenizer
    length = min(context_length, model.max_context)
    ids = [[tokenizer.bos, *of_text][:length] for of_text in tokenizer.encode_batch(list(texts))]
    if not ids:
        raise UserError(f"{what} holds no text")
    tokens = np.full((len(ids), max(map(len, ids))), IGNORED)
    for row, of_text in zip(tokens, ids, strict=True):
        row[: len(of_text)] = of_text
    return ModelRows(model, sites, tokens, what=what, excluded_tokens=tokenizer.special_tokens)


@jax.jit
def _encode(sae, x):
    return sae.encode(x)
