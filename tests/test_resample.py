"""Resampling of dead latents: what it sets, whom it picks, and that a run with it stays exact."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import BATCH, assert_same_arrays, make_config, make_store, metrics, saved_arrays

from sae_jax.activations import open_stream
from sae_jax.ops.sharding import PER_LATENT
from sae_jax.sae import ARCHITECTURES
from sae_jax.train import preparation, resample
from sae_jax.train.mesh import BatchPlacement, make_mesh
from sae_jax.train.preemption import PreemptedError, Preemption
from sae_jax.train.run import train_run
from sae_jax.train.step import Trainer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store")


def config_of(store, mesh=(1, 1), **sae):
    return make_config(
        store,
        "relu_l1_unit",
        sae={"aux_coefficient": 0.0, "resample_every_tokens": 44 * BATCH, **sae},
        optimizer={"learning_rate": 1e-2},
        mesh={"data": mesh[0], "model": mesh[1]},
    )


@pytest.mark.parametrize(
    "mesh", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 2, "zero")], ids=str
)
@pytest.mark.parametrize(
    "architecture",
    ["relu_l1_unit"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in ("jumprelu", "gated", "batchtopk")],
)
@pytest.mark.slow
def test_what_resampling_sets(store, architecture, mesh):
    data = {"data": mesh[0], "model": mesh[1], "zero": "zero" in mesh}
    sae = {"resample_every_tokens": 20 * BATCH}
    config = make_config(store, architecture, sae=sae, mesh=data)
    stream = open_stream(config.data)
    config = preparation.resolve(config, stream)
    scale, target_scale, variance = preparation.normalisation(config, stream)
    mesh = make_mesh(config)
    placement = BatchPlacement(mesh, BATCH)
    dead = np.arange(128) % 3 == 1
    with jax.set_mesh(mesh):
        trainer = Trainer(config, 50, variance)
        state = trainer.init(np.full(16, 0.3, np.float32), scale, target_scale)
        state, _ = trainer.step(state, placement.place(stream.read(0)))
        idle = jax.device_put(np.where(dead, 10**6, 0).astype(np.int32), state.idle_tokens.sharding)
        state = jax.tree.unflatten(
            jax.tree.structure(state),
            [idle if a is state.idle_tokens else a for a in jax.tree.leaves(state)],
        )
        before = jax.tree.map(np.asarray, state)
        rows = np.concatenate([stream.read(step) for step in range(1, 1 + 128 * 8 // BATCH)])
        after = jax.tree.map(np.asarray, resample.resample(trainer, state, 1, stream, placement))
    w_enc, w_dec = after.parameters["w_enc"], after.parameters["w_dec"]
    alive = np.linalg.norm(before.parameters["w_enc"][:, ~dead], axis=0).mean()
    np.testing.assert_allclose(np.linalg.norm(w_enc[:, dead], axis=0), 0.2 * alive, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(w_dec[dead], axis=1), 1, rtol=1e-5)
    inputs = rows * scale - before.parameters["b_dec"]
    cosines = w_dec[dead] @ (inputs / np.linalg.norm(inputs, axis=1, keepdims=True)).T
    np.testing.assert_allclose(cosines.max(axis=1), 1, rtol=1e-5)  # inputs of the coming batches
    assert len(set(cosines.argmax(axis=1))) == dead.sum()  # each another
    np.testing.assert_allclose(
        w_enc[:, dead].T / np.linalg.norm(w_enc[:, dead], axis=0)[:, None], w_dec[dead], atol=1e-5
    )
    assert not after.parameters["b_enc"][dead].any() and not after.idle_tokens[dead].any()
    for name, value in after.parameters.items():
        last = value.shape[-1] == 128
        here, there = (a if last else a.swapaxes(0, -1) for a in (value, before.parameters[name]))
        if name != "b_dec":
            np.testing.assert_array_equal(here[..., ~dead], there[..., ~dead])
    moments = [m for m in jax.tree.leaves(after.optimizer) if m.shape == (16, 128)]
    assert len(moments) == 2
    for moment in moments:
        assert not moment[:, dead].any() and moment[:, ~dead].any()


VARIANTS = {name: (name, {}) for name in ARCHITECTURES} | {
    "topk, multi": ("topk", {"multi_topk": True}),
    "topk, k schedule": ("topk", {"k_start": 6}),
    "batchtopk, k schedule": ("batchtopk", {"k_start": 6}),
    "jumprelu, tanh": ("jumprelu", {"sparsity_loss": "tanh", "gradient_to": "all"}),
    "relu, p-annealing": ("relu", {"p_end": 0.5}),
    "topk, bfloat16": ("topk", {"compute_dtype": "bfloat16"}),
}
OPTIONS = {
    "AuxK": {"resample_every_tokens": 0},
    "resampling": {"aux_coefficient": 0.0},
    "both": {},
}


def every_option(test):
    """`test` of all; in CI architectures with both options, but top-k with each alone."""
    like_others = ("relu_l1_unit", "matryoshka")  # like relu and batchtopk

    def mark(name, option):
        in_ci = name in ARCHITECTURES and (option == "both") == (name != "topk")
        in_ci = in_ci and name not in like_others
        return pytest.mark.slow if in_ci else pytest.mark.long

    cases = itertools.product(VARIANTS, OPTIONS)
    cases = [pytest.param(*case, marks=mark(*case)) for case in cases]
    return pytest.mark.parametrize("name,option", cases)(test)


@every_option
def test_dead_latents_under_every_option_on_several_meshes(
    store, tmp_path, monkeypatch, name, option
):
    """Runs of 10 steps of which a third of the latents is dead from the start, as none of their
    pre-activations is above 0; resampling after 6 steps and AuxK see the same everywhere."""
    architecture, fields = VARIANTS[name]
    init = Trainer.init

    def with_dead(self, *arguments):
        state = init(self, *arguments)
        dead = jnp.arange(128, out_sharding=PER_LATENT) % 3 == 1
        biases = {
            name: jnp.where(dead, -100.0, value)
            for name, value in state.parameters.items()
            if name in ("b_enc", "b_gate", "b_mag")
        }
        return dataclasses.replace(state, parameters=state.parameters | biases)

    monkeypatch.setattr(Trainer, "init", with_dead)
    lines = {}
    for mesh in [(1, 1), (1, 4), (2, 2)]:
        config = make_config(
            store,
            architecture,
            steps=10,
            sae={
                "resample_every_tokens": 6 * BATCH,
                "resample_times": 1,
                **OPTIONS[option],
                **fields,
            },
            mesh={"data": mesh[0], "model": mesh[1]},
        )
        result = train_run(config, None)
        lines[mesh] = result.read_lines()
        dead = [line["dead_fraction"] for line in lines[mesh]]
        assert dead[4] >= 1 / 3, "no latent is dead"
        assert option == "AuxK" or dead[6] == 0, "they were not resampled"
        np.testing.assert_allclose(
            [line["loss"] for line in lines[mesh]],
            [line["loss"] for line in lines[1, 1]],
            rtol=1e-2 if "bfloat16" in name else 1e-4,
        )
        assert dead == [line["dead_fraction"] for line in lines[1, 1]]


def test_inputs_are_picked_by_the_square_of_their_loss():
    losses = np.repeat([1.0, 2.0, 4.0], 1000)
    picks = np.concatenate([resample._pick(losses, 3, seed) for seed in range(3000)])
    shares = np.bincount(picks // 1000, minlength=3) / len(picks)
    np.testing.assert_allclose(shares, np.array([1, 4, 16]) / 21, atol=0.02)
    assert sorted(resample._pick(losses[:5], 7, 0))[-1] == 4  # fewer inputs than latents


@pytest.mark.slow
def test_run_with_resampling_is_exact_and_on_every_mesh_the_same(store, tmp_path, monkeypatch):
    config = config_of(store, sparsity_coefficient=30.0)
    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "reached", lambda self, step: step == 46)
        with pytest.raises(PreemptedError, match="step 46"):
            train_run(config, tmp_path / "stopped")
    train_run(config, tmp_path / "stopped")
    train_run(config, tmp_path / "whole")
    train_run(config_of(store, (2, 2), sparsity_coefficient=30.0), tmp_path / "mesh")
    assert_same_arrays(saved_arrays(tmp_path / "stopped"), saved_arrays(tmp_path / "whole"))
    got, want = metrics(tmp_path / "mesh"), metrics(tmp_path / "whole")
    np.testing.assert_allclose([m["loss"] for m in got], [m["loss"] for m in want], rtol=1e-4)
    dead = [line["dead_fraction"] for line in want]
    assert dead[43] > 0 and dead[44] == 0, "nothing died, or nothing was resampled"
