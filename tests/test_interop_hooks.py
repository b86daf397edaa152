"""SAEs of mlp_in, exported for the hook of TransformerLens that is nearest to it."""

import json
import pathlib

import numpy as np
import pytest
from test_interop_formats import random_sae

import sae_jax
from sae_jax import interop, lm
from sae_jax.errors import UserError
from sae_jax.interop import hooks

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "lm"
LAYER = 1
SITE = f"mlp_in.{LAYER}"
KINDS = [("relu", "transcoder"), ("jumprelu", "skip_transcoder"), ("gated", "autoencoder")]


def at_site(family):
    """Tokens of a model, and its mlp_in and what its MLP's norm reads, (rows, width)."""
    directory = FIXTURES / family
    tokens = np.load(directory / "expected.npz")["tokens"]
    config = lm.load_config(directory)
    reads = f"resid_{'pre' if config.parallel else 'mid'}.{LAYER}"
    _, taps = lm.forward(lm.load_params(directory), tokens, config, (SITE, reads))
    return tokens, *(np.asarray(taps[name]).reshape(-1, config.d_model) for name in (SITE, reads))


def wide_sae(architecture, kind, width):
    """A random SAE of a model's width, whose b_dec is in use on both sides."""
    small = random_sae(architecture, kind)
    rng = np.random.default_rng(0)
    fields = {"d_in": width, "d_out": width, "d_sae": small.config.d_sae, "kind": kind}
    config = type(small).Config(**fields)
    shapes = {
        "w_enc": (width, -1),
        "w_dec": (-1, width),
        "b_dec": (width,),
        "w_skip": (width, width),
    }
    parameters = dict(small.parameters())
    for name in shapes.keys() & parameters.keys():
        shape = [small.config.d_sae if n < 0 else n for n in shapes[name]]
        parameters[name] = rng.normal(size=shape).astype(np.float32)
    if config.unit_norm_decoder:
        parameters["w_dec"] /= np.linalg.norm(parameters["w_dec"], axis=1, keepdims=True)
    return type(small)(config, parameters=parameters)


@pytest.mark.parametrize(
    "family",
    ["llama_biases", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma2", "gpt_neox"))],
)
@pytest.mark.parametrize("architecture, kind", KINDS)
def test_the_same_latents_of_what_is_before_the_weight(family, architecture, kind):
    _, x, reads = at_site(family)
    config = lm.load_config(FIXTURES / family)
    centred = reads - reads.mean(axis=1, keepdims=True) * (config.norm == "layer")
    hook = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + config.norm_eps)
    sae = wide_sae(architecture, kind, x.shape[1])
    there, about = hooks.at_hook(sae, {"site": SITE}, FIXTURES / family)
    assert about["hook_name"] == f"blocks.{LAYER}.ln2.hook_normalized"
    close = {"atol": 1e-4 * np.abs(sae.encode(x)).max(), "rtol": 1e-3}
    assert np.abs(x - hook).max() > 0.1 and np.any(sae.encode(x))
    np.testing.assert_allclose(there.encode(hook), sae.encode(x), **close)
    y, got = np.asarray(sae(x)), np.asarray(there(hook))
    if kind == "autoencoder":  # it reconstructs what is at the hook
        weight, bias = lm.mlp_norm(FIXTURES / family, LAYER)
        got = got * weight + bias
    np.testing.assert_allclose(got, y, atol=1e-3 * np.abs(y).max(), rtol=1e-3)


def test_without_the_model_no_hook_is_named(tmp_path):
    sae, about = wide_sae("relu", "transcoder", 16), {"site": SITE}
    interop.export(sae, "saelens", tmp_path / "a", about)
    metadata = json.loads((tmp_path / "a" / "cfg.json").read_text())["metadata"]
    assert "hook_name" not in metadata and lm.hook_name(SITE) is None
    interop.export(sae, "saelens", tmp_path / "b", about, model=FIXTURES / "llama_biases")
    assert "ln2.hook_normalized" in (tmp_path / "b" / "README.md").read_text()
    assert interop.site(tmp_path / "b") is None  # it is no SAE of mlp_in any more
    with pytest.raises(UserError, match="has 2 layers, and none of number 7"):
        hooks.at_hook(sae, {"site": "mlp_in.7"}, FIXTURES / "llama_biases")


def in_transformer_lens(family):
    """The model as TransformerLens has it, without its weights processed."""
    import torch
    import transformers
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions as conversions

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        FIXTURES / family, attn_implementation="eager"
    )
    c = theirs.config
    common = {"device": "cpu", "dtype": torch.float32, "d_vocab": c.vocab_size, "n_ctx": 32}
    if family == "gpt2":
        config = HookedTransformerConfig(
            d_model=c.n_embd, d_head=c.n_embd // c.n_head, n_heads=c.n_head, n_layers=c.n_layer,
            act_fn="gelu_new", normalization_type="LN", eps=c.layer_norm_epsilon, **common,
        )  # fmt: skip
        state = conversions.convert_gpt2_weights(theirs, config)
    else:
        config = HookedTransformerConfig(
            d_model=c.hidden_size, d_head=c.head_dim, n_heads=c.num_attention_heads,
            n_key_value_heads=c.num_key_value_heads, n_layers=c.num_hidden_layers,
            d_mlp=c.intermediate_size, act_fn=c.hidden_act, normalization_type="RMS",
            final_rms=True, gated_mlp=True, eps=c.rms_norm_eps,
            positional_embedding_type="rotary", rotary_dim=c.head_dim,
            rotary_adjacent_pairs=False, rotary_base=c.rope_parameters["rope_theta"], **common,
        )  # fmt: skip
        state = conversions.convert_llama_weights(theirs, config)
    model = HookedTransformer(config)
    model.load_state_dict(state, strict=False)
    return model.eval()


@pytest.mark.peers
@pytest.mark.filterwarnings("default")  # of what the peers import
@pytest.mark.parametrize("family", ["gpt2", "llama_tied_gqa"])
def test_in_transformer_lens_with_folding_and_without(tmp_path, family):
    torch, sae_lens = pytest.importorskip("torch"), pytest.importorskip("sae_lens")
    tokens, x, _ = at_site(family)
    sae = wide_sae("relu", "transcoder", x.shape[1])
    about = {"site": SITE, "hook_name_out": f"blocks.{LAYER}.hook_mlp_out"}
    interop.export(sae, "saelens", tmp_path / "out", about, model=FIXTURES / family)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "out"))
    hook = theirs.cfg.metadata.hook_name
    want = sae_jax.load(tmp_path / "out")  # only its decoder is that of sae.fold()
    assert np.any(sae.fold().encode(x))
    model = in_transformer_lens(family)
    for folds in (False, True):
        if folds:
            model.process_weights_(center_writing_weights=False, center_unembed=False)
            assert model.cfg.normalization_type.endswith("Pre")
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.as_tensor(tokens, dtype=torch.long))
            there = cache[hook].reshape(-1, x.shape[1])
            latents, y = theirs.encode(there).numpy(), theirs(there).numpy()
        assert np.abs(there.numpy() - x).max() > 0.05
        scale = np.abs(sae(x)).max()
        np.testing.assert_allclose(latents, sae.fold().encode(x), atol=1e-4 * scale)
        np.testing.assert_allclose(y, sae(x), atol=1e-4 * scale)
        np.testing.assert_allclose(want(there.numpy()), y, atol=1e-4 * scale)
