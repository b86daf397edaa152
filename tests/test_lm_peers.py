"""Random models of random shapes, beside transformers, live."""

import numpy as np
import pytest

from sae_jax import lm
from sae_jax.lm.families import FAMILIES, OWN_TYPE

pytestmark = pytest.mark.peers


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))]


def some(rng, **options):
    """One of the values of each."""
    return {name: values[int(rng.integers(len(values)))] for name, values in options.items()}


def rope_parameters(rng, *kinds):
    """A kind of scaling, whose numbers matter in a context of 20 tokens."""
    kind = str(rng.choice(kinds))
    values = {"rope_type": kind, "rope_theta": float(10.0 ** rng.integers(1, 7))}
    if kind != "default":
        values["factor"] = float(rng.uniform(2, 8))
    if kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = 16
    if kind == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": float(rng.uniform(2, 5))}
    return values


def fields_of(family, rng):
    kv_heads, group = (int(x) for x in rng.integers(1, 4, 2))
    heads, head_dim = kv_heads * group, 2 * int(rng.integers(4, 7))
    fields = {
        "vocab_size": int(rng.integers(20, 90)),
        "hidden_size": heads * head_dim,
        "intermediate_size": int(rng.integers(5, 40)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": heads,
        "tie_word_embeddings": bool(rng.integers(2)),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    layers = fields["num_hidden_layers"]
    activations = ["gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh"]
    if family == "gpt2":
        return fields | some(
            rng, layer_norm_epsilon=[1e-5, 1e-2], scale_attn_by_inverse_layer_idx=[True, False],
            scale_attn_weights=[True, False], activation_function=activations,
            n_inner=[None, 20],
        )  # fmt: skip
    if family == "gpt_neox":
        rope = rope_parameters(rng, "default", "linear")
        rope["partial_rotary_factor"] = [0.25, 0.5, 1.0][int(rng.integers(3))]
        fields |= {"hidden_size": heads * 8, "rope_parameters": rope}
        return fields | some(
            rng, layer_norm_eps=[1e-5, 1e-2], use_parallel_residual=[True, True, False],
            hidden_act=activations, attention_bias=[True, False],
        )  # fmt: skip
    fields |= {"num_key_value_heads": kv_heads, "rms_norm_eps": float(10.0 ** rng.integers(-6, -1))}
    if family == "gemma":
        return fields | some(rng, head_dim=[4, 6], hidden_act=["gelu", "gelu_pytorch_tanh"])
    if family.startswith("gemma"):
        fields |= some(rng, head_dim=[4, 6, 16], query_pre_attn_scalar=[7, 30],
                       sliding_window=[2, 5, 100])  # fmt: skip
        kinds = ["sliding_attention", "full_attention"]
        fields["layer_types"] = [str(rng.choice(kinds)) for _ in range(layers)]
        if family == "gemma2":
            fields |= some(rng, attn_logit_softcapping=[None, 1.0, 50.0],
                           final_logit_softcapping=[None, 3.0])  # fmt: skip
            return fields | {"rope_parameters": rope_parameters(rng, "default")}
        return fields | {
            "rope_parameters": {
                "full_attention": rope_parameters(rng, "default", "linear"),
                "sliding_attention": rope_parameters(rng, "default"),
            }
        }
    fields["rope_parameters"] = rope_parameters(rng, "default", "linear", "llama3", "yarn")
    if family == "llama":
        return fields | some(rng, attention_bias=[True, False], mlp_bias=[True, False],
                             hidden_act=activations)  # fmt: skip
    if family == "mistral":
        return fields | some(rng, head_dim=[None, 10], sliding_window=[None, 4])
    window = some(rng, use_sliding_window=[True, False], max_window_layers=[0, 1, 2])
    fields |= window | {"sliding_window": 5}
    return fields | ({"head_dim": 12} if family == "qwen3" else {})


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gemma3", OWN_TYPE)])
@pytest.mark.filterwarnings("ignore")
def test_random_models_agree_with_transformers(tmp_path, family, seed):
    """Of other sizes than the fixtures', every switch on or off, logits and all sites."""
    pytest.importorskip("transformers")
    from fixtures.make_lm_fixtures import random_model, reference, sites_of

    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    fields = fields_of(family, rng)
    model = random_model(family, seed, **fields)
    model.save_pretrained(tmp_path, max_shard_size=["10KB", "1GB"][seed % 2])
    tokens = rng.integers(0, fields["vocab_size"], (2, 20))
    expected = reference(model, tokens)
    config = lm.load_config(tmp_path)
    sites = tuple(name for name in expected if "." in name)
    assert len(sites) == len(sites_of(model.config)) * config.num_layers
    logits, taps = lm.forward(lm.load_params(tmp_path), tokens, config, sites)
    for name, ours in {"logits": logits, **taps}.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(ours, expected[name], atol=2e-5 * scale, rtol=0, err_msg=name)
