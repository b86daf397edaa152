"""Says what the operations of a step take, one by one.

The time of a step is the sum of theirs: a product that waits for its units and an update that waits
for memory do not make up for each other, since a chip executes one operation after the other.
"""

import dataclasses
import math
import pathlib
import re
from collections import Counter
from collections.abc import Iterable

from sae_jax.plan.chips import Topology
from sae_jax.plan.hlo import Collective, Execution, Instruction, Program, array_sizes

_PACKAGE = f"{pathlib.Path(__file__).parents[1]}/"


@dataclasses.dataclass(frozen=True)
class Operation:
    """The executions of one operation in one step, by one device.

    Attributes:
      bytes: what one execution reads from memory and writes to it.
      times: how often it is executed.
      flops: FLOPs of one execution's matrix products, by the dtype of their operands.
      collective: what it sends, or None.
      name: what the program calls it.
      words: what JAX calls it, and where in the source it is.
      own_seconds: how long the compiler expects one execution to take, or None.
    """

    bytes: int
    times: int = 1
    flops: Counter = dataclasses.field(default_factory=Counter)
    collective: Collective | None = None
    name: str = ""
    words: str = ""
    own_seconds: float | None = None

    def seconds(self, topology: Topology) -> float:
        """Returns the seconds of all executions at the published peaks of a topology's chips.

        Each is the longest of those of its products, of its bytes, and of what it sends.
        """
        chip = topology.chip
        products = sum(n / getattr(chip, dtype) for dtype, n in self.flops.items())
        sent = 0.0
        if self.collective is not None:
            sent = self.collective.sent / topology.link_rate(self.collective.group)
        return self.times * max(products, self.bytes / chip.memory_rate, sent)

    def compiler_seconds(self, topology: Topology) -> float:
        """Returns the seconds of all executions by the compiler, and by the peaks where it has no
        estimate.
        """
        if self.own_seconds is None:
            return self.seconds(topology)
        return self.times * self.own_seconds


def bytes_of(operations: Iterable[Operation]) -> int:
    """Returns the bytes that operations move through memory."""
    return sum(o.bytes * o.times for o in operations)


def flops_of(operations: Iterable[Operation]) -> Counter:
    """Returns the FLOPs of operations' matrix products, by the dtype of their operands."""
    total: Counter = Counter()
    for o in operations:
        for dtype, flops in o.flops.items():
            total[dtype] += o.times * flops
    return total


def collectives_of(operations: Iterable[Operation]) -> tuple[Collective, ...]:
    """Returns the collectives among operations, with how often each is executed."""
    return tuple(
        dataclasses.replace(o.collective, times=o.times)
        for o in operations
        if o.collective is not None
    )


def operations_of(program: Program, clock: float | None) -> tuple[Operation, ...]:
    """Returns the operations of a compiled step.

    Args:
      program: the program.
      clock: cycles of the chip in a second, in which a TPU's compiler writes its estimates; None
        for other chips.
    """
    sources = _Sources(program.text)
    return tuple(
        Operation(
            execution.bytes,
            execution.times,
            _flops(execution.instruction, execution.computation, program),
            execution.collective,
            execution.instruction.name,
            sources.words(execution.instruction),
            _own_seconds(execution, clock),
        )
        for execution in program.executions
        if execution.times
    )


def with_dtypes_of(
    traced: Iterable[Operation], operations: Iterable[Operation]
) -> tuple[Operation, ...]:
    """Returns a program's operations with the dtypes that their products have in the traced one.

    A CPU's compiler widens the operands of some products of bfloat16. A traced product of as many
    FLOPs tells.
    """
    dtypes: dict[int, set[str]] = {}
    for o in traced:
        for dtype, flops in o.flops.items():
            dtypes.setdefault(flops, set()).add(dtype)

    def real(o: Operation) -> Operation:
        flops = Counter()
        for dtype, n in o.flops.items():
            known = dtypes.get(n, {dtype})
            flops[dtype if dtype in known else next(iter(known))] += n
        return dataclasses.replace(o, flops=flops)

    return tuple(map(real, operations))


