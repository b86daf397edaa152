"""Reads what a step takes of a device from the traced program, without compiling it.

A compiler fuses: what is computed element by element is not written to memory, but computed where
it is needed. So only some operations make arrays here (products, sums, top-k, scatters), all others
are views of such arrays or are computed from them, and an operation that makes an array reads those
that its operands are computed from. Loops count as often as they run. Of the branches of a
condition the one with the least traffic counts, as in `plan.hlo`.

It takes a hundredth of the time of a compiler, and is right enough to tell which meshes are worth
compiling.
"""

import dataclasses
import math
import re
from collections import Counter

import jax
import numpy as np
from jax.extend import core

from sae_jax.plan.flops import axes_of_dimension, product_flops
from sae_jax.plan.hlo import Collective
from sae_jax.plan.operations import Operation, bytes_of

_VIEWS = {"reshape", "squeeze", "expand_dims", "transpose", "copy", "stop_gradient", "rev"}
_PARTS = {"slice", "dynamic_slice", "gather", "split"}  # read of their operand what they return
_WHOLE = {  # make arrays from arrays
    "top_k", "approx_top_k", "sort", "argmax", "argmin", "conv_general_dilated", "cumsum", "cummax",
    "cummin", "cumprod", "cumlogsumexp", "fft", "cholesky", "triangular_solve",
    "pallas_call",
}  # fmt: skip
# A value is computed wherever it is needed, unless what is read for it is so many times its size.
_COMPUTED_ANEW = 16
_COLLECTIVES = {
    "psum": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device moves and keeps in one run of a traced program.

    Attributes:
      operations: what makes the arrays.
      temporary_bytes: the most bytes of arrays, beyond the arguments, that are kept at a time.
    """

    operations: tuple[Operation, ...]
    temporary_bytes: int


class _Array:
    """An array in memory, or a part of one.

    Attributes:
      bytes: the bytes that an operation reads of it.
      of: the arrays that it is a part of; none where it lies in memory by itself.
      born: when it is made.
      last: when it is used for the last time.
    """

    def __init__(self, size: int, time: int, of: frozenset = frozenset()):
        self.bytes, self.of, self.born, self.last = size, of, time, time

    def use(self, time: int) -> None:
        """Notes that it is used, and so is what it is a part of."""
        self.last = time
        for whole in self.of:
            whole.use(time)


@dataclasses.dataclass(frozen=True)
class _Value:
    """What a variable stands for.

    Attributes:
      arrays: the arrays that it is computed from.
      lies: whether it lies in memory, as one of them.
      constant: its value, where that is a constant of the program.
    """

    arrays: frozenset[_Array] = frozenset()
    lies: bool = False
    constant: object = None


def read(jaxpr: core.Jaxpr, mesh: jax.sharding.Mesh) -> Work:
    """Returns what a device of a mesh moves and keeps in one run of a program traced under it."""
    reader = _Reader(mesh)
    arguments = [_Value(frozenset([_Array(_bytes(v.aval), 0)]), lies=True) for v in jaxpr.invars]
    results = reader.run(jaxpr, arguments)
    computed = [i for i, value in enumerate(results) if not value.lies]
    # Once: what updates a parameter updates its moments too.
    read_once = reader.read_all(results[i] for i in computed)
    written = sum(_bytes(jaxpr.outvars[i].aval) for i in computed)
    reader.operations.append(Operation(read_once + written))
    return Work(tuple(reader.operations), reader.most_kept())


class _Reader:
    """Runs through a program.

    Attributes:
      operations: the operations so far.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._mesh = mesh
        self._time = 0
        self._made: list[_Array] = []
        self.operations: list[Operation] = []

    def run(
        self, jaxpr: core.Jaxpr, arguments: list[_Value], used: list[bool] | None = None
    ) -> list[_Value]:
        """Returns the results of a program, and adds up what it moves.

        Args:
          jaxpr: the program.
          arguments: the values of its arguments.
          used: whether somebody asks for each of its results, by default for all. What nobody asks
            for is not computed.
        """
        values: dict = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable in jaxpr.constvars:
            values[variable] = self._new(variable)
        for equation, asked in _live_equations(jaxpr, used):
            operands = [_value_of(v, values) for v in equation.invars]
            results = self._apply(equation, operands, asked)
            for variable, value in zip(equation.invars, operands, strict=True):
                if not isinstance(variable, core.Literal):
                    values[variable] = value  # what an operation has written lies there for others
            values |= zip(equation.outvars, results, strict=True)
        return [_value_of(v, values) for v in jaxpr.outvars]

    def most_kept(self) -> int:
        """Returns the most bytes that are kept at a time, without the arguments."""
        change = np.zeros(self._time + 2)
        for array in self._made:
            change[array.born] += array.bytes
            change[array.last + 1] -= array.bytes
        return int(np.cumsum(change).max())

    def read_all(self, values) -> int:
        """Reads, once each, the arrays that several values are computed from, and returns their
        bytes.
        """
        arrays = frozenset().union(*(value.arrays for value in values))
        for array in arrays:
            array.use(self._time)
        return sum(array.bytes for array in arrays)

    # ------------------------------------------------------------------ one equation

    def _apply(self, equation, operands: list[_Value], used: list[bool]) -> list[_Value]:
        """Returns an equation's results, of which some are used.

        Operands that it writes are replaced in `operands`.
        """
        self._time += 1
        name, parameters = equation.primitive.name, equation.params
        if name in _COLLECTIVES:
            return self._communicate(equation, operands)
        if name == "reshard":
            return [self._reshard(equation, *operands)]
        if name == "cond":
            return self._branch(equation, operands, used)
        if name == "scan":
            return self._scan(equation, operands, used)
        if name == "while":  # the data decides how often it runs, and an ordinary step's not at all
            consts = parameters["cond_nconsts"] + parameters["body_nconsts"]
            return operands[consts:]
        if name.startswith("scatter") or name == "dynamic_update_slice":
            return [self._update(equation, operands)]
        if name in _PARTS:
            return [self._part(variable, operands) for variable in equation.outvars]
        if name in _VIEWS or (name == "convert_element_type" and _keeps_type(equation)):
            return [operands[0]]
        if name == "dot_general" or name in _WHOLE:
            for i, variable in enumerate(equation.invars):
                operands[i] = self._write(operands[i], variable)
            return self._make(equation, operands)
        if name.startswith("reduce_") and name != "reduce_precision":
            return self._make(equation, operands)
        if (inner := _inlined(equation)) is not None:
            return self.run(inner, operands, used)
        arrays = frozenset().union(*(value.arrays for value in operands))
        constant = operands[0].constant if name == "convert_element_type" else None
        value = _Value(arrays, constant=constant)
        written = sum(_bytes(variable.aval) for variable in equation.outvars)
        if sum(array.bytes for array in arrays) > _COMPUTED_ANEW * written:
            return [self._write(value, variable) for variable in equation.outvars]
        return [value for _ in equation.outvars]

    def _new(self, variable) -> _Value:
        """Returns a new array of a variable's size."""
        array = _Array(_bytes(variable.aval), self._time)
        self._made.append(array)
        return _Value(frozenset([array]), lies=True)

    def _write(self, value: _Value, variable) -> _Value:
        """Returns a value as an array, which is computed and written if it is none yet."""
        if value.lies:
            return value
        self.operations.append(Operation(self.read_all([value]) + _bytes(variable.aval)))
        return self._new(variable)

    def _make(self, equation, operands: list[_Value]) -> list[_Value]:
        """Returns results that are written, from operands that are read."""
        moved = self.read_all(operands)
        results = [self._new(variable) for variable in equation.outvars]
        moved += sum(_bytes(variable.aval) for variable in equation.outvars)
        name, flops = equation.primitive.name, Counter()
        if name == "pallas_call" and (told := re.search(r"moves_(\d+)_bytes", _scope(equation))):
            moved = int(told.group(1))
        if name in ("pallas_call", "dot_general"):
            flops = product_flops(equation, self._mesh)
        self.operations.append(Operation(moved, flops=flops))
        if axes := _summed_axes(equation):
            for variable in equation.outvars:
                self._collective("all-reduce", axes, _bytes(variable.aval), 0)
        return results

    def _part(self, variable, operands: list[_Value]) -> _Value:
        """Returns a part of the first operand, at the places that the others give."""
        whole, *places = operands
        part = _Array(_bytes(variable.aval), self._time, whole.arrays)
        return _Value(frozenset([part]).union(*(value.arrays for value in places)))

    def _update(self, equation, operands: list[_Value]) -> _Value:
        """Returns the first operand, in whose memory rows or a slice are replaced or added to."""
        name = equation.primitive.name
        operands[0] = self._write(operands[0], equation.invars[0])
        update = 1 if name == "dynamic_update_slice" else 2  # scatter: operand, places, updates
        moved = self.read_all(operands[1:])
        times = 2 if name.startswith("scatter-") else 1  # adds: reads the rows as well
        self.operations.append(Operation(moved + times * _bytes(equation.invars[update].aval)))
        for array in operands[0].arrays:
            array.use(self._time)
        return operands[0]

    # ------------------------------------------------------------------ control flow

    def _branch(self, equation, operands: list[_Value], used: list[bool]) -> list[_Value]:
        """Returns the results of the branch that is taken: an accelerator's, that of a constant, or
        the one with the least traffic.
        """
        which, *arguments = operands
        branches = [branch.jaxpr for branch in equation.params["branches"]]
        if platforms := equation.params.get("branches_platforms"):
            others = (i for i, p in enumerate(platforms) if p is None or "cpu" not in p)
            return self.run(branches[next(others, 0)], arguments, used)
        if which.constant is not None:
            return self.run(branches[int(which.constant)], arguments, used)
        done, made = len(self.operations), len(self._made)

        def moved(branch) -> int:
            self.run(branch, list(arguments), used)
            cost = bytes_of(self.operations[done:])
            del self.operations[done:], self._made[made:]
            return cost

        return self.run(min(branches, key=moved), arguments, used)

    def _scan(self, equation, operands: list[_Value], used: list[bool]) -> list[_Value]:
        """Returns the results of a loop. What it carries stays in the same memory."""
        parameters = equation.params
        body, length = parameters["jaxpr"].jaxpr, parameters["length"]
        consts, carried = _scan_counts(parameters)
        end = consts + carried
        for i in range(consts, end):
            operands[i] = self._write(operands[i], equation.invars[i])
        sliced = [
            self._part(variable, [value])
            for variable, value in zip(body.invars[end:], operands[end:], strict=True)
        ]
        used = [True] * carried + used[carried:]
        stacked = [
            self._new(variable) if asked else _Value()
            for variable, asked in zip(equation.outvars[carried:], used[carried:], strict=True)
        ]
        done = len(self.operations)
        results = self.run(body, [*operands[:end], *sliced], used)
        for i, (variable, value) in enumerate(zip(body.outvars, results, strict=True)):
            if not used[i]:
                continue
            if i < carried and value.lies and value.arrays == operands[consts + i].arrays:
                continue  # changed in place, or not at all
            self.operations.append(Operation(self.read_all([value]) + _bytes(variable.aval)))
        self.operations[done:] = [
            dataclasses.replace(o, times=o.times * length) for o in self.operations[done:]
        ]
        self._time += 1
        for value in operands[consts:]:
            for array in value.arrays:
                array.use(self._time)
        return [*operands[consts:end], *stacked]

    # ------------------------------------------------------------------ communication

    def _communicate(self, equation, operands: list[_Value]) -> list[_Value]:
        parameters = equation.params
        axes = parameters.get("axes", parameters.get("axis_name"))
        axes = axes if isinstance(axes, tuple) else (axes,)
        # Between the runs of a pack, which share a device, nothing is sent.
        axes = tuple(axis for axis in axes if self._mesh.shape.get(axis, 1) > 1)
        kind = _COLLECTIVES[equation.primitive.name]
        results = []
        for i, (given, variable) in enumerate(zip(equation.invars, equation.outvars, strict=True)):
            if not axes:
                results.append(operands[i])
                continue
            operands[i] = self._write(operands[i], given)
            moved = self.read_all([operands[i]]) + _bytes(variable.aval)
            results.append(self._new(variable))
            self._collective(kind, axes, max(_bytes(given.aval), _bytes(variable.aval)), moved)
        return results

    def _reshard(self, equation, operand: _Value) -> _Value:
        """Returns a value in another sharding: a part of what a device has, or gathered."""
        (given,), (result,) = equation.invars, equation.outvars
        before, after = (set(_axes(v.aval)) for v in (given, result))
        gone = tuple(axis for axis in self._mesh.axis_names if axis in before - after)
        gone = tuple(axis for axis in gone if self._mesh.shape[axis] > 1)
        if gone:
            operand = self._write(operand, given)
            moved = self.read_all([operand]) + _bytes(result.aval)
            self._collective("all-gather", gone, _bytes(result.aval), moved)
            return self._new(result)
        return operand if before == after else self._part(result, [operand])

    def _collective(self, kind: str, axes: tuple[str, ...], size: int, moved: int) -> None:
        shape = dict(self._mesh.shape)
        places = np.arange(math.prod(shape.values())).reshape(*shape.values())
        along = tuple(slice(None) if axis in axes else 0 for axis in shape)
        group = tuple(places[along].ravel().tolist())
        collective = Collective(kind, group, size, 1) if len(group) > 1 else None
        self.operations.append(Operation(moved, collective=collective))


def _scan_counts(parameters: dict) -> tuple[int, int]:
    """Returns how many operands of a loop are constants, and how many it carries."""
    if "num_consts" in parameters:
        return parameters["num_consts"], parameters["num_carry"]
    consts, carried, _ = parameters["ft_in"].unpack()  # of JAX 0.12
    return len(consts), len(carried)


def _live_equations(jaxpr: core.Jaxpr, used: list[bool] | None) -> list[tuple]:
    """Returns the equations that are needed, each with whether its results are."""
    needed = {
        variable
        for i, variable in enumerate(jaxpr.outvars)
        if not isinstance(variable, core.Literal) and (used is None or used[i])
    }
    live = []
    for equation in reversed(jaxpr.eqns):
        asked = [variable in needed for variable in equation.outvars]
        if any(asked):
            live.append((equation, asked))
            needed |= {v for v in equation.invars if not isinstance(v, core.Literal)}
    return live[::-1]


def _value_of(variable, values: dict) -> _Value:
    if isinstance(variable, core.Literal):
        return _Value(constant=variable.val)
    return values.get(variable, _Value())


def _inlined(equation) -> core.Jaxpr | None:
    """Returns the program that an equation calls once, such as that of a jitted function."""
    for value in equation.params.values():
        inner = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
        if isinstance(inner, core.Jaxpr) and len(inner.invars) == len(equation.invars):
            return inner
    return None


def _scope(equation) -> str:
    """Returns the names of the scopes that an equation was traced in."""
    return str(equation.source_info.name_stack)


def _keeps_type(equation) -> bool:
    return equation.invars[0].aval.dtype == equation.outvars[0].aval.dtype


def _summed_axes(equation) -> tuple[str, ...]:
    """Returns the mesh axes that shard the dimensions that a product or a reduction sums over."""
    first = equation.invars[0].aval
    if equation.primitive.name == "dot_general":
        (dimensions, _), _ = equation.params["dimension_numbers"]
    else:
        dimensions = equation.params.get("axes", ())
    return tuple(axis for i in dimensions for axis in axes_of_dimension(first, i))


def _axes(aval) -> list[str]:
    return [axis for i in range(aval.ndim) for axis in axes_of_dimension(aval, i)]


def _bytes(aval) -> int:
    """Returns the bytes of a device's part of a value."""
    if not hasattr(aval, "shape"):
        return 0
    shards = math.prod(aval.sharding.mesh.shape[axis] for axis in _axes(aval))
    return math.prod(aval.shape) * _itemsize(aval.dtype) // shards


def _itemsize(dtype) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize
