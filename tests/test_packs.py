"""Runs trained together are the runs trained alone."""

import collections
import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from training import (
    BATCH,
    WIDTH,
    assert_same_arrays,
    make_config,
    make_store,
    metrics,
    saved_arrays,
    sparse_rows,
)

from sae_jax import config as configs
from sae_jax.activations import Store, open_stream, write_store
from sae_jax.errors import UserError
from sae_jax.ops.sharding import as_for_accelerators
from sae_jax.sae import ARCHITECTURES
from sae_jax.sweep import design, grid
from sae_jax.sweep.design import VARIED, make_passes
from sae_jax.sweep.pass_trainer import train_pass
from sae_jax.train import loop, pack, preparation
from sae_jax.train.loop import TrainingData
from sae_jax.train.mesh import BatchPlacement, make_mesh
from sae_jax.train.pack import PackTrainer, get_field, set_fields
from sae_jax.train.progress import Progress
from sae_jax.train.results import flops, run_id
from sae_jax.train.run import train_run

STEPS = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


def resolved(runs):
    stream = open_stream(runs[0].data)
    return [preparation.resolve(run, stream) for run in runs]


def base(store, architecture="relu", steps=STEPS, **sections):
    optimizer = {"schedule": "warmup_stable_decay", "warmup_fraction": 0.1, "learning_rate": 3e-3}
    sections = {
        "optimizer": optimizer,
        "train": {"log_every": 5, "checkpoint_every": 20},
    } | sections
    return make_config(store, architecture, steps, **sections)


# ------------------------------------------------------------------------ the program

AXES = ("run", "data", "model", "zero")
MESHES = [(2, 1, 2), (1, 1, 1), (1, 2, 1), (2, 2, 1, True)]
SLOW = {
    ("relu", True, MESHES[0]),
    ("topk", False, MESHES[3]),
}


def marks_of(case) -> tuple:
    return pytest.mark.slow if case in SLOW else pytest.mark.long


@pytest.mark.parametrize(
    "architecture,batched,mesh",
    [
        pytest.param(*case, marks=marks_of(case))
        for case in itertools.product(ARCHITECTURES, (False, True), MESHES)
    ],
    ids=str,
)
def test_a_step_of_a_pack_is_that_of_each_run(store, monkeypatch, architecture, batched, mesh):
    """Three runs that differ in all that may differ; half of the latents of one begin as dead ones,
    so that AuxK is at work in it alone. Batched: as on an accelerator."""
    monkeypatch.setattr(pack, "on_cpu", lambda: not batched)
    picks = ARCHITECTURES[architecture].Config.k is not None
    one = base(store, architecture, mesh=dict(zip(AXES, mesh, strict=False)))
    runs = resolved(
        [
            set_fields(
                one,
                {
                    "optimizer.learning_rate": 1e-3 * (i + 1),
                    "optimizer.b1": (0.9, 0.8, 0.9)[i],
                    "train.seed": i,
                    "sae.k" if picks else "sae.sparsity_coefficient": i + 2 if picks else 5.0 * i,
                },
            )
            for i in range(3)
        ]
    )
    stream = open_stream(one.data)
    scale, target_scale, variance = preparation.normalisation(runs[0], stream)
    b_dec = np.full(stream.width, 0.1, np.float32)
    mesh = make_mesh(one)
    place = BatchPlacement(mesh, BATCH).place
    batches = [place(rows) for _, rows in zip(range(12), stream.batches(prefetch=0), strict=False)]
    with jax.set_mesh(mesh):
        trainer = PackTrainer(runs, STEPS, variance)
        states = trainer.init(b_dec, scale, target_scale)
        alone = [t.init(b_dec, scale, target_scale) for t in trainer.trainers]
        idle = alone[1].idle_tokens + 10**6 * (np.arange(128) % 2)
        alone[1] = dataclasses.replace(alone[1], idle_tokens=idle)
        states = trainer.put_run(states, 1, jax.tree.map(jnp.copy, alone[1]))
        for rows in batches:
            states, got = trainer.step(states, rows)
            for i, t in enumerate(trainer.trainers):
                alone[i], want = t.step(alone[i], rows)
                if rows is batches[0]:
                    assert want["dead_fraction"] == (0, 0.5, 0)[i]
                for name, value in want.items():
                    np.testing.assert_allclose(got[name][i], value, rtol=2e-4, err_msg=name)
        means = trainer.evaluate(states, batches[0])
        for name, value in trainer.trainers[2].evaluate(alone[2], batches[0]).items():
            np.testing.assert_allclose(means[name][2], value, rtol=1e-4, err_msg=name)
        again = trainer.blank()
        for i in range(3):
            state = trainer.get_run(states, i)
            again = trainer.put_run(again, i, state)
            assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, alone[i])
            for name, value in alone[i].parameters.items():
                np.testing.assert_allclose(state.parameters[name], value, rtol=1e-3, atol=2e-5)
        for i in range(3):
            got, want = (trainer.get_run(s, i) for s in (again, states))
            jax.tree.map(np.testing.assert_array_equal, got, want)


