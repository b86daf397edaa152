"""Whether SAEs are as good when the products of their training are of bfloat16.

    python experiments/benchmarks/half_beside_float.py --out=half
    sae-jax harvest --model=hf://HuggingFaceTB/SmolLM2-135M --text=FILE --sites=resid_post.9 \\
        --context_length=128 --tokens=180e3 --out=smollm
    python experiments/benchmarks/half_beside_float.py --out=half --store=smollm

The tiny recipes of top-k, BatchTopK, JumpReLU and ReLU train on a world whose features are known,
and on the activations of a store, with products of float32 and of bfloat16: the same rows and the
same seeds. All are then evaluated in float32, as they will be used. The difference of two means is
within the spread of seeds if it is no larger than that of two seeds of one type.

The CPU rounds here what an accelerator does: it computes by all latents, and top-k reads rows of
bfloat16, as on a GPU. Runs that are in --out are not made again.
"""

import dataclasses
import pathlib
from unittest import mock

import jax
import numpy as np
from absl import app, flags, logging

from sae_jax import paths
from sae_jax.activations import open_stream
from sae_jax.config import Config, DataConfig, load_file
from sae_jax.evaluate.api import evaluate
from sae_jax.evaluate.recovery import measure_recovery
from sae_jax.evaluate.worlds import WorldRows
from sae_jax.json_files import read_json
from sae_jax.ops import sparse
from sae_jax.ops.active import by_all_latents
from sae_jax.paths import save_json
from sae_jax.sweep import grid, worker
from sae_jax.sweep.directory import SweepDirectory, expand
from sae_jax.train.checkpoints import load_sae

RECIPES = ("openai_topk", "batchtopk", "gemma_scope", "scaling_monosemanticity")
DTYPES = ("float32", "bfloat16")
_BATCH, _HELD_OUT = 256, 16_384  # rows

_OUT = flags.DEFINE_string("out", None, "Directory of runs and figures.json.", required=True)
_WORLD = flags.DEFINE_string(
    "world", "world:superposition,width=64,features=256", "Empty: only --store."
)
_STORE = flags.DEFINE_string("store", None, "Of real activations; none: only the world.")
_D_SAE = flags.DEFINE_integer("d_sae", 2048, "Latents for the activations of --store.")
_STEPS = flags.DEFINE_integer("steps", 600, "Steps on them, of 256 rows.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Initialisations of each SAE.")
_RECIPES = flags.DEFINE_list("recipes", list(RECIPES), "Which of them to train.")


def main(_) -> None:
    logging.set_verbosity(logging.ERROR)
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32
    out, figures = pathlib.Path(_OUT.value), {}
    print(f"{'':24}{'':10}{'float32':>10}{'seeds':>10}{'bfloat16':>10}{'seeds':>10}{'apart':>10}")
    for data in filter(None, [_WORLD.value, _STORE.value]):
        for recipe in _RECIPES.value:
            is_world = data == _WORLD.value
            place = out / ("world" if is_world else "store") / recipe
            config = on_world(recipe) if is_world else on_store(recipe)
            found = scores(train(config, place), is_world)
            label = f"{place.parent.name} {config.sae.architecture}"
            figures[label] = [compare(label, name, runs) for name, runs in found.items()]
    rows = [row for rows in figures.values() for row in rows]
    within = sum(row["within"] for row in rows)
    print(f"{within} of {len(rows)} differences are within the spread of seeds")
    save_json(figures, out / "figures.json")


def on_world(recipe: str) -> Config:
    """Returns a recipe with a latent for each feature, about as many of which fire as features."""
    width = open_stream(DataConfig(store=_WORLD.value)).world.num_features
    falling = {"k_start": 24, "k_anneal_fraction": 0.6}
    return _tiny(recipe, width, 6, falling, _WORLD.value, 3e-3, 1500)


def on_store(recipe: str) -> Config:
    """Returns a recipe for the activations of a store, at the sparsity that is usual for them."""
    return _tiny(recipe, _D_SAE.value, 32, {}, _STORE.value, 1e-3, _STEPS.value)


def _tiny(
    recipe: str, d_sae: int, l0: int, of_k: dict, store: str, rate: float, steps: int
) -> Config:
    """Returns a tiny recipe for other data.

    l0: how many latents fire on a row. of_k: more fields of the SAEs that have a k.
    """
    config, tokens = load_file(f"{recipe}:tiny"), steps * _BATCH
    if config.sae.k is not None:
        sae = {"k": l0, **of_k}
    else:
        sae = {"target_l0": float(l0)}
    if config.sae.architecture == "relu":
        sae["sparsity_coefficient"] = 0.5  # so short a run must begin dense
    return dataclasses.replace(
        config,
        sae=dataclasses.replace(config.sae, d_sae=d_sae, dead_after_tokens=None, **sae),
        data=DataConfig(store=store, batch_size=_BATCH),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
        train=dataclasses.replace(config.train, tokens=tokens, checkpoint_every=tokens),
    )


def train(config: Config, place: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Returns the directories of the runs of each dtype, one for each seed."""
    dtypes = grid.sweep("sae.compute_dtype", DTYPES)
    seeds = grid.sweep("train.seed", range(_SEEDS.value))
    sweep = SweepDirectory.start(paths.path(place), expand(config, grid.product(dtypes, seeds)))
    reads_half = mock.patch.object(sparse, "operand", lambda a, dtype: a.astype(dtype))
    with by_all_latents(), reads_half:
        worker.work(sweep, lease_seconds=60.0)
    found = {dtype: [] for dtype in DTYPES}
    for run in sweep.runs:
        found[run.config.sae.compute_dtype].append(sweep.run_path(run))
    return found


def scores(runs: dict[str, list[pathlib.Path]], is_world: bool) -> dict[str, dict]:
    """Returns the scores of every run by their names and dtypes."""
    found = {}
    for dtype, directories in runs.items():
        for directory in directories:
            for name, value in _scores(directory, is_world).items():
                found.setdefault(name, {}).setdefault(dtype, []).append(value)
    return found


def _scores(directory: pathlib.Path, is_world: bool) -> dict[str, float]:
    sae = load_sae(directory)
    store = _WORLD.value if is_world else _STORE.value
    evaluation = evaluate(sae, store=store, tokens=_HELD_OUT).to_dict()
    found = {
        "loss": read_json(directory / "result.json")["eval_loss"],
        "fvu": evaluation["reconstruction"]["fvu"],
        "l0": evaluation["sparsity"]["l0"],
        "dead": evaluation["sparsity"]["dead_fraction"],
    }
    if is_world:
        rows = WorldRows(DataConfig(store=store), tokens=_HELD_OUT)
        found["mcc"] = measure_recovery(sae, rows).scalars["mcc"]
    return found


def compare(label: str, name: str, runs: dict[str, list[float]]) -> dict:
    """Prints a row of the table, and returns it."""
    means = {dtype: float(np.mean(runs[dtype])) for dtype in DTYPES}
    spreads = {dtype: float(np.ptp(runs[dtype])) for dtype in DTYPES}
    apart = means["bfloat16"] - means["float32"]
    within = abs(apart) <= max(spreads.values())
    columns = [v for dtype in DTYPES for v in (means[dtype], spreads[dtype])]
    shown = "".join(f"{value:10.4f}" for value in (*columns, apart))
    print(f"{label:24}{name:10}{shown}{'' if within else '  beyond the seeds'}", flush=True)
    return {"score": name, "runs": runs, "difference": apart, "within": within}


if __name__ == "__main__":
    app.run(main)
