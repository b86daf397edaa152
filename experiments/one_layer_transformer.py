"""The one-layer transformer of Towards Monosemanticity (Bricken et al. 2023), trained on any text.

    python experiments/one_layer_transformer.py --out=DIR [--text=PATH,...] [--steps=N]

Attention, then a ReLU MLP of width 4d, whose site `mlp_act.0` is what that paper decomposes. The
default text is what every machine has, the sources of Python's own standard library. DIR gets
config.json, model.safetensors and tokenizer.json, which `sae-jax harvest --model=DIR` reads, and
training.json: the cross-entropy on held-out files beside a unigram and a bigram model's.

Held out is every file whose path (below the given directory) hashes to 0 modulo 20, so that the
split stays as files come and go. The model that ships in sae_jax/assets/one_layer was made by the
command above with no other flag, on a corpus that still had pydoc_data (now left out) in it.
"""

import hashlib
import pathlib
import sys
import sysconfig
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tqdm
from absl import app, flags, logging

from sae_jax import lm
from sae_jax.errors import UserError
from sae_jax.paths import save_json

_OUT = flags.DEFINE_string("out", None, "Directory of the model, made here.", required=True)
_TEXT = flags.DEFINE_list("text", [], "Files or directories; none: Python's standard library.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Of the byte-level BPE trained here.")
_D_MODEL = flags.DEFINE_integer(
    "d_model", 128, "Width of the residual stream; the MLP has 4 times."
)
_HEADS = flags.DEFINE_integer("heads", 4, "Attention heads, d_model / heads wide.")
_CONTEXT = flags.DEFINE_integer("context_length", 256, "Tokens of a context, BOS included.")
_BATCH = flags.DEFINE_integer("batch_size", 8, "Contexts in a step.")
_STEPS = flags.DEFINE_integer("steps", 6000, "Steps of Adam.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "Peak; cosine to a tenth after warm-up.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the parameters and of the order of contexts.")

BOS = "<|bos|>"
HELD_OUT_OF = 20


def main(argv):
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value")
    out = pathlib.Path(_OUT.value)
    if out.exists():
        raise UserError(f"{out} exists; remove it or give another --out")
    started = time.time()
    train_texts, heldout_texts = read_corpus(_TEXT.value)
    logging.info("%d documents to train on, %d held out", len(train_texts), len(heldout_texts))

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        report = make_model(pathlib.Path(scratch) / "model", train_texts, heldout_texts)
        report["wall_seconds"] = round(time.time() - started)
        save_json(report, pathlib.Path(scratch) / "model" / "training.json")
        (pathlib.Path(scratch) / "model").rename(out)  # finished, or not there at all
    for name in ("heldout_loss_unigram", "heldout_loss_bigram", "heldout_loss"):
        print(f"{name:22}{report[name]:.4f} nats/token")


def make_model(directory: pathlib.Path, train_texts: list[str], heldout_texts: list[str]) -> dict:
    """Writes tokenizer and model; returns what goes into training.json."""
    directory.mkdir()
    train_tokenizer(train_texts, _VOCAB_SIZE.value).save(str(directory / "tokenizer.json"))
    save_json({"bos_token": BOS, "eos_token": BOS}, directory / "tokenizer_config.json")
    tokenizer = lm.load_tokenizer(directory)
    train_tokens = lm.pack(train_texts, tokenizer, _CONTEXT.value)
    heldout_tokens = lm.pack(heldout_texts, tokenizer, _CONTEXT.value)

    config = lm.DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=_D_MODEL.value,
        num_layers=1,
        num_heads=_HEADS.value,
        num_kv_heads=_HEADS.value,
        head_dim=_D_MODEL.value // _HEADS.value,
        d_mlp=4 * _D_MODEL.value,
        max_context=_CONTEXT.value,
        activation="relu",
        gated_mlp=False,
    )
    params = fit(config, train_tokens)
    special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    lm.save_model(directory, config, params, jnp.bfloat16, **special)

    shipped = lm.load_params(directory)  # what a user gets: rounded to bfloat16 in the file
    unigram, bigram = ngram_losses(train_tokens, heldout_tokens, config.vocab_size)
    return {
        "heldout_loss": heldout_loss(config, shipped, heldout_tokens),
        "heldout_loss_unigram": unigram,
        "heldout_loss_bigram": bigram,
        "unit": "nats per token, mean over all tokens after BOS",
        "train_tokens": train_tokens.size,
        "heldout_tokens": heldout_tokens.size,
        "heldout_bytes_per_token": bytes_per_token(tokenizer, heldout_texts),
        "epochs": _STEPS.value * _BATCH.value / len(train_tokens),
        "text": _TEXT.value or f"standard library of Python {sys.version.split()[0]}",
        "flags": {
            flag.name: flag.value
            for flag in (_VOCAB_SIZE, _D_MODEL, _HEADS, _CONTEXT, _BATCH, _STEPS)
            + (_LEARNING_RATE, _SEED)
        },
    }


