"""Reading SAELens folders: the same function as SAELens' formulas, and what is refused."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

import sae_jax
from sae_jax import interop
from sae_jax.cli import main
from sae_jax.errors import UserError

D, N, K = 6, 20, 4
RECORDED = pathlib.Path(__file__).parents[2] / "shared" / "data" / "saes"


def write(directory, drop=(), tensors=None, **fields):
    rng = np.random.default_rng(0)
    default = {
        "W_enc": rng.normal(size=(D, N)),
        "W_dec": rng.normal(size=(N, D)),
        "b_enc": rng.normal(size=N),
        "b_dec": rng.normal(size=D),
    }
    tensors = {n: np.float32(t) for n, t in (default | (tensors or {})).items() if t is not None}
    cfg = {
        "architecture": "topk", "k": K, "d_in": D, "d_sae": N, "dtype": "float32",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_pre"},
    } | fields  # fmt: skip
    directory.mkdir(exist_ok=True)
    (directory / "cfg.json").write_text(json.dumps({n: v for n, v in cfg.items() if n not in drop}))
    safetensors.numpy.save_file(tensors, directory / "sae_weights.safetensors")
    return tensors


def saelens(t, x, architecture, subtract, rescale):
    """SAELens 6.54's encode and decode."""
    norms = np.linalg.norm(t["W_dec"], axis=1)
    pre = (x - t["b_dec"] * subtract) @ t["W_enc"] + t["b_enc"]
    if architecture == "topk":
        pre = pre * norms if rescale else pre
        pre[pre < np.sort(pre, axis=1)[:, -K, None]] = 0
    latents = np.maximum(pre, 0)
    return latents, (latents / norms if rescale else latents) @ t["W_dec"] + t["b_dec"]


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(
    "architecture, rescale", [("topk", True), ("topk", False), ("standard", False)]
)
def test_the_same_function(tmp_path, architecture, rescale, subtract):
    fields = {"architecture": architecture, "apply_b_dec_to_input": subtract}
    if architecture == "topk":
        fields["rescale_acts_by_decoder_norm"] = rescale
    tensors = write(tmp_path / "sae", **fields)
    sae = sae_jax.load(tmp_path / "sae")
    x = np.random.default_rng(1).normal(size=(100, D)).astype(np.float32)
    latents, x_hat = saelens(tensors, x, architecture, subtract, rescale)
    np.testing.assert_allclose(sae.encode(x), latents, atol=1e-4)
    np.testing.assert_allclose(sae(x), x_hat, atol=1e-4)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"drop": ["k"]}, "k is missing"),
        ({"k": 0}, "k: Expected `int` >= 1"),
        ({"drop": ["architecture"]}, "missing required field `architecture`"),
        ({"architecture": "temporal"}, "architecture 'temporal' cannot be read"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ({"reshape_activations": "hook_q"}, "reshape_activations 'hook_q'"),
        ({"tensors": {"threshold": np.ones(N)}}, "tensor threshold that its config does not"),
        ({"tensors": {"b_enc": None}}, "no tensor b_enc"),
        ({"d_sae": N + 1}, r"W_enc has shape \(6, 20\); it must be \(6, 21\)"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_what_would_change_the_function_is_refused(tmp_path, changes, complaint):
    write(tmp_path / "sae", **changes)
    with pytest.raises(UserError, match=complaint):
        sae_jax.load(tmp_path / "sae")


def test_a_truncated_file_and_an_empty_directory_are_named(tmp_path):
    write(tmp_path / "sae")
    file = tmp_path / "sae" / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="sae_weights.safetensors is damaged"):
        sae_jax.load(tmp_path / "sae")
    with pytest.raises(UserError, match="no SAE at"):
        sae_jax.load(tmp_path)


@pytest.mark.parametrize(
    "hook, site",
    [
        ("blocks.3.hook_resid_pre", "resid_pre.3"),
        ("blocks.11.hook_mlp_out", "mlp_out.11"),
        ("blocks.0.mlp.hook_post", "mlp_act.0"),
        ("model.layers.2", "resid_post.2"),
        ("blocks.0.attn.hook_z", "z.0"),
        ("blocks.0.attn.hook_q", None),
        (None, None),
    ],
)
def test_sites_of_hooks(tmp_path, hook, site):
    write(tmp_path / "sae", metadata={"hook_name": hook})
    assert interop.site(tmp_path / "sae") == site


@pytest.mark.skipif(not RECORDED.is_dir(), reason="no shared data: ../shared/data/saes")
@pytest.mark.parametrize(
    "name, format, file",
    [
        ("saelens_6.54.12_topk_stories260K_L2", "saelens", "sae_weights.safetensors"),
        ("sparsify_1.3.3_topk_stories260K_L2", "sparsify", "sae.safetensors"),
    ],
)
def test_what_the_packages_saved_comes_in_and_goes_out_byte_for_byte(tmp_path, name, format, file):
    ours, out = tmp_path / "ours", tmp_path / "out"
    assert main(["import", f"--path={RECORDED / name}", f"--out={ours}"]) == 0
    assert main(["export", f"--checkpoint={ours}", f"--format={format}", f"--out={out}"]) == 0
    before, after = (
        safetensors.numpy.load_file(directory / file) for directory in (RECORDED / name, out)
    )
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype
        assert before[tensor].tobytes() == after[tensor].tobytes(), tensor
    if format == "saelens":
        hook = json.loads((out / "cfg.json").read_text())["metadata"]["hook_name"]
        assert hook == "model.layers.2"  # SAELens' own evaluation asks for it


def test_of_heads_side_by_side(tmp_path):
    """SAELens joins the heads' axes itself for such an SAE, if its file says so."""
    write(
        tmp_path / "z", reshape_activations="hook_z", metadata={"hook_name": "blocks.3.attn.hook_z"}
    )
    about = {"hook_name": "blocks.3.attn.hook_z"}
    interop.export(interop.load(tmp_path / "z"), "saelens", tmp_path / "out", about)
    assert (
        json.loads((tmp_path / "out" / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    )
