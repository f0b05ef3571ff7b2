"""`topklm train`: trains a model; the same as `python -m topklm.main`."""

from collections.abc import Sequence

from topklm import main


def run(flags: Sequence[str]) -> None:
    """Carries the verb out; the flags are those of `topklm.main`, `--help` too."""
    main.main(["topklm train", *flags])
