"""A planted world with tokens, of which the activations of every latent are known exactly.

Inputs and weights are small whole numbers, so that every sum is exact in any order.
"""

import numpy as np

from sae_jax.activations import write_store
from sae_jax.sae import by_name, resolve

D, N, T, BOS = 8, 40, 16, 7
SLOTS = {"top": 4, "intervals": 5, "per_interval": 3, "before": 4, "after": 3, "seed": 3}


def sae(architecture: str, kind: str = "autoencoder", widths=(D,)):
    cls = by_name(architecture)
    rng = np.random.default_rng(0)
    picks = {"k": 5} if cls.Config.k is not None else {}
    config = resolve(cls.Config(d_sae=N, kind=kind, **picks), *widths)
    parameters = {
        "w_enc": rng.integers(-2, 3, (config.d_in, N)),
        "w_dec": rng.integers(-1, 2, (N, config.d_out)) * 2.0,
        "b_dec": rng.integers(-1, 2, config.d_out),
        **{name: np.full(N, value) for name, value in cls.fresh_latent(config).items()},
    }
    parameters["b_enc"] = rng.integers(-25, -5, N).astype(np.float32)
    parameters["b_enc"][5] = -1e6  # never fires
    parameters["b_enc"][6] = 1e3  # always
    return cls.from_parameters(
        config, {name: np.asarray(value, np.float32) for name, value in parameters.items()}
    )


def texts(sequences: int) -> np.ndarray:
    """Tokens (sequences, T), some texts of which are there several times."""
    tokens = np.random.default_rng(1).integers(10, 50, (sequences, T)).astype(np.int32)
    tokens[sequences // 2 :: 9] = tokens[3]
    tokens[:, 0] = BOS
    return tokens


def activations(tokens: np.ndarray, seed: int = 2) -> np.ndarray:
    """What a model gives: it depends on a token and on the one before."""
    table = np.random.default_rng(seed).integers(-4, 5, (2, 50, D)).astype(np.float32)
    before = np.roll(tokens, 1, axis=1)
    return table[0][tokens] + table[1][before]


def store(path, sequences: int = 300):
    tokens = texts(sequences)
    sites = {name: activations(tokens, seed).reshape(-1, D) for name, seed in (("a", 2), ("b", 4))}
    return write_store(path, sites, context_length=T, tokens=tokens, special_tokens=(BOS,))
