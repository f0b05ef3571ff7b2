"""Reads XLA's text of an optimized program: computations, instructions, and how often each one runs.

A scan is one `while` whose body stands in the text once. Its trip count comes from XLA's own annotation or,
where a backend leaves that out (TPU), from running the loop's counter.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import math
import operator
import re
from typing import Any, TypeAlias

# Instructions of a program that could not be read, and how often they run in one run of it.
Unread: TypeAlias = collections.Counter[str]

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_MAX_TRIPS = 1_000_000
_ROLES = (
    *("calls", "body", "condition", "true_computation", "false_computation"),
    *("branch_computations", "called_computations"),
)
_INTEGERS = ("pred", "s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64")

# Operations on integer scalars; a comparison has the name of its direction.
_COMPUTE: dict[str, Callable[..., int]] = {
    **{name: getattr(operator, name.lower()) for name in ("LT", "LE", "GT", "GE", "EQ", "NE")},
    **dict.fromkeys(("copy", "bitcast", "reshape", "convert", "broadcast"), int),
    **{"add": operator.add, "subtract": operator.sub, "multiply": operator.mul},
    **{"and": operator.and_, "or": operator.or_, "not": operator.not_, "maximum": max, "minimum": min},
    "select": lambda condition, one, other: one if condition else other,
}

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{(?:[^}]*?S\((\d+)\))?[^}]*\})?")
_QUOTED_OR_PARENTHESIS = re.compile(r'"(?:\\.|[^"\\])*"|[()]')
_HEADER = re.compile(r"^(ENTRY )?%?(\S+) \(.*\) -> .*\{\s*$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")  # a kernel's metadata has lines that only begin like it
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*)$")
_CALLED = re.compile(r"\b(calls|to_apply|condition|body|true_computation|false_computation)=%([\w.-]+)")
_CALLED_MANY = re.compile(r"\b(branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array as the program holds it."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0  # 0: the device's main memory; a TPU's on-chip memories have other numbers

    @property
    def bytes(self) -> int:
        """Size without padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            number = re.match(r"[a-z]+(\d+)", self.dtype)  # s32, bf16, f8e4m3fn
            if number is None:
                raise ValueError(f"unknown element type {self.dtype!r}")
            bits = int(number[1])
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]  # of the result; the leaves of a tuple
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # everything after the operands, as printed
    argument: str  # text between the parentheses, as printed: the value of a constant

    def called(self, *roles: str) -> list[str]:
        """Returns the names of the computations that it runs in these roles, e.g. "body"."""
        calls = _CALLED.findall(self.attributes)
        for role, names in _CALLED_MANY.findall(self.attributes):
            calls += [(role, name.strip().lstrip("%")) for name in names.split(",") if name.strip()]
        return [name for role, name in calls if role in roles]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program; the last of its instructions is not always the root."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions whose results it takes."""
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclasses.dataclass(frozen=True)
class Runs:
    """How often a computation runs in one run of the program."""

    count: int
    is_exact: bool  # False inside a loop whose trip count depends on data: the loop is counted once


