"""Tells what a compiled program moves: bytes through memory, and through each collective.

It is read from the text of the optimised HLO, because XLA's own cost analysis takes the body of a
loop for one pass. Where a program branches, the branch with the least traffic counts, which is the
one that an ordinary step takes: the others are for dead latents, of which a healthy run has none,
for codes of which one shard has far more than its share, and for batches in which a faster way was
not exact.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from sae_jax.errors import UserError

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0, "opaque": 0, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*)$")
_OPCODE = re.compile(r"^([a-z][\w-]*)\(")
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "optimization-barrier",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """The executions of one collective by one device in one run of the program.

    Attributes:
      kind: one of `COLLECTIVES`.
      group: the indices, in the program's devices, of device 0's group.
      bytes: bytes of the whole array that is reduced or gathered.
      times: how often it is executed.
    """

    kind: str
    group: tuple[int, ...]
    bytes: int
    times: int

    @property
    def sent(self) -> int:
        """The bytes that a device sends in all executions, by the ring algorithm."""
        share = (len(self.group) - 1) / len(self.group)
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return round(factor * self.bytes * self.times)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of HLO.

    Attributes:
      name: its name.
      opcode: its opcode.
      type: the type of its result, as printed.
      operands: the names of its operands.
      rest: the text after the operands: its attributes.
      arguments: the operands, as printed.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    rest: str
    arguments: str

    def called(self, attribute: str) -> list[str]:
        """Returns the names of the computations in an attribute such as body=%loop; `attribute` may
        be several, "a|b".
        """
        found = re.search(rf"\b(?:{attribute})=(%[\w.-]+|\{{[^}}]*\}})", self.rest)
        return re.findall(r"%([\w.-]+)", found.group(1)) if found else []


@dataclasses.dataclass(frozen=True)
class Execution:
    """The executions of one instruction outside of fusions in one run of a program.

    Attributes:
      instruction: the instruction.
      times: how often it is executed; 0 in a loop of which the text does not say how often it runs.
      looped: whether it is in a loop.
      bytes: what one execution reads from device memory and writes to it.
      collective: what it sends, or None.
      computation: the name of the computation that the instruction is of.
    """

    instruction: Instruction
    times: int
    looped: bool
    bytes: int
    collective: Collective | None
    computation: str


class Program:
    """An optimised HLO module.

    Attributes:
      text: its text.
      computations: the instructions of each computation, by their names.
    """

    def __init__(self, text: str):
        """Parses the text of a module, as XLA prints it."""
        self.text = text
        self.computations, self._entry = _parse_module(text)

    @functools.cached_property
    def executions(self) -> tuple[Execution, ...]:
        """What one device executes in one run of the program, in the order of the text."""
        return tuple(self._executions(self._entry, 1, False))

    def _executions(self, computation: str, times: int, looped: bool) -> Iterator[Execution]:
        """Yields what a computation executes that is executed `times` times."""
        scope = self.computations[computation]
        for instruction in scope.values():
            opcode = instruction.opcode
            if opcode == "while":
                body, condition = (instruction.called(name)[0] for name in ("body", "condition"))
                trips = self._trip_count(instruction, condition)
                yield from self._executions(body, times * trips, True)
            elif opcode == "conditional":
                branches = instruction.called("branch_computations") or [
                    instruction.called(f"{which}_computation")[0] for which in ("true", "false")
                ]
                executed = (tuple(self._executions(name, times, looped)) for name in branches)
                yield from min(executed, key=lambda all: sum(e.bytes * e.times for e in all))
            elif opcode in ("call", "async-start"):
                for name in instruction.called("to_apply|calls"):
                    yield from self._executions(name, times, looped)
            elif opcode not in _NO_TRAFFIC and not opcode.endswith(("-done", "-update")):
                kind, collective = opcode.removesuffix("-start"), None
                if kind in COLLECTIVES:
                    collective = _make_collective(instruction, kind)
                    moved = 2 * collective.bytes
                    collective = collective if len(collective.group) > 1 else None
                else:
                    moved = self._bytes(instruction, scope)
                yield Execution(instruction, times, looped, moved, collective, computation)

    def _bytes(self, instruction: Instruction, scope: dict) -> int:
        """Returns the bytes that an instruction moves that calls no other and sends nothing."""
        opcode = instruction.opcode
        if opcode == "fusion":
            return self._fusion_bytes(instruction)
        # What a kernel moves does not follow from its operands: ours say it in their names.
        if opcode == "custom-call" and (moved := re.search(r"moves_(\d+)_bytes", instruction.rest)):
            return int(moved.group(1))
        if opcode == "custom-call" and 'target="AllocateBuffer"' in instruction.rest:
            return 0
        operands = [_type_bytes(scope[name].type) for name in instruction.operands]
        if opcode == "custom-call" and "__cublas" in instruction.rest:
            # Beside the result there is room that cuBLAS may use.
            return _array_bytes(*_SHAPE.findall(instruction.type)[0]) + sum(operands)
        return _unfused_bytes(instruction, operands)

    def _trip_count(self, instruction: Instruction, condition: str) -> int:
        """Returns how often a loop runs."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
        if known:
            return int(known.group(1))
        # The loops of jax.lax.scan and fori_loop count from 0 to a constant. Of any other the data
        # decides, such as one over dead latents, of which an ordinary step has none.
        constants = [i for i in self.computations[condition].values() if i.opcode == "constant"]
        counts = [int(i.arguments) for i in constants if i.type.startswith("s32[]")]
        return counts[0] if len(counts) == 1 else 0

    def _fusion_bytes(self, instruction: Instruction) -> int:
        """Returns the bytes that a fusion moves.

        It reads its operands once and writes its results. Of an operand of which it only takes
        slices or rows, it reads these. Of a result that it updates in place, it writes the update.
        """
        (computation,) = instruction.called("calls")
        inner = self.computations[computation]
        parameters = [i for i in inner.values() if i.opcode == "parameter"]
        *_, root = inner.values()
        results = [inner[o] for o in root.operands] if root.opcode == "tuple" else [root]
        read = sum(self._read_bytes(i, computation) for i in parameters)
        return read + sum(_written_bytes(result, inner) for result in results)

    def _read_bytes(self, value: Instruction, computation: str) -> int:
        """Returns the bytes that a fusion reads of `value`, one of its operands."""
        total = rows = 0
        for user in self.computations[computation].values():
            if value.name not in user.operands:
                continue
            first = user.operands[0] == value.name
            if user.opcode in ("bitcast", "convert"):
                total += self._read_bytes(user, computation)
            elif user.opcode == "fusion":  # in a fusion
                (called,) = user.called("calls")
                places = [str(n) for n, o in enumerate(user.operands) if o == value.name]
                inner = self.computations[called].values()
                taken = [i for i in inner if i.opcode == "parameter" and i.arguments in places]
                total += sum(self._read_bytes(i, called) for i in taken)
            elif user.opcode == "gather" and first:
                rows += _type_bytes(user.type)  # some of them several times
            elif user.opcode in ("dynamic-slice", "slice") and first:
                total += _type_bytes(user.type)
            elif user.opcode in ("dynamic-update-slice", "scatter") and first:
                pass  # in place
            else:
                return _type_bytes(value.type) + rows
        return min(total, _type_bytes(value.type)) + rows


