"""The hot operations: exact top-k, sparse and dense encoding and decoding, and their gradients.

Every operation takes global arrays and states its own collectives. It equals its plain reference
(tests/test_ops.py) on any mesh with the axes `data` (the batch) and `model` (the dictionary).
"""

from sae_jax.ops.batch_topk import batch_top_k
from sae_jax.ops.dead_latents import decode_dead, few_and_many
from sae_jax.ops.dense import Activated, dense_autoencode
from sae_jax.ops.prefixes import decode_groups
from sae_jax.ops.shares import Code
from sae_jax.ops.sparse import (
    encode_top_k,
    fired_latents,
    keep_top_k,
    sparse_decode,
    top_k_latents,
)
from sae_jax.ops.topk import top_k

__all__ = [
    "Activated",
    "Code",
    "batch_top_k",
    "decode_dead",
    "decode_groups",
    "dense_autoencode",
    "encode_top_k",
    "few_and_many",
    "fired_latents",
    "keep_top_k",
    "sparse_decode",
    "top_k",
    "top_k_latents",
]
