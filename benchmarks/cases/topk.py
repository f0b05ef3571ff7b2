"""`topklm bench topk`: the TopK operation, every backend of this platform beside one pass over the array.

The floor of the forward pass is an elementwise pass, of forward and backward two: one read and one write of
the activations each, measured in the same rounds.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import peers
from benchmarks.harness import timing
from benchmarks.harness.report import Comparison, Report, Result
from benchmarks.harness.shapes import random_rows, topk_side
from benchmarks.harness.timing import Samples
from benchmarks.harness.worker import Prepared, Worker
from benchmarks.subjects import blocking
from topklm.config import DTYPES, Config
from topklm.errors import UserError
from topklm.model import backends
from topklm.model.topk import topk

DESCRIPTION = (
    "Times the TopK operation: every backend of this platform, jax.lax.top_k with a scatter, and an "
    "elementwise pass over the same array, which nothing can be faster than."
)
EXAMPLE = "topklm bench topk --sizes=1024:128,2048:64 --peer=torch"
ROWS = 4096
SIZES = "256:32,1024:128,2048:64,4096:128"
AUTO, SCATTER, COPY, TORCH = "auto", "lax.top_k + scatter", "copy", "torch.topk + scatter"

_NAMES = (*backends.TOPK.names, SCATTER)
_SECONDS_PER_SAMPLE = 0.05
# Forward pass in float32 on CPUs, at every size.
_CPU_TARGETS = {TORCH: 1.5, SCATTER: 3.0}
# At the one size that is measured on GPUs beside the table, bfloat16.
_GPU_TARGETS = {TORCH: 5.0, SCATTER: 10.0}
_GPU_COPY_SHARE = 0.7


@dataclasses.dataclass(frozen=True)
class Case:
    """An array, and how many of each row's entries are kept."""

    rows: int
    d: int
    ks: tuple[int, ...]
    dtype: str

    def name(self, k: int) -> str:
        """Returns the name in the tables."""
        return f"{self.rows} x {self.d}, k {k}, {self.dtype}"


_GPU_CASE = Case(65_536, 2048, (128,), "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares flags of its own."""
    parser.add_argument("--sizes", default=SIZES, metavar="D:K,...", help=f"widths and kept; default {SIZES}")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"default {ROWS}")
    parser.add_argument("--dtype", choices=DTYPES, help="default: both")
    names = ", ".join(_NAMES)
    parser.add_argument("--only", metavar="NAME,...", help=f"of ours and JAX's, {names}; default all of here")
    parser.add_argument(
        "--against", choices=("k",), help="at the first width only, k from 1 to half of it: the cost's growth"
    )


