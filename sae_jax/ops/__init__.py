"""The hot operations: exact top-k, sparse and dense encode and decode, their gradients.

Every operation takes global arrays, says its own collectives, and equals its plain reference
(tests/test_ops.py) on any mesh with the axes `data` (batch) and `model` (dictionary).
"""

from sae_jax.ops.dense import relu_autoencode
from sae_jax.ops.sparse import Code, encode_top_k, fired_latents, sparse_decode
from sae_jax.ops.topk import top_k

__all__ = [
    "Code",
    "encode_top_k",
    "fired_latents",
    "relu_autoencode",
    "sparse_decode",
    "top_k",
]
