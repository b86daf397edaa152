"""A sweep: the runs of a grid, and the directory where workers train them.

SWEEP/sweep.json     the grid: every run's id, config and swept fields; passes; mesh; versions
SWEEP/runs/RUN_ID/   a run's directory, as `sae-jax train` makes it; failed.json if it diverged
SWEEP/dropped/       directories of runs that were dropped, or are done again
SWEEP/leases/        which worker trains which pass (leases.py)
SWEEP/results.csv    a row for each run, in the grid's order
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from sae_jax import config as configs
from sae_jax import paths
from sae_jax.config import Config, MeshConfig
from sae_jax.errors import UserError, some
from sae_jax.json_files import checked, read_json
from sae_jax.lm.live import open_stream
from sae_jax.paths import AnyPath
from sae_jax.sweep import design
from sae_jax.sweep import grid as grids
from sae_jax.sweep.design import Pass
from sae_jax.tables import as_csv
from sae_jax.train import preparation, results, watching
from sae_jax.train.branch import Origin, split
from sae_jax.train.directory import environment

_VOLATILE = ("wall_seconds", "devices")  # differ with who did the work, and how often it was killed
_HOW_TO_CHANGE = (
    "use another --workdir; or --extend to add runs, --drop=RUN to take one out; or, to change "
    "this sweep altogether, end its workers, delete {file} and start again: runs that are finished "
    "stand, whatever grid they are in"
)

# What a sweep without its sweep.json may have.
_OURS = ("dropped", "leases", "runs", "tensorboard", "wandb")


@dataclasses.dataclass(frozen=True)
class _RunEntry:
    """A run's entry in sweep.json."""

    swept: dict[str, Any]
    config: dict[str, Any]
    round: Annotated[int, msgspec.Meta(ge=0)] = 0
    dropped: bool = False


