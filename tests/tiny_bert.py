"""Makes the files of a sentence encoder with random weights, and finds the real one."""

import json
import os
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
MINILM = pathlib.Path(os.environ.get("MINILM", SHARED / "models" / "minilm"))
"""all-MiniLM-L6-v2, as sentence-transformers saves it: the variable MINILM says where."""

WORDS = "a man is eating food piece of bread ##s ##er . , the cat sat on mat".split()
CONFIG = {
    "model_type": "bert", "vocab_size": 5 + len(WORDS), "hidden_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 40,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0,
}  # fmt: skip
MODES = {
    f"pooling_mode_{m}": m == "mean_tokens" for m in ("cls_token", "mean_tokens", "max_tokens")
}


def write(path, config=CONFIG, pooling=MODES, modules=("Transformer", "Pooling", "Normalize"),
          sentences=None, prefix="", tensors=None):  # fmt: skip
    """Writes all files; None for a part leaves it out. `tensors` change those of the model."""
    path.mkdir(parents=True)
    tensors = {f"{prefix}{k}": v for k, v in (weights(config) | (tensors or {})).items()}
    tensors = {k: v for k, v in tensors.items() if v is not None}
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    files = {"config.json": config, "1_Pooling/config.json": pooling}
    files["sentence_bert_config.json"] = sentences
    places = {"Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    files["modules.json"] = modules and [
        {"type": f"sentence_transformers.models.{name}", "path": places.get(name, "")}
        for name in modules
    ]
    (path / "1_Pooling").mkdir()
    for name, values in files.items():
        if values is not None:
            (path / name).write_text(json.dumps(values))
    tokenizer().save(str(path / "tokenizer.json"))
    return path


def tokenizer() -> tokenizers.Tokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding(length=16)  # as all-MiniLM-L6-v2's file has it
    made.enable_truncation(8)
    return made


def weights(config: dict) -> dict[str, np.ndarray]:
    rng, d, inner = np.random.default_rng(0), config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings": (config["vocab_size"], d),
        "embeddings.position_embeddings": (config["max_position_embeddings"], d),
        "embeddings.token_type_embeddings": (config["type_vocab_size"], d),
        "embeddings.LayerNorm": (d,),
        "pooler.dense": (d, d),
    }
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"encoder.layer.{i}.attention.self.{n}": (d, d) for n in ("query", "key", "value")
        }
        shapes |= {
            f"encoder.layer.{i}.attention.output.dense": (d, d),
            f"encoder.layer.{i}.attention.output.LayerNorm": (d,),
            f"encoder.layer.{i}.intermediate.dense": (inner, d),
            f"encoder.layer.{i}.output.dense": (d, inner),
            f"encoder.layer.{i}.output.LayerNorm": (d,),
        }
    found = {}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = rng.normal(size=shape, scale=0.3) + (len(shape) == 1)
        if not name.endswith("_embeddings"):
            found[f"{name}.bias"] = rng.normal(size=shape[0], scale=0.2)
    return {name: array.astype(np.float32) for name, array in found.items()}
