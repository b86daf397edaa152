"""Published peaks of accelerators, and the topologies that `--topology` names.

The figures of TPUs are from Google's "How to Scale Your Model" (2025), the table of its chapter on
TPUs; their clocks follow from the peaks and the units. Those of GPUs are from NVIDIA's data sheets:
dense (not sparse) figures of the SXM variants, and the links of the DGX systems, one way.
"""

import dataclasses
import math
import os
import re

import jax
import numpy as np
from jax.experimental import topologies

from sae_jax.errors import UserError
from sae_jax.plan.absent_gpus import absent_gpus, options_for

_GIB = 2**30
_MOST_DEVICES = 16_384  # of one slice or cluster; XLA makes something for each
_GPU_FRACTION = 0.75  # the part of a GPU's memory that JAX takes unless it is told otherwise


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip.

    Attributes:
      name: its name.
      bfloat16: FLOP/s of products of bfloat16 with float32 sums.
      float32: FLOP/s of products of float32 that are never rounded to TF32 or bfloat16.
      memory: bytes of its memory.
      memory_rate: bytes/s to and from its memory.
      link_rate: bytes/s to the chips that it is linked to: along one axis of a TPU's torus both
        ways, or by NVLink.
      network_rate: bytes/s of a GPU to other nodes.
      clock: cycles a second, of a TPU.
    """

    name: str
    bfloat16: float
    float32: float
    memory: float
    memory_rate: float
    link_rate: float
    network_rate: float = math.inf
    clock: float | None = None


def _tpu(
    name: str, bfloat16: float, memory: float, memory_rate: float, link: float, clock: float
) -> Chip:
    """Returns a TPU. A float32 product is six of bfloat16 parts (XLA's precision "highest")."""
    return Chip(name, bfloat16, bfloat16 / 6, memory, memory_rate, 2 * link, clock=clock)


CHIPS = {
    "v4": _tpu("TPU v4", 275e12, 32 * _GIB, 1.2e12, 45e9, 1.05e9),
    "v5e": _tpu("TPU v5e", 197e12, 16 * _GIB, 0.81e12, 45e9, 1.5e9),
    "v5p": _tpu("TPU v5p", 459e12, 95 * _GIB, 2.8e12, 90e9, 1.75e9),
    "v6e": _tpu("TPU v6e", 918e12, 32 * _GIB, 1.6e12, 90e9, 1.75e9),
    "a100": Chip("A100 80 GB", 312e12, 19.5e12, 80e9, 2.04e12, 300e9, 25e9),
    "h100": Chip("H100", 989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Chip("H200", 989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Chip("B200", 2250e12, 75e12, 180e9, 8e12, 900e9, 50e9),
}

# What JAX calls them (`device_kind`), where that is not the name above.
_KINDS = {"v5 lite": "v5e", "v6 lite": "v6e", "tpu v5": "v5p"}


def chip_from_kind(device_kind: str) -> Chip | None:
    """Returns the chip of a device kind, as JAX names it ("NVIDIA H100 80GB HBM3"); None if it is
    not in the table.
    """
    kind = device_kind.lower()
    names = _KINDS | {name: name for name in CHIPS}
    return next((CHIPS[name] for part, name in names.items() if part in kind), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and their places.

    Attributes:
      name: the name, as `--topology` gives it.
      chip: the kind of chip; None for CPUs.
      devices: the devices to compile for; None for each where nothing is compiled.
      per_node: how many of them share a node.
      note: why CPUs stand for these GPUs, and what follows from it; "" where none do.
    """

    name: str
    chip: Chip | None
    devices: list
    per_node: int
    note: str = ""

    @property
    def is_tpu(self) -> bool:
        """Whether the devices are TPUs."""
        return self.chip is not None and self.chip.network_rate == math.inf

    @property
    def has_hosts(self) -> bool:
        """Whether the devices are those of several hosts."""
        if self.is_tpu:
            return len({device.process_index for device in self.devices}) > 1
        return self.chip is not None and len(self.devices) > self.per_node

    @property
    def stands_in(self) -> bool:
        """Whether the devices are CPUs that stand for GPUs."""
        is_gpu = self.chip is not None and not self.is_tpu
        return is_gpu and self.devices[0].platform == "cpu"

    @property
    def compiler_options(self) -> dict[str, object]:
        """The options of `lowered.compile(...)` for the devices."""
        is_gpu = self.chip is not None and not self.is_tpu
        return options_for(self.kind) if is_gpu and not self.stands_in else {}

    @property
    def kind(self) -> str:
        """The kind of device in the name: "h100", "v5p", "cpu"."""
        return self.name.lower().partition(":")[0]

    @property
    def capacity(self) -> float:
        """The bytes of a chip's memory that a program may take."""
        if self.chip is None:
            return math.inf
        fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _GPU_FRACTION))
        return self.chip.memory * (1.0 if self.is_tpu else fraction)

    def link_rate(self, group: tuple[int, ...]) -> float:
        """Returns the bytes/s at which each device of a group sends around its ring.

        Between nodes the members in one node share its network links, of which there is one a GPU.

        Args:
          group: indices of devices.
        """
        nodes: dict[int, int] = {}
        for place in group:
            nodes[place // self.per_node] = nodes.get(place // self.per_node, 0) + 1
        if len(nodes) == 1:
            return self.chip.link_rate
        return min(self.chip.link_rate, min(nodes.values()) * self.chip.network_rate)


def find(name: str, stand_in: bool = True) -> Topology:
    """Returns the topology of a name: "v5p:4x4x4" (a TPU slice), "h100:8x8" (nodes x GPUs of a
    node) or "cpu:8".

    It decides which devices this process has, so it is called before anything else uses JAX.

    Args:
      name: the name.
      stand_in: whether CPUs stand for GPUs without the CUDA compiler.

    Raises UserError for other names, and where the compiler is not installed.
    """
    topology = describe(name)
    jax.config.update("jax_platforms", "cpu")
    if topology.is_tpu:
        return dataclasses.replace(topology, devices=_tpu_devices(name))
    count, note = len(topology.devices), ""
    if topology.chip is not None:
        try:
            nodes = count // topology.per_node
            devices = absent_gpus(topology.kind, topology.per_node, nodes)
            return dataclasses.replace(topology, devices=devices)
        except UserError as error:
            if not stand_in:
                raise
            note = (
                f"{error}. CPUs stand for the GPUs: their compiler fuses less and has no kernels "
                "of ours, so that bytes and times are rather too high"
            )
    jax.config.update("jax_num_cpu_devices", count)
    return dataclasses.replace(topology, devices=jax.devices(), note=note)


def describe(name: str) -> Topology:
    """Returns the topology of a name, as `find` takes it, without devices. It does not use JAX.

    Raises UserError for a name that is none.
    """
    kind, _, shape = name.lower().partition(":")
    if kind not in (*CHIPS, "cpu") or not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", shape):
        raise UserError(
            f"--topology={name} is not one of KIND:SIZES with a kind of {', '.join(CHIPS)} or cpu, "
            "such as v5p:4x4x4, h100:8x8 (nodes x GPUs) or cpu:8"
        )
    sizes = [int(size) for size in shape.split("x")]
    count = math.prod(sizes)
    if not 1 <= count <= _MOST_DEVICES:
        raise UserError(f"--topology={name} has {count} devices; it must be 1 to {_MOST_DEVICES:,}")
    topology = Topology(name, CHIPS.get(kind), [None] * count, per_node=count)
    if topology.is_tpu:
        return topology
    if topology.chip is not None and len(sizes) > 2:
        raise UserError(f"--topology={name}: GPUs are nodes x GPUs of a node, such as {kind}:8x8")
    return dataclasses.replace(topology, per_node=sizes[-1])


def _tpu_devices(name: str) -> list:
    """Returns the devices of a TPU slice, described by the TPU compiler."""
    # Several processes may compile at a time, since none of them uses a TPU.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Without these the TPU library asks a metadata server what this machine is.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    try:
        return list(np.ravel(topologies.get_topology_desc(name, platform="tpu").devices))
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"the TPU compiler gives no topology {name} ({reason}); it comes with "
            'pip install "sae-jax[tpu]", and takes slices as Google names them, such as v5p:4x4x4'
        ) from error