@dataclasses.dataclass(frozen=True)
class _SweepFile:
    """The content of sweep.json."""

    passes: Annotated[int, msgspec.Meta(ge=1)]
    runs: Annotated[dict[str, _RunEntry], msgspec.Meta(min_length=1)]
    mesh: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      id: the run's name, which its config determines.
      config: the resolved config.
      swept: the fields that the grid sets, with their values.
      round: how often the sweep had been extended before the run came in. Runs of one round are
        trained together.
      dropped: whether the run was taken out.
    """

    id: str
    config: Config
    swept: grids.Assignment
    round: int = 0
    dropped: bool = False


def counted(number: int, what: str) -> str:
    """Returns a number with its noun, such as "1 run" and "2 passes"."""
    plural = "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{'' if number == 1 else plural}"


def load(spec: str, overrides: dict[str, str], path: AnyPath | None = None) -> list[Run]:
    """Reads the runs of a sweep file.

    Args:
      spec: "FILE.py" or "FILE.py:ARG"; the file has get_config and get_sweep.
      overrides: values of the base config's fields, as text.
      path: the directory of the sweep. If it was started, its runs tell when a latent is dead where
        the file leaves it open, as `expand` says, so that a larger grid has the same runs.

    Raises UserError for a mistake in any run's config. No device is used.
    """
    grid = configs.call_in_file(
        spec, "get_sweep", "a sweep file has get_sweep(), which returns a grid (sweep/grid.py)"
    )
    if not _is_grid(grid):
        raise UserError(
            f"get_sweep() of {spec} returned {grid!r:.60}, not a grid of one run or more; make it "
            "with sae_jax.sweep.grid"
        )
    base = configs.override(configs.load_file(spec), overrides)
    for field in overrides:
        if field in grids.fields(grid):
            raise UserError(
                f"--config.{field} has no effect: the sweep sets {field} for each run; change it "
                f"in {spec}, or leave the override out"
            )
    there = path is not None and (path / "sweep.json").is_file()
    windows = SweepDirectory(path).windows if there else set()
    return expand(base, grid, windows.pop() if len(windows) == 1 else None)


def _is_grid(value) -> bool:
    if not isinstance(value, list) or not all(isinstance(run, dict) for run in value):
        return False
    return bool(value) and all(isinstance(field, str) for run in value for field in run)


def expand(base: Config, grid: grids.Grid, window: int | None = None) -> list[Run]:
    """Returns the runs of `grid` over the config `base`, each resolved against its data.

    Runs that leave open when a latent is dead all have `window`, or by default that of the smallest
    budget among them. So budgets compare, and can share a trunk.

    Raises UserError, which names the run, for a run that cannot be trained.
    """
    streams, origins = functools.lru_cache(open_stream), functools.lru_cache(Origin.open)
    resolved, windows = [], []
    for number, swept in enumerate(grid, 1):
        try:
            config = grids.apply(base, swept)
            if not config.data.store:
                raise UserError(
                    "no activations given: set data.store in get_config(), or add "
                    "--config.data.store=STORE (make one with: sae-jax harvest)"
                )
            if config.train.init:
                raise UserError(
                    "train.init is for sae-jax train; a sweep's runs begin fresh, or at a "
                    "checkpoint: train.branch_from"
                )
            stream = streams(config.data)
            leaves_open = config.sae.dead_after_tokens is None
            config = preparation.resolve(config, stream)
            preparation.checked_steps(config, stream)
            preparation.check_variances(config, stream)
            if config.train.branch_from:
                if split(config.train.branch_from)[1] is None:
                    raise UserError(
                        f"train.branch_from is {config.train.branch_from}, and a sweep needs a "
                        "step, at which all its runs begin: RUN/checkpoints/STEP"
                    )
                origins(config.train.branch_from).check(config, stream.fingerprint)
        except UserError as error:
            where = f"run {number} of {len(grid)} ({grids.describe(swept)})"
            raise UserError(f"{where}: {error}") from error
        resolved.append((config, leaves_open))
        windows += [config.sae.dead_after_tokens] if leaves_open else []
    runs: dict[str, Run] = {}
    for swept, (config, leaves_open) in zip(grid, resolved, strict=True):
        if leaves_open:
            sae = dataclasses.replace(config.sae, dead_after_tokens=window or min(windows))
            config = dataclasses.replace(config, sae=sae)
        run = Run(results.run_id(config), config, swept)
        if run.id in runs:
            raise UserError(
                f"{grids.describe(runs[run.id].swept)} and {grids.describe(swept)} are the same "
                "run, once the defaults are filled in; leave one out of the grid"
            )
        runs[run.id] = run
    return list(runs.values())


def passes_of(runs: Sequence[Run], passes: int) -> list[Pass]:
    """Groups runs into passes, those of each round apart: what has begun stays as it is.

    `passes` is the number of passes for each data config.
    """
    rounds = sorted({run.round for run in runs})
    configs_of = {number: [r.config for r in runs if r.round == number] for number in rounds}
    return [work for number in rounds for work in design.make_passes(configs_of[number], passes)]


class SweepDirectory:
    """A sweep's directory, and what the files in it say of its runs.

    Attributes:
      path: the directory.
      passes: the number of passes for each reading of the data (`design.make_passes`).
      runs: the runs, in the grid's order, without those that were dropped.
      all_runs: the runs with those.
    """

    def __init__(self, path: AnyPath):
        """Opens the directory of a sweep that was started. Raises UserError if it holds none."""
        self.path = path
        file = path / "sweep.json"
        if not file.is_file():
            raise UserError(f"{path} holds no sweep (no sweep.json); start one with --config")
        values = checked(read_json(file), _SweepFile, file)
        self.passes: int = values.passes
        mesh = configs.from_dict(values.mesh, MeshConfig, f"{file}: mesh.")
        runs = [_from_json(run_id, run, mesh, file) for run_id, run in values.runs.items()]
        self._set(runs)

    def _set(self, runs: Sequence[Run]) -> None:
        self.all_runs = list(runs)
        self._results: dict[str, dict] = {}  # of runs that are done, read once
        self.runs = [run for run in runs if not run.dropped]
        names = grids.names([run.swept for run in runs])
        self._names = {run.id: name for run, name in zip(runs, names, strict=True)}

    @classmethod
    def start(cls, path: AnyPath, runs: list[Run], passes: int | None = None):
        """Makes `path` the directory of a new sweep, or opens it if it holds the same sweep.

        Args:
          path: the directory.
          runs: the sweep's runs.
          passes: the number of passes for each reading of the data. None keeps that of an existing
            sweep, and is 1 for a new one.

        Raises UserError, which shows the difference, where the directory holds another sweep.
        """
        file = path / "sweep.json"
        if not file.exists():
            _make(file, runs, passes or 1)
        there = cls(path)
        there._check_same(runs, passes)
        there.use_hardware(runs)
        return there

    def override(self, overrides: dict[str, str]) -> None:
        """Makes this worker train the runs on other hardware, given as text: {"mesh.data": "4"}.

        Raises UserError for other fields than those of the mesh.
        """
        for field in overrides:
            if not field.startswith("mesh."):
                raise UserError(
                    f"--config.{field} would change the runs of {self.path}; without --config "
                    "only fields of the mesh may change"
                )
        self._set(
            [
                dataclasses.replace(run, config=configs.override(run.config, overrides))
                for run in self.all_runs
            ]
        )

    def name(self, run: Run) -> str:
        """Returns a run's name for people: the fields by which it differs from the others."""
        return self._names[run.id]

    @property
    def windows(self) -> set[int | None]:
        """The different values of sae.dead_after_tokens among all runs."""
        return {run.config.sae.dead_after_tokens for run in self.all_runs}

    def done(self) -> list[Run]:
        """Returns the runs that are done."""
        states = self.states()
        return [run for run in self.runs if states[run.id] == "done"]

    def ended(self) -> set[str]:
        """Returns the ids of the runs that are done, or have failed."""
        return {run_id for run_id, state in self.states().items() if state in ("done", "failed")}

    def work(self) -> list[Pass]:
        """Returns the passes of the sweep."""
        return passes_of(self.runs, self.passes)

    def rewrite(self, runs: Sequence[Run]) -> None:
        """Writes sweep.json anew, with these runs."""
        values = _to_json(runs, self.passes)
        paths.write(self.path / "sweep.json", paths.as_json(values), by=paths.this_process())
        self._set(runs)

    def use_hardware(self, runs: Sequence[Run]) -> None:
        """Takes over the mesh of runs with the same ids."""
        by_id = {run.id: run.config for run in runs}
        self._set(
            [
                dataclasses.replace(run, config=by_id.get(run.id, run.config))
                for run in self.all_runs
            ]
        )

    def run_path(self, run: Run) -> AnyPath:
        """Returns the directory of a run."""
        return paths.inside(self.path / "runs", run.id)

    def state(self, run: Run) -> str:
        """Returns one of `watching.STATES` for a run.

        The leases tell who trains a run that has been started, if anyone.
        """
        return "done" if run.id in self._results else watching.state(self.run_path(run))

    def states(self) -> dict[str, str]:
        """Returns one of `watching.STATES` for every run, by its id.

        All are looked at side by side.
        """
        found = watching.at_once(self.state, self.runs)
        return {run.id: state for run, state in zip(self.runs, found, strict=True)}

    def write_results(self) -> AnyPath:
        """Writes results.csv and returns its path.

        It has a row for each run, in the grid's order: its name, its state, what the grid sets, and
        the columns of result.json. Of a run without a result it has what the config says. Columns
        that depend on the workers are left out, so that the file is the same, byte for byte,
        whoever did the work.
        """
        states = self.states()
        watching.at_once(self._result, [run for run in self.runs if states[run.id] == "done"])
        rows = [self._row(run, states[run.id]) for run in self.runs]
        swept = grids.fields([run.swept for run in self.runs])
        file = self.path / "results.csv"
        text = as_csv(rows, ["run_id", "name", "status", *swept])
        paths.write(file, text, by=paths.this_process())
        return file

    def missed_targets(self, states: dict[str, str]) -> list[tuple[Run, str]]:
        """Returns the runs that ended away from their target L0, with a sentence about each.

        `states` are those of `states()`.
        """
        done = [run for run in self.runs if states[run.id] == "done"]
        found = watching.at_once(self._result, done)
        sentences = [(run, results.missed_target(r)) for run, r in zip(done, found, strict=True)]
        return [(run, sentence) for run, sentence in sentences if sentence]

    def _row(self, run: Run, state: str) -> dict:
        """Returns the row of a run in results.csv."""
        row = {"run_id": run.id, "name": self.name(run), "status": state, **run.swept}
        row |= results.planned(run.config)
        if state == "done":
            row |= self._result(run) | {"run_id": run.id}
        row["warnings"] = "; ".join(row.get("warnings", ()))
        return {name: value for name, value in row.items() if name not in _VOLATILE}

    def _result(self, run: Run) -> dict:
        """Returns the result of a run that is done, which does not change any more."""
        if run.id not in self._results:
            self._results[run.id] = read_json(self.run_path(run) / "result.json")
        return self._results[run.id]

    def _check_same(self, runs: list[Run], passes: int | None) -> None:
        """Raises UserError where this sweep does not have these runs, or these passes."""
        how = _HOW_TO_CHANGE.format(file=self.path / "sweep.json")
        there, here = {run.id for run in self.all_runs}, {run.id for run in runs}
        differences = _differences(
            [run for run in self.runs if run.id not in here],
            [run for run in runs if run.id not in there],
        )
        if differences:
            raise UserError(
                f"{self.path} holds a sweep of another grid ({'; '.join(differences)}); {how}"
            )
        self.check_passes(passes)

    def check_passes(self, passes: int | None) -> None:
        """Raises UserError where this sweep is cut into another number of passes."""
        how = _HOW_TO_CHANGE.format(file=self.path / "sweep.json")
        if passes not in (None, self.passes):
            raise UserError(
                f"{self.path} holds a sweep cut into --passes={self.passes}, not {passes}; leave "
                f"--passes out, or {how}"
            )


