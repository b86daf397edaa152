"""Evaluating from Python: `sae_jax.evaluate` and `sae_jax.dead_latents`."""

import pathlib
from collections.abc import Sequence

import numpy as np

from sae_jax import lm, paths
from sae_jax.activations import ArrayStore, is_world
from sae_jax.config import DataConfig
from sae_jax.errors import UserError, known_arguments
from sae_jax.evaluate.report import Evaluation
from sae_jax.evaluate.report import evaluate as evaluate_source
from sae_jax.evaluate.sources import HeldOutRows, ModelRows, check_model
from sae_jax.evaluate.worlds import WorldRows
from sae_jax.sae import SAE
from sae_jax.train.checkpoints import load_sae
from sae_jax.train.directory import find_store, read_config


@known_arguments
def evaluate(
    sae: SAE,
    data=None,
    *,
    store=None,
    model=None,
    token_ids: np.ndarray | None = None,
    site: str | Sequence[str] = "",
    tokens: int = 1_000_000,
    lm_tokens: int = 262_144,
    holdout_fraction: float = DataConfig.holdout_fraction,
    include_excluded: bool = False,
) -> Evaluation:
    """Measures how good an SAE is, alone on activations and inside its language model.

        print(sae_jax.evaluate(sae, store="store", model="path/to/model").table())

    Give one of:

      data: an array (rows, d) of activations in the model's own units, or {site: array}; every row
        counts.
      store: a store or its path, of which the held-out sequences count; or "world:NAME,...", whose
        features are then looked for among the latents.
      token_ids: (sequences, length) for `model` to run on.

    Args:
      model: the language model, or its directory or hf:// name. With it the result says what
        cross-entropy the model keeps when the SAE's reconstruction stands in its place.
      site: the site, or several in the SAE's order, a transcoder's target last; by default the only
        one that the data have.
      tokens: about how many rows to measure, at most.
      lm_tokens: about how many tokens to run the language model on, at most.
      holdout_fraction: of the store, as it was in training.
      include_excluded: count BOS and other high-norm positions too.

    Returns an `Evaluation`: `table()` is for people, `to_dict()` for programs, and `rows` has
    arrays (d_sae,) of every latent's density and mean and largest activation.

    Raises UserError where the sites do not fit the SAE, the model is not the store's, or nothing is
    given to evaluate on.
    """
    given = [name for name, x in (("data", data), ("store", store), ("token_ids", token_ids))
             if x is not None]  # fmt: skip
    if len(given) != 1:
        raise UserError(
            "evaluate on one of: data=array, store=STORE, token_ids=array (with model=); got "
            f"{' and '.join(given) or 'none of them'}"
        )
    if model is not None and not isinstance(model, lm.LanguageModel):
        model = lm.open_model(model)
    if token_ids is not None:
        source = _on_tokens(model, token_ids, site, include_excluded)
    elif isinstance(store, str) and is_world(store):
        source = WorldRows(DataConfig(store=store, site=_joined(site)), tokens=tokens)
    elif store is not None:
        store = _opened(store)
        if model is not None:
            check_model(store, model)
        source = HeldOutRows(
            store,
            site,
            tokens=tokens,
            holdout_fraction=holdout_fraction,
            include_excluded=include_excluded,
        )
    else:
        if model is not None:
            raise UserError("an array has no tokens for a model to read; give store= or token_ids=")
        array = ArrayStore(data)
        names = site or tuple(array.meta.sites)
        source = HeldOutRows(array, names, tokens=tokens, holdout_fraction=None)
    return evaluate_source(sae, source, model, lm_tokens)


@known_arguments
def dead_latents(
    sae: SAE | str | pathlib.Path,
    data=None,
    *,
    store=None,
    site: str | Sequence[str] = "",
    tokens: int = 1_000_000,
) -> np.ndarray:
    """Returns the latents that fire on no row, by their indices in order, (dead,) int.

        sae_jax.dead_latents("runs/a")

    Args:
      sae: an SAE, or the directory of a run. A run's rows are the held-out ones of its own store,
        if no others are given, of its own sites, and with or without positions that are excluded as
        it was trained.
      data: an array (rows, d) of activations, or {site: array}, as for `evaluate`.
      store: a store or its path, of which the held-out sequences count; or "world:NAME,...".
      site: the site, or several in the SAE's order, as for `evaluate`.
      tokens: about how many rows to look at, at most. A latent that fires on none of few rows may
        be a rare one.

    Raises UserError where there is no such run, and as `evaluate` does.
    """
    settings = {"store": store, "site": site}
    if not isinstance(sae, SAE):
        run = paths.path(sae)
        sae, own = load_sae(run), find_store(run, read_config(run).data)
        if data is None:
            store = own.store if store is None else _opened(store)
            settings = {
                "store": store,
                "site": site or _own_sites(own, store),
                "holdout_fraction": own.holdout_fraction,
                "include_excluded": own.include_excluded,
            }
    return evaluate(sae, data, tokens=tokens, **settings).dead_latents


def _opened(store):
    """Returns a store that may be given by its path; a world stays its name."""
    is_path = isinstance(store, str | pathlib.Path | paths.ObjectPath)
    return lm.open_store(store) if is_path and not is_world(str(store)) else store


def _own_sites(data: DataConfig, store) -> str:
    """Returns a run's sites; "", for the only one, where another store or a world has none of such
    names."""
    sites = ",".join(filter(None, (data.site, data.target_site)))
    if isinstance(store, str):
        same = store == data.store or is_world(data.store)
    else:
        same = set(sites.split(",")) <= store.meta.sites.keys()
    return sites if same else ""


def _on_tokens(model, token_ids, site, include_excluded: bool) -> ModelRows:
    if model is None or not site:
        raise UserError("token_ids need the model= that runs on them, and the site= to look at")
    token_ids = np.asarray(token_ids)
    if token_ids.ndim != 2 or token_ids.dtype.kind not in "iu":
        raise UserError(
            f"token_ids are whole numbers (sequences, length), not {token_ids.shape} of "
            f"{token_ids.dtype}"
        )
    excluded = () if include_excluded else model.tokenizer.special_tokens
    return ModelRows(model, site, token_ids, what="the tokens given", excluded_tokens=excluded)


def _joined(site: str | Sequence[str]) -> str:
    return site if isinstance(site, str) else ",".join(site)
