"""Runs per-shard functions on the ambient mesh (`jax.set_mesh`), or plainly where there is none."""

import contextlib
import contextvars
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

# Where the two big tensors and the batch live. Axes of size one cost nothing.
BATCH = P("data", None)  # (B, d)
CODE = P("data", "model")  # (B, model shards * k): each shard's own slots
ENCODER = P(None, "model")  # (d_in, d_sae)
DECODER = P("model", None)  # (d_sae, d_out)
PER_LATENT = P("model")  # (d_sae,)
PER_TOKEN = P("data")  # (B,)

ZERO = ("model", "data")  # what `model` shards, when it is spread over `data` too

_for_accelerator = contextvars.ContextVar("for_accelerator", default=False)

BATCHED_RUNS = "batched_runs"  # name of the vmapped axis of runs that one program trains


def per_shard(function: Callable, in_specs, out_specs) -> Callable:
    """Returns a function of global arrays that runs `function` on each device's shards.

    The function states its collectives itself (`psum` below). It is never differentiated through:
    the operations define their gradients.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    axes = set(mesh.axis_names) - set(mesh.manual_axes)  # `run` may be taken apart already
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
    )


def most_of_runs(x: jax.Array) -> jax.Array:
    """Returns the largest x of all runs of the same `jax.vmap(axis_name=BATCHED_RUNS)`.

    It is the same for all of them, and so a branch or a loop that depends on it alone stays one.
    Without such an axis x itself is returned.
    """
    try:
        # Gathered, since jax 0.12 cannot lower a pmax of scalars here.
        return jax.lax.all_gather(x, BATCHED_RUNS).max(axis=0)
    except NameError:  # no such axis: one run by itself
        return x


def in_any_run(flag: jax.Array) -> jax.Array:
    """Whether a flag is set in any run of the same `jax.vmap(axis_name=BATCHED_RUNS)`.

    A branch on the result is taken by all runs or by none (`most_of_runs`).
    """
    return most_of_runs(flag)


def branch(flag: jax.Array, taken: Callable, otherwise: Callable):
    """Computes `jax.lax.cond(flag, taken, otherwise)` for branches that communicate.

    On several CPU devices both branches are computed. XLA's runtime there keeps collectives in
    order, but not those in a branch with those outside it. Two that ran at once crashed it, and may
    as well have added up each other's arrays. This was seen with jax 0.10.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1 and on_cpu():
        return jax.tree.map(lambda a, b: jnp.where(flag, a, b), taken(), otherwise())
    return jax.lax.cond(flag, taken, otherwise)


def psum(x: jax.Array, axis: str) -> jax.Array:
    """Sums x over the shards along one axis of the mesh."""
    return x if shard_count(axis) == 1 else jax.lax.psum(x, axis)


def gather_last(x: jax.Array, axis: str) -> jax.Array:
    """Returns every shard's (B, c) side by side, (B, shards * c), in the order of the axis."""
    return x if shard_count(axis) == 1 else jax.lax.all_gather(x, axis, axis=1, tiled=True)


def shard_index(axis: str) -> jax.Array | int:
    """Returns the index of this device along one axis of the mesh; 0 without a mesh."""
    return 0 if _without_mesh() else jax.lax.axis_index(axis)


def shard_count(axis: str) -> int:
    """Returns the number of shards along one axis of the mesh; 1 without a mesh."""
    return 1 if _without_mesh() else jax.lax.axis_size(axis)


def out_sharding(spec: P):
    """Returns `spec` for a contraction's `out_sharding=`; None without a mesh."""
    return None if _without_mesh() else spec


def matmul_f32(a: jax.Array, b: jax.Array, spec: P | None = None) -> jax.Array:
    """Returns a @ b in float32.

    Operands of float32 are multiplied as float32. By default a TPU would round them to bfloat16 and
    a GPU to TF32; operands of bfloat16 have that speed.

    Args:
      a: the left operand.
      b: the right operand.
      spec: how the result is sharded; None leaves it to JAX.
    """
    return jnp.matmul(
        a,
        b,
        precision="highest",
        preferred_element_type=jnp.float32,
        out_sharding=None if spec is None else out_sharding(spec),
    )


def zero_shard(tree):
    """Spreads arrays that are sharded over `model` over `data` too (ZeRO: Rajbhandari et al. 2020).

    Each device keeps a part of its own shard, so that there is no communication.
    """
    return jax.tree.map(lambda a: _with_axes(a, "model", ZERO), tree)


def zero_gather(tree):
    """Undoes `zero_shard`, with one all-gather of each array over `data`."""
    return jax.tree.map(lambda a: _with_axes(a, ZERO, "model"), tree)


def _with_axes(a: jax.Array, old, new) -> jax.Array:
    """Returns an array sharded over `new` where it was sharded over `old`."""
    spec = P(*(new if axes == old else axes for axes in jax.typeof(a).sharding.spec))
    return jax.reshard(a, spec)


def on_cpu() -> bool:
    """Whether the program that is traced is for CPUs: those of the mesh, or the default device."""
    return _platform() == "cpu" and not _for_accelerator.get()


def on_gpu() -> bool:
    """Whether the program that is traced is for GPUs: those of the mesh, or the default device."""
    return _platform() in ("gpu", "cuda")


def on_tpu() -> bool:
    """Whether the program that is traced is for TPUs: those of the mesh, or the default device."""
    return _platform() == "tpu"


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


@contextlib.contextmanager
def as_for_accelerators():
    """Traces programs as for accelerators on a mesh of CPUs, which stand for devices that are
    absent.
    """
    token = _for_accelerator.set(True)
    try:
        yield
    finally:
        _for_accelerator.reset(token)


def _without_mesh() -> bool:
    return jax.sharding.get_abstract_mesh().empty
