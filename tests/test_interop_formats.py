"""Every format both ways, without the packages that read them; those are in test_interop_peers."""

import dataclasses
import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from training import make_config, make_store, metrics, sparse_rows

import sae_jax
from sae_jax import interop
from sae_jax.activations import open_stream
from sae_jax.cli import main
from sae_jax.errors import UserError
from sae_jax.interop import FORMATS
from sae_jax.sae import ARCHITECTURES, by_name, resolve
from sae_jax.sae.config import KINDS
from sae_jax.train.run import train_run

D, N = 8, 24
NEEDS_TORCH = ("dictionary_learning", "openai")  # to be written
EXPRESSED = [
    (name, *what)
    for name, one in FORMATS.items()
    for what in one.EXPRESSES
    if what[1] != "crosscoder"
]


def random_sae(architecture: str, kind: str = "autoencoder", seed: int = 0, d_out: int = D):
    """As after training on activations of norm 3 sqrt(d), whose SAE sees norm sqrt(d)."""
    rng = np.random.default_rng(seed)
    fields = {"k": 5} if ARCHITECTURES[architecture].Config.k is not None else {}
    if architecture == "matryoshka":
        fields["prefix_widths"] = (6, 12, N)
    config = resolve(
        by_name(architecture).Config(kind=kind, d_sae=N, **fields),
        (D,),
        None if kind == "autoencoder" else d_out,
    )
    w_dec = rng.normal(size=(N, d_out))
    if config.unit_norm_decoder:
        w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    parameters = {"w_enc": rng.normal(size=(D, N)), "w_dec": w_dec, "b_dec": rng.normal(size=d_out)}
    for name in ARCHITECTURES[architecture].fresh_latent(config):
        parameters[name] = 0.3 * rng.normal(size=N)
    if architecture in ("batchtopk", "matryoshka"):
        parameters["threshold"] = np.full(N, 0.7)  # those of jumprelu are of either sign
    if kind == "skip_transcoder":
        parameters["w_skip"] = rng.normal(size=(D, d_out))
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in parameters.items()}
    return ARCHITECTURES[architecture].from_parameters(
        config, arrays, 1 / 3, 1 / 3 if kind == "autoencoder" else 0.5
    )


def inputs(count=200) -> np.ndarray:
    return 3 * np.random.default_rng(7).normal(size=(count, D)).astype(np.float32)


def needs(name: str) -> None:
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")


QUICK = {("saelens", "gated", "autoencoder"), ("sae_jax", "topk", "autoencoder")}


@pytest.mark.parametrize(
    "name,architecture,kind",
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in EXPRESSED],
)
def test_what_is_written_is_read_as_the_same_function(tmp_path, name, architecture, kind):
    """And written again from that, the tensors are the same bytes."""
    needs(name)
    sae = random_sae(architecture, kind)
    interop.export(sae, name, tmp_path / "a", {"hook_name": "blocks.1.hook_resid_post"})
    assert interop.format_of(tmp_path / "a") == name
    back = sae_jax.load(tmp_path / "a")
    x = inputs()
    np.testing.assert_allclose(back(x), sae(x), atol=2e-5, rtol=1e-5)
    want = sae.encode(x) if name == "sae_jax" else sae.fold().encode(x)
    np.testing.assert_allclose(back.encode(x), want, atol=2e-5, rtol=1e-5)
    interop.export(back, name, tmp_path / "b")
    again = sae_jax.load(tmp_path / "b")
    for key, value in back.parameters().items():
        np.testing.assert_array_equal(again.parameters()[key], value, err_msg=key)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "openai" else pytest.mark.slow) for name in FORMATS],
)
def test_what_cannot_be_expressed_is_refused_with_who_can(tmp_path, name):
    needs(name)
    for architecture in ARCHITECTURES:
        for kind in KINDS[:3]:
            if (architecture, kind) in FORMATS[name].EXPRESSES:
                continue
            sae = random_sae(architecture, kind)
            with pytest.raises(
                UserError, match=f"{name} cannot express a {architecture} {kind}.*sae_jax"
            ):
                interop.export(sae, name, tmp_path / "out")
            assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is there already"):
        interop.export(random_sae("relu"), "saelens", tmp_path / "out")


