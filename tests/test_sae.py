"""The contract that every architecture obeys, in every variant that CASES names. A new one joins by
a line in CASES and its published formula in references.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import REFERENCES
from training import sparse_rows

import sae_jax
from sae_jax import ops
from sae_jax import sae as saes
from sae_jax.config import Config, OptimizerConfig, from_dict, to_dict
from sae_jax.errors import UserError
from sae_jax.ops.sharding import BATCH, PER_LATENT
from sae_jax.sae import LossInputs
from sae_jax.train import optimizer
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.directory import RunDirectory
from sae_jax.train.schedule_steps import ScheduleSteps
from sae_jax.train.step import Trainer

D, N, B = 6, 20, 16
OUT = 4  # width of a transcoder's target
SITES = (4, 2)  # widths of a crosscoder's sites
MESHES = ((2, 2), (4, 1), (1, 4))  # data, model
THREE_MESHES = ("topk, multi", "batchtopk", "gated, crosscoder")
AUX = {"aux_k": 5, "aux_coefficient": 1 / 32}

CASES = {
    "relu": {"architecture": "relu"},
    "relu, p-annealing": {"architecture": "relu", "p_end": 0.3},
    "relu_l1_unit": {"architecture": "relu_l1_unit"},
    "topk": {"architecture": "topk", "k": 3},
    "topk, multi": {"architecture": "topk", "k": 2, "multi_topk": True},
    "topk, k schedule": {"architecture": "topk", "k": 2, "k_start": 6},
    "batchtopk": {"architecture": "batchtopk", "k": 3},
    "batchtopk, k schedule": {"architecture": "batchtopk", "k": 2, "k_start": 6},
    "matryoshka": {"architecture": "matryoshka", "k": 3, "prefix_widths": (3, 8, 20)},
    "jumprelu": {"architecture": "jumprelu"},
    "jumprelu, to all": {"architecture": "jumprelu", "gradient_to": "all"},
    "jumprelu, quadratic": {
        "architecture": "jumprelu", "sparsity_loss": "quadratic", "target_l0": 4.0,
    },
    "jumprelu, the paper's target": {
        "architecture": "jumprelu", "sparsity_loss": "jumprelu_paper", "target_l0": 4.0,
    },
    "jumprelu, tanh": {
        "architecture": "jumprelu", "sparsity_loss": "tanh", "gradient_to": "all",
        "preactivation_coefficient": 0.2, "unit_norm_decoder": False,
    },
    "gated": {"architecture": "gated"},
}  # fmt: skip
QUICK = {*saes.ARCHITECTURES, "jumprelu, tanh", "topk, skip_transcoder", "gated, crosscoder"}
KINDS = ("transcoder", "skip_transcoder", "crosscoder")
CROSSED = set()  # where a test takes long, for by hand: an architecture with two of the kinds
for _number, _name in enumerate(saes.ARCHITECTURES):
    # Inputs and targets compose with every one of them.
    CASES |= {f"{_name}, {kind}": CASES[_name] | {"kind": kind} for kind in KINDS}
    CROSSED |= {f"{_name}, {KINDS[(_number + other) % 3]}" for other in (1, 2)}


def every_case(test, quick=frozenset(QUICK), by_hand=frozenset()):
    """`test` of every case; those that are not in `quick` are slow tests, of `by_hand` long."""

    def marks(name):
        if name in quick:
            return ()
        return pytest.mark.long if name in by_hand else pytest.mark.slow

    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in CASES])(test)


def every_case_quickly(*quick):
    """Of a test that takes long: `quick` at once, each kind with some architectures in CI."""
    return functools.partial(every_case, quick=quick, by_hand=CROSSED)


every_architecture = pytest.mark.parametrize("name", saes.ARCHITECTURES)
some_dead = pytest.mark.parametrize("dead_count", [0, 3, 9])


def resolved(name, **changes):
    fields = {"d_sae": N, **AUX, **CASES[name], **changes}
    config = saes.by_name(fields.pop("architecture")).Config(**fields)
    crosses = config.kind == "crosscoder"
    target = OUT if "transcoder" in config.kind else None
    return saes.resolve(config, SITES if crosses else D, target)


def parameters_of(config, seed=0):
    """Random, with every bias off zero, so that nothing holds by symmetry."""
    key = jax.random.key(seed)
    fresh = saes.architecture(config).init_parameters(key, config, jnp.full(config.d_out, 0.2))
    rng = np.random.default_rng(seed)
    out = {n: p + 0.1 * rng.normal(size=p.shape).astype(np.float32) for n, p in fresh.items()}
    if "threshold" in out:
        out["threshold"] = jnp.abs(out["threshold"])
    if config.unit_norm_decoder:
        out["w_dec"] /= jnp.linalg.norm(out["w_dec"], axis=1, keepdims=True)
    return out


def make(name, scale=1.0, seed=0, **changes):
    config = resolved(name, **changes)
    return saes.architecture(config).from_parameters(
        config, parameters_of(config, seed), *scales(config, scale)
    )


def scales(config, scale):
    """(input scale, target scale); another for each site and target."""
    if config.kind == "crosscoder":
        columns = np.repeat([scale, 3 * scale], SITES).astype(np.float32)
        return columns, columns
    return (scale, 2 * scale) if "transcoder" in config.kind else (scale, scale)


def data(config, rows=B):
    """Inputs and targets, in the SAE's own units."""
    x = sparse_rows(rows, seed=5, width=D)
    if "transcoder" in config.kind:
        return jnp.asarray(x), jnp.tanh(x @ np.random.default_rng(1).normal(size=(D, OUT)))
    return jnp.asarray(x), jnp.asarray(x)


