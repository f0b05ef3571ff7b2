"""Arithmetic and memory traffic of a compiled program, with every loop counted as often as it runs.

XLA's own cost analysis counts the body of a loop once, which for a scan over layers is most of the program.
"""

from collections.abc import Callable, Iterable
import dataclasses
import math
import re

from topklm.compile_check.hlo import Computation, Instruction, Program, Shape, Unread, reading
from topklm.model.attention import splash_block

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

    Args:
        program: The compiled one.
        unread: Takes note of the instructions that are in the way of an exact sum; without it they raise.
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
    of a dilated window, most of which meet only padding and cost nothing.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {convolution.attributes[:200]}")
    data, kernel = (operand.shapes[0].dims for operand in computation.operands(convolution)[:2])
    result = convolution.shapes[0].dims
    window = _Window(convolution.attributes, n_dims=sum(label.isdigit() for label in labels[1]))
    pairs = math.prod(
        window.valid_pairs(
            dim,
            n_data=data[labels[1].index(str(dim))],
            n_kernel=kernel[labels[2].index(str(dim))],
            n_result=result[labels[3].index(str(dim))],
        )
        for dim in range(window.n_dims)
    )
    features = kernel[labels[2].index("i")] * result[labels[3].index("f")]
    return 2 * result[labels[3].index("b")] * features * pairs


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


class _Window:
    """The window of a convolution, "{size=16x12 stride=15x11 pad=0_0x11_11 lhs_dilate=16x12}"."""

    def __init__(self, attributes: str, n_dims: int):
        text = re.search(r"window=\{([^}]*)\}", attributes)
        fields = dict(field.split("=") for field in text[1].split()) if text else {}
        ones, self.n_dims = "x".join("1" * n_dims), n_dims
        self._stride, self._data_dilation, self._kernel_dilation = (
            [int(size) for size in fields.get(name, ones).split("x")] if n_dims else []
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        pads = fields.get("pad", "x".join(["0_0"] * n_dims)).split("x")
        self._pad_low = [int(pad.split("_")[0]) for pad in pads if pad]

    def valid_pairs(self, dim: int, *, n_data: int, n_kernel: int, n_result: int) -> int:
        """Counts the pairs of result and kernel positions that meet a true element of the data."""
        dilation = self._data_dilation[dim]
        last = (n_data - 1) * dilation
        starts = range(
            -self._pad_low[dim], n_result * self._stride[dim] - self._pad_low[dim], self._stride[dim]
        )
        steps = range(0, n_kernel * self._kernel_dilation[dim], self._kernel_dilation[dim])
        return sum(
            0 <= start + step <= last and (start + step) % dilation == 0 for start in starts for step in steps
        )


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
