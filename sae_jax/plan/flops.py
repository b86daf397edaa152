"""Counts the FLOPs of a traced program's matrix products, for one device."""

import math
from collections import Counter
from collections.abc import Iterator

import jax
from jax.extend import core


def matmul_flops(jaxpr: core.Jaxpr, mesh: jax.sharding.Mesh) -> Counter:
    """Returns the FLOPs of a program's matrix products on one device, by the name of their dtype.

    A multiply and an add are two. Loops count as often as they run. Of the branches of a condition
    the cheapest counts, which is the one that an ordinary step takes: the others are for dead
    latents, of which a healthy run has none, for codes of which one shard has far more than its
    share, and for batches in which a faster way was not exact. A loop whose length the data decides
    counts for nothing, since it works for these too.

    Where the program is written per shard (`jax.shard_map`), shapes are a device's own. Elsewhere
    the operands' shardings divide the work.
    """
    total: Counter = Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("dot_general", "pallas_call"):
            total += product_flops(equation, mesh)
        elif name == "cond":
            branches = [matmul_flops(b.jaxpr, mesh) for b in equation.params["branches"]]
            total += min(branches, key=Counter.total)
        elif name != "while":
            times = equation.params["length"] if name == "scan" else 1
            for inner in _inner_jaxprs(equation.params):
                for dtype, flops in matmul_flops(inner, mesh).items():
                    total[dtype] += times * flops
    return total


def product_flops(equation, mesh) -> Counter:
    """Returns the FLOPs of one product, or of a kernel, on one device, by the name of their dtype.

    A kernel says its own, or has no products.
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


def _inner_jaxprs(parameters: dict) -> Iterator[core.Jaxpr]:
    """Yields the programs in an equation's parameters."""
    for value in parameters.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
