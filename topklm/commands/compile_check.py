"""`topklm compile-check`: what the train step of a config needs on a TPU slice that is not there."""

import argparse
from collections.abc import Sequence
import json

import jax
import rich.console

from topklm.commands import train
from topklm.compile_check import topology as topology_lib
from topklm.compile_check.check import compile_check, does_not_fit
from topklm.compile_check.report import show
from topklm.errors import UserError

DESCRIPTION = (
    "Compiles the full train step for a TPU slice that is not there, and prints what a step takes of each "
    "device: memory, arithmetic and communication. Fails if it does not fit. Takes minutes of one core."
)
EXAMPLE = (
    "topklm compile-check --config=configs/paper.py:1.4b --topology=v5e:16x16 --config.train.batch_size=512"
)


def run(flags: Sequence[str]) -> None:
    """Carries the verb out; flags that are not its own are those of `topklm train`."""
    parser = _Parser("topklm compile-check", description=DESCRIPTION, epilog=f"example: {EXAMPLE}")
    parser.allow_abbrev = False  # --config belongs to the others
    parser.add_argument(
        "--topology",
        required=True,
        metavar="T",
        help="chips of a slice: v5e:4x4, v5p:4x4x4, v6e:16x16; cpu:8 for virtual CPU devices",
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="slices of that shape, which mesh.data spans; default 1",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments, rest = parser.parse_known_args(flags)
    config, _ = train.parse(rest, EXAMPLE)
    # Nothing runs here: leave the machine's accelerators to others.
    jax.config.update("jax_platforms", "cpu")
    topology = topology_lib.find(arguments.topology, arguments.slices)
    report = compile_check(config, topology, _config_name(rest))
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        show(report, rich.console.Console())
    if report.chip is not None and not report.fits:
        raise does_not_fit(report.memory.total, report.chip.hbm_bytes, report.chip.name)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see {self.prog} --help")


def _config_name(flags: Sequence[str]) -> str:
    """As it was given: "configs/paper.py:1.4b"."""
    for flag, following in zip(flags, [*flags[1:], ""], strict=True):
        name, _, value = flag.lstrip("-").partition("=")
        if name == "config":
            return value or following
    return ""
