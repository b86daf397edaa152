"""Numbers, data and settings of JAX at the edge of what a run can be: right, or refused in one line
before anything is written."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import BATCH, finish_all, make_config, metrics, sparse_rows, start

import sae_jax
from sae_jax.activations import open_stream, write_store
from sae_jax.errors import UserError
from sae_jax.sae import ARCHITECTURES
from sae_jax.sweep import directory
from sae_jax.train import preparation, results
from sae_jax.train.mesh import BatchPlacement, make_mesh
from sae_jax.train.run import train_run
from sae_jax.train.step import Trainer

WORLD = "world:orthonormal,width=16,features=16"


def resolved(config):
    return preparation.resolve(config, open_stream(config.data))


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"sae.d_sae": 10**9}, ["sae.d_sae 1,000,000,000", "GB", "mesh.model"]),
        ({"sae.d_sae": 10**12}, ["sae.d_sae must be below 2^31, not 1000000000000"]),
        ({"train.seed": 10**30}, ["train.seed must be from 0 to 4,294,967,295"]),
        ({"train.seed": 2**32}, ["train.seed must be", "not 4294967296"]),  # JAX takes it for 0
        ({"train.seed": -1}, ["train.seed must be", "not -1"]),
        ({"data.seed": 10**30}, ["data.seed is 1" + "0" * 30]),
        ({"train.tokens": 10**30}, ["train.tokens 1000000", "lower train.tokens"]),
        ({"train.tokens": 2**31 * BATCH}, ["fewer than 2^31"]),
        ({"sae.k": 128, "data.batch_size": 2**26}, ["sae.k times data.batch_size", "2^31"]),
    ],
    ids=str,
)
def test_numbers_that_no_run_can_have(tmp_path, changes, words):
    sections = {}
    for name, value in changes.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    with pytest.raises(UserError) as caught:
        train_run(make_config(WORLD, **sections), tmp_path / "run")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_seeds_that_are_told_apart():
    """The largest two that are accepted give other parameters than 0, and in a pack as alone."""
    largest = 2**32 - 1
    keys = {seed: jax.random.key_data(jax.random.key(seed)).tolist() for seed in (0, largest)}
    assert keys[0] != keys[largest]
    wrapped = np.asarray([largest]).astype(np.int32)[0]  # as an argument of a pack's program
    assert jax.random.key_data(jax.random.key(wrapped)).tolist() == keys[largest]


@pytest.mark.parametrize(
    "tokens", [2**30 + 10 * BATCH, 2**31 - 1] + [pytest.param(n, marks=pytest.mark.slow) for n in (
        2**31, 3 * 10**9, 10**11)],
)  # fmt: skip
@pytest.mark.slow
def test_a_latent_is_dead_after_any_number_of_tokens(tokens):
    """Not a batch earlier and not a batch later. From 2^30 on none ever was."""
    sae = {"dead_after_tokens": tokens, "aux_coefficient": 0.0}
    config = resolved(make_config(WORLD, sae=sae))
    mesh = make_mesh(config)
    batch = BatchPlacement(mesh, BATCH).place(open_stream(config.data).read(0))
    steps = -(-tokens // BATCH)  # of silence until it is dead
    with jax.set_mesh(mesh):
        trainer = Trainer(config, 100, 1.0)

        def silent(idle):
            state = trainer.init(np.zeros(16, np.float32), 1.0)
            biases = {"b_enc": jnp.full_like(state.parameters["b_enc"], -100.0)}
            idle = jnp.full_like(state.idle_tokens, idle)
            parameters = state.parameters | biases
            return dataclasses.replace(state, parameters=parameters, idle_tokens=idle)

        per_step = int(trainer.step(silent(0), batch)[0].idle_tokens[0])
        assert per_step in (1, BATCH)
        state = silent((steps - 1) * per_step)
        assert not trainer.dead(state).any()
        for _ in range(3):
            state, metrics = trainer.step(state, batch)
            assert trainer.dead(state).all()
    assert float(metrics["dead_fraction"]) == 1


@pytest.mark.parametrize("tokens", [10**13, 10**30])
def test_a_latent_that_dies_after_more_tokens_than_any_run_has(tokens):
    trainer = Trainer(resolved(make_config(WORLD, sae={"dead_after_tokens": tokens})), 3, 1.0)
    longest = types.SimpleNamespace(idle_tokens=jnp.full(3, 2**31 - 2))  # steps
    assert not trainer.dead(longest).any()


# -------------------------------------------------------- activations without variance


def without_variance(kind: str, rows: int = 4096) -> np.ndarray:
    return {
        "zero": np.zeros((rows, 8), np.float32),
        "constant": np.full((rows, 8), 3, np.float32),
        "of many digits": np.tile(np.linspace(-1e3, 0.1, 8, dtype=np.float32), (rows, 1)),
    }[kind]


@pytest.mark.parametrize("kind", ["zero", "constant", "of many digits"])
def test_a_site_without_variance_is_named(tmp_path, kind):
    """Also where it is one of a crosscoder's, or a transcoder's input; and nothing is written."""
    rows = sparse_rows(4096)
    write_store(tmp_path / "store", [{"good": rows, "bad": without_variance(kind)}])
    what = "zero" if kind == "zero" else "the same"
    for sae, data in (
        ({}, {"site": "bad"}),
        ({"kind": "crosscoder"}, {"site": "good,bad"}),
        ({"kind": "transcoder"}, {"site": "bad", "target_site": "good"}),
        ({"kind": "transcoder"}, {"site": "good", "target_site": "bad"}),
    ):
        config = make_config(str(tmp_path / "store"), sae=sae, data=data)
        with pytest.raises(UserError, match=f"all rows of the site bad of .*store are {what}"):
            train_run(config, tmp_path / "run")
        with pytest.raises(UserError, match="run 1 of 1.* site bad"):
            directory.expand(config, [{}])
    assert not (tmp_path / "run").exists()
    good = make_config(str(tmp_path / "store"), steps=2, data={"site": "good"})
    assert train_run(good, tmp_path / "run").result["eval_fvu"] > 0


@pytest.mark.parametrize("given", [np.asarray, lambda rows: iter(np.split(rows, 8))])
def test_an_array_without_variance_in_python(given):
    with pytest.raises(UserError, match="all rows of the site activations"):
        sae_jax.train(
            sae_jax.TopK(d_in=8, d_sae=32, k=4), given(without_variance("constant")), tokens=2048
        )


@pytest.mark.slow
def test_a_small_variance_is_one():
    """Of a thousandth of the mean, which float32 has: FVU is that of the rows less their mean."""
    rows = 1000 + sparse_rows(4096)
    result = sae_jax.train(sae_jax.TopK(d_in=16, d_sae=32, k=4), rows, tokens=2048)
    assert 0 < result.result["eval_fvu"] < 10


def test_results_that_are_not_finite_are_still_json():
    """Readers of JSON other than Python's refuse Infinity and NaN."""
    config = resolved(make_config(WORLD))
    trainer = types.SimpleNamespace(config=config, dead=lambda _: jnp.zeros(128))
    state = types.SimpleNamespace(log_coefficient=0.0)
    with jax.set_mesh(make_mesh(config)):
        means = {"eval_loss": np.nan, "eval_fvu": np.inf, "eval_l0": 2.0}
        result = results.make_result(trainer, state, means, 1.0)
    json.dumps(result, allow_nan=False)
    assert result["eval_loss"] is None and result["eval_l0"] == 2