def controls(config, dead_count=0):
    """Of a step in the middle of a run, `dead_count` latents of odd index being dead."""
    dead = jnp.isin(jnp.arange(N), jnp.arange(1, 2 * dead_count + 1, 2))
    k = jnp.int32(4) if config.k_start else None
    p, next_p = (0.6, 0.59) if config.p_end < 1 else (1.0, 1.0)
    return LossInputs(dead, jnp.float32(0.3), k, p, next_p)


def loss_of(config, x, y, now):
    architecture = saes.architecture(config)
    return lambda parameters: architecture.from_parameters(config, parameters).training_loss(
        x, y, now
    )


@functools.cache
def compiled(name, dtype="float32"):
    """(losses, gradients) of parameters, x, y and controls, compiled once for a case."""
    config = resolved(name, compute_dtype=dtype)

    def total(parameters, x, y, now):
        losses = loss_of(config, x, y, now)(parameters)
        return losses.total, losses

    function = jax.jit(jax.value_and_grad(total, has_aux=True))

    def run(parameters, x, y, now):
        (_, losses), gradients = function(parameters, x, y, now)
        return losses, gradients

    return run


def wide(arrays):
    return {name: np.asarray(value, np.float64) for name, value in arrays.items()}


def test_every_architecture_is_tested():
    assert REFERENCES.keys() == saes.ARCHITECTURES.keys()
    assert {case["architecture"] for case in CASES.values()} == saes.ARCHITECTURES.keys()


@every_case
def test_shapes(name):
    sae = make(name)
    d_out = OUT if "transcoder" in sae.config.kind else D
    shapes = {n: p.shape for n, p in sae.parameters().items()}
    expected = {"w_enc": (D, N), "w_dec": (N, d_out), "b_enc": (N,), "b_dec": (d_out,)}
    assert expected.items() <= shapes.items()
    for leading in ((), (3,), (2, 3)):
        x = jnp.ones((*leading, D))
        latents = sae.encode(x)
        assert latents.shape == (*leading, N) and float(latents.min()) >= 0
        assert sae.decode(latents, x).shape == sae(x).shape == (*leading, d_out)
    rows = jnp.ones((3, D + d_out if "transcoder" in sae.config.kind else D))
    assert [part.shape for part in sae.split(rows)] == [(3, D), (3, d_out)]
    with pytest.raises(UserError, match="width 7"):
        sae.encode(jnp.ones((2, 7)))