def _differences(gone: list[Run], new: list[Run]) -> list[str]:
    """Says in words how two grids differ: in fields of runs that they set alike, or else in the
    runs themselves.
    """
    for before, run in itertools.product(gone, new):
        if before.swept == run.swept:
            lines = configs.difference(*(configs.identity(r.config) for r in (before, run)))
            return [f"{grids.describe(run.swept)}: {line}" for line in lines]
    words = []
    for what, runs in (("gone", gone), ("new", new)):
        if runs:
            words.append(f"{what}: {some([grids.describe(run.swept) for run in runs], 3)}")
    return words


def _make(file: AnyPath, runs: list[Run], passes: int) -> None:
    """Writes sweep.json whole, unless another worker was faster."""
    path = file.parent
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir {path} is a file; give a new or empty directory")
    strange = _strangers(path) if path.exists() else []
    if file.exists():  # another worker has just made it
        return
    if strange:
        raise UserError(
            f"{path} is not empty and holds no sweep (no sweep.json; {some(strange, 3)}); give "
            "--workdir a new or empty directory"
        )
    path.mkdir(parents=True, exist_ok=True)
    paths.create(file, paths.as_json(_to_json(runs, passes)), by=paths.this_process())


def _to_json(runs: Sequence[Run], passes: int) -> dict:
    """Returns the content of sweep.json."""
    entries = {}
    for run in runs:
        entry = {"swept": run.swept, "config": configs.without_hardware(run.config)}
        entry |= {"round": run.round} if run.round else {}
        entries[run.id] = entry | ({"dropped": True} if run.dropped else {})
    return {
        "passes": passes,
        "runs": entries,
        "mesh": dataclasses.asdict(runs[0].config.mesh),
        "environment": environment(),
    }


def _strangers(path: AnyPath) -> list[str]:
    """Returns the names in a directory that a sweep would not have made."""
    names = {entry.name for entry in path.iterdir()}
    results_are_ours = "runs" in names
    return sorted(
        name
        for name in names - set(_OURS)
        if not name.startswith("sweep.json.")  # another worker is about to make it
        and not (results_are_ours and name.startswith("results.csv"))
    )


def _from_json(run_id: str, entry: _RunEntry, mesh: MeshConfig, file: AnyPath) -> Run:
    """Returns a run from its entry in `file`, sweep.json."""
    try:
        paths.inside(file.parent / "runs", run_id)
        swept = {field: configs.typed_field(field, v) for field, v in entry.swept.items()}
        config = configs.from_dict(entry.config, folder=file.parent)
        config = dataclasses.replace(config, mesh=mesh)
        return Run(run_id, config, swept, entry.round, entry.dropped)
    except UserError as error:
        raise UserError(f"{file}, run {run_id!r}: {error}") from error
