"""How much of a synthetic world each architecture finds, beside the peers' own trainers.

    python experiments/benchmarks/worlds_beside_peers.py --out=worlds.json
    python experiments/benchmarks/worlds_beside_peers.py --architectures=topk,gated --seeds=11,12

The peers need: pip install "sae-jax[peers]". Leave them out with --packages=sae-jax.

Everyone trains on the same rows in the same order, with the same dictionary size, batch and
number of steps. Each contestant tries as many settings on a tuning seed: every sparsity at the
first learning rate, then the other rates at the best sparsity. The setting with the largest sum
of MMCS and F1 then trains on fresh seeds, and the table has its means over them, measured on rows
that nobody trained on.
"""

import dataclasses
import functools
import itertools
import pathlib
import tempfile

import numpy as np
from absl import app, flags, logging
from world_peers import OFFERED, Recipe, train_peer

from sae_jax.activations import open_stream, write_store
from sae_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from sae_jax.evaluate.recovery import Recovery, RecoveryMeter, measure_recovery
from sae_jax.evaluate.worlds import WorldRows
from sae_jax.interop import load
from sae_jax.json_files import read_json
from sae_jax.paths import save_json
from sae_jax.sae import SAEConfig
from sae_jax.sae.registry import by_name
from sae_jax.train.run import train_run

OURS = "sae-jax"
LEARNING_RATES = (1e-2, 3e-3)
ARCHITECTURES = ("relu", "relu_l1_unit", "topk", "batchtopk", "jumprelu", "gated", "matryoshka")
# What sparsity is told by: k or the target L0, of about what the world's rows have; where a package
# has neither for an architecture, the coefficient of the L1 penalty for rows with E||x||^2 = d.
COUNTS, COEFFICIENTS = (4, 5, 6), (1.0, 2.0, 3.0)
BY_COEFFICIENT = ("relu", "relu_l1_unit", "gated")  # in the peers
SCALARS = ("mmcs", "f1", "precision", "recall", "uniqueness", "shrinkage", "dead_fraction", "l0")
_EVAL_ROWS = 16_384
_TUNING_SEED = 1000

flags.DEFINE_string("world", "world:superposition,width=64,features=256", "The world's spec.")
flags.DEFINE_list("architectures", list(ARCHITECTURES), "Rows of the table.")
flags.DEFINE_list("packages", [OURS, *OFFERED], "Columns of the table.")
flags.DEFINE_list("seeds", ["1", "2", "3"], "Of data and initialisation; the tuning's is another.")
flags.DEFINE_integer("d_sae", 256, "Dictionary size.")
flags.DEFINE_integer("batch", 256, "Rows a step.")
flags.DEFINE_integer("steps", 2500, "Training steps.")
flags.DEFINE_string("out", "worlds.json", "Results; a run that is in there is not made again.")


@dataclasses.dataclass(frozen=True)
class World:
    """The data of one seed: a store of its rows, which all train on in order, and held-out rows."""

    spec: str
    seed: int
    store: str
    held_out: WorldRows
    scale: float  # makes E||x||^2 = d

    @classmethod
    def make(cls, spec: str, seed: int, batch: int, steps: int, folder: pathlib.Path) -> "World":
        data = DataConfig(store=spec, seed=seed, batch_size=batch)
        stream = open_stream(data)
        store = folder / f"rows-{seed}"
        write_store(store, (stream.read(step) for step in range(steps)))
        scale = (stream.width / stream.site_mean_squared_norms[0]) ** 0.5
        held_out = WorldRows(data, tokens=_EVAL_ROWS)
        return cls(spec, seed, str(store), held_out, scale)

    def data(self, batch: int) -> DataConfig:
        return DataConfig(store=self.store, batch_size=batch, seed=self.seed, holdout_fraction=0.0)


def run_ours(recipe: Recipe, world: World, workdir: pathlib.Path) -> Recovery:
    config = Config(
        sae=our_fields(recipe),
        data=world.data(recipe.batch),
        optimizer=OptimizerConfig(
            learning_rate=recipe.learning_rate, warmup_fraction=0.05, decay_fraction=0.2
        ),
        train=TrainConfig(
            tokens=recipe.steps * recipe.batch, seed=recipe.seed, checkpoint_every=recipe.steps
        ),
        mesh=MeshConfig(data=1, model=1),
    )
    train_run(config, workdir)
    return measure_recovery(load(workdir), world.held_out)


