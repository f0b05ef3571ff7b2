"""Arithmetic, memory traffic and collectives of a compiled program, from its text, of CPU and TPU compilers.

Every loop is counted as often as it runs. XLA's own cost analysis counts its body once, which for a scan over
layers is most of the program. A scan is one `while` whose body stands in the text once. Its trip count comes
from XLA's own annotation or, where a backend leaves that out (TPU), from running the loop's counter.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import itertools
import math
import operator
import re
from typing import Any, TypeAlias

import numpy as np

from topklm.model.attention import splash_block

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


# They move nothing: names for parts of something, or the second half of what was counted at its start.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "iota"}
_FREE |= {"while", "conditional", "call", "partition-id", "replica-id", "send-done", "recv", "recv-done"}
# The kernels of `attention.splash`, and how many products each does for a pair of blocks: scores and
# output; scores, their gradient, dq; scores, their gradient, dk, dv.
_SPLASH = re.compile(r"splash_mha_(fwd|dq|dkv)")
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
# Libraries' matrix products, which a compiler may put in the place of a dot.
_FOREIGN_PRODUCT = re.compile(r'custom_call_target="[^"]*(?i:matmul|gemm|convolution|[$]conv|[$]dot)[^"]*"')
_SLICES = {"slice", "slice-start", "dynamic-slice", "gather"}


def matmul_flops(program: Program, unread: Unread | None = None) -> int:
    """Counts floating-point operations of all matrix products (and convolutions) of one run, on one device.

    `unread` takes note of the instructions that are in the way of an exact sum; without it they raise.
    """
    total = 0
    for computation, instruction, runs in program.walk():
        if count := _reader_of_products(instruction):
            with reading(instruction.name, runs, unread):
                total += runs.count * count(computation, instruction)
    return total


def main_memory_bytes(program: Program, unread: Unread | None = None) -> int:
    """Estimates the bytes that one run reads from and writes to the main memory of one device.

    Arrays in a TPU's on-chip memory count as nothing, and so do operations inside a fusion. Of an
    array that is only sliced the slice counts, of one that is updated in place the update. A kernel is taken
    to read and write each of its arrays once. Arguments as `matmul_flops`.
    """
    fused = {name for _, i, _ in program.walk() if i.opcode == "fusion" for name in i.called("calls")}
    total = 0
    for computation, instruction, runs in program.walk():
        if computation.name not in fused:
            if unread is not None and not runs.is_exact:
                unread[f"{computation.name}, a loop of unknown length"] = runs.count
            with reading(instruction.name, dataclasses.replace(runs, is_exact=True), unread):
                total += runs.count * _traffic(program, computation, instruction)
    return total


def _reader_of_products(instruction: Instruction) -> Callable[[Computation, Instruction], int] | None:
    """Returns the function that counts an instruction's products, or None if it does none."""
    if instruction.opcode == "dot":
        return _dot_flops
    if instruction.opcode == "convolution":
        return _convolution_flops
    if instruction.opcode != "custom-call":
        return None
    if _SPLASH.match(instruction.name):
        return _splash_flops
    return _unknown_kernel if _FOREIGN_PRODUCT.search(instruction.attributes) else None


def _unknown_kernel(computation: Computation, kernel: Instruction) -> int:
    raise ValueError(f"{kernel.name}: a matrix product whose operands have no order that is known here")


