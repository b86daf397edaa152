"""Model directories: read sharded, round trip, and everything that must be refused."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sae_jax import lm
from sae_jax.errors import UserError

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "lm"
MODEL = FIXTURES / "llama_biases"


@pytest.fixture
def model(tmp_path):
    return pathlib.Path(shutil.copytree(MODEL, tmp_path / "model"))


def set_config(directory, **fields):
    values = json.loads((directory / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(values))


def set_tensors(directory, change):
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "gpt_neox", "llama_biases", "mistral"])
@pytest.mark.parametrize("scan", [False, True])
def test_each_device_reads_its_part_and_no_more(name, scan):
    """mistral lies in two files; gemma3 has one key/value head, gpt2 an odd vocabulary."""
    whole = lm.load_params(FIXTURES / name, scan=scan)
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    sharded = lm.load_params(FIXTURES / name, mesh=mesh, scan=scan)
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)
    small = {"w_k", "w_v", "b_k", "b_v"} if name == "gemma3" else set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(sharded):
        key = path[-1].key
        if key.startswith("w_") and key not in small or key in ("embed", "unembed"):
            for shard in leaf.addressable_shards:
                assert shard.data.size == leaf.size // 2, key


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama_tied_gqa"])
def test_a_model_saved_without_its_head_is_the_same(name, tmp_path):
    """As the files of the hub's gpt2, and with tensors that say nothing new."""
    model = pathlib.Path(shutil.copytree(FIXTURES / name, tmp_path / "model"))

    def strip(tensors):
        for key in list(tensors):
            for base in ("transformer.", "gpt_neox.", "model."):
                if key.startswith(base):
                    tensors[key.removeprefix(base)] = tensors.pop(key)
        causal = {"gpt2": "h.0.attn.bias", "gpt_neox": "layers.0.attention.bias"}
        tensors[causal.get(name, "layers.0.self_attn.rotary_emb.inv_freq")] = np.zeros(3)

    set_tensors(model, strip)
    jax.tree.map(
        np.testing.assert_array_equal, lm.load_params(model), lm.load_params(FIXTURES / name)
    )


def test_gemma3_with_images(tmp_path):
    """Its text_config leaves out what is Gemma 3's default; the image part is not read."""
    model = pathlib.Path(shutil.copytree(FIXTURES / "gemma3", tmp_path / "model"))
    text = json.loads((model / "config.json").read_text())
    set_config(model, model_type="gemma3", text_config=text, vision_config={"patch_size": 14})

    def dress(tensors):
        for key in list(tensors):
            tensors["language_model." + key] = tensors.pop(key)
        tensors["vision_tower.patches"] = np.zeros(3)

    set_tensors(model, dress)
    assert lm.load_config(model) == lm.load_config(FIXTURES / "gemma3")
    params = lm.load_params(FIXTURES / "gemma3")
    jax.tree.map(np.testing.assert_array_equal, lm.load_params(model), params)
    few = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
           "sliding_window": 1024, "model_type": "gemma3_text",
           "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    (model / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": few}))
    config = lm.load_config(model)
    assert (config.vocab_size, config.num_heads, config.head_dim) == (262_208, 8, 256)
    assert config.rope == lm.Rope(theta=1e6, scaling="linear", factor=8.0)
    assert config.local_rope == lm.Rope(theta=1e4)
    assert [i for i, window in enumerate(config.windows) if window is None] == [5, 11, 17, 23, 29]