def read_corpus(sources: list[str]) -> tuple[list[str], list[str]]:
    """Documents to train on and documents held out, by the hash of each file's path."""
    if sources:
        files = [file for source in sources for file in named_files(pathlib.Path(source))]
    else:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        files = sorted((path.relative_to(root), path) for path in lm.standard_library())
    split = ([], [])
    for name, path in files:
        for number, text in enumerate(lm.read_texts(path)):
            key = hashlib.sha256(f"{name.as_posix()}:{number}".encode()).digest()
            split[key[0] % HELD_OUT_OF == 0].append(text)
    if not split[0] or not split[1]:
        raise UserError("the text has too few files to train on some and hold out others")
    return split


def named_files(source: pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Files with their names, which do not depend on where the source lies."""
    if not source.is_dir():
        return [(pathlib.Path(source.name), source)]
    return [(path.relative_to(source), path) for path in lm.text_files(source)]


def train_tokenizer(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def fit(config: lm.DecoderConfig, tokens_NxT: np.ndarray) -> dict:
    """Adam with warm-up and cosine decay; every epoch has its own order."""
    steps, batch_size = _STEPS.value, _BATCH.value
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, _LEARNING_RATE.value, min(200, steps // 10), steps, 0.1 * _LEARNING_RATE.value
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))
    params = lm.init(jax.random.key(_SEED.value), config)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, tokens):
        def loss_of(params):
            logits, _ = lm.forward(params, tokens, config)
            return lm.next_token_loss(logits, tokens).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    order = batches(len(tokens_NxT), batch_size, steps, _SEED.value)
    progress = tqdm.tqdm(order, total=steps, unit="step", disable=not sys.stderr.isatty())
    loss = None
    for number, rows in enumerate(progress):
        if number % 100 == 0 and loss is not None:
            progress.set_postfix(loss=f"{loss:.3f}")
            logging.info("step %d of %d: training loss %.4f", number, steps, loss)
        params, state, loss = step(params, state, tokens_NxT[rows])
    return params


def batches(num_rows: int, batch_size: int, steps: int, seed: int):
    """Rows of each step; an epoch is a permutation, its last short batch left out."""
    per_epoch = num_rows // batch_size
    if not per_epoch:
        raise UserError(f"the text fills {num_rows} contexts, fewer than one batch of {batch_size}")
    for number in range(steps):
        epoch, place = divmod(number, per_epoch)
        if place == 0:
            order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        yield order[place * batch_size : (place + 1) * batch_size]


def heldout_loss(config: lm.DecoderConfig, params: dict, tokens_NxT: np.ndarray) -> float:
    """Mean nats per token after BOS."""

    @jax.jit
    def total(tokens):
        return lm.next_token_loss(lm.forward(params, tokens, config)[0], tokens).sum()

    starts = range(0, len(tokens_NxT), _BATCH.value)
    nats = sum(float(total(tokens_NxT[s : s + _BATCH.value])) for s in starts)
    return nats / tokens_NxT[:, 1:].size


def ngram_losses(train_NxT: np.ndarray, heldout_NxT: np.ndarray, vocab_size: int):
    """Held-out nats per token of a unigram (add-one) and of a bigram with absolute discounting,
    interpolated with that unigram: (count(a b) - D)+ / count(a) + D types(a) / count(a) p(b),
    D = n1 / (n1 + 2 n2) as Ney, Essen and Kneser (1994) estimate it from the training counts."""
    before, after = train_NxT[:, :-1].ravel(), train_NxT[:, 1:].ravel()
    p_unigram = np.bincount(after, minlength=vocab_size) + 1.0
    p_unigram /= p_unigram.sum()
    pairs, counts = np.unique(before.astype(np.int64) * vocab_size + after, return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = (once + 1) / (once + 2 * twice + 2)  # one more of each: neither 0 / 0 nor 0
    followers = np.bincount(before, minlength=vocab_size)
    types = np.bincount(pairs // vocab_size, minlength=vocab_size)

    a, b = heldout_NxT[:, :-1].ravel(), heldout_NxT[:, 1:].ravel()
    wanted = a.astype(np.int64) * vocab_size + b
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    seen = np.maximum(followers[a], 1)
    back_off = np.where(followers[a] > 0, discount * types[a] / seen, 1.0)
    p_bigram = np.maximum(count - discount, 0) / seen + back_off * p_unigram[b]
    return float(-np.log(p_unigram[b]).mean()), float(-np.log(p_bigram).mean())


def bytes_per_token(tokenizer: lm.Tokenizer, texts: list[str]) -> float:
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    return sum(len(text.encode()) for text in texts) / tokens


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
