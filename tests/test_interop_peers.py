"""Against the real sae-lens package: SAEs that it makes and saves give the same here."""

import numpy as np
import pytest

import sae_jax

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("standard", {}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": False}),
    ],
)
@pytest.mark.filterwarnings("default")  # of what sae-lens imports
def test_saes_saved_by_sae_lens(tmp_path, kind, options, subtract):
    torch = pytest.importorskip("torch")
    saes = pytest.importorskip("sae_lens.saes")
    config, cls = {
        "standard": (saes.StandardSAEConfig, saes.StandardSAE),
        "topk": (saes.TopKSAEConfig, saes.TopKSAE),
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