def run(arguments: argparse.Namespace, config: Config | None) -> Report:
    """Measures; see the module's description.

    Raises:
        UserError: For sizes that are none, a config, or a peer that is not installed.
    """
    if config is not None:
        raise UserError("--config: `bench topk` has no model; give --sizes=D:K,...")
    if arguments.peer:
        peers.require(arguments.peer)
    if arguments.only and (unknown := set(arguments.only.split(",")) - {*_NAMES}):
        raise UserError(f"--only = {min(unknown)}: must be of {', '.join(_NAMES)}")
    if arguments.only and AUTO not in arguments.only.split(","):
        raise UserError(f"--only = {arguments.only}: must have {AUTO}, with which the others are compared")
    parts = [_measure(case, arguments) for case in _cases(arguments)]
    if parts[0].settings["platform"] == "gpu" and arguments.sizes == SIZES and not arguments.against:
        parts.append(_measure(_GPU_CASE, arguments))
    results = [result for part in parts for result in part.results]
    comparisons = [comparison for part in parts for comparison in part.comparisons]
    return Report("topk", parts[0].settings, results, comparisons)


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Prepares the subjects `topk_side` of every operation and k, and `COPY`; facts are their names.

    Args:
        spec: `rows`, `d`, `ks` and `dtype`; `only`: names of operations, all if empty.
    """
    x, g = (jnp.asarray(values, spec["dtype"]) for values in random_rows(spec["rows"], spec["d"]))
    ours = [name for name in (*_backends(), SCATTER) if name in spec["only"] or not spec["only"]]
    subjects: dict[str, Callable[[], Any]] = {COPY: blocking(jax.jit(jnp.negative), x)}
    for k in spec["ks"]:
        for name in ours:
            operation = functools.partial(topk, k=k, backend=name)
            if name == SCATTER:
                operation = functools.partial(top_k_and_scatter, k=k)
            subjects[topk_side(k, name, backward=False)] = blocking(jax.jit(operation), x)
            subjects[topk_side(k, name, backward=True)] = blocking(_with_gradient(operation), x, g)
    return Prepared(subjects, {"platform": jax.default_backend(), "operations": ours})


def top_k_and_scatter(x_ND: jax.Array, k: int) -> jax.Array:
    """Computes TopK as one writes it in JAX: [N, D] -> [N, D], clipped at 0."""
    values, index = jax.lax.top_k(x_ND, k)
    rows = jnp.arange(x_ND.shape[0])[:, None]
    return jnp.zeros_like(x_ND).at[rows, index].set(jax.nn.relu(values))


def _backends() -> list[str]:
    """Names the backends that this platform has."""
    found = []
    for name in backends.TOPK.names:
        with contextlib.suppress(UserError):
            backends.TOPK.check_platform(name, jax.default_backend())
            found.append(name)
    return found


def _with_gradient(operation: Callable[[jax.Array], jax.Array]) -> Callable:
    @jax.jit
    def both(x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, gradient = jax.vjp(operation, x)
        return y, gradient(g)[0]

    return both


def _measure(case: Case, arguments: argparse.Namespace) -> Report:
    growth = arguments.against == "k"
    only = arguments.only.split(",") if arguments.only else [AUTO, SCATTER] if growth else []
    spec = {**dataclasses.asdict(case), "only": only}
    modules = [__name__, *(["benchmarks.peers.torch_topk"] if arguments.peer else [])]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(module, spec)) for module in modules]
        label = f"{case.rows} x {case.d} {case.dtype}"
        subjects = {name: side for worker in workers for name, side in worker.subjects().items()}
        found = timing.alternate(subjects, arguments.repeats, at_least=_SECONDS_PER_SAMPLE, label=label)
        facts = workers[0].facts
    operations = [*facts["operations"], *([TORCH] if arguments.peer else [])]
    settings = {
        "allocator": facts["allocator"],
        "platform": facts["platform"],
        "peer": arguments.peer,
        "against": arguments.against or "",
    }
    comparisons = [*_comparisons(case, facts["platform"], found, growth=growth)]
    return Report("topk", settings, [*_results(case, operations, found)], comparisons)


def _cases(arguments: argparse.Namespace) -> Iterator[Case]:
    if arguments.rows < 1:
        raise UserError(f"--rows = {arguments.rows}: must be 1 or more")
    sizes = [_size(text) for text in arguments.sizes.split(",")]
    dtypes = [arguments.dtype] if arguments.dtype else list(DTYPES)
    for dtype in dtypes:
        if arguments.against == "k":
            d = sizes[0][0]
            powers_of_two = tuple(2**i for i in range(max(d // 2, 1).bit_length()))
            yield Case(arguments.rows, d, powers_of_two, dtype)
        else:
            yield from (Case(arguments.rows, d, (k,), dtype) for d, k in sizes)


def _size(text: str) -> tuple[int, int]:
    """Parses 256:32 as (256, 32)."""
    d, _, k = text.strip().partition(":")
    if not (d.isdecimal() and k.isdecimal() and 1 <= int(k) <= int(d)):
        raise UserError(f"--sizes = {text!r}: must be D:K with K from 1 to D, several separated by commas")
    return int(d), int(k)


def _results(case: Case, operations: list[str], found: Mapping[str, Samples]) -> Iterator[Result]:
    for k in case.ks:
        for backward in (False, True):
            floor = found[COPY].median * (2 if backward else 1)
            for operation in operations:
                facts = {"rows": case.rows, "d": case.d, "k": k, "dtype": case.dtype, "operation": operation}
                yield Result(
                    f"{case.name(k)}: {operation}, {'forward and backward' if backward else 'forward'}",
                    "s",
                    found[topk_side(k, operation, backward=backward)].seconds,
                    floor,
                    {**facts, "backward": backward},
                )


def _comparisons(
    case: Case, platform: str, found: Mapping[str, Samples], *, growth: bool
) -> Iterator[Comparison]:
    for k in case.ks:
        for backward in (False, True):
            ours = found[topk_side(k, AUTO, backward=backward)]
            direction = "forward and backward" if backward else "forward"
            for other in (SCATTER, TORCH):
                if samples := found.get(topk_side(k, other, backward=backward)):
                    target = None if backward or growth else _target(case, platform, other)
                    name = f"{case.name(k)}, {direction}: faster than {other}"
                    yield Comparison(name, ours.speedup_over(samples), target)
        if not growth:
            ours = found[topk_side(k, AUTO, backward=False)]
            target = _GPU_COPY_SHARE if platform == "gpu" and case == _GPU_CASE else None
            yield Comparison(
                f"{case.name(k)}: share of the copy bandwidth", ours.speedup_over(found[COPY]), target
            )
    if growth:
        first, last = (found[topk_side(k, AUTO, backward=False)] for k in (case.ks[0], case.ks[-1]))
        name = f"{case.rows} x {case.d}, {case.dtype}: time at k {case.ks[-1]} over time at k {case.ks[0]}"
        yield Comparison(name, first.speedup_over(last))


def _target(case: Case, platform: str, other: str) -> float | None:
    if platform == "cpu":
        return _CPU_TARGETS[other] if case.dtype == "float32" else None
    return _GPU_TARGETS[other] if case == _GPU_CASE else None