def test_one_threshold_is_not_made_of_many(tmp_path):
    pytest.importorskip("torch")
    sae = random_sae("batchtopk")
    parameters = sae.parameters() | {"threshold": jnp.linspace(0.1, 1, N)}
    sae = type(sae).from_parameters(sae.config, parameters, sae.scale)
    with pytest.raises(UserError, match="one threshold for all latents"):
        interop.export(sae, "dictionary_learning", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def edit_json(file, **changes):
    values = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (values | changes).items() if v is not None}))


def edit_tensors(file, change):
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(change(tensors), file)


@pytest.mark.parametrize(
    "name,damage,complaint",
    [
        ("saelens", lambda d: edit_json(d / "cfg.json", k=None), "k is missing"),
        ("sparsify", lambda d: edit_json(d / "cfg.json", k=None), "missing required field `k`"),
        ("sparsify", lambda d: edit_json(d / "cfg.json", d_in=9), "d_in 9"),
        (
            "saelens",
            lambda d: edit_tensors(
                d / "sae_weights.safetensors",
                lambda t: t | {"W_enc": np.ascontiguousarray(t["W_enc"].T)},
            ),
            r"W_enc has shape \(24, 8\), transposed",
        ),
        (
            "sparsify",
            lambda d: edit_tensors(
                d / "sae.safetensors", lambda t: t | {"b_dec": np.full(D, np.nan, np.float32)}
            ),
            "b_dec holds NaN",
        ),
        (
            "sae_jax",
            lambda d: edit_json(d / "sae.json", version=3),
            "version: Invalid enum value 3",
        ),
        (
            "sae_jax",
            lambda d: (d / "sae.safetensors").write_bytes(b"\0" * 40),
            "sae.safetensors is damaged",
        ),
    ],
)
def test_damage_is_named(tmp_path, name, damage, complaint):
    interop.export(random_sae("topk"), name, tmp_path / "sae")
    damage(tmp_path / "sae")
    with pytest.raises(UserError, match=complaint):
        sae_jax.load(tmp_path / "sae")


def test_a_cut_npz_is_named(tmp_path):
    interop.export(random_sae("jumprelu"), "gemma_scope", tmp_path / "sae")
    file = tmp_path / "sae" / "params.npz"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match="params.npz .*damaged"):
        sae_jax.load(tmp_path / "sae")


def test_half_precision_is_read_as_what_it_says(tmp_path):
    sae = random_sae("jumprelu")
    interop.export(sae, "saelens", tmp_path / "sae")
    half = lambda tensors: {name: value.astype(np.float16) for name, value in tensors.items()}  # noqa: E731
    edit_tensors(tmp_path / "sae" / "sae_weights.safetensors", half)
    back = sae_jax.load(tmp_path / "sae")
    assert all(value.dtype == jnp.float32 for value in back.parameters().values())
    np.testing.assert_allclose(back.w_enc[...], sae.fold().w_enc[...], rtol=2e-3, atol=1e-3)


class Malice:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    interop.export(random_sae("relu"), "dictionary_learning", tmp_path / "sae")
    torch.save({"encoder.weight": Malice()}, tmp_path / "sae" / "ae.pt")
    with pytest.raises(UserError, match="not a file of tensors that is safe to read"):
        sae_jax.load(tmp_path / "sae")
    assert "must not run" not in capsys.readouterr().out


def test_the_config_of_a_native_folder_is_the_runs_own(tmp_path):
    sae = random_sae("matryoshka")
    interop.export(sae, "sae_jax", tmp_path / "sae", {"site": "mlp_out.3"})
    assert sae_jax.load(tmp_path / "sae").config == dataclasses.replace(sae.config)
    assert interop.site(tmp_path / "sae") == "mlp_out.3"


