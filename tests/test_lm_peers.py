"""Random models of random shapes, beside transformers, live."""

import numpy as np
import pytest

from sae_jax import lm

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore")
def test_random_models_agree_with_transformers(tmp_path, seed):
    pytest.importorskip("transformers")
    from fixtures.make_lm_fixtures import random_model, reference

    rng = np.random.default_rng(seed)
    family = str(rng.choice(["llama", "mistral", "qwen2"]))
    kv_heads, group, head_dim = (int(x) for x in rng.integers(1, 4, 3))
    heads, head_dim = kv_heads * group, 2 * head_dim
    fields = {
        "vocab_size": int(rng.integers(20, 90)),
        "hidden_size": heads * head_dim,
        "intermediate_size": int(rng.integers(5, 40)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": float(10.0 ** rng.integers(-6, -1)),
        "rope_theta": float(10.0 ** rng.integers(2, 7)),
        "tie_word_embeddings": bool(rng.integers(2)),
    }
    if family == "llama":
        fields |= {"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))}
    if family == "mistral":
        fields["sliding_window"] = None
    model = random_model(family, seed, **fields)
    model.save_pretrained(tmp_path)
    tokens = rng.integers(0, fields["vocab_size"], (2, 20))
    expected = reference(model, tokens)
    config = lm.load_config(tmp_path)
    sites = tuple(name for name in expected if "." in name)
    assert len(sites) == 7 * config.num_layers
    logits, taps = lm.forward(lm.load_params(tmp_path), tokens, config, sites)
    for name, ours in {"logits": logits, **taps}.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(ours, expected[name], atol=2e-5 * scale, rtol=0, err_msg=name)