# ------------------------------------------------------------------------- 64 bits


IN_CI = ("relu", "batchtopk")


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(a, marks=pytest.mark.slow if a in IN_CI else pytest.mark.long)
        for a in ARCHITECTURES
    ],
)
def test_training_where_jax_has_64_bits(architecture, tmp_path):
    """The same run, bit for bit, with AuxK and resampling; and it is resumed, and loads."""
    sae = {"resample_every_tokens": 4 * BATCH, "resample_times": 1}
    config = make_config(WORLD, architecture, steps=6, sae=sae)
    with jax.enable_x64(True):
        wide = train_run(config, tmp_path / "run").read_lines()
        loaded = sae_jax.load(tmp_path / "run")
        assert {p.dtype for p in loaded.parameters().values()} == {np.dtype(np.float32)}
        result = sae_jax.train(loaded, sparse_rows(2048), tokens=1024)
        assert result.sae.encode(sparse_rows(4)).dtype == np.float32
    plain = train_run(config, None).read_lines()
    assert [line["loss"] for line in wide] == [line["loss"] for line in plain]


@pytest.mark.slow
def test_the_command_where_the_environment_asks_for_64_bits(tmp_path):
    config = make_config(WORLD, steps=3)
    (end,) = finish_all([start(tmp_path / "run", config, environment={"JAX_ENABLE_X64": "1"})])
    assert end[0] == 0, end
    plain = train_run(config, None).read_lines()
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [line["loss"] for line in plain]