@every_case_quickly(*QUICK)
@some_dead
def test_loss_is_the_published_formula(name, dead_count):
    config = resolved(name)
    (x, y), now = data(config), controls(config, dead_count)
    assert int(now.dead.sum()) == dead_count
    parameters = parameters_of(config)
    losses, _ = compiled(name)(parameters, x, y, now)
    want = REFERENCES[config.architecture](config, wide(parameters), *data(config), now)
    np.testing.assert_allclose(losses.total, want.total(held=want), rtol=2e-5)
    np.testing.assert_allclose(losses.mse, np.mean((want.error**2).sum(axis=1)), rtol=2e-5)
    np.testing.assert_allclose(losses.l0, np.mean((want.latents > 0).sum(axis=1)), rtol=1e-6)
    weighted = want.latents * want.norms
    np.testing.assert_allclose(losses.l1, np.mean(weighted.sum(axis=1)), rtol=2e-5)
    np.testing.assert_array_equal(losses.fired, (want.latents > 0).any(axis=0))


@every_case_quickly(*QUICK)
@some_dead
def test_gradients_by_finite_differences(name, dead_count):
    """Of the reference in float64, in every entry of every parameter; where the formula gives a
    gradient there must be one, and a straight-through gradient is a difference quotient of the
    steps smeared out as wide as its kernel."""
    config = resolved(name)
    (x, y), now = data(config), controls(config, dead_count)
    parameters = parameters_of(config)
    _, got = compiled(name)(parameters, x, y, now)
    values, reference = wide(parameters), REFERENCES[config.architecture]
    held = reference(config, values, x, y, now)
    running = saes.architecture(config).RUNNING_MEANS

    def total():
        return reference(config, values, x, y, now, held).total(held)

    for parameter, value in values.items():
        if parameter in running:
            assert not np.any(got[parameter])
            continue
        want = np.zeros_like(value)
        for place in np.ndindex(value.shape):
            before = value[place]
            value[place] = before + 1e-6
            above = total()
            value[place] = before - 1e-6
            want[place] = (above - total()) / 2e-6
            value[place] = before
        want += held.straight_through.get(parameter, 0.0)
        size = np.abs(want).max()
        assert size > 1e-3
        np.testing.assert_allclose(
            got[parameter], want, rtol=1e-4, atol=1e-4 * size, err_msg=parameter
        )


@every_architecture
def test_dead_latents_learn_even_below_zero(name):
    """AuxK's ReLU leaks: with few dead, all are picked for every token, and every one's encoder
    column, decoder row and bias get a gradient, negative pre-activations or not."""
    config = resolved(name)
    (x, y), now = data(config), controls(config, 3)
    parameters = parameters_of(config)
    parameters["b_enc"] = jnp.where(now.dead, -50.0, parameters["b_enc"])
    _, got = compiled(name)(parameters, x, y, now)
    for latent in np.flatnonzero(now.dead):
        assert float(jnp.abs(got["w_enc"][:, latent]).max()) > 1e-4
        assert float(jnp.abs(got["w_dec"][latent]).max()) > 1e-3
        assert abs(float(got["b_enc"][latent])) > 1e-4


@pytest.mark.parametrize("name", ["topk", pytest.param("relu", marks=pytest.mark.slow)])
def test_many_dead_latents_as_few(monkeypatch, name):
    """The k-sparse code of AuxK, which many dead latents have, gives the loss and the gradients
    that blocks of dead latents give."""
    config = resolved(name)
    (x, y), parameters = data(config), parameters_of(config)
    counts = (0, 1, 5, 6, 10)
    want = [compiled(name)(parameters, x, y, controls(config, count)) for count in counts]
    monkeypatch.setattr(ops, "few_and_many", lambda dead, k: (jnp.zeros_like(dead), dead))
    run = compiled.__wrapped__(name)
    for count, (losses, gradients) in zip(counts, want, strict=True):
        got, got_gradients = run(parameters, x, y, controls(config, count))
        np.testing.assert_allclose(got.total, losses.total, rtol=1e-6)
        for parameter, gradient in gradients.items():
            np.testing.assert_allclose(
                got_gradients[parameter], gradient, rtol=1e-5, atol=1e-6, err_msg=parameter
            )


