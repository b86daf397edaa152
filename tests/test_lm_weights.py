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
        ({"hidden_size": None}, "config.json has no hidden_size, which"),
        ({"hidden_size": "16"}, "hidden_size = '16' in .*Expected `int`, got `str`"),
        ({"model_type": None}, "model_type .* is 'None', which is not one of gpt2"),
    ],
)
def test_what_changes_the_function_is_refused(model, fields, message):
    set_config(model, **fields)
    with pytest.raises(UserError, match=message):
        lm.load_config(model)


WRONG_FIELDS = [
    ("llama", {"num_attention_heads": 0}),
    ("llama", {"num_key_value_heads": 0}),
    ("llama", {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": None}),
    ("llama", {"vocab_size": -3}),
    ("llama", {"head_dim": 0}),
    ("llama", {"num_hidden_layers": 10**9}),
    ("mistral", {"num_hidden_layers": 10**9}),
    ("llama", {"rope_scaling": "linear"}),
    ("llama", {"rope_scaling": [1]}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "x"}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 2.0,
                                   "high_freq_factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "beta_fast": None, "truncate": "yes"}}),
    ("llama", {"rope_parameters": {"full_attention": 3}}),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.1}}),
    ("llama", {"rope_parameters": None, "rope_theta": "abc"}),
    ("llama", {"rope_parameters": None, "rope_theta": 0}),
    ("llama", {"rope_parameters": None, "rope_theta": -1e4}),
    ("llama", {"rope_parameters": None, "rope_theta": float("inf")}),
    ("llama", {"rms_norm_eps": "1e-5"}),
    ("llama", {"rms_norm_eps": float("nan")}),
    ("llama", {"rms_norm_eps": -1}),
    ("llama", {"tie_word_embeddings": "false"}),
    ("llama", {"attention_bias": 1}),
    ("llama", {"hidden_act": 3}),
    ("llama", {"hidden_act": "\ud800"}),
    ("mistral", {"sliding_window": 0}),
    ("qwen2", {"layer_types": 5}),
    ("qwen2", {"max_window_layers": "x"}),
    ("gemma2", {"query_pre_attn_scalar": 0}),
    ("gemma2", {"attn_logit_softcapping": 0}),
    ("gemma2", {"final_logit_softcapping": "none"}),
    ("gemma3", {"sliding_window_pattern": 0}),
    ("gemma3", {"text_config": 3}),
    ("gpt2", {"n_head": 0}),
    ("gpt2", {"scale_attn_weights": "yes"}),
    ("gpt_neox", {"rotary_pct": 0, "rope_parameters": None}),
    ("gpt_neox", {"layer_norm_eps": "x"}),
    ("gpt_neox", {"use_parallel_residual": "no"}),
]  # fmt: skip


@pytest.mark.parametrize("family, fields", WRONG_FIELDS, ids=lambda p: str(p)[:60])
def test_fields_of_a_wrong_type_or_size_are_refused(tmp_path, family, fields):
    """In one line that names the file and the field, before anything is made of them."""
    source = {"llama": MODEL}.get(family, FIXTURES / family)
    shutil.copy(source / "config.json", tmp_path)
    set_config(tmp_path, **fields)
    with pytest.raises(UserError, match="config.json") as refused:
        lm.load_config(tmp_path)
    named = ["heads", "rope_parameters", *fields, "hidden_act", "intermediate_size", "norm_eps",
             "partial_rotary_factor"]  # fmt: skip
    text = str(refused.value)
    assert any(name in text for name in named) and "\n" not in text


def test_layers_that_the_files_do_not_hold_are_refused(model):
    set_config(model, num_hidden_layers=9_999)
    with pytest.raises(UserError, match="says 9,999 layers, and its files hold 3[0-9] tensors"):
        lm.load_params(model)


NOTES = {
    "HuggingFaceTB/SmolLM2-135M": {"is_llama_config": True, "rope_interleaved": False},
    "SmolLM2-Instruct": {"transformers.js_config": {"dtype": "q4"}},
    "saved by transformers 4.46": {"_attn_implementation_autoset": True},
    "Llama 1": {"max_sequence_length": 2048, "pad_token_id": -1},
    "unsloth": {"unsloth_version": "2024.9", "unsloth_fixed": True},
    "a tokenizer's class": {"tokenizer_class": "LlamaTokenizer"},
    "NEFTune": {"neftune_noise_alpha": 0.0},
    "old GPT-2": {"output_past": True, "n_special": 0, "_num_labels": 1},
}


@pytest.mark.parametrize("name", NOTES)
def test_fields_without_effect_are_taken(model, name):
    """Of config.json files of the hub."""
    set_config(model, **NOTES[name])
    assert lm.load_config(model) == lm.load_config(MODEL)