@dataclasses.dataclass(frozen=True)
class Program:
    """A module, which each of its devices runs."""

    computations: Mapping[str, Computation]
    entry: str
    n_partitions: int

    def walk(self) -> Iterator[tuple[Computation, Instruction, Runs]]:
        """Yields every instruction that runs, those inside fusions too, with the number of its runs.

        The scalar functions of reductions, sorts and the like are left out. Each branch of a conditional
        counts as taken, so the sum over branches is an upper bound.
        """
        runs: dict[str, Runs] = {}

        def visit(name: str, count: int, is_exact: bool) -> None:
            before = runs.get(name, Runs(0, True))
            runs[name] = Runs(before.count + count, before.is_exact and is_exact)
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                if instruction.opcode in ("async-done", "async-update"):
                    continue  # its start has run it
                trips = self._trip_count(computation, instruction) if instruction.opcode == "while" else 1
                roles = (*_ROLES, "to_apply") if instruction.opcode == "call" else _ROLES
                for callee in instruction.called(*roles):
                    visit(callee, count * (1 if trips is None else trips), is_exact and trips is not None)

        visit(self.entry, 1, True)
        for name, times in runs.items():
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, times

    def _trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        try:
            [condition], [body] = loop.called("condition"), loop.called("body")
            state = self._scalar(computation, loop.operands[0])
            for trips in range(_MAX_TRIPS):
                goes_on = self._result(condition, (state,))
                if not goes_on:
                    return None if goes_on is None else trips
                state = self._result(body, (state,))
        except Exception:  # a counter in a notation that is not known here
            return None
        return None

    def _result(self, name: str, arguments: tuple) -> Any:
        computation = self.computations[name]
        return self._scalar(computation, computation.root, arguments)

    def _scalar(self, computation: Computation, name: str, arguments: tuple | None = None) -> Any:
        """Computes an integer scalar, or a tuple of these, of one run of a computation; None for all else."""

        @functools.cache
        def value(name: str) -> Any:
            instruction = computation.instructions[name]
            opcode, operands = instruction.opcode, instruction.operands
            if opcode == "parameter":
                return arguments[int(instruction.argument)] if arguments else None
            if opcode == "tuple":
                return tuple(map(value, operands))
            if opcode == "get-tuple-element":
                index = re.search(r"\bindex=(\d+)", instruction.attributes)
                of = value(operands[0])
                return of[int(index[1])] if isinstance(of, tuple) and index else None
            if opcode in ("fusion", "call"):
                [callee] = instruction.called("calls", "to_apply")
                return self._result(callee, tuple(map(value, operands)))
            if opcode == "opt-barrier":
                return value(operands[0])
            shape = instruction.shapes[0]
            if len(instruction.shapes) != 1 or math.prod(shape.dims) != 1 or shape.dtype not in _INTEGERS:
                return None
            if opcode == "constant":
                digits = instruction.argument.strip("{} ")
                digits = {"true": "1", "false": "0"}.get(digits, digits)
                return int(digits) if re.fullmatch(r"-?\d+", digits) else None
            compared = re.search(r"direction=(\w+)", instruction.attributes)
            compute = _COMPUTE.get(compared[1] if compared else opcode)
            known = [value(operand) for operand in operands]
            is_known = compute and known and all(isinstance(number, int) for number in known)
            return int(compute(*known)) if compute and is_known else None

        return value(name)


@contextlib.contextmanager
def reading(name: str, runs: Runs, unread: Unread | None) -> Iterator[None]:
    """Leaves an instruction out, and notes it, if it cannot be read inside the block.

    One that is read and runs in a loop of unknown length, and so is counted for one turn, is noted too. Its
    name ends in a number of no interest. Without `unread` errors are raised, and loops are not looked at.
    """
    kind = name.partition(".")[0]
    try:
        yield
    except Exception:  # whatever a notation does that another version of the compiler writes
        if unread is None:
            raise
        unread[kind] += runs.count
    else:
        if unread is not None and not runs.is_exact:
            unread[f"{kind} in a loop of unknown length"] += runs.count


def parse(text: str) -> Program:
    """Reads `as_text()` of a compiled JAX program of any backend; ValueError without an entry computation."""
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, root, instructions = header[2], "", {}
            entry = name if header[1] else entry
        elif _END.match(line) and name:
            computations[name] = Computation(name, instructions, root)
            name = ""
        elif name and (match := _INSTRUCTION.match(line)):
            instructions[match[2]] = _instruction(match[2], match[3])
            root = match[2] if match[1] else root
    if not entry:
        raise ValueError("no entry computation: this is not the text of a compiled program")
    partitions = re.search(r"\bnum_partitions=(\d+)", text.split("\n", 1)[0])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(name: str, text: str) -> Instruction:
    """Reads "SHAPE opcode(operands), attributes"; a shape has spaces only inside a tuple's parentheses."""
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    shapes = tuple(
        Shape(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size), int(space or 0))
        for dtype, dims, space in _SHAPE.findall(text[:end])
    )
    opcode, _, rest = text[end:].strip().partition("(")
    close = _closing("(" + rest) - 1
    argument = rest[:close]
    operands = tuple(re.findall(r"%([\w.-]+)", argument)) if opcode != "constant" else ()
    return Instruction(name, shapes, opcode.strip(), operands, rest[close + 1 :], argument)


def _closing(text: str) -> int:
    """Finds the parenthesis that closes the first one; those in quotes do not count."""
    depth = 0
    for found in _QUOTED_OR_PARENTHESIS.finditer(text):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if not depth:
            return found.start()
    raise ValueError(f"unbalanced parentheses in {text[:200]!r}")
