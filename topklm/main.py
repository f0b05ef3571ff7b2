"""Trains a model: `python -m topklm.main --config=configs/small.py`; the same as `topklm train`.

What happens then is in `commands.train`, which reads the flags, and in `training.loop`.
"""

import sys

from topklm import cli


def run() -> int:
    """The process's entry: returns its exit code."""
    return cli.run(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(run())
