"""`topklm compile-check`: compiles the train step of a config for a TPU slice that is not there."""

import argparse

from topklm.commands import shared, train
from topklm.commands.shared import Output
from topklm.imports import when_used

with when_used():
    from topklm.compile_check import check

DESCRIPTION = (
    "Compiles the full train step for a TPU slice that is not there, and prints what a step takes of each "
    "device: memory, arithmetic and communication. Fails if it does not fit. Takes minutes of one core."
)
TAKES_CONFIG = True
EXAMPLE = (
    "topklm compile-check --config=configs/paper.py:1.4b --topology=v5e:16x16 --config.train.batch_size=512"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments, those of `topklm train` among them."""
    train.add_config(parser)
    add = shared.flags(parser, "json")
    text = "chips of a slice: v5e:4x4, v5p:4x4x4, v6e:16x16; cpu:8 for virtual CPU devices"
    add("--topology T", text, required=True)
    add("--slices N", "slices of that shape, which mesh.data spans", 1)


def run(arguments: argparse.Namespace) -> None:
    import jax  # noqa: PLC0415 - slow, and --help does without

    config, _ = train.read(arguments, arguments.config_flags, EXAMPLE)
    # Nothing runs here: leave the machine's accelerators to others.
    jax.config.update("jax_platforms", "cpu")
    slices = check.find(arguments.topology, arguments.slices)
    report = check.compile_check(config, slices, arguments.config)
    output = Output(arguments.json)
    output.give(report.to_dict(), lambda: check.show(report, output.console))
    if report.chip is not None and not report.fits:
        raise check.does_not_fit(report.memory.total, report.chip.hbm_bytes, report.chip.name)
