"""Counts the FLOPs of traced matrix products, and tells how arrays are sharded."""

import math
from collections import Counter

import jax


def product_flops(equation, mesh) -> Counter:
    """Returns the FLOPs of one product, or of a kernel, on one device, by the name of their dtype.

    A multiply and an add are two. Within `jax.shard_map` shapes are a device's own. Elsewhere the
    operands' shardings divide the work. A kernel says its own, or has no products.
    """
    if equation.primitive.name == "pallas_call":
        estimate = equation.params["cost_estimate"]
        if not estimate or not estimate.flops:
            return Counter()
        types = (operand.aval.dtype for operand in equation.invars)
        dtype = next(t for t in types if jax.dtypes.issubdtype(t, jax.numpy.floating))
        return Counter({dtype.name: estimate.flops})
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    axes = [axes_of_dimension(left, i) for i in contracted] + [
        axes_of_dimension(out, i) for i in range(out.ndim)
    ]
    shards = math.prod(mesh.shape[axis] for group in axes for axis in group)
    depth = math.prod(left.shape[i] for i in contracted)
    return Counter({left.dtype.name: 2 * depth * math.prod(out.shape) // shards})


def axes_of_dimension(aval, i: int) -> tuple[str, ...]:
    """Returns the mesh axes that shard dimension i."""
    spec = aval.sharding.spec
    axes = spec[i] if i < len(spec) else None
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)
