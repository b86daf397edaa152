"""The hot operations: exact top-k, sparse and dense encode and decode, their gradients.

Every operation takes global arrays, says its own collectives, and equals its plain reference
(tests/test_ops.py) on any mesh with the axes `data` (batch) and `model` (dictionary).
"""

from sae_jax.ops.batch_topk import over_batch
from sae_jax.ops.dense import Activated, autoencode
from sae_jax.ops.prefixes import decode_groups
from sae_jax.ops.sparse import Code, encode_top_k, fired_latents, sparse_decode, strongest
from sae_jax.ops.topk import top_k

__all__ = [
    "Activated",
    "Code",
    "autoencode",
    "decode_groups",
    "encode_top_k",
    "fired_latents",
    "over_batch",
    "sparse_decode",
    "strongest",
    "top_k",
]
