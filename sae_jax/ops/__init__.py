"""The hot operations: exact top-k, sparse and dense encode and decode, their gradients.

Every operation takes global arrays, says its own collectives, and equals its plain reference
(tests/test_ops.py) on any mesh with the axes `data` (batch) and `model` (dictionary).
"""

from sae_jax.ops.batch_topk import batch_top_k
from sae_jax.ops.dense import Activated, dense_autoencode
from sae_jax.ops.prefixes import decode_groups
from sae_jax.ops.sparse import Code, encode_top_k, fired_latents, keep_top_k, sparse_decode
from sae_jax.ops.topk import top_k

__all__ = [
    "Activated",
    "Code",
    "dense_autoencode",
    "decode_groups",
    "encode_top_k",
    "fired_latents",
    "batch_top_k",
    "sparse_decode",
    "keep_top_k",
    "top_k",
]
