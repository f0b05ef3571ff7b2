"""`topklm bench`: hands over to the harness in `benchmarks/`, which lies beside the package in a clone."""

import argparse
import importlib
from pathlib import Path
import sys

import topklm
from topklm.errors import UserError


def run(arguments: argparse.Namespace) -> None:
    """Runs a benchmark, see `benchmarks.command`; UserError if the package is not that of a clone."""
    root = Path(topklm.__file__).parents[1]
    if not (root / "benchmarks" / "command.py").is_file():
        raise UserError(
            "bench: the benchmarks are not installed with the package; clone the repository and run "
            "`python -m topklm bench ...` there"
        )
    sys.path.insert(0, str(root))  # before another folder of that name in the working directory
    importlib.import_module("benchmarks.command").run(arguments.words)
