"""Against the packages whose formats these are: what they save gives the same here, and what is
exported from here gives the same there. OpenAI's and Gemma Scope's come without a package to
install: by their published forward, in torch and numpy.
"""

import os

import numpy as np
import pytest
import safetensors.numpy
from test_interop_formats import EXPRESSED, inputs, random_sae

import sae_jax
from sae_jax import interop

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # of what the peers import
]


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("standard", {}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": False}),
        ("jumprelu", {}),  # with thresholds of either sign
    ],
)
def test_saes_saved_by_sae_lens(tmp_path, kind, options, subtract):
    torch = pytest.importorskip("torch")
    saes = pytest.importorskip("sae_lens.saes")
    config, cls = {
        "standard": (saes.StandardSAEConfig, saes.StandardSAE),
        "topk": (saes.TopKSAEConfig, saes.TopKSAE),
        "jumprelu": (saes.JumpReLUSAEConfig, saes.JumpReLUSAE),
    }[kind]
    theirs = cls(config(d_in=12, d_sae=40, apply_b_dec_to_input=subtract, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    theirs.save_model(tmp_path)
    ours = sae_jax.load(tmp_path)
    x = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(x))
        x_hat = theirs.decode(latents).numpy()
    np.testing.assert_allclose(ours.encode(x), latents.numpy(), atol=2e-4)
    np.testing.assert_allclose(ours(x), x_hat, atol=2e-3)


def by_sae_lens(directory, kind):
    from sae_lens import SAE

    del kind
    sae = SAE.load_from_disk(str(directory), device="cpu")
    sae.fold_W_dec_norm()  # SAEDashboard does it first of all

    def run(x):
        latents = sae.encode(x)
        return latents, sae(x)

    return run


def by_dictionary_learning(directory, kind):
    from dictionary_learning.utils import load_dictionary

    del kind
    sae, config = load_dictionary(str(directory), device="cpu")

    def run(x):
        latents = sae.encode(x)
        return latents, sae.decode(latents)

    assert config["trainer"]["activation_dim"] == 8
    return run


def by_sparsify(directory, kind):
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels need a GPU
    import torch
    from sparsify import SparseCoder

    del kind
    sae = SparseCoder.load_from_disk(str(directory), device="cpu")

    def run(x):
        picked = sae.encode(x)
        latents = torch.zeros(len(x), sae.num_latents)
        latents.scatter_(1, picked.top_indices, picked.top_acts)
        return latents, sae(x).sae_out

    return run


def by_gemma_scope(directory, kind):
    """The tutorial's JumpReLUSAE; with a transcoder's affine skip, Gemma Scope 2's."""
    import torch

    if (directory / "params.npz").is_file():
        archive = np.load(directory / "params.npz")
        arrays = {name.lower(): archive[name] for name in archive.files}
        assert set(archive.files) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
    else:
        arrays = safetensors.numpy.load_file(directory / "params.safetensors")
    p = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def run(x):
        pre = x @ p["w_enc"] + p["b_enc"]
        latents = (pre > p["threshold"]) * torch.nn.functional.relu(pre)
        x_hat = latents @ p["w_dec"] + p["b_dec"]
        if kind == "skip_transcoder":
            x_hat = x_hat + x @ p["affine_skip_connection"]
        return latents, x_hat

    return run


def by_openai(directory, kind):
    """sparse_autoencoder.model.Autoencoder: from_state_dict and forward, for ReLU."""
    import torch

    del kind
    state = torch.load(directory / "autoencoder.pt", weights_only=True)
    assert state.pop("activation") == "ReLU" and state.pop("activation_state_dict") == {}
    n_latents, n_inputs = state["encoder.weight"].shape
    model = torch.nn.ParameterDict()
    model.encoder = torch.nn.Linear(n_inputs, n_latents, bias=False)
    model.decoder = torch.nn.Linear(n_latents, n_inputs, bias=False)
    model.pre_bias = torch.nn.Parameter(torch.zeros(n_inputs))
    model.latent_bias = torch.nn.Parameter(torch.zeros(n_latents))
    for name, dtype in (
        ("stats_last_nonzero", torch.long),
        ("latents_activation_frequency", torch.float32),
        ("latents_mean_square", torch.float32),
    ):
        model.register_buffer(name, torch.zeros(n_latents, dtype=dtype))
    model.load_state_dict(state, strict=True)

    def run(x):
        pre = torch.nn.functional.linear(x - model.pre_bias, model.encoder.weight)
        latents = torch.relu(pre + model.latent_bias)
        return latents, model.decoder(latents) + model.pre_bias

    return run


READERS = {
    "saelens": by_sae_lens,
    "dictionary_learning": by_dictionary_learning,
    "sparsify": by_sparsify,
    "gemma_scope": by_gemma_scope,
    "gemma_scope_2": by_gemma_scope,
    "openai": by_openai,
}


@pytest.mark.parametrize("name,architecture,kind", [c for c in EXPRESSED if c[0] in READERS])
def test_the_package_loads_an_export_as_the_same_function(tmp_path, name, architecture, kind):
    """On activations of the norm that the SAE was trained on, which normalises them; within 1e-5 of
    their size."""
    torch = pytest.importorskip("torch")
    sae = random_sae(architecture, kind)
    interop.export(sae, name, tmp_path / "out", {"hook_name": "blocks.1.hook_resid_post"})
    run = READERS[name](tmp_path / "out", kind)
    x = inputs()
    with torch.no_grad():
        latents, x_hat = (tensor.numpy() for tensor in run(torch.from_numpy(x)))
    want, want_hat = sae.fold().encode(x), sae(x)
    np.testing.assert_allclose(latents, want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(x_hat, want_hat, atol=1e-5 * np.abs(want_hat).max())


def test_saelens_takes_heads_apart_where_an_export_is_of_z(tmp_path):
    torch, sae_lens = pytest.importorskip("torch"), pytest.importorskip("sae_lens")
    sae, x = random_sae("relu", "autoencoder"), inputs()
    interop.export(sae, "saelens", tmp_path / "out", {"hook_name": "blocks.1.attn.hook_z"})
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "out"))
    apart = torch.from_numpy(x).reshape(1, len(x), 2, -1)
    with torch.no_grad():
        x_hat = theirs(apart)
    assert x_hat.shape == apart.shape
    np.testing.assert_allclose(x_hat.reshape(x.shape), sae(x), atol=1e-5 * np.abs(sae(x)).max())
