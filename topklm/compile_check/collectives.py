"""The communication of a compiled program: every collective, its size, its groups, and how often it runs.

Reads the text of optimized HLO as CPU and TPU compilers print it. A pair of start and done is one collective,
also where a TPU spreads it over several fused computations; between slices it is a `send` to the host.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np

from topklm.compile_check.hlo import Computation, Instruction, Program, Runs, Unread, reading

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_OTHER_KINDS = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}
_OPCODES = {**{kind: kind for kind in KINDS}, **_OTHER_KINDS}

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
    origin: str = ""  # where it comes from in the traced function

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device sends in a run, with the ring algorithms (Thakur et al. 2005, section 4)."""
        share = (self.group_size - 1) / self.group_size
        return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share) * self.bytes

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """Returns the mesh axes along which its groups reach; over slices, the first axis.

        Args:
            mesh_shape: Axis -> size, in the order of the mesh.
        """
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
    """Lists the collectives of a program that move anything.

    Args:
        program: The compiled one.
        unread: As in `cost.matmul_flops`.

    Returns:
        One entry per instruction; multiply by its `count`.
    """
    scattered = _all_reduces_that_scatter(program)
    found = []
    for computation, instruction, runs in program.walk():
        if instruction.opcode == "send" or instruction.opcode.removesuffix("-start") in _OPCODES:
            with reading(instruction.name, runs, unread):
                found.append(_collective(program, computation, instruction, runs, scattered))
    return [c for c in found if c is not None and c.group_size > 1 and c.count > 0]


def _collective(
    program: Program, computation: Computation, instruction: Instruction, runs: Runs, scattered: set[str]
) -> Collective | None:
    origin = re.search(r'op_name="([^"]*)"', instruction.attributes)
    common: dict[str, Any] = {"count": runs.count, "is_exact": runs.is_exact, "name": instruction.name}
    common["origin"] = origin[1] if origin else ""
    if instruction.opcode == "send":
        return _over_slices(computation, instruction, common)
    kind = _OPCODES.get(instruction.opcode.removesuffix("-start"))
    if kind is None or _is_a_later_part(computation, instruction):
        return None
    groups, size = _groups(instruction, program.n_partitions)
    n_bytes = _whole_bytes(kind, size, computation, instruction)
    if instruction.name in scattered:
        kind = "reduce-scatter"
    return Collective(kind=kind, bytes=n_bytes, group_size=size, groups=groups, **common)


def _whole_bytes(kind: str, size: int, computation: Computation, instruction: Instruction) -> int:
    operands = computation.operands(instruction)
    if kind == "collective-permute":
        operands = operands[:1]  # after it come buffers and offsets of the in-place form
    taken = sum(shape.bytes for operand in operands for shape in operand.shapes)
    taken *= size if kind == "all-gather" else 1
    if instruction.opcode.endswith("-start"):
        return taken  # the result names the operands again
    given = sum(shape.bytes for shape in instruction.shapes) * (size if kind == "reduce-scatter" else 1)
    return max(taken, given)  # they differ where a TPU converts on the way: to be sure, the wider type


def _over_slices(computation: Computation, instruction: Instruction, common: dict) -> Collective | None:
    """Reads a transfer through the host to the other slices; None for other sends."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', instruction.attributes)
    if kind is None or target is None:
        return None
    name = kind[1].lower().replace("_", "-")
    name = name if name in KINDS else "collective-permute"
    [data, *_] = computation.operands(instruction)
    n_slices = len(_numbers(target[1]))
    n_bytes = sum(shape.bytes for shape in data.shapes) * (n_slices if name == "all-gather" else 1)
    return Collective(kind=name, bytes=n_bytes, group_size=n_slices, groups=(), across_slices=True, **common)


def _is_a_later_part(computation: Computation, instruction: Instruction) -> bool:
    """Tells whether a collective that a TPU runs beside other work was counted at its first fusion."""
    if "async_collective_fusion_config" not in instruction.attributes:
        return False
    starts = (
        other
        for other in computation.instructions.values()
        if 'custom_call_target="AsyncCollectiveStart"' in other.attributes
    )
    return not any(instruction.name in start.operands for start in starts)


def _all_reduces_that_scatter(program: Program) -> set[str]:
    """Names all-reduces fused with the slicing of their result: so a TPU may write a reduce-scatter."""
    fused = [c for name, c in program.computations.items() if name.startswith("all-reduce-scatter")]
    return {i.name for c in fused for i in c.instructions.values() if i.opcode == "all-reduce"}


def _groups(instruction: Instruction, n_partitions: int) -> tuple[Groups, int]:
    """Reads the groups of devices that take part together, and their size.

    Raises:
        ValueError: For a notation that is not known.
    """
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
        rows = _iota(match[2], match[3]).reshape(_numbers(match[1]))
        return _as_groups(rows)
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
    return tuple(tuple(int(i) for i in row) for row in rows)


def _braces(text: str) -> Groups:
    return tuple(tuple(_numbers(inner)) for inner in re.findall(r"\{([\d,]*)\}", text))


def _numbers(text: str) -> Sequence[int]:
    return [int(number) for number in text.split(",") if number]
