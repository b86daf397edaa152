"""How much of the memory of a TPU's core programs may take.

Google's generations differ: a v4 has 16 MiB, a v5p 64 MiB, a v5e and a v6e have 128 MiB.
"""

from jax.experimental.pallas import tpu as pltpu

from sae_jax.ops.sharding import on_tpu


def capacity() -> int:
    """Returns the bytes of a core of the TPUs that the program is traced for."""
    return pltpu.get_tpu_info().vmem_capacity_bytes


def for_kernels() -> int:
    """Returns the bytes that one of our kernels may take; the rest is the compiler's."""
    return capacity() * 7 // 8


def compiler_options() -> dict[str, str]:
    """Returns options of `jax.jit` for training steps, none but for TPUs.

    One operation may take three quarters of a core's memory. By default it is 16 or 32 MiB, with
    which large products reach two thirds of a v5p's peak, by the compiler's own estimate.
    """
    return {"xla_tpu_scoped_vmem_limit_kib": str(capacity() * 3 // 4096)} if on_tpu() else {}
