"""Describes NVIDIA GPUs to XLA that are not there, so that it compiles for them.

It takes the CUDA plugin of JAX (`pip install "sae-jax[cuda]"`) and no GPU.
"""

import importlib.util
import os

import jax
from jax.experimental import topologies

from sae_jax.errors import UserError

COMPILER_OPTIONS = {
    # The first would sort by a library that asks for a GPU. The second would take untuned kernels
    # for products, where XLA calls cuBLAS on a machine that has the GPU.
    "xla_gpu_deviceless_cub_mode": "DEVICELESS_CUB_DISABLED",
    "xla_gpu_enable_triton_gemm": False,
    # Writes down how long XLA expects each loop to take.
    "xla_gpu_collect_cost_model_stats": True,
}
"""Options of `lowered.compile(...)` for these GPUs."""

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

# Of each chip: its full name, bytes/s to its memory, the memory's bytes, and its clock in kHz.
_CHIPS = {
    "h100": ("NVIDIA H100 80GB HBM3", 3_352_320_000_000, 84_942_979_072, 2_619_000),
    "h200": ("NVIDIA H200 141GB HBM3e", 4_800_000_000_000, 151_397_597_184, 3_750_000),
}

# Operations a clock by the number of a type in XLA: of the units for numbers, and of those for
# matrices (after XLA's own description of an H100).
_SCALAR_RATES = {4: (64, 1), 8: (64, 1), 10: (128, 2), 11: (128, 1), 12: (64, 1), 16: (128, 2)}
_MATRIX_RATES = {10: 512, 11: 256, 16: 512} | dict.fromkeys(
    (2, 6, 19, 20, 23, 24, 25, 28, 29, 33, 35, 36), 1024
)


def installed() -> bool:
    """Returns whether JAX's CUDA plugin is there."""
    return any(map(importlib.util.find_spec, _PLUGINS))


def absent_gpus(kind: str, per_node: int, nodes: int = 1) -> list:
    """Returns the devices of nodes of a kind of GPU, "h100" or "h200", to compile for.

    Raises UserError where the CUDA plugin is not installed, or describes GPUs in another way, and
    for another kind.
    """
    if not installed():
        raise UserError(
            'the CUDA compiler is not installed (pip install "sae-jax[cuda]"; it needs no GPU)'
        )
    if kind not in _CHIPS:
        raise UserError(f"the CUDA compiler is told of {' and '.join(_CHIPS)}, not of {kind}")
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # else it warns of every sort, which has no GPU here
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=_describe(kind), topology=f"1x{nodes}x{per_node}"
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"the CUDA compiler gives no {kind} ({reason}); another version of jax[cuda] may"
        ) from error
    return list(topology.devices)


def _describe(kind: str) -> str:
    """Returns a chip as XLA's GpuTargetConfigProto, in its text format."""
    name, rate, memory, clock = _CHIPS[kind]
    scalar = "".join(_rate(t, 1.98, *rates) for t, rates in _SCALAR_RATES.items())
    matrix = "".join(_rate(t, 1.8295201, 4, ops) for t, ops in _MATRIX_RATES.items())
    matrix += _rate(12, 1.98, 4, 32)
    newer = "collective_memory_granularity: 2097152" if jax.__version_info__ >= (0, 12) else ""
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {rate} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  scalar_unit_description {{ {scalar} }}
  matrix_unit_description {{ {matrix} }}
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  model_str: "sm_9.0a with {memory}B RAM, 132 cores, 1980000KHz clock, {clock}KHz mem clock, \
52428800B L2$"
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true name: "{name}"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0" cub_version: "3.1.2"
  device_interconnect_info {{ active_links: 18 }}
  {newer}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def _rate(type_: int, clock: float, units: int, operations: int) -> str:
    return (
        f"rate_infos {{ key: {type_} value {{ clock_rate_ghz: {clock} units_per_core: {units} "
        f"ops_per_clock: {operations} }} }} "
    )
