"""Every layout of SAELens' files from before version 6, beside what SAELens makes of it."""

import json

import numpy as np
import pytest
import safetensors.numpy

import sae_jax
from sae_jax import interop
from sae_jax.cli import main
from sae_jax.errors import UserError

D, N, K = 16, 64, 4
OLD = {  # what version 3 wrote
    "architecture": "standard", "d_in": D, "d_sae": N, "activation_fn_str": "relu",
    "activation_fn_kwargs": {}, "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
    "context_size": 128, "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre",
    "hook_layer": 8, "hook_head_index": None, "prepend_bos": True, "dataset_path": "a/b",
    "dataset_trust_remote_code": True, "normalize_activations": "none", "dtype": "torch.float32",
    "device": "cpu", "sae_lens_training_version": "3.18.0",
}  # fmt: skip
TOP_K = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
NO = object()  # the field is left out
LAYOUTS = {
    "relu": {},
    "topk in activation_fn_str": TOP_K,
    "topk in activation_fn": {"activation_fn_str": NO, "activation_fn": "topk",
                              "activation_fn_kwargs": {"k": K}},
    "topk as an architecture too": TOP_K | {"architecture": "topk"},
    "topk of a bias that is not applied": TOP_K | {"apply_b_dec_to_input": False},
    "no architecture": {"architecture": NO},
    "no architecture, topk": TOP_K | {"architecture": NO},
    "no apply_b_dec_to_input": {"apply_b_dec_to_input": NO},
    "normalisation null": {"normalize_activations": None},
    "normalisation false": {"normalize_activations": False},
    "no normalisation": {"normalize_activations": NO},
    "names of version 1": {"hook_name": NO, "hook_layer": NO, "hook_head_index": NO,
                           "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8,
                           "hook_point_head_index": None},
    "metadata without a version": {"metadata": {"l0": 3.0}},
    "a version below 6": TOP_K | {"sae_lens_version": "5.11.0"},
    "a version below 6 in the metadata": TOP_K | {"metadata": {"sae_lens_version": "5.11.0"}},
    "a candidate of 6": {"sae_lens_version": "6.0.0-rc.3", "normalize_activations": "none"},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
    "scaling factor of ones": {"tensors": {"scaling_factor": np.ones(N)}},
    "scaling factor of ones, topk": TOP_K | {"tensors": {"scaling_factor": np.ones(N)}},
    "float16": TOP_K | {"dtype": "torch.float16", "type": np.float16},
}  # fmt: skip
NULL_METADATA = {"metadata": None}  # at which SAELens fails


def write(directory, changes):
    """A folder of the layout `changes`, with random weights; thresholds are of either sign."""
    changes = dict(changes)
    tensors, dtype = changes.pop("tensors", {}), changes.pop("type", np.float32)
    cfg = {name: value for name, value in (OLD | changes).items() if value is not NO}
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_dec": (D,)}
    per_latent = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}
    names = per_latent.get(str(cfg.get("architecture")), ("b_enc",))
    weights = {n: rng.normal(size=s) / 2 for n, s in (shapes | dict.fromkeys(names, (N,))).items()}
    arrays = {name: np.asarray(a, dtype) for name, a in (weights | tensors).items()}
    directory.mkdir()
    (directory / "cfg.json").write_text(json.dumps(cfg))
    safetensors.numpy.save_file(arrays, directory / "sae_weights.safetensors")
    return directory


@pytest.mark.peers
@pytest.mark.filterwarnings("default")  # of what the peers import
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_function_that_saelens_reads(tmp_path, layout):
    torch, sae_lens = pytest.importorskip("torch"), pytest.importorskip("sae_lens")
    write(tmp_path / "sae", LAYOUTS[layout])
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "sae"), dtype="float32")
    ours = sae_jax.load(tmp_path / "sae")
    x = np.random.default_rng(1).normal(size=(100, D)).astype(np.float32)
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(x)).numpy()
        x_hat = theirs(torch.from_numpy(x)).numpy()
    norms = 1.0
    if layout == "gated":  # ours has unit rows only
        norms = np.linalg.norm(theirs.W_dec.detach().numpy(), axis=1)
    assert 0 < (latents != 0).mean() < 0.9
    np.testing.assert_allclose(ours.encode(x), latents * norms, atol=1e-4)
    np.testing.assert_allclose(ours(x), x_hat, atol=1e-3)


@pytest.mark.parametrize("layout", [{}, NULL_METADATA, *LAYOUTS.values()])
def test_where_it_was_trained_is_known(tmp_path, layout):
    """Wherever the version has it: at the top level, before there was a section for it."""
    write(tmp_path / "sae", layout)
    if layout.get("sae_lens_version", "").startswith("6"):
        return  # whose metadata is in the section, and there only
    provenance = interop.read_provenance(tmp_path / "sae")
    assert provenance["hook_name"] == "blocks.8.hook_resid_pre"
    assert provenance["site"] == interop.site(tmp_path / "sae") == "resid_pre.8"
    assert (provenance["model_name"], provenance["context_size"]) == ("gpt2-small", 128)


def test_a_null_metadata_is_none(tmp_path):
    write(tmp_path / "sae", NULL_METADATA | TOP_K)
    assert main(["import", f"--path={tmp_path / 'sae'}", f"--out={tmp_path / 'ours'}"]) == 0
    sae = sae_jax.load(tmp_path / "ours")
    assert (sae.config.architecture, sae.config.k) == ("topk", K)
    assert interop.read_provenance(tmp_path / "ours")["hook_layer"] == 8


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"activation_fn_str": "tanh-relu"}, "architecture 'tanh-relu' cannot be read"),
        (TOP_K | {"activation_fn_kwargs": {}}, "k is missing"),
        (TOP_K | {"activation_fn_kwargs": {"k": True}}, "k: Expected `int"),
        (TOP_K | {"activation_fn_kwargs": [4]}, "activation_fn_kwargs: Expected `object"),
        (TOP_K | {"activation_fn_kwargs": {"k": N + 1}}, "sae.k must be at most sae.d_sae"),
        ({"normalize_activations": True}, "expected_average_only_in' happens at run time"),
        ({"tensors": {"scaling_factor": np.full(N, 2.0)}}, "a tensor scaling_factor that"),
        ({"metadata": [1]}, "metadata: Expected `object"),
        ({"architecture": ["topk"]}, "architecture: Expected `str`, got `array`"),
        ({"hook_name": 3}, "metadata.hook_name: Expected `str"),
        ({"sae_lens_version": 6}, "sae_lens_version: Expected `str"),
    ],
)
def test_what_cannot_be_the_same_is_refused(tmp_path, changes, complaint):
    write(tmp_path / "sae", changes)
    with pytest.raises(UserError, match=complaint):
        sae_jax.load(tmp_path / "sae")


def test_one_head_is_not_the_site(tmp_path):
    write(tmp_path / "sae", {"hook_name": "blocks.8.attn.hook_z", "hook_head_index": 3})
    assert interop.site(tmp_path / "sae") is None