@every_case_quickly("relu", "batchtopk")
def test_jit_is_no_jit(name):
    config = resolved(name)
    (x, y), now = data(config), controls(config, 3)
    parameters, loss = parameters_of(config), loss_of(config, x, y, now)
    plain = jax.grad(lambda p: loss(p).total)(parameters)
    _, jitted = compiled(name)(parameters, x, y, now)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), plain, jitted)
    sae = saes.architecture(config).from_parameters(config, parameters)
    np.testing.assert_allclose(jax.jit(lambda s, x: s(x))(sae, x), sae(x), rtol=1e-5, atol=1e-6)


@every_case_quickly("gated", "matryoshka", "topk, skip_transcoder")
def test_every_mesh_is_one_device(name):
    """Losses and gradients with AuxK at work, on 4 devices in 3 ways; and every gradient keeps its
    parameter's sharding."""
    config = resolved(name)
    (x, y), now = data(config), controls(config, 9)
    parameters = parameters_of(config)
    want, want_gradients = compiled(name)(parameters, x, y, now)
    for shape in MESHES[: 3 if name in THREE_MESHES else 1]:
        mesh = jax.make_mesh((1, *shape), ("run", "data", "model"))
        with jax.set_mesh(mesh):
            fresh = saes.architecture(config).init_parameters(
                jax.random.key(0), config, jax.device_put(y[0], jax.P(None))
            )
            placed = {n: jax.device_put(p, fresh[n].sharding) for n, p in parameters.items()}
            dead = jax.device_put(now.dead, PER_LATENT)
            batch = jax.device_put(x, BATCH), jax.device_put(y, BATCH)
            got, gradients = compiled(name)(placed, *batch, dataclasses.replace(now, dead=dead))
        np.testing.assert_allclose(got.total, want.total, rtol=1e-5)
        np.testing.assert_array_equal(got.fired, want.fired)
        for parameter, gradient in gradients.items():
            assert gradient.sharding.is_equivalent_to(placed[parameter].sharding, gradient.ndim)
            np.testing.assert_allclose(gradient, want_gradients[parameter], rtol=2e-4, atol=2e-5)


@every_case_quickly("topk", "gated, crosscoder")
@pytest.mark.slow
def test_row_losses_on_every_mesh(name):
    """Of one device as well: resampling picks by them, under the mesh of the run, inputs that dead
    latents restart from."""
    config = resolved(name)
    sae = saes.architecture(config).from_parameters(config, parameters_of(config))
    x, y = data(config)
    want = sae.row_losses(x, y, coefficient=0.3)
    for shape in ((1, 1), *MESHES):
        mesh = jax.make_mesh(
            (1, *shape), ("run", "data", "model"), devices=jax.devices()[: shape[0] * shape[1]]
        )
        with jax.set_mesh(mesh):
            fresh = saes.architecture(config).init_parameters(
                jax.random.key(0), config, jax.device_put(y[0], jax.P(None))
            )
            placed = {n: jax.device_put(p, fresh[n].sharding) for n, p in sae.parameters().items()}
            on_mesh = saes.architecture(config).from_parameters(config, placed)
            batch = jax.device_put(x, BATCH), jax.device_put(y, BATCH)
            got = jax.jit(lambda sae, *xy: sae.scaled_row_losses(*xy, 0.3))(on_mesh, *batch)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@every_case_quickly(*saes.ARCHITECTURES)
