"""What a person in a notebook does with an SAE of any architecture: made from keyword arguments, in
the model's own units, from any type of array, saved and loaded."""

import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_sae import CASES, OUT, QUICK, SITES, D, N, data, every_case_quickly, make

import sae_jax
from sae_jax import sae as saes
from sae_jax.errors import UserError
from sae_jax.fields import documentation, types_of
from sae_jax.interop import FORMATS

EXPORTS = pathlib.Path(__file__).parent / "fixtures" / "exports"
SCALE = 0.25


def made(name, **more):
    """An SAE of a case from keyword arguments alone."""
    fields = {"d_sae": N, **CASES[name]}
    cls = saes.by_name(fields.pop("architecture"))
    kind = fields.get("kind", "autoencoder")
    widths = {"site_widths": SITES} if kind == "crosscoder" else {"d_in": D}
    if "transcoder" in kind:
        widths["d_out"] = OUT
    return cls(**fields, **widths, **more)


def pair(sae, rows=16):
    """Inputs and targets in the units of the model."""
    x, y = data(sae.config, rows)
    return np.asarray(x / jnp.asarray(sae.scale)), np.asarray(y / jnp.asarray(sae.target_scale))


@every_case_quickly(*QUICK)
def test_made_from_keywords(name):
    sae = made(name)
    other = type(sae)(sae.config, rngs=nnx.Rngs(7))
    fresh = type(sae).init_parameters(jax.random.key(0), sae.config, jnp.zeros(sae.config.d_out))
    assert fresh.keys() == sae.parameters().keys()
    for parameter, value in fresh.items():
        np.testing.assert_array_equal(sae.parameters()[parameter], value)
    assert not np.array_equal(other.w_dec[...], sae.w_dec[...])
    x, y = pair(sae)
    for grad in (jax.grad, nnx.grad) if name == "relu" else (jax.grad,):
        gradients = jax.jit(grad(lambda sae: sae.loss(x, y).total))(sae)
        assert float(jnp.abs(gradients.w_dec[...]).max()) > 0


@every_case_quickly(*QUICK)
@pytest.mark.slow
def test_units(name):
    """Everything is in the units of x and y, whatever the SAE's own are."""
    one, other = make(name), make(name, scale=SCALE)
    x, y = pair(one)
    there, y_there = pair(other)
    np.testing.assert_allclose(other.encode(there), one.encode(x), rtol=1e-5, atol=1e-6)
    units = jnp.broadcast_to(jnp.asarray(other.target_scale / one.target_scale), (y.shape[-1],))
    np.testing.assert_allclose(other(there) * units, one(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        other.direction([0, 3]) * units, one.direction([0, 3]), rtol=1e-5, atol=1e-7
    )
    decoded = other.decode(np.eye(N)[3], there[0]) - other.decode(np.zeros(N), there[0])
    np.testing.assert_allclose(decoded, other.direction(3), rtol=1e-4, atol=1e-5)

    losses = other.loss(there, y_there, coefficient=0.0, training=False)
    error = np.mean(np.sum(np.square(y_there - np.asarray(other(there))), axis=1))
    np.testing.assert_allclose(losses.mse, error, rtol=1e-5)
    rows = other.row_losses(there, y_there, coefficient=0.0)
    np.testing.assert_allclose(np.mean(rows), error, rtol=1e-5)
    if other.config.kind != "crosscoder":
        unit = other.target_scale / one.target_scale
        want, got = one.loss(x, y), other.loss(there, y_there)
        np.testing.assert_allclose(got.total * unit**2, want.total, rtol=1e-5)
        np.testing.assert_allclose(got.l1 * unit, want.l1, rtol=1e-5)


def torch_like(x, dtype):
    torch = pytest.importorskip("torch")
    return torch.tensor(np.asarray(x), dtype=getattr(torch, dtype))


TYPES = {
    "float32": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "bfloat16": lambda x: jnp.asarray(x, jnp.bfloat16),
    "integers": lambda x: np.round(x).astype(np.int64),
    "a list": lambda x: x.tolist(),
    "torch": lambda x: torch_like(x, "float32"),
    "torch, float64": lambda x: torch_like(x, "float64"),
    "torch, bfloat16": lambda x: torch_like(x, "bfloat16"),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_scaled_in_float32(dtype):
    """So that 30,000 does not overflow float16, and ranks and thresholds are those of float32."""
    sae = make("topk", scale=1 / SCALE)
    x = 40 * np.random.default_rng(0).normal(size=(256, D)).astype(np.float32)
    half = jnp.asarray(x, dtype).at[:, 0].set(30_000)
    whole = half.astype(jnp.float32)
    y = jnp.zeros((256, sae.config.d_out))
    for name, one, other in (
        ("preactivations", sae.preactivations(half), sae.preactivations(whole)),
        ("encode", sae.encode(half), sae.encode(whole)),
        ("encode_sparse", sae.encode_sparse(half)[0], sae.encode_sparse(whole)[0]),
        ("sae", sae(half), sae(whole)),
        ("decode", sae.decode(sae.encode(x).astype(dtype)), None),
        ("row_losses", sae.row_losses(half, y), sae.row_losses(whole, y)),
        ("loss", sae.loss(half, y).total, sae.loss(whole, y).total),
    ):
        assert one.dtype == jnp.float32 and np.isfinite(one).all(), name
        if other is not None:
            np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 3)])