def _own_seconds(execution: Execution, clock: float | None) -> float | None:
    """Returns how long the compiler expects an operation to take."""
    rest = execution.instruction.rest
    if clock is not None:
        cycles = re.search(r'"estimated_cycles":"?(\d+)', rest)
        return int(cycles.group(1)) / clock if cycles else None
    # A GPU's compiler knows its own loops. Its figures for calls of libraries and for kernels are
    # a hundred times too high or 0.
    if "kind=kLoop" in rest or "kind=kInput" in rest:
        found = re.search(r'"exec_time_us":([\d.e+-]+)', rest)
        return float(found.group(1)) / 1e6 if found else None
    return None


# ---------------------------------------------------------------------------- products


def _flops(instruction: Instruction, computation: str, program: Program) -> Counter:
    """Returns the FLOPs of the matrix products of one execution, by dtype.

    A multiply and an add are two.
    """
    scope = program.computations[computation]
    opcode, rest = instruction.opcode, instruction.rest
    if opcode == "fusion":
        (called,) = instruction.called("calls")
        inner = program.computations[called].values()
        return sum((_flops(i, called, program) for i in inner), Counter())
    if opcode == "dot":
        depth = _depth(instruction, scope, re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest))
    elif opcode == "convolution":  # what a TPU's compiler makes of products
        (kernel,) = array_sizes(scope[instruction.operands[1]].type)
        labels = re.search(r"dim_labels=\w+_(\w+)->", rest).group(1)
        depth = math.prod(n for n, label in zip(kernel, labels, strict=True) if label != "o")
    elif opcode == "custom-call" and "__cublas" in rest:
        found = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', rest)
        depth = _depth(instruction, scope, found)
    elif opcode == "custom-call" and (kernel := re.search(r"_of_(\d+)_flops", rest)):
        # Ours say it in their names.
        operands = (scope[name].type for name in instruction.operands)
        return Counter({_dtype(next(t for t in operands if "f" in t[:2])): int(kernel[1])})
    else:
        return Counter()
    flops = 2 * math.prod(array_sizes(instruction.type)[0]) * depth
    return Counter({_dtype(*(scope[name].type for name in instruction.operands[:2])): flops})


def _depth(instruction: Instruction, scope: dict, found: re.Match) -> int:
    """Returns how many products are added up for each element of a result."""
    (left,) = array_sizes(scope[instruction.operands[0]].type)
    return math.prod(left[int(i)] for i in re.findall(r"\d+", found.group(1)))


def _dtype(*types: str) -> str:
    """Returns the name of the dtype whose peak a product of operands of printed types has."""
    return "float32" if any(re.match(r"f(32|64)\b", type_) for type_ in types) else "bfloat16"


# ----------------------------------------------------------------------------- sources


class _Sources:
    """Where in the source the operations of a program are, from the tables that XLA prints."""

    def __init__(self, text: str):
        self._files = dict(re.findall(r'^(\d+) "([^"]*)"$', _table(text, "FileNames"), re.M))
        places = r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+) "
        self._places = {
            key: (file, line)
            for key, file, line in re.findall(places, _table(text, "FileLocations"), re.M)
        }
        frames = r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)"
        self._frames = {
            key: (place, str(int(parent) - 1))  # 0 for none
            for key, place, parent in re.findall(frames, _table(text, "StackFrames"), re.M)
        }

    def words(self, instruction: Instruction) -> str:
        """Returns what JAX calls an instruction, and its line: "dot_general backward,
        sae/topk.py:86"; its opcode where it is XLA's own.
        """
        named = re.search(r'op_name="([^"]*)"', instruction.rest)
        parts = re.findall(r"[\w.-]+", named.group(1)) if named else []
        word = parts[-1] if parts else instruction.opcode
        if named and "transpose(jvp" in named.group(1):
            word += " backward"
        found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        place = self._place(found.group(1)) if found else ""
        return f"{word}, {place}" if place else word

    def _place(self, frame: str) -> str:
        """Returns the innermost line of this package outwards of a frame, by the end of its path;
        "" for none. The module that all products and collectives go through says nothing.
        """
        while frame in self._frames:
            place, frame = self._frames[frame]
            file, line = self._places.get(place, ("", ""))
            path = self._files.get(file, "")
            if path.startswith(_PACKAGE) and path != f"{_PACKAGE}ops/sharding.py":
                return f"{path.removeprefix(_PACKAGE)}:{line}"
        return ""


def _table(text: str, title: str) -> str:
    """Returns the lines of a table of the module's head."""
    found = re.search(rf"^{title}\n((?:\d.*\n)*)", text, re.MULTILINE)
    return found.group(1) if found else ""