@pytest.mark.slow
def test_loss_falls(name):
    config = resolved(name)
    x, y = data(config, 256)
    architecture = saes.architecture(config)
    parameters = architecture.init_parameters(jax.random.key(0), config, y.mean(axis=0))
    constant = OptimizerConfig(learning_rate=5e-3, schedule="constant")
    lengths = ScheduleSteps.from_config(Config(optimizer=constant), 100)
    adam = optimizer.make(constant, lengths, config.unit_norm_decoder)
    losses = loss_of(
        config, x, y, dataclasses.replace(controls(config), coefficient=jnp.float32(0.03))
    )

    @jax.jit
    def step(parameters, state):
        value, gradients = jax.value_and_grad(lambda p: losses(p).total)(parameters)
        updates, state = adam.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    state, values = adam.init(parameters), []
    for _ in range(100):
        parameters, state, value = step(parameters, state)
        values.append(float(value))
    assert values[-1] < 0.75 * values[0]
    if config.unit_norm_decoder:
        np.testing.assert_allclose(jnp.linalg.norm(parameters["w_dec"], axis=1), 1, rtol=1e-5)


@every_case
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_fold_is_the_same_function(name, scale):
    sae = make(name, scale=scale)
    x = data(sae.config)[0] / jnp.asarray(sae.scale)
    folded = sae.fold()
    assert folded.scale == folded.target_scale == 1
    np.testing.assert_allclose(folded(x), sae(x), rtol=1e-4, atol=1e-4)
    norms = jnp.linalg.norm(sae.w_dec[...] / sae.target_scale, axis=1)
    if sae.config.architecture != "topk" or sae.config.kind != "crosscoder":
        np.testing.assert_allclose(jnp.linalg.norm(folded.w_dec[...], axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(folded.encode(x), sae.encode(x) * norms, rtol=1e-4, atol=1e-4)


@every_case
def test_scale_is_only_a_change_of_units(name):
    sae, other = make(name), make(name, scale=0.25)
    x = data(sae.config)[0]
    there = jnp.asarray(sae.scale) * x / jnp.asarray(other.scale)
    np.testing.assert_allclose(other.encode(there), sae.encode(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        other(there) * other.target_scale, sae(x) * sae.target_scale, rtol=1e-5, atol=1e-5
    )


@every_case_quickly("relu", "topk", "batchtopk", "jumprelu")
@pytest.mark.slow
def test_bfloat16_is_close(name):
    config = resolved(name)
    (x, y), now = data(config), controls(config, 3)
    parameters = parameters_of(config)
    losses, gradients = compiled(name)(parameters, x, y, now)
    low_losses, low_gradients = compiled(name, "bfloat16")(parameters, x, y, now)
    assert float(low_losses.total) == pytest.approx(float(losses.total), rel=0.02)
    for parameter, gradient in gradients.items():
        assert low_gradients[parameter].dtype == jnp.float32
        difference = jnp.linalg.norm(low_gradients[parameter] - gradient)
        # A straight-through kernel moves by whole tokens when pre-activations are rounded.
        part = 0.3 if parameter == "threshold" or "jumprelu" in name else 0.1
        assert difference <= part * jnp.linalg.norm(gradient), parameter


@every_case
def test_loss_without_training_is_what_encode_and_decode_do(name):
    config = resolved(name)
    x, y = data(config, 64)
    sae = saes.architecture(config).from_parameters(config, parameters_of(config))
    losses = sae.training_loss(x, y, dataclasses.replace(controls(config), training=False, k=None))
    np.testing.assert_allclose(
        losses.mse, np.mean(np.sum((y - sae(x)) ** 2, axis=1)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(losses.l0, np.mean((sae.encode(x) > 0).sum(axis=1)), rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in CASES if n.partition(",")[0] == "jumprelu"])
def test_thresholds_below_zero_stand_for_zero(name):
    """No latent is below 0, as in SAELens and Gemma Scope: relu(z) * (z > theta)."""
    config = resolved(name, preactivation_coefficient=0.0)
    (x, y), now = data(config), controls(config)
    low = parameters_of(config) | {"threshold": jnp.linspace(-1, 1, N)}
    clipped = low | {"threshold": jnp.maximum(low["threshold"], 0)}
    cls = saes.architecture(config)
    ours, wanted = (cls.from_parameters(config, p) for p in (low, clipped))
    z = ours.preactivations(x)
    assert ((z < 0) & (z > low["threshold"])).any()
    np.testing.assert_array_equal(ours.encode(x), np.maximum(z, 0) * (z > low["threshold"]))
    for got, want in zip(
        jax.tree.leaves(ours.training_loss(x, y, now)),
        jax.tree.leaves(wanted.training_loss(x, y, now)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "name, formula",
    [
        ("gemma_scope_2", lambda l0, target: 2 / target * (l0 - target) ** 2),
        ("quadratic", lambda l0, target: 2 / target * (l0 - target) ** 2),
        ("jumprelu_paper", lambda l0, target: (l0 / target - 1) ** 2),
    ],
)
def test_penalties_of_a_target_l0(name, formula):
    """Gemma Scope 2's eq. 5, by SAELens' name too, and that of the JumpReLU paper."""
    sae = sae_jax.JumpReLU(d_in=D, d_sae=N, sparsity_loss=name, target_l0=3.0)
    x = sparse_rows(64, seed=5, width=D)
    l0 = (np.asarray(sae.encode(x)) > 0).sum(axis=1)
    penalty = sae.loss(x, coefficient=1.0).total - sae.loss(x, coefficient=0.0).total
    assert penalty == pytest.approx(formula(l0, 3.0).mean(), rel=1e-4)


def test_quadratic_in_a_file_means_what_it_meant(tmp_path):
    """Files of versions before say quadratic, and none since: runs, sweeps and exports."""
    fields = {"architecture": "jumprelu", "sparsity_loss": "quadratic", "target_l0": 3.0}
    assert from_dict({"sae": fields}).sae.sparsity_loss == "jumprelu_paper"
    new = Config(sae=saes.JumpReLUConfig(**fields))
    assert from_dict(to_dict(new)) == new and new.sae.sparsity_loss == "gemma_scope_2"
    sae_jax.JumpReLU(new.sae, d_in=D, d_sae=N).save(tmp_path / "sae")
    file = tmp_path / "sae" / "sae.json"
    assert sae_jax.load(tmp_path / "sae").config.sparsity_loss == "gemma_scope_2"
    file.write_text(file.read_text().replace("gemma_scope_2", "quadratic"))
    assert sae_jax.load(tmp_path / "sae").config.sparsity_loss == "jumprelu_paper"


@every_case_quickly("topk", "gated, crosscoder")
def test_saved_and_restored(name, tmp_path):
    """All of a state comes back, and `load` gives the same function of x."""
    config = resolved(name, d_sae=N, dead_after_tokens=100)
    whole = Config(sae=config, optimizer=OptimizerConfig(learning_rate=1e-3))
    trainer = Trainer(whole, 10, 1.0)
    mesh = jax.make_mesh((1, 2, 2), ("run", "data", "model"))
    with jax.set_mesh(mesh):
        state = trainer.init(np.full(config.d_out, 0.2, np.float32), *scales(config, 0.5))
        directory = RunDirectory(tmp_path / "run", whole)
        checkpoints = Checkpoints(directory.path, keep=1)
        checkpoints.save(state, 1)
        checkpoints.finish()
        restored = checkpoints.restore(trainer.abstract())
        checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    loaded = sae_jax.load(tmp_path / "run")
    parameters = jax.tree.map(np.asarray, state.parameters)
    want = saes.architecture(config).from_parameters(config, parameters, *scales(config, 0.5))
    x = data(config)[0] * 2
    np.testing.assert_array_equal(loaded.encode(x), want.encode(x))
    np.testing.assert_array_equal(loaded(x), want(x))
