"""Describes NVIDIA GPUs to XLA that are not there, so that it compiles for them.

It takes the CUDA plugin of JAX (`pip install "sae-jax[cuda]"`) and no GPU.
"""

import importlib.util
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from sae_jax.errors import UserError

COMPILER_OPTIONS = {
    # The first would sort by a library that asks for a GPU. The second would take untuned kernels
    # for products, where XLA calls cuBLAS on a machine that has the GPU.
    "xla_gpu_deviceless_cub_mode": "DEVICELESS_CUB_DISABLED",
    "xla_gpu_enable_triton_gemm": False,
}
"""Options of `lowered.compile(...)` for these GPUs."""

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


class _Gpu(NamedTuple):
    """What XLA asks about a GPU, after its own descriptions.

    Attributes:
      name: its full name.
      capability: its compute capability, with the letter of features that only it has.
      memory_rate: bytes/s to its memory.
      memory: the memory's bytes.
      memory_clock: in kHz.
      cores: its multiprocessors.
      units: units for float32 of a multiprocessor.
      clock: in GHz.
      cache: bytes of its second cache.
      shared: bytes of a multiprocessor's shared memory, of which a program may take all but 1,024.
      products: multiplications and additions of float32, rounded to TF32, of a multiprocessor's
        unit for matrices in one clock; 0 where XLA has no such figures.
    """

    name: str
    capability: str
    memory_rate: int
    memory: int
    memory_clock: int
    cores: int
    units: int
    clock: float
    cache: int
    shared: int
    products: int


_A100 = _Gpu(
    "NVIDIA A100-SXM4-80GB", "8.0", 2_039_040_000_000, 85_100_068_864, 1_593_000,
    cores=108, units=64, clock=1.41, cache=41_943_040, shared=167_936, products=0,
)  # fmt: skip
_H100 = _Gpu(
    "NVIDIA H100 80GB HBM3", "9.0a", 3_352_320_000_000, 84_942_979_072, 2_619_000,
    cores=132, units=128, clock=1.98, cache=52_428_800, shared=233_472, products=256,
)  # fmt: skip
_H200 = _H100._replace(
    name="NVIDIA H200 141GB HBM3e",
    memory_rate=4_800_000_000_000,
    memory=151_397_597_184,
    memory_clock=3_750_000,
)
_B200 = _Gpu(
    "NVIDIA B200", "10.0a", 7_672_320_000_000, 191_514_411_008, 3_996_000,
    cores=148, units=128, clock=1.965, cache=132_644_864, shared=233_472, products=512,
)  # fmt: skip
_GPUS = {"a100": _A100, "h100": _H100, "h200": _H200, "b200": _B200}

# By the number of a type in XLA: units of a multiprocessor for numbers and their operations a
# clock; and how many times the products of TF32 its units for matrices do.
_SCALAR_RATES = {4: (64, 1), 8: (64, 1), 10: (128, 2), 11: (128, 1), 12: (64, 1), 16: (128, 2)}
_MATRIX_RATES = {10: 2, 11: 1, 16: 2} | dict.fromkeys(
    (2, 6, 19, 20, 23, 24, 25, 28, 29, 33, 35, 36), 4
)


def installed() -> bool:
    """Returns whether JAX's CUDA plugin is there."""
    return any(map(importlib.util.find_spec, _PLUGINS))


def options_for(kind: str) -> dict[str, object]:
    """Returns `COMPILER_OPTIONS` with which XLA also writes down how long it expects each loop to
    take, where it can: it has no figures for an A100's products, and would not compile.
    """
    writes = kind in _GPUS and _GPUS[kind].products > 0
    return COMPILER_OPTIONS | {"xla_gpu_collect_cost_model_stats": writes}


def absent_gpus(kind: str, per_node: int, nodes: int = 1) -> list:
    """Returns the devices of nodes of a kind of GPU, such as "h200", to compile for.

    Raises UserError where the CUDA plugin is not installed, or describes GPUs in another way, and
    for another kind.
    """
    if not installed():
        raise UserError(
            'the CUDA compiler is not installed (pip install "sae-jax[cuda]"; it needs no GPU)'
        )
    if kind not in _GPUS:
        raise UserError(f"the CUDA compiler is told of {', '.join(_GPUS)}, not of {kind}")
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
    gpu = _GPUS[kind]
    major, minor = gpu.capability.rstrip("a").split(".")
    features = "ACCELERATED_FEATURES" if gpu.capability.endswith("a") else "NONE"
    scalar = "".join(_rate(t, gpu.clock, *rates) for t, rates in _SCALAR_RATES.items())
    matrix = "".join(_rate(t, gpu.clock, 4, gpu.products * n) for t, n in _MATRIX_RATES.items())
    units = f"scalar_unit_description {{ {scalar} }} matrix_unit_description {{ {matrix} }}"
    newer = "collective_memory_granularity: 2097152" if jax.__version_info__ >= (0, 12) else ""
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared}
  threads_per_core_limit: 2048 core_count: {gpu.cores} fpus_per_core: {gpu.units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.memory_rate} l2_cache_size: {gpu.cache} clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory} shared_memory_per_block_optin: {gpu.shared - 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  {units if gpu.products else ""}
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {gpu.capability}"
  model_str: "sm_{gpu.capability} with {gpu.memory}B RAM, {gpu.cores} cores, \
{round(gpu.clock * 1e6)}KHz clock, {gpu.memory_clock}KHz mem clock, {gpu.cache}B L2$"
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true name: "{gpu.name}"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0" cub_version: "3.1.2"
  device_interconnect_info {{ active_links: 18 }}
  {newer}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def _rate(type_: int, clock: float, units: int, operations: int) -> str:
    return (
        f"rate_infos {{ key: {type_} value {{ clock_rate_ghz: {clock} units_per_core: {units} "
        f"ops_per_clock: {operations} }} }} "
    )
