"""Reads XLA's text of an optimized program: computations, instructions, and how often each one runs.

A scan is one `while` whose body stands in the text once. Its trip count comes from XLA's own annotation or,
where a backend leaves that out (TPU), from running the loop's counter.
"""

import collections
from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import functools
import math
import re
from typing import Any, TypeAlias

# Instructions of a program that could not be read, and how often they run in one run of it.
Unread: TypeAlias = collections.Counter[str]

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_MAX_TRIPS = 1_000_000
_INTEGERS = ("pred", "s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64")

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
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
        return math.prod(self.dims) * _bits(self.dtype) // 8


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
        """Names of the computations that it runs in these roles, e.g. "body"."""
        return [name for role, name in self._calls if role in roles]

    @functools.cached_property
    def _calls(self) -> list[tuple[str, str]]:
        calls = _CALLED.findall(self.attributes)
        for role, names in _CALLED_MANY.findall(self.attributes):
            calls += [(role, name.strip().lstrip("%")) for name in names.split(",") if name.strip()]
        return calls


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
        for name, runs in self._runs().items():
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, runs

    def _runs(self) -> dict[str, Runs]:
        runs: dict[str, Runs] = {}

        def visit(name: str, count: int, is_exact: bool) -> None:
            before = runs.get(name, Runs(0, True))
            runs[name] = Runs(before.count + count, before.is_exact and is_exact)
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                times, exactly = 1, is_exact
                if instruction.opcode == "while":
                    trips = self._trip_count(computation, instruction)
                    times, exactly = (1, False) if trips is None else (trips, is_exact)
                for callee in _runs_in(instruction):
                    visit(callee, count * times, exactly)

        visit(self.entry, 1, True)
        return runs

    def _trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        try:
            return self._count_trips(computation, loop)
        except Exception:  # a counter in a notation that is not known here
            return None

    def _count_trips(self, computation: Computation, loop: Instruction) -> int | None:
        [condition], [body] = loop.called("condition"), loop.called("body")
        state = _Evaluation(self, computation, None).value(loop.operands[0])
        for trips in range(_MAX_TRIPS):
            goes_on = _Evaluation(self, self.computations[condition], (state,)).result()
            if goes_on is None:
                return None
            if not goes_on:
                return trips
            state = _Evaluation(self, self.computations[body], (state,)).result()
        return None


@contextlib.contextmanager
def reading(name: str, runs: Runs, unread: Unread | None) -> Iterator[None]:
    """Leaves an instruction out, and notes it, if it cannot be read inside the block.

    One that is read and runs in a loop of unknown length, and so is counted for one turn, is noted too.

    Args:
        name: Of the instruction, which ends in a number of no interest.
        runs: How often it runs.
        unread: Where to note it; None: errors are raised, and loops are not looked at.
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
    """Reads `compiled.as_text()` of `jax.jit(...).lower(...).compile()`, of any backend.

    Raises:
        ValueError: If it holds no entry computation.
    """
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
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes = tuple(_shape(*groups) for groups in _SHAPE.findall(text[:end]))
    opcode, _, rest = text[end:].strip().partition("(")
    close = _closing("(" + rest, 0) - 1
    argument = rest[:close]
    operands = tuple(re.findall(r"%([\w.-]+)", argument)) if opcode != "constant" else ()
    return Instruction(name, shapes, opcode.strip(), operands, rest[close + 1 :], argument)


def _closing(text: str, start: int) -> int:
    """Finds the parenthesis that closes the one at `start`; those in quotes do not count."""
    depth, quoted = 0, False
    for i in range(start, len(text)):
        character = text[i]
        if character == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted and character == "(":
            depth += 1
        elif not quoted and character == ")":
            depth -= 1
            if depth == 0:
                return i
    raise ValueError(f"unbalanced parentheses in {text[:200]!r}")


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    return Shape(dtype, sizes, int(space[1]) if space else 0)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    number = re.match(r"[a-z]+(\d+)", dtype)  # s32, bf16, f8e4m3fn
    if number is None:
        raise ValueError(f"unknown element type {dtype!r}")
    return int(number[1])


def _runs_in(instruction: Instruction) -> list[str]:
    if instruction.opcode in ("async-done", "async-update"):
        return []  # its start has run it
    roles = ["calls", "body", "condition", "true_computation", "false_computation"]
    roles += ["branch_computations", "called_computations"]
    return instruction.called(*roles, *(["to_apply"] if instruction.opcode == "call" else []))


class _Evaluation:
    """The integer scalars of one run of a computation; all else is None. Computes only what is asked for."""

    def __init__(self, program: Program, computation: Computation, arguments: tuple | None):
        self._program, self._computation, self._arguments = program, computation, arguments
        self._values: dict[str, Any] = {}

    def result(self) -> Any:
        return self.value(self._computation.root)

    def value(self, name: str) -> Any:
        """Returns an int, a tuple of these or None, or None for an unknown value."""
        if name not in self._values:
            self._values[name] = self._evaluate(self._computation.instructions[name])
        return self._values[name]

    def _evaluate(self, instruction: Instruction) -> Any:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return self._arguments[int(instruction.argument)] if self._arguments else None
        if opcode == "tuple":
            return tuple(self.value(name) for name in operands)
        if opcode == "get-tuple-element":
            index = re.search(r"\bindex=(\d+)", instruction.attributes)
            of = self.value(operands[0])
            return of[int(index[1])] if isinstance(of, tuple) and index else None
        if opcode in ("fusion", "call"):
            [callee] = instruction.called("calls", "to_apply")
            arguments = tuple(self.value(name) for name in operands)
            return _Evaluation(self._program, self._program.computations[callee], arguments).result()
        if opcode == "opt-barrier":
            return self.value(operands[0])
        shape = instruction.shapes[0]
        if len(instruction.shapes) != 1 or math.prod(shape.dims) != 1 or shape.dtype not in _INTEGERS:
            return None
        if opcode == "constant":
            return _integer(instruction.argument)
        return _arithmetic(instruction, [self.value(name) for name in operands])


def _integer(text: str) -> int | None:
    digits = text.strip("{} ")
    if digits in ("true", "false"):
        return int(digits == "true")
    return int(digits) if re.fullmatch(r"-?\d+", digits) else None


def _arithmetic(instruction: Instruction, values: list[Any]) -> int | None:
    if not values or not all(isinstance(value, int) for value in values):
        return None
    opcode = instruction.opcode
    if opcode in ("copy", "bitcast", "reshape", "convert", "broadcast"):
        return values[0]
    if opcode == "not":
        return int(not values[0])
    if opcode == "select":
        return values[1] if values[0] else values[2]
    if len(values) != 2:
        return None
    a, b = values
    if opcode == "compare":
        direction = re.search(r"direction=(\w+)", instruction.attributes)
        results = {"LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "EQ": a == b, "NE": a != b}
        return int(results[direction[1]]) if direction else None
    results = {"add": a + b, "subtract": a - b, "multiply": a * b, "and": a & b, "or": a | b}
    results |= {"maximum": max(a, b), "minimum": min(a, b)}
    return results.get(opcode)
