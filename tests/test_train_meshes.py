"""One run is the same run on every mesh."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from training import BATCH, assert_same_arrays, make_config, make_store, metrics, saved_arrays

from sae_jax import sae as saes
from sae_jax.activations import open_stream
from sae_jax.ops.sharding import BATCH as BATCH_SPEC
from sae_jax.train import preparation
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.mesh import BatchPlacement, make_mesh
from sae_jax.train.preemption import PreemptedError, Preemption
from sae_jax.train.run import train_run
from sae_jax.train.step import Trainer

MESHES = [(1, 1), (4, 1), (1, 4), (2, 2), (2, 2, "zero")]
# test_sae.py has all architectures, for one step.
TRAINED = ("topk", pytest.param("relu", marks=pytest.mark.slow))


def on(mesh, **kwargs):
    fields = {"data": mesh[0], "model": mesh[1], "zero": mesh[2:] == ("zero",)}
    return make_config(**kwargs, mesh=fields)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory):
    """(architecture, mesh) -> (directory, result) of 50 steps."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(architecture, mesh):
        path = folder / f"{architecture}-{'x'.join(map(str, mesh))}"
        return path, train_run(on(mesh, store=store, architecture=architecture), path).result

    return run


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TRAINED)
@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_losses_do_not_depend_on_the_mesh(runs, architecture, mesh):
    (path, result), (path_1, result_1) = runs(architecture, mesh), runs(architecture, (1, 1))
    got, want = metrics(path), metrics(path_1)
    assert [line["step"] for line in got] == list(range(1, 51))
    for name in ("loss", "mse", "fvu", "l1", "grad_norm", "lr", "sparsity_coefficient"):
        np.testing.assert_allclose(
            [line[name] for line in got], [line[name] for line in want], rtol=1e-5, err_msg=name
        )
    assert [line["dead_fraction"] for line in got] == [line["dead_fraction"] for line in want]
    if architecture != "relu":
        assert want[20]["dead_fraction"] > 0, "no latent is dead, so AuxK is not tried"
    assert result["run_id"] == result_1["run_id"]
    for name in ("eval_loss", "eval_fvu", "eval_l0"):
        assert result[name] == pytest.approx(result_1[name], rel=1e-5)


@pytest.mark.parametrize("source", MESHES, ids=str)
@pytest.mark.parametrize("target", MESHES, ids=str)
@pytest.mark.slow
def test_checkpoint_restores_on_every_mesh(runs, store, source, target):
    path, _ = runs("topk", source)
    config = on(target, store=store)
    config = preparation.resolve(config, open_stream(config.data))
    with jax.set_mesh(make_mesh(config)):
        checkpoints = Checkpoints(path, keep=2)
        like = Trainer(config, 50, 1.0).abstract()
        state = checkpoints.restore(like)
        checkpoints.close()
        assert int(state.step) == 50
        wanted = jax.tree.map(lambda a: a.sharding, like)
        assert jax.tree.map(lambda a: a.sharding, state) == wanted
        saved = saved_arrays(path)
        for name, array in state.parameters.items():
            np.testing.assert_array_equal(array, saved[f"['parameters']['{name}']"])


@pytest.mark.slow
def test_run_that_moves_from_mesh_to_mesh(runs, store, tmp_path, monkeypatch):
    stops = iter([17, 33])
    for mesh in [(2, 2), (1, 4), (4, 1)]:
        stop = next(stops, None)
        monkeypatch.setattr(Preemption, "reached", lambda self, step, stop=stop: step == stop)
        if stop:
            with pytest.raises(PreemptedError):
                train_run(on(mesh, store=store), tmp_path / "run")
        else:
            train_run(on(mesh, store=store), tmp_path / "run")
    path, _ = runs("topk", (1, 1))
    got, want = metrics(tmp_path / "run"), metrics(path)
    assert [line["step"] for line in got] == list(range(1, 51))
    np.testing.assert_allclose([m["loss"] for m in got], [m["loss"] for m in want], rtol=1e-5)


def test_stop_and_resume_on_one_mesh_is_exact(runs, store, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "reached", lambda self, step: step == 23)
        with pytest.raises(PreemptedError, match="step 23"):
            train_run(on((1, 1), store=store), tmp_path / "run")
    train_run(on((1, 1), store=store), tmp_path / "run")
    assert_same_arrays(saved_arrays(tmp_path / "run"), saved_arrays(runs("topk", (1, 1))[0]))


def test_batches_do_not_depend_on_the_mesh(store):
    stream = open_stream(on((1, 1), store=store).data)
    want = [stream.read(step) for step in range(3)]
    for mesh in MESHES:
        placement = BatchPlacement(make_mesh(on(mesh, store=store)), BATCH)
        batches = map(placement.place, stream.batches(0, placement.rows))
        for step in range(3):
            np.testing.assert_array_equal(next(batches), want[step])


def branches(program: str) -> list[str]:
    """The computations of a compiled program that are branches."""
    names = re.findall(r"branch_computations=\{(.*?)\}", program)
    names += re.findall(r"(?:true|false)_computation=(%[\w.-]+)", program)
    names = {name.strip() for listed in names for name in listed.split(",")}
    bodies = {part.split(" ", 1)[0]: part for part in program.split("\n\n")}
    assert names and names <= bodies.keys()
    return [bodies[name] for name in names]


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1, "zero")], ids=str)
@pytest.mark.slow
def test_step_holds_nothing_whole_and_needs_no_host(store, shape):
    """512 tokens 32 wide, 4,096 latents: what the compiled step of one device holds."""
    config = on(
        shape,
        store=store,
        sae={"d_sae": 4096, "k": 8, "aux_k": 16},
        optimizer={"learning_rate": 1e-3},
        data={"batch_size": 512},
    )
    config = dataclasses.replace(config, sae=saes.resolve(config.sae, 32))
    trainer = Trainer(config, 50, 1.0)
    data, shards = shape[:2]
    state_shards = data * shards if "zero" in shape else shards
    tokens = min(256, 512 // data)  # the encoder runs over slices of 256
    others = jax.live_arrays()  # that other tests have left
    with jax.set_mesh(make_mesh(config)):
        x = np.random.default_rng(0).normal(size=(512, 32)).astype(np.float32)
        x = jax.device_put(x, BATCH_SPEC)
        state = trainer.init(np.zeros(32, np.float32), 1.0)
        compiled = trainer.step.lower(state, x).compile()
        found = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
        shapes = {tuple(map(int, dimensions.split(","))) for dimensions in found}
        assert {(512 // data, 32), (32, 4096 // shards), (tokens, 4096 // shards)} <= shapes
        # Not even pre-activations are whole.
        big = {s for s in shapes if np.prod(s) >= 512 * 4096 // shards}
        assert not big, "arrays of batch x d_sae"
        if shards > 1:
            assert not {(32, 4096), (4096, 32)} & shapes, "a whole parameter on one device"

        for body in branches(compiled.as_text()):  # on CPUs it would run out of order there
            assert not re.search(r"all-(reduce|gather)\(", body), "a collective in a branch"

        with jax.transfer_guard("disallow"):
            for _ in range(3):
                state, values = trainer.step(state, x)
        assert np.isfinite(values["loss"])
        known = set(map(id, others))
        made = [array for array in jax.live_arrays() if id(array) not in known]
        for array in [*jax.tree.leaves(state), *made]:
            if array.size >= 4096 and array.ndim and 4096 in array.shape:
                sizes = {shard.data.size for shard in array.addressable_shards}
                per_token = array is state.idle_tokens
                assert sizes == {array.size // (shards if per_token else state_shards)}, array.shape