def test_notes_of_tools_are_named_in_a_warning(model, caplog):
    set_config(model, **{"_of_mine": 1, "transformers.js_config": {}, "unsloth_version": "1"})
    lm.load_config(model)
    assert "left out _of_mine, transformers.js_config, unsloth_version" in caplog.text


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"logit_scale": 2.0}, "logit_scale = 2.0 is not known.*take it out.*--model=torch:"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads = .* is not implemented"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config = .* is not implemented"),
        ({"rope_interleaved": True}, "rope_interleaved = True is not implemented"),
        ({"quantization": {"bits": 4}}, "quantization = .* is not known"),
    ],
)
def test_fields_with_an_effect_are_still_refused(model, fields, message):
    set_config(model, **fields)
    with pytest.raises(UserError, match=message):
        lm.load_config(model)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_fields_of_every_config_of_transformers_are_known(model, caplog):
    """What this version of transformers writes, and what it leaves out of what is there.

    A field that fails here is new: find out whether it changes the function, and list it with those
    that do not or read it.
    """
    transformers = pytest.importorskip("transformers")
    base = transformers.PretrainedConfig()
    fields = base.to_dict() | {name: value for name, value in vars(base).items()}
    sampling = getattr(transformers.GenerationConfig, "_get_default_generation_params", dict)
    fields |= sampling()  # which may be in config.json
    for name in [*fields]:
        fields[name] = 1 if fields[name] is None else fields[name]  # nulls say nothing
    own = ("transformers_version", "model_type", "eos_token_id", "bos_token_id", "pad_token_id")
    set_config(model, **{name: value for name, value in fields.items() if name not in own})
    assert lm.load_config(model) == lm.load_config(MODEL)
    for family in ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2",
                   "gemma3_text"):  # fmt: skip
        transformers.AutoConfig.for_model(family).save_pretrained(model)
        lm.load_config(model)
        (model / "config.json").unlink()


def split_in_two(directory, copies=0.0):
    """Makes two files of a model's one, the second with changed copies of some of the first's
    tensors, and an index that means those of the first."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    one, two = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    stale = {name: tensors[name] + np.float32(copies) for name in first[:5]}
    safetensors.numpy.save_file({n: tensors[n] for n in first}, directory / one)
    safetensors.numpy.save_file({n: tensors[n] for n in second} | stale, directory / two)
    index = {"metadata": {}, "weight_map": {n: one if n in first else two for n in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index["weight_map"], one, two


def set_index(directory, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("meant", [0, 1])
def test_a_tensor_is_read_from_the_file_that_the_index_says(model, meant):
    """vLLM #54230: it stands in two."""
    weight_map, one, two = split_in_two(model, copies=1.0)
    names = sorted(weight_map)[:5]
    if meant == 1:
        set_index(model, weight_map | {name: two for name in names})
    ours, original = lm.load_params(model), lm.load_params(MODEL)
    different = [
        jax.tree_util.keystr(path)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(original), strict=True
        )
        if not np.array_equal(a, b)
    ]
    assert len(different) == (5 if meant == 1 else 0)


def test_a_tensor_in_two_files_that_the_index_leaves_out_is_refused(model):
    weight_map, _, _ = split_in_two(model)
    name = sorted(weight_map)[0]
    set_index(model, {n: file for n, file in weight_map.items() if n != name})
    with pytest.raises(UserError, match=f"tensor {name} is in .*00001.* and in .*00002"):
        lm.load_params(model)


@pytest.mark.parametrize(
    "weight_map",
    [["a"], None, 3, {"lm_head.weight": 3}, {"x": "../other/model.safetensors"}, {"x": ""},
     {"x": "/etc/passwd"}, {"x": None}, {"x": ["a"]}],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(model, weight_map):
    split_in_two(model)
    set_index(model, weight_map)
    for read in (lm.load_params, lm.fingerprint):
        with pytest.raises(UserError, match="weight_map|is not the name of something in"):
            read(model)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_one_file_beside_an_index_is_read_as_transformers_reads_it(tmp_path):
    """The file, not what a stale index names."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = pathlib.Path(shutil.copytree(FIXTURES / "llama_tied_gqa", tmp_path / "model"))
    whole = (model / "model.safetensors").read_bytes()
    set_tensors(model, lambda tensors: [t.__imul__(0.5) for t in tensors.values()])
    split_in_two(model)
    (model / "model.safetensors").write_bytes(whole)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    tokens = np.array([[1, 5, 9, 3]])
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    ours, _ = lm.forward(lm.load_params(model), tokens, lm.load_config(model))
    np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers_are_refused(model, value, dtype):
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors):
        tensors[name][3, 5] = value
        tensors.update({key: tensor.astype(dtype) for key, tensor in tensors.items()})

    set_tensors(model, change)
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    for options in ({}, {"scan": True}, {"mesh": mesh}, {"dtype": jnp.bfloat16}):
        with pytest.raises(UserError, match=f"tensor {name} holds NaN or infinity"):
            lm.load_params(model, **options)


def test_weights_of_whole_numbers_are_refused(model):
    name = "model.layers.1.mlp.up_proj.weight"
    set_tensors(model, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)}))
    with pytest.raises(UserError, match=f"tensor {name} .*is I8, which is none of F32, BF16"):
        lm.load_params(model)


def test_home_is_expanded(tmp_path, monkeypatch):
    shutil.copytree(MODEL, tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lm.load_config("~/m") == lm.load_config(MODEL)
    assert lm.fingerprint("~/m") == lm.fingerprint(MODEL)
    assert lm.open_model("~/m").spec == str(tmp_path / "m")


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