def _written_bytes(result: Instruction, inner: dict) -> int:
    """Returns the bytes that a fusion writes for one of its results."""
    source = result
    while source.opcode in ("bitcast", "convert"):
        source = inner[source.operands[0]]
    if source.opcode == "dynamic-update-slice":
        return _type_bytes(inner[source.operands[1]].type)
    if source.opcode == "scatter":  # adds to rows: reads and writes them
        return 2 * _type_bytes(inner[source.operands[2]].type)
    return _type_bytes(result.type)


def _unfused_bytes(instruction: Instruction, operands: list[int]) -> int:
    """Returns the bytes that an instruction outside of fusions moves, given its operands' bytes."""
    opcode, result = instruction.opcode, _type_bytes(instruction.type)
    if opcode in ("dynamic-slice", "slice"):
        return 2 * result
    if opcode == "gather":
        return 2 * result + operands[1]
    if opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if opcode == "scatter":
        return operands[1] + 3 * operands[2]
    return result + sum(operands)


def _make_collective(instruction: Instruction, kind: str) -> Collective:
    """Returns the collective that an instruction executes."""
    shapes = [_array_bytes(*match) for match in _SHAPE.findall(instruction.type)]
    if instruction.opcode.endswith("-start"):  # the results and the operands side by side
        size = max(shapes)
    else:
        size = sum(shapes)
    group = parse_group(instruction.rest)
    return Collective(kind, group, size * (len(group) if kind == "reduce-scatter" else 1), 1)


