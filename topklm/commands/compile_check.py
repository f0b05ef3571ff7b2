"""`topklm compile-check`: compiles the train step of a config for a TPU slice that is not there."""

import argparse
from collections.abc import Sequence

import jax

from topklm.commands import shared, train
from topklm.commands.shared import Output
from topklm.compile_check import topology as topology_lib
from topklm.compile_check.check import compile_check, does_not_fit
from topklm.compile_check.report import show

DESCRIPTION = (
    "Compiles the full train step for a TPU slice that is not there, and prints what a step takes of each "
    "device: memory, arithmetic and communication. Fails if it does not fit. Takes minutes of one core."
)
TAKES_CONFIG = True
EXAMPLE = (
    "topklm compile-check --config=configs/paper.py:1.4b --topology=v5e:16x16 --config.train.batch_size=512"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's own arguments; the others are those of `topklm train`."""
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
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    config, _ = train.parse(arguments.config_flags, EXAMPLE)
    # Nothing runs here: leave the machine's accelerators to others.
    jax.config.update("jax_platforms", "cpu")
    topology = topology_lib.find(arguments.topology, arguments.slices)
    report = compile_check(config, topology, _config_name(arguments.config_flags))
    output = Output(arguments.json)
    output.give(report.to_dict(), lambda: show(report, output.console))
    if report.chip is not None and not report.fits:
        raise does_not_fit(report.memory.total, report.chip.hbm_bytes, report.chip.name)


def _config_name(flags: Sequence[str]) -> str:
    """As it was given: "configs/paper.py:1.4b"."""
    for flag, following in zip(flags, [*flags[1:], ""], strict=True):
        name, _, value = flag.lstrip("-").partition("=")
        if name == "config":
            return value or following
    return ""
