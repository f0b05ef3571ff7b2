"""Trains a model: `python -m topklm.main --config=small`; the same as `topklm train`."""

import sys

from topklm import cli


def run() -> int:
    """Runs the process; returns its exit code."""
    return cli.run(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(run())