def _dot_flops(computation: Computation, dot: Instruction) -> int:
    """Computes 2 x elements of the result x size of the dims summed over."""
    left = computation.operands(dot)[0].shapes[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    dims = [int(dim) for dim in contracted[1].split(",") if dim] if contracted else []
    return 2 * math.prod(dot.shapes[0].dims) * math.prod(left.dims[dim] for dim in dims)


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """Computes 2 x batch x output features x input features x valid pairs of output and kernel positions.

    A TPU writes every matrix product as a convolution; a batched one runs its batch through the positions
    of a dilated window, such as "{size=16x12 stride=15x11 pad=0_0x11_11 lhs_dilate=16x12}", most of which
    meet only padding and cost nothing.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {convolution.attributes[:200]}")
    data, kernel = (operand.shapes[0].dims for operand in computation.operands(convolution)[:2])
    result = convolution.shapes[0].dims
    text = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    window = dict(field.split("=") for field in text[1].split()) if text else {}

    def of_dim(name: str, dim: int, default: int = 1) -> int:
        return int(window[name].split("x")[dim].split("_")[0]) if name in window else default

    flops = 2 * result[labels[3].index("b")] * kernel[labels[2].index("i")] * result[labels[3].index("f")]
    for dim in range(sum(label.isdigit() for label in labels[1])):
        n_data, n_kernel, n_result = (
            dims[names.index(str(dim))]
            for dims, names in zip((data, kernel, result), labels.groups(), strict=True)
        )
        dilation, stride = of_dim("lhs_dilate", dim), of_dim("stride", dim)
        first, last = -of_dim("pad", dim, 0), (n_data - 1) * dilation
        step = of_dim("rhs_dilate", dim)
        # Of the pairs of positions in result and kernel, those that meet a true element of the data.
        flops *= sum(
            0 <= start + offset <= last and (start + offset) % dilation == 0
            for start in range(first, first + n_result * stride, stride)
            for offset in range(0, n_kernel * step, step)
        )
    return flops


def _splash_flops(computation: Computation, kernel: Instruction) -> int:
    """Computes 2 x pairs x head width per product; pairs of tokens in blocks on and under the diagonal."""
    role = _SPLASH.match(kernel.name)
    # After the integers that describe the mask, the first array are the queries [B, H, T, d]; B is left out
    # where a device has one sequence.
    *batch, heads, length, width = next(
        shape.dims
        for operand in computation.operands(kernel)
        for shape in operand.shapes
        if "f" in shape.dtype and len(shape.dims) >= 3
    )
    block = splash_block(length)
    blocks = length // block
    pairs = math.prod(batch) * heads * blocks * (blocks + 1) // 2 * block**2
    return _SPLASH_PRODUCTS[role[1] if role else ""] * 2 * pairs * width


def _traffic(program: Program, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    operands = computation.operands(instruction)
    if opcode == "fusion":
        [callee] = instruction.called("calls")
        return _fusion_traffic(instruction, operands, program.computations[callee])
    if opcode == "dynamic-update-slice":
        return 2 * _bytes(operands[1].shapes)
    written = _written(instruction)
    if opcode in _SLICES:
        return _bytes(written) + (_size(written) if operands[0].shapes[0].memory_space == 0 else 0)
    return _bytes(written) + sum(_bytes(operand.shapes) for operand in operands)


def _written(instruction: Instruction) -> tuple[Shape, ...]:
    """Returns the written shapes; an asynchronous operation's result names its source, too."""
    if not instruction.opcode.endswith("-start") or len(instruction.shapes) < 2:
        return instruction.shapes
    return instruction.shapes[:1] if instruction.opcode == "copy-start" else instruction.shapes[1:2]


def _fusion_traffic(fusion: Instruction, operands: list[Instruction], inside: Computation) -> int:
    users: dict[str, list[Instruction]] = {}
    for instruction in inside.instructions.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    total = 0
    for parameter in inside.instructions.values():
        if parameter.opcode == "parameter":
            operand = operands[int(parameter.argument)]
            total += _read(parameter, operand, users.get(parameter.name, []))
    roots = [inside.instructions[inside.root]]
    if roots[0].opcode == "tuple":
        roots = inside.operands(roots[0])
    for root, shape in zip(roots, fusion.shapes, strict=False):
        written = inside.operands(root)[1].shapes if root.opcode == "dynamic-update-slice" else (shape,)
        total += _bytes(written) if shape.memory_space == 0 else 0
    return total


def _read(parameter: Instruction, operand: Instruction, users: list[Instruction]) -> int:
    whole = _bytes(operand.shapes[:1])
    in_parts = [user for user in users if user.opcode in (*_SLICES, "dynamic-update-slice")]
    if whole == 0 or users != [user for user in in_parts if user.operands[0] == parameter.name]:
        return whole
    return sum(_size(user.shapes) for user in users if user.opcode in _SLICES)


def _bytes(shapes: Iterable[Shape]) -> int:
    return sum(shape.bytes for shape in shapes if shape.memory_space == 0)


def _size(shapes: Iterable[Shape]) -> int:
    return sum(shape.bytes for shape in shapes)


KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_KIND_OF = {kind: kind for kind in KINDS}  # by opcode
_KIND_OF |= {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of one device's program."""

    kind: str  # one of KINDS
    bytes: int  # of the whole array, per run: the gathered one, the one to be reduced, the one sent
    count: int  # runs in one run of the program
    group_size: int  # devices, or slices, that take part together
    groups: Groups  # devices by their place in the flattened mesh; of a permute its (source, target) pairs
    across_slices: bool = False  # over the data-centre network; `groups` is empty then
    is_exact: bool = True  # False: in a loop whose trip count depends on data, counted as one trip
    name: str = ""  # of the instruction

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device sends in a run, with the ring algorithms (Thakur et al. 2005, section 4)."""
        share = (self.group_size - 1) / self.group_size
        return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share) * self.bytes

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """Returns the axes of a mesh, sizes by name, along which its groups reach; over slices, the first."""
        names, sizes = list(mesh_shape), list(mesh_shape.values())
        if self.across_slices:
            return (names[0],)
        # Of several slices the program names the devices of one: the first axis is shorter then.
        n_devices = 1 + max(itertools.chain.from_iterable(self.groups))
        whole = math.prod(sizes)
        sizes[0] //= max(1, whole // n_devices) if whole % n_devices == 0 else 1
        varies = [np.ptp(np.unravel_index(group, sizes), axis=1) > 0 for group in self.groups]
        return tuple(name for name, does in zip(names, np.any(varies, axis=0), strict=True) if does)


def collectives(program: Program, unread: Unread | None = None) -> list[Collective]:
    """Lists the collectives of a program that move anything, an entry per instruction; see its `count`.

    Arguments as `matmul_flops`. A pair of start and done is one collective, also where a TPU spreads it over
    several fused computations; between slices it is a `send` to the host.
    """
    # All-reduces fused with the slicing of their result: so a TPU may write a reduce-scatter.
    fused = [c for name, c in program.computations.items() if name.startswith("all-reduce-scatter")]
    scattered = {i.name for c in fused for i in c.instructions.values() if i.opcode == "all-reduce"}
    found = []
    for computation, instruction, runs in program.walk():
        kind = _KIND_OF.get(instruction.opcode.removesuffix("-start"))
        if (kind is None and instruction.opcode != "send") or _is_a_later_part(computation, instruction):
            continue
        with reading(instruction.name, runs, unread):
            common: dict[str, Any] = {**dataclasses.asdict(runs), "name": instruction.name}
            if kind is None:
                found += _over_slices(computation, instruction, common)
                continue
            groups, size = _groups(instruction, program.n_partitions)
            n_bytes = _whole_bytes(kind, size, computation, instruction)
            kind = "reduce-scatter" if instruction.name in scattered else kind
            found.append(Collective(kind, n_bytes, group_size=size, groups=groups, **common))
    return [c for c in found if c.group_size > 1 and c.count > 0]


def _whole_bytes(kind: str, size: int, computation: Computation, instruction: Instruction) -> int:
    operands = computation.operands(instruction)
    if kind == "collective-permute":
        operands = operands[:1]  # after it come buffers and offsets of the in-place form
    taken = sum(_size(operand.shapes) for operand in operands) * (size if kind == "all-gather" else 1)
    if instruction.opcode.endswith("-start"):
        return taken  # the result names the operands again
    given = _size(instruction.shapes) * (size if kind == "reduce-scatter" else 1)
    return max(taken, given)  # they differ where a TPU converts on the way: to be sure, the wider type


def _over_slices(computation: Computation, send: Instruction, common: dict[str, Any]) -> list[Collective]:
    """Reads a transfer through the host to the other slices; other sends are none."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', send.attributes)
    if transfer is None or target is None:
        return []
    name = transfer[1].lower().replace("_", "-")
    kind, n_slices = name if name in KINDS else "collective-permute", len(_numbers(target[1]))
    n_bytes = _size(computation.operands(send)[0].shapes) * (n_slices if kind == "all-gather" else 1)
    return [Collective(kind, n_bytes, group_size=n_slices, groups=(), across_slices=True, **common)]


def _is_a_later_part(computation: Computation, instruction: Instruction) -> bool:
    """Tells whether a collective that a TPU runs beside other work was counted at its first fusion."""
    if "async_collective_fusion_config" not in instruction.attributes:
        return False
    return not any(
        instruction.name in other.operands
        for other in computation.instructions.values()
        if 'custom_call_target="AsyncCollectiveStart"' in other.attributes
    )


def _groups(instruction: Instruction, n_partitions: int) -> tuple[Groups, int]:
    """Reads the groups of devices that take part together, and their size; ValueError for other notations."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})?\}", text):
        moves = [(a, b) for a, b in _braces(pairs[1] or "") if a != b]
        return tuple(moves), 2 if moves else 1
    groups = _replica_groups(text)
    if groups == ((),):
        groups = (tuple(range(n_partitions)),)
    return groups, len(groups[0])


def _replica_groups(text: str) -> Groups:
    """Reads three notations: lists, an iota that is reshaped and transposed, and axes of a mesh.

    `{{0,1},{2,3}}`; `[4,2]<=[2,2,2]T(0,2,1)`; `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a':(2)2,'b'}`.
    An empty list, ((),), stands for one group of all.
    """
    if match := re.search(r"replica_groups=\{(\{.*?\})?\}", text):
        return _braces(match[1]) if match[1] else ((),)
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _as_groups(_iota(match[2], match[3]).reshape(_numbers(match[1])))
    if match := re.search(
        r"replica_groups=@?mesh[\[<](.*?)[\]>](?:,? ?device_ids=\((.*?\)?)\))? \{(.*?)\}", text
    ):
        return _mesh_groups(match[1], match[2], match[3])
    raise ValueError(f"replica groups in an unknown notation: {text[:200]}")


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> Groups:
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.-]+)'?=(\d+)", mesh)}
    dims: list[int] = []  # sub-axes have dims of their own
    grouped: list[int] = []
    wanted = [(n, pre, size) for n, pre, size in re.findall(r"'?([\w.-]+)'?(?::\((\d+)\)(\d+))?", axes) if n]
    for name, size in sizes.items():
        parts = sorted((int(pre or 1), int(part or size)) for n, pre, part in wanted if n == name)
        done = 1
        for pre, part in parts:
            dims += [pre // done, part]
            grouped.append(len(dims) - 1)
            done = pre * part
        dims.append(size // done)
    devices = _device_ids(device_ids, math.prod(dims)).reshape(dims)
    others = [axis for axis in range(len(dims)) if axis not in grouped]
    return _as_groups(devices.transpose(others + grouped).reshape(-1, math.prod(dims[g] for g in grouped)))


def _device_ids(text: str | None, n: int) -> np.ndarray:
    if text is None:
        return np.arange(n)
    if match := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(match[1], match[2]).reshape(-1)
    return np.array(_numbers(text))


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    sizes = _numbers(dims)
    array = np.arange(math.prod(sizes)).reshape(sizes)
    return array.transpose(_numbers(permutation)) if permutation else array


def _as_groups(rows: np.ndarray) -> Groups:
    return tuple(map(tuple, rows.tolist()))


def _braces(text: str) -> Groups:
    return tuple(tuple(_numbers(inner)) for inner in re.findall(r"\{([\d,]*)\}", text))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