def control_flow(jaxpr):
    """Counts the conditions of a program and its parts, and the loops that end by a single flag."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        inner = list(core.jaxprs_in_params(equation.params))
        if equation.primitive.name == "cond":
            found["cond"] += 1
        elif equation.primitive.name == "while":
            ends = equation.params["cond_jaxpr"].jaxpr
            found["while"] += all(e.primitive.name != "reduce_or" for e in ends.eqns)
        for part in inner:
            found += control_flow(part)
    return found


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_batch_of_runs_takes_one_branch_of_each_condition(store, monkeypatch, architecture):
    """Under `jax.vmap` a condition of a single run would be computed both ways."""
    monkeypatch.setattr(pack, "on_cpu", lambda: False)
    one = base(store, architecture, sae={"aux_k": 4})
    runs = resolved([set_fields(one, {"train.seed": i}) for i in range(2)])
    mesh = make_mesh(one)
    rows = jax.ShapeDtypeStruct((BATCH, WIDTH), np.float32, sharding=NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh), as_for_accelerators():
        trainer = PackTrainer(runs, STEPS, 1.0)
        (state,) = trainer.abstract()
        together = jax.make_jaxpr(lambda *a: trainer.step_round(0, *a))(state, rows)
        alone = trainer.trainers[0]
        single = jax.make_jaxpr(alone.update)(alone.abstract(), rows)
    found = control_flow(single.jaxpr)
    assert found["cond"] and found["while"]
    assert control_flow(together.jaxpr) == found


@pytest.mark.parametrize(
    "mib,d_sae,rounds", [(128, 512, 1), (128, 8192, 4), (64, 8192, 8), (128, 2**16, 8)]
)
def test_a_tpu_computes_as_many_runs_at_once_as_it_keeps_to_itself(
    store, monkeypatch, mib, d_sae, rounds
):
    monkeypatch.setattr(pack, "on_cpu", lambda: False)
    monkeypatch.setattr(pack, "on_tpu", lambda: True)
    monkeypatch.setattr(pack.tpu_memory, "capacity", lambda: mib * 2**20)
    one = base(store, sae={"d_sae": d_sae}, data={"batch_size": 1024})
    runs = resolved([set_fields(one, {"train.seed": i}) for i in range(8)])
    with jax.set_mesh(make_mesh(one)):
        assert len(PackTrainer(runs, STEPS, 1.0).abstract()) == rounds


# ------------------------------------------------------------------- what goes together


def grid_of(store, assignments, **sections):
    return resolved([grid.apply(base(store, **sections), a) for a in assignments])


BUDGETS = dict(batch_size=BATCH, warmup_tokens=4 * BATCH, sparsity_warmup_tokens=2 * BATCH)


@pytest.fixture
def runs(store):
    """Two sizes x three budgets x two rates, and one run that has no longer twin."""
    budgets = grid.budgets([n * BATCH for n in (20, 30, 60)], **BUDGETS)
    rates = grid.sweep("optimizer.learning_rate", [1e-3, 2e-3])
    sizes = grid.sweep("sae.d_sae", [32, 64])
    odd = grid.product([budgets[1]], grid.sweep("optimizer.learning_rate", [5e-3]), [sizes[0]])
    return grid_of(store, grid.chain(grid.product(sizes, budgets, rates), odd))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_passes_hold_every_run_once(runs, count):
    passes = make_passes(runs, count)
    assert len(passes) == (count if count < 5 else 5)  # no more than rows of runs
    assert len({p.name for p in passes}) == len(passes)
    ids = [run_id(run) for p in passes for run in p.runs]
    assert sorted(ids) == sorted(map(run_id, runs))
    assert passes == make_passes(runs, count)
    for work in passes:
        for place, packed in enumerate(work.packs):
            same = [configs.identity(set_fields(r, dict.fromkeys(VARIED))) for r in packed.runs]
            assert all(one == same[0] for one in same)
            if packed.trunk is None:
                assert packed.start == 0
                continue
            trunk = work.packs[packed.trunk]
            assert packed.trunk < place and trunk.trunk is None and trunk.steps > packed.steps
            assert packed.start == packed.steps - round(0.2 * packed.steps) > 4
            for run, parent in zip(packed.runs, packed.parents, strict=True):
                twin = trunk.runs[parent]
                assert all(get_field(run, field) == get_field(twin, field) for field in VARIED)
                assert run.sae.d_sae == twin.sae.d_sae
    if count == 1:
        branches = [packed for packed in passes[0].packs if packed.trunk is not None]
        assert sum(len(packed.runs) for packed in branches) == 8
        assert passes[0].flops < 0.75 * sum(flops(run, run.train.tokens)["flops"] for run in runs)
    costs = [work.flops for work in passes]
    assert count != 2 or max(costs) < 1.3 * min(costs)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer.schedule": "cosine"},
        {"sae.target_l0": 4.0},
        {"sae.p_end": 0.5},
        {"optimizer.warmup_fraction": 0.1},
        {"sae.sparsity_warmup_fraction": 0.3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_depends_on_the_budget_shares_no_trunk(store, change):
    budgets = grid.budgets([20 * BATCH, 60 * BATCH], **BUDGETS)
    runs = grid_of(store, [run | change for run in budgets])
    assert [packed.trunk for packed in make_passes(runs)[0].packs] == [None, None]


class _Stepping:
    """A pack whose steps compute nothing."""

    open_recorders = recorders = (None, None)

    def __init__(self, steps: int, trunk=None, start: int = 0, step: int = 0):
        self.steps, self.trunk, self.start = steps, trunk, start
        self.step, self._saved = 0, step

    def newest_common_step(self) -> int | None:
        return self._saved or None

    def begin(self, most=None) -> None:
        self.step = self._saved

    def branch_from_trunk(self) -> None:
        self.step, self.waiting_for_trunk = self.start, False

    def advance(self, rows) -> None:
        self.step += 1

    def maybe_save(self, stop) -> None: ...
    def end(self) -> None: ...


@pytest.mark.parametrize("saved,last,shown", [(0, 10, (0, 10)), (6, 12, (6, 12))])
def test_the_log_tells_where_a_pass_is_as_its_status_does(monkeypatch, saved, last, shown):
    """By the steps of its longest run, of which a branch that has not begun has done none."""
    bars = []

    class Bar(loop.TrainingBar):
        def __init__(self, name, done, total):
            bars.append(self)
            self.first, self.last = (done, total), done
            super().__init__(name, done, total)

        def advance(self, steps, line=None):
            self.last += steps

    monkeypatch.setattr(loop, "TrainingBar", Bar)
    trunk = _Stepping(last, step=saved)
    data = SimpleNamespace(batches=lambda first: iter(range(last - first)), store="here")
    branches = [_Stepping(9, trunk, 7), _Stepping(8, trunk, 6)]
    loop.train_packs([trunk, *branches], data, "pass-x", Progress())
    assert [(bar.first, bar.last) for bar in bars] == [(shown, last)]
    assert [pack.step for pack in (trunk, *branches)] == [last, 9, 8]


def test_other_data_is_another_pass(store):
    runs = grid_of(store, grid.sweep("data.seed", [0, 1]))
    assert [len(work.runs) for work in make_passes(runs)] == [1, 1]


@pytest.fixture(scope="module")
def two_sites(tmp_path_factory):
    path = tmp_path_factory.mktemp("sites") / "store"
    a, b = sparse_rows(8192), sparse_rows(8192, seed=1, width=24)
    write_store(path, [{"a": a, "b": b}], context_length=8)
    return str(path)


SITES = grid.sweep("data.site", ["a", "b"])
TRANSCODER = [{"data.site": "a", "data.target_site": "b", "sae.kind": "transcoder"}]
CROSSCODER = [{"data.site": "b,a", "sae.kind": "crosscoder"}]


def runs_of_sites(store, assignments, **sections):
    runs = [grid.apply(base(store, "topk", **sections), run) for run in assignments]
    return [preparation.resolve(run, open_stream(run.data)) for run in runs]


def test_sites_share_a_pass_up_to_a_windows_memory(two_sites, monkeypatch):
    kinds = grid.product(grid.chain(SITES, TRANSCODER), grid.sweep("sae.k", [2, 4]))
    runs = runs_of_sites(two_sites, kinds)
    (work,) = make_passes(runs)
    assert (sorted(work.data.site), work.data.target_site) == ([*",ab"], "")
    assert [len(packed.runs) for packed in work.packs] == [2, 2, 2]
    monkeypatch.setattr(design, "_WINDOW_BYTES", 4 * 1024 * (WIDTH + 24))  # a and b, then a with b
    assert [len(p.packs) for p in make_passes(runs)] == [2, 1]
    worlds = [dataclasses.replace(r.data, store="world:superposition") for r in runs]
    of_worlds = [dataclasses.replace(r, data=d) for r, d in zip(runs, worlds, strict=True)]
    assert len(make_passes(of_worlds)) == 3


@pytest.mark.parametrize("assignment", [*SITES, *TRANSCODER, *CROSSCODER], ids=str)
def test_what_is_taken_from_a_batch_of_all_sites_is_a_batch_of_ones_own(two_sites, assignment):
    (run,) = runs_of_sites(two_sites, [assignment], mesh={"data": 4})
    own = TrainingData.open(run, open_stream)
    data = dataclasses.replace(run.data, site="a,b", target_site="")
    whole = TrainingData(run, open_stream(data), None, make_mesh(run))
    own.take_from(whole)
    with jax.set_mesh(own.mesh):
        for batch, want, _ in zip(whole.batches(3), own.batches(3), range(5), strict=False):
            got = own.own(batch)
            assert jax.typeof(got) == jax.typeof(want) and got.sharding == want.sharding
            np.testing.assert_array_equal(*map(np.asarray, (got, want)))


# ----------------------------------------------------------------------------- training


def results(folder):
    """By run: the result without what is about the hardware, and the logged lines without speed."""
    out = {}
    for path in folder.glob("*/result.json"):
        result = json.loads(path.read_text())
        lines = [{k: v for k, v in m.items() if "second" not in k} for m in metrics(path.parent)]
        out[path.parent.name] = {k: v for k, v in result.items() if k != "wall_seconds"}, lines
    return out


def assert_same_runs(got, want, rel):
    assert got.keys() == want.keys()
    for run, (result, lines) in want.items():
        assert len(got[run][1]) == len(lines)
        for a, b in zip((got[run][0], *got[run][1]), (result, *lines), strict=True):
            assert a.keys() == b.keys()
            for name, value in b.items():
                if isinstance(value, float):
                    assert a[name] == pytest.approx(value, rel=rel, abs=rel), name
                else:
                    assert a[name] == value, name


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """The passes of a sweep with branches, and the folder that they were trained in."""
    budgets = grid.budgets([16 * BATCH, 44 * BATCH], **BUDGETS)
    rates = grid.sweep("optimizer.learning_rate", [1e-3, 3e-3])
    sections = {"sae": {"resample_every_tokens": 25 * BATCH, "resample_times": 1}}
    runs = grid_of(store, grid.product(budgets, rates), **sections)
    folder = tmp_path_factory.mktemp("passes")
    (work,) = make_passes(runs)
    train_pass(work, folder)
    return work, folder


@pytest.mark.slow
def test_each_run_is_as_if_it_had_been_alone(trained, tmp_path):
    work, folder = trained
    for run in work.runs:
        train_run(run, tmp_path / run_id(run))
    assert_same_runs(results(folder), results(tmp_path), rel=1e-4)
    for run in work.runs:
        name = run_id(run)
        got, want = saved_arrays(folder / name), saved_arrays(tmp_path / name)
        assert got.keys() == want.keys()
        for array, value in want.items():
            np.testing.assert_allclose(got[array], value, rtol=1e-3, atol=1e-5, err_msg=array)
        assert train_run(run, folder / name).result["run_id"] == name, "train takes it as its own"


@pytest.mark.slow
def test_sites_in_one_pass_are_read_once_and_train_as_in_passes_of_their_own(
    two_sites, tmp_path, monkeypatch
):
    """Two sites of two widths, whose dead latents are resampled once."""
    reads = []
    read_chunks = Store.read_chunks

    def counting(store, sites, chunks, outs):
        reads.extend((site, int(chunk)) for site in sites for chunk in chunks)
        read_chunks(store, sites, chunks, outs)

    monkeypatch.setattr(Store, "read_chunks", counting)
    fields = {"resample_every_tokens": 25 * BATCH, "resample_times": 1, "b_dec_init": "mean"}
    runs = runs_of_sites(two_sites, SITES, sae=fields)
    for run in runs:
        (work,) = make_passes([run])
        assert work.data == run.data
        train_pass(work, tmp_path / "alone")
    alone = collections.Counter(reads)
    reads.clear()
    (work,) = make_passes(runs)
    train_pass(work, tmp_path / "together")
    assert collections.Counter(reads) == alone
    assert_same_runs(results(tmp_path / "together"), results(tmp_path / "alone"), rel=0)
    for run in runs:
        folders = (tmp_path / how / run_id(run) for how in ("together", "alone"))
        assert_same_arrays(*map(saved_arrays, folders))


class CutError(Exception):
    pass


@pytest.mark.parametrize("cut", range(1, 8))
@pytest.mark.slow
def test_a_pass_that_was_cut_goes_on(trained, tmp_path, cut):
    """Cut before each of its writes in turn, twice; what had ended is not trained again."""
    work, folder = trained
    ended = []
    for left in (cut, 2):

        def check():
            nonlocal left
            left -= 1
            if left == 0:
                raise CutError

        with pytest.raises(CutError):
            train_pass(work, tmp_path, check, lambda: ended.append(1))
    train_pass(work, tmp_path, run_ended=lambda: ended.append(1))
    assert len(ended) == len(work.runs)
    assert_same_runs(results(tmp_path), results(folder), rel=0)


@pytest.mark.slow
def test_a_run_that_diverges_is_given_up_and_the_others_go_on(store, tmp_path):
    budgets = grid.budgets([16 * BATCH, 40 * BATCH], **BUDGETS)
    runs = grid_of(
        store, grid.product(budgets, grid.sweep("optimizer.learning_rate", [1e-3, 1e25, 2e-3]))
    )
    healthy = [run for run in runs if run.optimizer.learning_rate < 1]
    (work,), (others,) = make_passes(runs), make_passes(healthy)
    ended = []
    train_pass(work, tmp_path / "all", run_ended=lambda: ended.append(1))
    train_pass(others, tmp_path / "healthy")
    assert len(ended) == len(runs)
    assert_same_runs(results(tmp_path / "all"), results(tmp_path / "healthy"), rel=1e-6)
    for run in runs:
        failure = tmp_path / "all" / run_id(run) / "failed.json"
        assert failure.exists() == (run.optimizer.learning_rate > 1)
        if failure.exists():
            assert "NaN or infinite at step" in json.loads(failure.read_text())["reason"]
    train_pass(work, tmp_path / "all", run_ended=lambda: ended.append(1))
    assert len(ended) == len(runs), "it is not tried again"


def test_mistakes_come_before_anything_is_made(store, tmp_path):
    run = resolved([base(store)])[0]
    long = dataclasses.replace(run, train=dataclasses.replace(run.train, tokens=10**9))
    with pytest.raises(UserError, match="is more than the"):
        train_pass(make_passes([run, long])[0], tmp_path / "runs")
    wide = dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, model=3))
    with pytest.raises(UserError, match="not divisible by the 3 devices"):
        train_pass(make_passes([wide])[0], tmp_path / "runs")
    with pytest.raises(UserError, match="mesh.run shards the runs of a sweep"):
        train_run(dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, run=2)), tmp_path)
    assert not list(tmp_path.iterdir())
