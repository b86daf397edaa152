"""A tiny language model with a byte-level tokenizer, and texts in several scripts, for tests."""

import jax
import numpy as np
import tokenizers

from sae_jax import lm

TEXTS = [
    "The quick <b>brown</b> fox & the lazy dog said: \"hello\" and 'goodbye'.\n\tHe left.",
    "שלום עולם, זה טקסט בעברית שנכתב מימין לשמאל.",
    "日本語の文章です。絵文字も🙂🎉あります。",
    "Ünïcödé ist überall: naïve café, Straße, œuvre.",
]


def make_model(directory, *, num_layers=1, d_model=16, context=32, gated=False, seed=0):
    """Writes a random model with the merges of a small byte-level BPE; returns its config."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|bos|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = lm.DecoderConfig(
        vocab_size=backend.get_vocab_size(), d_model=d_model, num_layers=num_layers, num_heads=2,
        num_kv_heads=2, head_dim=d_model // 2, d_mlp=4 * d_model, max_context=context,
        activation="relu", gated_mlp=gated,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape), lm.layout(config))
    lm.save_model(directory, config, params, np.float32, bos_token_id=0)
    return config