def test_every_type_is_as_float32_of_its_values(kind, leading):
    sae = make("topk", scale=SCALE)
    x = 40 * np.random.default_rng(0).normal(size=(*leading, D)).astype(np.float32)
    given = TYPES[kind](x)
    if leading == (0,) and kind == "a list":
        return  # an empty list has no last axis
    float32 = given.float().numpy() if kind.startswith("torch") else np.asarray(given, np.float32)
    latents, x_hat = sae.encode(given), sae(given)
    np.testing.assert_array_equal(np.asarray(latents), sae.encode(float32))
    np.testing.assert_array_equal(np.asarray(x_hat), sae(float32))
    np.testing.assert_array_equal(np.asarray(sae.decode(latents)), np.asarray(x_hat))
    assert latents.shape == (*leading, N) and x_hat.shape == (*leading, D)
    if kind.startswith("torch"):
        assert type(latents) is type(x_hat) is type(given)
        latents += 1  # its own memory
        np.testing.assert_array_equal(sae.encode(given), sae.encode(float32))
    if leading == (3,):
        values, indices = sae.encode_sparse(given)
        assert type(values) is type(latents) and values.shape == (3, 3)
        np.testing.assert_array_equal(
            np.take_along_axis(np.asarray(sae.encode(float32)), np.asarray(indices), 1), values
        )


