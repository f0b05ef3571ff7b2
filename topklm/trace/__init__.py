"""Neurons over the checkpoints of a run: `topklm trace`, and `topklm.trace("runs/small")` in Python.

The same held-out tokens are read through every checkpoint (`read`), what a neuron does at one is compared
with what it does at the reference, at the checkpoint before and in other layers (`measure`), and
written as tables (`tables`), from which onsets follow (`changes`).
"""

import os
import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """The module, which a call opens a trace with; a function `topklm.trace` would hide it."""

    def __call__(self, run: str | os.PathLike[str], name: str = "") -> Any:
        """Opens the trace of a run folder, see `topklm.open_trace`."""
        import topklm  # noqa: PLC0415 - which looks for it where notebooks have their classes

        return topklm.open_trace(run, name)


sys.modules[__name__].__class__ = _Callable