def our_fields(recipe: Recipe) -> SAEConfig:
    """What we advise where rows are few: begin dense (k falls from 4k, the sparsity coefficient is
    driven from a low one to the target L0), and AuxK. Its weight is 1/32 in Gao et al. of errors
    that are each divided by their own variance: here 1/32 / FVU."""
    if recipe.architecture in ("topk", "batchtopk", "matryoshka"):
        k = int(recipe.sparsity)
        sparsity = {"k": k, "k_start": 4 * k, "k_anneal_fraction": 0.6}
    else:
        sparsity = {"target_l0": recipe.sparsity, "sparsity_coefficient": 0.5}
    return by_name(recipe.architecture).Config(
        d_sae=recipe.d_sae,
        dead_after_tokens=recipe.dead_steps * recipe.batch,
        aux_coefficient=0.25,
        **sparsity,
    )


def run_peer(package: str, recipe: Recipe, world: World) -> Recovery:
    rows = itertools.islice(open_stream(world.data(recipe.batch)).batches(), recipe.steps)
    found = train_peer(package, recipe, rows, world.scale)
    features = world.held_out.stream.features
    meter = RecoveryMeter(features, found.decoder)
    norms = np.linalg.norm(found.decoder, axis=1)
    for ids in world.held_out.ids(4096):
        latents = found.encode(world.held_out.stream.read_rows(ids)) * norms
        meter.add(world.held_out.world.activations(ids), latents)
    return meter.finish()


class Results:
    """The scalars of every run by its name, in a JSON file."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._runs = read_json(path, default={})

    def get(self, name: str, run) -> dict[str, float]:
        """What `run()` gives, or gave."""
        if name not in self._runs:
            recovery = run()
            l0 = float(recovery.latents["density"].sum())
            self._runs[name] = recovery.scalars | {"l0": l0}
            save_json(self._runs, self._path)
            shown = " ".join(f"{key} {self._runs[name][key]:.3f}" for key in SCALARS)
            logging.info("%s: %s", name, shown)
        return self._runs[name]


def contest(values: flags.FlagValues, results: Results, folder: pathlib.Path) -> dict:
    """{(architecture, package): (best setting, its scalars on each seed)}."""

    @functools.cache
    def world(seed: int) -> World:
        return World.make(values.world, seed, values.batch, values.steps, folder)

    def scalars(package: str, architecture: str, setting, seed: int) -> dict[str, float]:
        rate, sparsity = setting
        name = f"{values.world} {architecture} {package} lr={rate} sparsity={sparsity} seed={seed}"

        def run() -> Recovery:
            recipe = Recipe(
                architecture=architecture,
                d_in=world(seed).held_out.stream.width,
                d_sae=values.d_sae,
                batch=values.batch,
                steps=values.steps,
                learning_rate=rate,
                sparsity=sparsity,
                dead_steps=max(1, values.steps // 100),
                seed=seed,
            )
            if package != OURS:
                return run_peer(package, recipe, world(seed))
            with tempfile.TemporaryDirectory() as workdir:
                return run_ours(recipe, world(seed), pathlib.Path(workdir) / "run")

        return results.get(f"{name} d_sae={values.d_sae} {values.batch}x{values.steps}", run)

    found = {}
    for architecture, package in itertools.product(values.architectures, values.packages):
        if package != OURS and architecture not in OFFERED[package]:
            continue

        def tuned(settings, package=package, architecture=architecture):
            runs = {s: scalars(package, architecture, s, _TUNING_SEED) for s in settings}
            return max(runs, key=lambda setting: runs[setting]["mmcs"] + runs[setting]["f1"])

        by_count = package == OURS or architecture not in BY_COEFFICIENT
        best = tuned([(LEARNING_RATES[0], s) for s in (COUNTS if by_count else COEFFICIENTS)])
        best = tuned([(rate, best[1]) for rate in LEARNING_RATES])
        seeds = [scalars(package, architecture, best, int(seed)) for seed in values.seeds]
        found[architecture, package] = (best, seeds)
    return found


def print_table(found: dict) -> None:
    print(f"{'':13}{'':21}{'lr':>7}{'sparsity':>9}{'MMCS':>15}{'F1':>15}{'L0':>6}{'dead':>6}")
    for (architecture, package), ((rate, sparsity), seeds) in found.items():
        means = {name: np.mean([s[name] for s in seeds]) for name in SCALARS}
        spread = {name: np.std([s[name] for s in seeds]) for name in SCALARS}
        both = "".join(f"{means[n]:>9.3f} ±{spread[n]:.3f}" for n in ("mmcs", "f1"))
        print(
            f"{architecture:13}{package:21}{rate:>7}{sparsity:>9}{both}{means['l0']:>6.2f}"
            f"{means['dead_fraction']:>6.2f}"
        )


def main(_) -> None:
    values = flags.FLAGS
    logging.get_absl_handler().addFilter(lambda record: record.pathname == __file__)
    logging.set_verbosity(logging.INFO)
    results = Results(pathlib.Path(values.out))
    with tempfile.TemporaryDirectory() as folder:
        print_table(contest(values, results, pathlib.Path(folder)))


if __name__ == "__main__":
    app.run(main)
