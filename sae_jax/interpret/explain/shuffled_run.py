"""Trains the SAE of a model with shuffled weights as that of the model itself was trained."""

import dataclasses
from typing import NamedTuple

import numpy as np

from sae_jax import lm, paths
from sae_jax.activations import Sites, is_world
from sae_jax.errors import UserError
from sae_jax.evaluate.batching import evenly_spaced
from sae_jax.evaluate.sources import check_model
from sae_jax.sae import SAE
from sae_jax.train.api import train
from sae_jax.train.directory import run_there


class ShuffledRun(NamedTuple):
    """An SAE of a shuffled model.

    Attributes:
      sae: the SAE.
      model: the shuffled model, as `lm.open_model` takes it.
      path: the run's directory.
    """

    sae: SAE
    model: str
    path: str


def shuffled_run(
    run,
    out,
    *,
    model: lm.LanguageModel,
    store=None,
    tokens: int | None = None,
    seed: int = 0,
) -> ShuffledRun:
    """Trains an SAE on a model with shuffled weights by the config of a run, on the same text.

    The text is the very tokens of the run's store, and the passes over them are as many as the
    run's. In `out` are model, store and run. The store keeps activations if the run's does. What
    was stopped goes on where it was, and what is done is opened.

    Args:
      run: the directory of the run.
      out: the directory to write.
      model: the language model that the run's store is of.
      store: the run's store, or its path. None: where the run says that it is.
      tokens: of about how many tokens of the store to take activations, spread evenly; fewer train
        a run that is shorter in proportion. None: all of them.
      seed: the seed of the shuffle.

    Raises UserError if there is no run, if its store has no tokens or is of another model, and
    where shuffling, harvesting or training does.
    """
    config = run_there(paths.path(run))
    if config is None:
        raise UserError(f"{run} is not a run: it has no config.json")
    if is_world(config.data.store):
        raise UserError(f"{run} is of a synthetic world, which has no model that can be shuffled")
    store = lm.open_store(config.data.store if store is None else store)
    meta = store.meta
    if meta.tokens_sha256 is None:
        raise UserError(f"{store.path} has no tokens, on which the shuffled model is to run")
    check_model(store, model)
    asked = meta.num_sequences if tokens is None else -(-tokens // meta.context_length)
    ids = store.read_tokens(evenly_spaced(np.arange(meta.num_sequences), asked))
    out = paths.local(out)
    shuffled = lm.shuffled_model(model.spec, out / "model", seed)
    data = config.data
    sites = Sites(store, ",".join(filter(None, (data.site, data.target_site)))).names
    made = lm.harvest(
        shuffled,
        ids,
        out / "store",
        sites=sites,
        dtype=meta.sites[sites[0]].dtype,
        model_dtype=meta.provenance.get("model_dtype", model.dtype),
        live=meta.live is not None,
        provenance={"packing": meta.provenance.get("packing")},
    )
    data = dataclasses.replace(data, store=str((out / "store").absolute()))
    # Other rows are left out for their norm, so there may be fewer.
    there = lm.open_stream(data).num_steps * data.batch_size
    share = int(config.train.tokens * len(ids) / meta.num_sequences)
    config = dataclasses.replace(
        config,
        data=data,
        train=dataclasses.replace(config.train, init="", branch_from=""),
        mesh=dataclasses.replace(config.mesh, run=1, data=-1),
    )
    trained = train(config.sae, made, tokens=min(share, there), workdir=out / "run", config=config)
    return ShuffledRun(trained.sae, shuffled, str(out / "run"))
