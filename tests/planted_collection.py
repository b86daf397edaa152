"""A collection with planted examples, of a tiny model's tokenizer, for tests of what shows one."""

import numpy as np
import world

from sae_jax import lm
from sae_jax.interpret.collection import BINS, COACTIVE, FULL, VERSION, About, Collection, write
from sae_jax.sae import TopK, TopKConfig, resolve

WIDTH, LENGTH, TOP, INTERVALS, PER_INTERVAL, BEFORE, AFTER = 16, 32, 3, 2, 1, 4, 3
SLOTS = TOP + INTERVALS * PER_INTERVAL


def make_sae(d_sae: int, width: int = WIDTH, seed: int = 0) -> TopK:
    """A random TopK SAE, whose latent 0 has a decoder row of 0."""
    rng = np.random.default_rng(seed)
    w_dec = rng.normal(size=(d_sae, width)).astype(np.float32)
    w_dec[0] = 0
    parameters = {
        "w_enc": w_dec.T, "w_dec": w_dec, "b_enc": np.zeros(d_sae, np.float32),
        "b_dec": np.zeros(width, np.float32),
    }  # fmt: skip
    return TopK.from_parameters(
        resolve(TopKConfig(d_sae=d_sae, k=min(4, d_sae)), width), parameters
    )


def make_tokens(tokenizer: lm.Tokenizer, texts=world.TEXTS) -> np.ndarray:
    """The texts, each in sequences of its own, that begin with BOS."""
    return lm.pack(texts * 3, tokenizer, LENGTH)


def plant(path, tokens: np.ndarray, d_sae: int, seed: int = 0, site: str = "resid_post.0"):
    """Writes a collection of random peaks on these tokens; latent 0 fires nowhere."""
    rng = np.random.default_rng(seed)
    maximum = (0.5 + 3 * rng.random(d_sae)).astype(np.float32)
    share = np.sort(rng.random((d_sae, SLOTS)), axis=1)[:, ::-1] * 0.9 + 0.05
    share[:, 0] = 1
    value = (maximum[:, None] * share).astype(np.float32)
    value[rng.random((d_sae, SLOTS)) < 0.2] = 0
    value[0] = maximum[0] = 0
    sequence = np.argsort(rng.random((d_sae, len(tokens))), axis=1)[:, :SLOTS].astype(np.int32)
    position = rng.integers(1, tokens.shape[1], (d_sae, SLOTS)).astype(np.int32)
    window = rng.random((d_sae, SLOTS, BEFORE + 1 + AFTER)) * share[..., None] * FULL
    window[..., BEFORE] = share * FULL
    window[rng.random(window.shape) < 0.4] = 0
    coactive = np.full((d_sae, COACTIVE), -1, np.int32)
    coactive[1:, 0] = np.arange(d_sae - 1)
    arrays = {
        "histogram": rng.integers(0, 9, (d_sae, BINS)).astype(np.uint32),
        "value": value,
        "sequence": sequence,
        "position": position,
        "window": window.astype(np.uint16),
        "coactive": coactive,
        "similarity": np.where(coactive >= 0, 0.25, 0).astype(np.float32),
        "tokens": tokens.astype(np.int32),
        "numbers": (10 * np.arange(len(tokens))).astype(np.int64),
    }
    about = About(
        VERSION, {"site": site}, d_sae, tokens.size, TOP, INTERVALS, PER_INTERVAL, BEFORE, AFTER
    )
    density = rng.random(d_sae).astype(np.float32)
    latents = {"density": density, "mean_activation": maximum / 2, "max_activation": maximum}
    write(path, about, latents, arrays)
    return Collection(path), arrays
