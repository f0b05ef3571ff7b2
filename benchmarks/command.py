"""`topklm bench`: measures a part of the library on this machine.

A benchmark is a module of `benchmarks.cases` with `DESCRIPTION`, `EXAMPLE`, `add_arguments(parser)`, for
flags of its own, and `run(arguments, config) -> Report`. `arguments` also has `repeats` and `peer` ("" or
"torch"); `config` is None without --config. It raises UserError for a measurement that it cannot do, before
any other.
"""

import argparse
from collections.abc import Sequence
import importlib

import rich.console

from topklm.commands import Parser, shared, train, with_json
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
}
PEERS = ("torch",)


def run(flags: Sequence[str]) -> None:
    """Runs a benchmark; flags that it does not know are those of `topklm train`.

    Raises:
        UserError: For flags that it cannot measure with.
    """
    if not flags or flags[0] not in BENCHMARKS:
        _parser_of_benchmarks().parse_args(list(flags))
        return
    name, *rest = flags
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
    config = train.parse(config_flags, benchmark.EXAMPLE)[0] if config_flags else None
    from benchmarks.harness import report as report_lib  # noqa: PLC0415 - imports JAX, --help does without

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
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="samples of each side; default 7")
    shared.flags(parser, "json")


def _parser_of_benchmarks() -> argparse.ArgumentParser:
    parser = Parser("topklm bench", description=DESCRIPTION, epilog=f"example: {EXAMPLE}")
    names = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    for name, summary in BENCHMARKS.items():
        names.add_parser(name, help=summary)
    return parser