def parse_group(attributes: str) -> tuple[int, ...]:
    """Returns the group of device 0, from any of the ways in which XLA prints replica groups.

    Raises UserError for a way that is not known.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return _numbers(found.group(1))
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return _numbers(",".join(found.groups()))
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={iota}", attributes):
        shape, source, order = found.groups()
        return tuple(_device_ids(source, order).reshape(_numbers(shape))[0].tolist())
    named = rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({iota}\))? \{{(.*?)\}}"
    if found := re.search(named, attributes):
        axes, source, order, along = found.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        ids = _device_ids(source or str(math.prod(sizes.values())), order).reshape(*sizes.values())
        names = re.findall(r"'(\w+)'", along)
        return tuple(ids[tuple(slice(None) if n in names else 0 for n in sizes)].ravel().tolist())
    raise UserError(
        "the XLA that is installed prints the groups of a collective in a way that sae-jax plan "
        f"does not read ({attributes.strip(', ')[:200]}); plan with another version of jax"
    )


def _device_ids(source: str, order: str | None) -> np.ndarray:
    """Returns the device ids that "[4,2]T(1,0)" stands for."""
    shape = _numbers(source)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _type_bytes(shape: str) -> int:
    """Returns the bytes of the arrays in a printed type that are in device memory."""
    return sum(_array_bytes(*match) for match in _SHAPE.findall(shape))


def array_sizes(shape: str) -> list[tuple[int, ...]]:
    """Returns the sizes of each array in a printed type."""
    return [_numbers(sizes) if sizes else () for _, sizes, _ in _SHAPE.findall(shape)]


def _array_bytes(dtype: str, dimensions: str, layout: str) -> int:
    """Returns the bytes of one array in device memory; 0 for one that is elsewhere."""
    if re.search(r"S\([1-9]", layout):  # not in the device's main memory
        return 0
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 0)
    return bits * math.prod(_numbers(dimensions) if dimensions else ()) // 8


def _parse_module(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Returns the instructions of each computation by name, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = {}, ""
    for line in text.splitlines():
        if header := re.match(r"^(ENTRY )?%([\w.-]+) .*\{$", line):
            current = computations[header.group(2)] = {}
            entry = header.group(2) if header.group(1) else entry
        elif match := _INSTRUCTION.match(line):
            _, name, rest = match.groups()
            instruction = _parse_instruction(name, rest)
            current[name] = instruction
    return computations, entry


def _parse_instruction(name: str, text: str) -> Instruction:
    """Parses the text of an instruction behind its name."""
    end = _find_closing(text, 0) if text.startswith("(") else text.index(" ")
    type_, text = text[:end], text[end:].lstrip()
    opcode = _OPCODE.match(text).group(1)
    end = _find_closing(text, len(opcode))
    arguments = text[len(opcode) + 1 : end - 1]
    operands = () if opcode == "constant" else tuple(re.findall(r"%([\w.-]+)", arguments))
    return Instruction(name, opcode, type_, operands, text[end:], arguments)


def _find_closing(text: str, start: int) -> int:
    """Returns the index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i + 1
    raise UserError(
        "the XLA that is installed prints its programs in a way that sae-jax plan does not read "
        f"({text[:200]}); plan with another version of jax"
    )
