"""`topklm bench`: measures a part of the library on this machine.

A benchmark is a module of `benchmarks.cases` with `DESCRIPTION`, `EXAMPLE`, `add_arguments(parser)`, for
flags of its own, and `run(arguments, config) -> Report`. `arguments` also has `repeats` and `peer` ("" or
"torch"); `config` is None without --config. It raises UserError for a measurement that it cannot do, before
any other. `compare` reads two files of results.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import importlib
import json
import os
from pathlib import Path
from typing import Any

import rich.console

from topklm.cli import Parser, with_json
from topklm.commands import shared, train
from topklm.errors import UserError

DESCRIPTION = (
    "Measures a part of the library on this machine, beside what the machine could do and beside peers."
)
EXAMPLE = "topklm bench step --shape=s1 --peer=torch --json=step.json"
BENCHMARKS = {
    "step": "the train step: tokens/s, MFU, memory; --explain: where its time goes",
    "topk": "the TopK operation, every backend",
    "data": "the stream of training batches",
    "decode": "generation",
    "checkpoint": "saving and loading",
    "compare": "two files of results: which differences are more than noise",
}
PEERS = ("torch",)
REPEATS = 30  # enough alternations for an interval


def run(flags: Sequence[str]) -> None:
    """Runs a benchmark; flags that it does not know are those of `topklm train`.

    Raises:
        UserError: For flags that it cannot measure with.
    """
    if not flags or flags[0] not in BENCHMARKS:
        _parser_of_benchmarks().parse_args(list(flags))
        return
    name, *rest = flags
    if name == "compare":
        _compare(rest)
        return
    benchmark = importlib.import_module(f"benchmarks.cases.{name}")
    parser = Parser(
        f"topklm bench {name}",
        description=benchmark.DESCRIPTION,
        epilog=f"--config flags are those of `topklm train`. Example: {benchmark.EXAMPLE}",
        allow_abbrev=False,  # --config belongs to the others
    )
    _add_common_arguments(parser)
    benchmark.add_arguments(parser)
    arguments, config_flags = parser.parse_known_args(with_json(rest))
    if arguments.repeats < 1:
        raise UserError(f"--repeats = {arguments.repeats}: must be 1 or more")
    # Imported here: they import JAX, and --help does without.
    from benchmarks.harness import report as report_lib  # noqa: PLC0415
    from benchmarks.harness import results  # noqa: PLC0415

    if arguments.isa:
        # Before a process is started that asks the processor.
        flags_of_xla = os.environ.get("XLA_FLAGS", "")
        os.environ.update(results.AVX2_ONLY)
        os.environ["XLA_FLAGS"] = f"{flags_of_xla} {results.AVX2_ONLY['XLA_FLAGS']}".strip()
    config = train.parse(config_flags, benchmark.EXAMPLE)[0] if config_flags else None
    report = benchmark.run(arguments, config)
    if arguments.json != "-":
        report_lib.show(report, rich.console.Console())
    if arguments.json:
        report_lib.write(report, arguments.json, ["topklm", "bench", *flags])


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer",
        choices=PEERS,
        default="",
        help="measure a peer in turns with ours: torch needs pip install 'topklm[peers]'",
    )
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, metavar="N", help=f"samples of each side; default {REPEATS}"
    )
    parser.add_argument(
        "--isa",
        choices=("avx2",),
        help="keep both sides from wider vector instructions than these, where the processor has them",
    )
    shared.flags(parser, "json")


def _compare(flags: Sequence[str]) -> None:
    """Says which figures of two reports differ; errors as `run`."""
    parser = Parser(
        "topklm bench compare",
        description="Says which figures and ratios of two files of results differ by more than noise: the "
        "95 % interval of the later over the earlier leaves 1 out.",
        epilog="Example: topklm bench compare before.json after.json",
    )
    for name in ("earlier", "later"):
        parser.add_argument(name, metavar=f"{name.upper()}.json", help="written by `topklm bench ... --json`")
    shared.flags(parser, "json")
    arguments = parser.parse_args(with_json(flags))
    from benchmarks.harness import report  # noqa: PLC0415 - imports JAX, --help does without

    contents = [_read_report(name) for name in (arguments.earlier, arguments.later)]
    found = report.changes(*contents)
    if not found:
        raise UserError(f"{arguments.later}: has no figure that {arguments.earlier} has")
    if arguments.json:
        rows = [{**dataclasses.asdict(one), "is_real": one.is_real} for one in found]
        report.write_json({"changes": rows}, arguments.json)
    if arguments.json != "-":
        console = rich.console.Console()
        for fact in ("processor", "instructions", "jax"):
            one, other = (content["machine"].get(fact, "unknown") for content in contents)
            if one != other:
                console.print(f"note: {fact} was {one}, and is {other}", markup=False, highlight=False)
        report.show_changes(found, console)


def _read_report(name: str) -> Any:
    try:
        content = json.loads(Path(name).read_bytes())
        for part in ("results", "comparisons"):
            _ = [(row["name"], row["samples"][0]) for row in content[part]]
        _ = content["machine"]
    except OSError as e:
        raise UserError(f"{name}: {e.strerror or e}") from e
    except (ValueError, LookupError, TypeError) as e:
        raise UserError(f"{name}: is no report of `topklm bench ... --json`") from e
    return content


def _parser_of_benchmarks() -> argparse.ArgumentParser:
    parser = Parser("topklm bench", description=DESCRIPTION, epilog=f"example: {EXAMPLE}")
    names = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    for name, summary in BENCHMARKS.items():
        names.add_parser(name, help=summary)
    return parser
