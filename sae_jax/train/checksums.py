"""Checksums of arrays, computed where the arrays are.

The checksum of an array is a sum over its elements, modulo 2^32, of a hash of the element's bits
and its place. So each device hashes its own shards, the sums alone are communicated, and a state
that is restored on another mesh has the checksums that it was saved with. For its place, an
element's hash is a one-to-one function of its bits: a change of one element always shows, and
another change escapes with probability 2^-32.
"""

import jax
import jax.numpy as jnp
import numpy as np


def checksums(tree) -> dict[str, int]:
    """Returns the checksums of the arrays in a tree, by their paths such as parameters/w_enc.

    Where there are several processes all of them call it, and get the same.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    sums = [_checksum(jnp.asarray(leaf)) for _, leaf in leaves]
    return {name: int(value) for name, value in zip(names, jax.device_get(sums), strict=True)}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Returns the checksum of an array of any shape, a uint32 scalar."""
    words = _as_words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + _indices(words, axis)
    bits = words ^ (place * jnp.uint32(0x9E3779B1))
    bits = (bits ^ (bits >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(bits ^ (bits >> jnp.uint32(16)), dtype=jnp.uint32)


def _as_words(x: jax.Array) -> jax.Array:
    """Returns the bits of each element as uint32; of 8 bytes an element, they are two."""
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    size = np.dtype(x.dtype).itemsize
    unsigned = jnp.uint32 if size == 8 else np.dtype(f"uint{8 * size}")
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _indices(words: jax.Array, axis: int) -> jax.Array:
    """Returns each element's index along an axis, sharded as `words` are."""
    sharding = jax.typeof(words).sharding
    out_sharding = None if sharding.mesh.empty else sharding
    return jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis, out_sharding=out_sharding)