def test_save_and_load_round_trip(tmp_path):
    config = lm.DecoderConfig(
        vocab_size=40, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_mlp=64,
        max_context=32, activation="relu", gated_mlp=False, qkv_bias=True, attn_out_bias=True,
        mlp_bias=True,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), lm.layout(config))
    lm.save_model(tmp_path, config, params, bos_token_id=3)
    assert lm.load_config(tmp_path) == config
    loaded = lm.load_params(tmp_path)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(ml_dtypes.bfloat16)),
        loaded,
        params,
    )
    assert lm.load_params(tmp_path, jnp.bfloat16)["embed"].dtype == jnp.bfloat16
    with pytest.raises(FileExistsError):
        lm.save_model(tmp_path, config, params)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "opt"}, "model_type .* is 'opt'.*--model=torch:"),
        ({"hidden_act": "mish"}, "hidden_act .* is 'mish'"),
        ({"rope_parameters": {"type": "longrope", "factor": 2.0}}, "of type 'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "surprise": 0.5}}, "with surprise"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "other"]}, "layer_types"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"logit_scale": 2.0}, "logit_scale = 2.0 is not known"),
        ({"num_key_value_heads": 3}, "3 key/value heads do not divide 4"),
        ({"hidden_size": None}, "hidden_size must be a whole number, not None"),
        ({"hidden_size": "16"}, "hidden_size must be a whole number, not '16'"),
        ({"model_type": None}, "model_type .* is 'None', which is not one of gpt2"),
    ],
)
def test_what_changes_the_function_is_refused(model, fields, message):
    set_config(model, **fields)
    with pytest.raises(UserError, match=message):
        lm.load_config(model)


def test_damaged_directories_are_refused_by_name(model):
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="model.safetensors is damaged or truncated"):
        lm.load_params(model)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="model.safetensors is damaged or truncated"):
        lm.load_params(model)
    file.unlink()
    with pytest.raises(UserError, match="no model.safetensors in"):
        lm.load_params(model)
    (model / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        lm.load_config(model)
    with pytest.raises(UserError, match="no config.json in"):
        lm.load_config(model / "elsewhere")


def test_a_missing_file_of_several_is_named(tmp_path):
    model = shutil.copytree(FIXTURES / "mistral", tmp_path / "model")
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="no model-00002-of-00002.safetensors"):
        lm.load_params(model)


def test_tensors_that_do_not_fit_the_config_are_named(model):
    name = "model.layers.1.mlp.up_proj.weight"
    set_tensors(model, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(UserError, match=rf"{name} has shape \[23, 16\]; .* \[24, 16\]"):
        lm.load_params(model)
    set_tensors(model, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"no tensor {name}"):
        lm.load_params(model)


def test_a_tensor_that_the_config_does_not_explain_is_refused(model):
    norm = "model.layers.0.self_attn.q_norm.weight"
    set_tensors(model, lambda tensors: tensors.update({norm: np.ones(4, np.float32)}))
    with pytest.raises(UserError, match=f"a tensor {norm}"):
        lm.load_params(model)


def test_fingerprint_sees_one_changed_weight(model):
    before = lm.fingerprint(model)
    assert before == lm.fingerprint(MODEL)

    def change(tensors):
        tensors["model.norm.weight"][3] += 1e-3

    set_tensors(model, change)
    assert lm.fingerprint(model) != before


PUBLISHED = {
    "gpt2": {
        "activation_function": "gelu_new", "attn_pdrop": 0.1, "model_type": "gpt2", "n_ctx": 1024,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
        "layer_norm_epsilon": 1e-5, "summary_type": "cls_index", "task_specific_params": {},
    },
    "pythia-70m": {
        "hidden_act": "gelu", "hidden_size": 512, "intermediate_size": 2048, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8,
        "num_hidden_layers": 6, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50304,
    },
    "Llama-3.2-1B": {
        "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": True, "vocab_size": 128256,
    },
    "Qwen2.5-0.5B": {
        "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768, "use_mrope": False,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "gemma-2-2b": {
        "attention_bias": False, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096, "vocab_size": 256000,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "name, parameters, what",
    [
        ("gpt2", 124_439_808, {"rope": None, "head_dim": 64, "d_mlp": 3072}),
        ("pythia-70m", 70_426_624, {"parallel": True, "rope": lm.Rope(features=16)}),
        ("Llama-3.2-1B", 1_235_814_400, {"group": 4, "windows": ()}),
        ("Qwen2.5-0.5B", 494_032_768, {"qkv_bias": True, "attn_out_bias": False, "windows": ()}),
        ("gemma-2-2b", 2_614_341_888, {"post_norms": True, "windows": (4096, None) * 13}),
    ],
)
def test_published_configs_give_models_of_the_published_size(tmp_path, name, parameters, what):
    """The fields of the hub's config.json files, from before transformers 5."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = lm.load_config(tmp_path)
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(lm.layout(config))) == parameters
    assert {field: getattr(config, field) for field in what} == what