def test_the_table_in_help_is_what_is_expressed():
    def said(able: list[str]) -> str:
        missing = [name for name in ("topk", "gated") if name not in able]
        if len(able) + len(missing) < len(ARCHITECTURES):
            return ", ".join(able) or "-"
        return f"all but {', '.join(missing)}" if missing else "all"

    for name, one in FORMATS.items():
        columns = [said([a for a, k in one.EXPRESSES if k == kind]) for kind in KINDS[:3]]
        row = f"  {name:21}{columns[0]:21}{columns[1]:21}{columns[2]}\n"
        assert row in importlib.import_module("sae_jax.cli.export").SUMMARY


@pytest.mark.slow
def test_a_run_goes_out_and_comes_back_by_the_commands(tmp_path, capsys):
    store = make_store(tmp_path / "store")
    run = tmp_path / "run"
    train_run(make_config(store, "topk", steps=20), run)

    def cli(*arguments) -> int:
        return main(
            [arguments[0], *(f"--{a}={b}" for a, b in zip(*[iter(arguments[1:])] * 2, strict=True))]
        )

    assert cli("export", "checkpoint", run, "format", "saelens", "out", tmp_path / "out") == 0
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert cfg["metadata"]["context_size"] == 8
    assert cfg["metadata"]["l0"] == json.loads((run / "result.json").read_text())["eval_l0"]
    assert cli("import", "path", tmp_path / "out", "out", tmp_path / "back") == 0
    x = sparse_rows(50)
    sae, back = sae_jax.load(run), sae_jax.load(tmp_path / "back")
    np.testing.assert_allclose(back(x), sae(x), atol=1e-5)
    capsys.readouterr()
    refused = cli("import", "path", tmp_path / "out", "format", "openai", "out", tmp_path / "x")
    assert refused == 2 and "it looks like saelens" in capsys.readouterr().err
    assert cli("export", "checkpoint", run, "format", "openai", "out", tmp_path / "x") == 2
    assert "These can: saelens, dictionary_learning, sparsify, sae_jax" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "gated", "batchtopk"])
def test_a_run_goes_on_from_an_sae(tmp_path, architecture):
    """Its first loss is the SAE's own error on the first batch, in units in which the activations
    have norm sqrt(d)."""
    store = make_store(tmp_path / "store")
    sae = random_sae(architecture)
    config = dataclasses.replace(sae.config, d_in=16, d_out=16, d_sae=N)
    sae = type(sae).from_parameters(config, wide(sae), 1 / 3)
    interop.export(sae, "sae_jax", tmp_path / "sae")
    fields = {"d_sae": N, "aux_coefficient": 0.0}
    if sae.config.k is None:
        fields["sparsity_coefficient"] = 1e-6
    else:
        fields["k"] = sae.config.k
    config = make_config(
        store,
        architecture,
        steps=1,
        sae=fields,
        train={"init": str(tmp_path / "sae")},
        optimizer={"learning_rate": 1e-12},
    )
    result = train_run(config, tmp_path / "run", load_sae=interop.load).result
    x = next(open_stream(config.data).batches(0, prefetch=0)).astype(np.float32)
    back = sae_jax.load(tmp_path / "run")
    if architecture != "batchtopk":  # whose threshold is that of the last batch
        np.testing.assert_allclose(back(x), sae(x), atol=1e-4, rtol=1e-4)
        error = np.sum(np.square(x - np.asarray(sae(x))), axis=1).mean()
        assert metrics(tmp_path / "run")[0]["mse"] == pytest.approx(error, rel=1e-3)
    assert result["d_sae"] == N
    with pytest.raises(UserError, match="--config.sae.d_sae=24"):
        wrong = make_config(store, architecture, steps=1, train={"init": str(tmp_path / "sae")})
        train_run(wrong, tmp_path / "wrong", load_sae=interop.load)


def wide(sae) -> dict:
    """The parameters of an SAE of 8, for one of 16."""
    rng = np.random.default_rng(3)
    w_dec = rng.normal(size=(N, 16))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    own = {"w_enc": w_dec.T, "w_dec": w_dec, "b_dec": rng.normal(size=16)}
    return sae.parameters() | {n: jnp.asarray(a, jnp.float32) for n, a in own.items()}
