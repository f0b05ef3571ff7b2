"""`topklm bench`: measures a part of the library on this machine.

A benchmark is a module of `topklm.bench` with `DESCRIPTION`, `EXAMPLE`, `add_arguments(parser)`, for flags of
its own, and `run(arguments, config) -> Report`. `arguments` also has `repeats` and `peer` ("" or "torch");
`config` is None without --config. It raises UserError before it measures anything that it cannot do.
"""

import argparse
import importlib
from typing import Any

from topklm.bench import report as report_lib
from topklm.commands import Parser, shared, train
from topklm.commands.shared import Output

DESCRIPTION = (
    "Measures a part of the library on this machine, beside what the machine could do and beside peers."
)
TAKES_CONFIG = True
EXAMPLE = "topklm bench step --shape=s1 --peer=torch --json=step.json"
BENCHMARKS = {
    "step": ("step", "the train step: tokens/s, MFU, memory; --explain: where its time goes"),
    "topk": ("topk_op", "the TopK operation, every backend"),
    "data": ("data", "the stream of training batches"),
    "decode": ("decode", "generation"),
    "checkpoint": ("checkpoint", "saving and loading"),
}
PEERS = ("torch",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the benchmarks."""
    names = parser.add_subparsers(
        title="benchmarks", required=True, metavar="BENCHMARK", dest="benchmark", parser_class=_Benchmark
    )
    for name, (_, summary) in BENCHMARKS.items():
        names.add_parser(name, help=summary)


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out; flags that no benchmark knows are those of `topklm train`."""
    shared.check_at_least(arguments, 1, "repeats")
    benchmark, flags = _module(arguments.benchmark), arguments.config_flags
    config = train.parse(flags, benchmark.EXAMPLE)[0] if flags else None
    report = benchmark.run(arguments, config)
    if arguments.json != "-":
        report_lib.show(report, Output(as_json=False).console)
    if arguments.json:
        report_lib.write(report, arguments.json, arguments.command)


class _Benchmark(Parser):
    """Of one benchmark, whose module is loaded only if it is the one that is asked for."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Declares the arguments, and reads them."""
        name = self.prog.split()[-1]
        benchmark = _module(name)
        self.description, self.allow_abbrev = benchmark.DESCRIPTION, False  # --config belongs to the others
        self.epilog = f"--config flags are those of `topklm train`. Example: {benchmark.EXAMPLE}"
        self.add_argument(
            "--peer",
            choices=PEERS,
            default="",
            help="measure a peer in turns with ours: torch needs pip install 'topklm[peers]'",
        )
        self.add_argument(
            "--repeats", type=int, default=7, metavar="N", help="samples of each side; default 7"
        )
        self.add_argument("--json", default="", metavar="FILE", help="write all of it to FILE; - prints it")
        self.set_defaults(command=["topklm", "bench", name, *args])
        benchmark.add_arguments(self)
        return super().parse_known_args(args, namespace)


def _module(name: str) -> Any:
    return importlib.import_module(f"topklm.bench.{BENCHMARKS[name][0]}")