@pytest.mark.parametrize(
    "x, words",
    [
        (np.zeros((2, D + 1)), ["width 7", "d_in 6", "(..., 6)"]),
        (np.float32(1), ["()"]),
        ([[1.0], [1.0, 2.0]], ["activations"]),
        (["a"] * D, ["real numbers"]),
        (np.zeros((2, D), complex), ["complex128"]),
        ([None] * D, ["object"]),
        ({}, ["object"]),
    ],
)
def test_what_is_no_activation_is_refused(x, words):
    sae = make("relu")
    for use in (sae.encode, sae, sae.loss, sae.row_losses):
        with pytest.raises(UserError) as error:
            use(x)
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: saes.TopK(d_in=8, d_sea=4), ["sae.d_sea", "sae.d_sae"]),
        (lambda: saes.TopK(d_sae=8, k=2), ["TopK", "d_in"]),
        (lambda: saes.TopK(d_in=8, d_sae=8, k="thirty-two"), ["sae.k", "whole number"]),
        (lambda: saes.TopKConfig(k="thirty-two"), ["sae.k", "'thirty-two'"]),
        (lambda: saes.TopKConfig(kk=1), ["sae.kk", "sae.k"]),
        (lambda: saes.ReLUConfig(k=1), ["sae.k", "relu", "sparsity_coefficient"]),
        (lambda: saes.TopKConfig(architecture="relu"), ["relu", "TopKConfig"]),
        (lambda: saes.SAEConfig("topk"), ["TopKConfig"]),
        (lambda: saes.TopK(d_in=8, d_sae=8, k=9), ["sae.k", "8"]),
        (lambda: saes.TopK(saes.ReLUConfig(d_in=8)), ["TopKConfig"]),
        (lambda: saes.TopK(d_in=8, d_sae=8, k=2, rngs="0"), ["rngs"]),
        (lambda: saes.ReLU(kind="crosscoder", d_sae=8), ["site_widths"]),
        (lambda: saes.ReLU(kind="transcoder", d_in=8, d_sae=8), ["d_out"]),
        (lambda: made("relu").direction(N), [f"no latent {N}"]),
        (lambda: made("relu").direction(-1), ["no latent -1"]),
        (lambda: made("relu").direction(0.5), ["whole numbers"]),
        (lambda: made("relu").loss(np.zeros((0, D))), ["none"]),
        (lambda: made("relu, transcoder").loss(np.zeros((2, D))), ["targets"]),
        (lambda: made("relu, skip_transcoder").decode(np.zeros(N)), ["decode(latents, x)"]),
        (lambda: sae_jax.config.TrainConfig(tokens="many"), ["train.tokens"]),
        (lambda: sae_jax.config.DataConfig(drop_nonfinite=1), ["data.drop_nonfinite"]),
        (lambda: sae_jax.config.Config(sae=3), ["sae", "SAEConfig"]),
    ],
)
def test_mistakes_in_python_are_one_line(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_parameters_are_checked():
    sae = made("topk")
    parameters = sae.parameters()
    for change, words in (
        ({"w_enc": parameters["w_dec"]}, ["w_enc", "transposed"]),
        ({"w_encoder": parameters["w_enc"]}, ["w_encoder", "w_enc"]),
    ):
        with pytest.raises(UserError) as error:
            saes.TopK.from_parameters(sae.config, parameters | change)
        assert all(word in str(error.value) for word in words)
    with pytest.raises(UserError, match="b_dec"):
        saes.TopK.from_parameters(sae.config, {"w_enc": parameters["w_enc"]})


@pytest.mark.parametrize("name", saes.ARCHITECTURES)
def test_a_notebook_completes_the_fields(name):
    cls = saes.ARCHITECTURES[name]
    signature = inspect.signature(cls)
    assert {"d_in", "d_sae", "rngs", "scale"} <= signature.parameters.keys()
    assert ("k" in signature.parameters) == (cls.Config.k is not None)
    assert documentation(cls.Config).keys() == set(types_of(cls.Config))


@every_case_quickly(*QUICK)
def test_saved_and_loaded_to_the_last_bit(tmp_path, name):
    sae = make(name, scale=1 / 3)
    sae.save(tmp_path / "sae")
    back = sae_jax.load(tmp_path / "sae")
    assert type(back) is type(sae) and back.config == sae.config
    assert np.array_equal(back.scale, sae.scale)
    assert np.array_equal(back.target_scale, sae.target_scale)
    for parameter, value in sae.parameters().items():
        np.testing.assert_array_equal(back.parameters()[parameter], value)
    values = json.loads((tmp_path / "sae" / "sae.json").read_text())
    assert values["version"] == 2 and "architecture_file" not in values
    assert values["config"].keys() == types_of(type(sae.config)).keys()
    with pytest.raises(UserError, match="is there already"):
        sae.save(tmp_path / "sae")
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("folder", sorted(p.name for p in EXPORTS.iterdir() if p.is_dir()))
def test_exports_of_before_are_read(folder):
    """Made by fixtures/make_export_fixtures.py with d780916; ours are of version 1."""
    name, architecture, kind = folder.split("-")
    if name in ("dictionary_learning", "openai"):
        pytest.importorskip("torch")
    assert FORMATS[name].recognises(EXPORTS / folder)
    sae = sae_jax.load(EXPORTS / folder)
    assert sae.config.kind == kind
    if name == "sae_jax":
        assert sae.config.architecture == architecture
    expected = np.load(EXPORTS / "expected.npz")
    x = expected["x"]
    np.testing.assert_allclose(sae.encode(x), expected[f"{folder}/latents"], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(sae(x), expected[f"{folder}/y_hat"], rtol=1e-5, atol=5e-6)
