"""Trackers of experiments, such as Weights & Biases: they get a copy of every line of a run's metrics.

`log.trackers` names them. A tracker is made by a function of a run folder and a config, a dict of sections,
and has `write(step, values)` and `close()`. The function is named as "module:function", or by an entry point
of the group `topklm.trackers`, so that a package can bring its own. metrics.jsonl stays the record.
"""

from collections.abc import Callable, Mapping
import difflib
import functools
import importlib
import importlib.metadata
import os
from typing import Any, Protocol
import uuid

from topklm.errors import UserError, one_line
from topklm.imports import optional_module
from topklm.storage.files import AnyPath, as_path, is_bucket, write_atomically

GROUP = "topklm.trackers"
FIELD = "log.trackers"

_WANDB_ID_FILE = "wandb_id"  # in the run folder, so that a continued run goes on in the same place


class Tracker(Protocol):
    """Takes the metrics of one run."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Takes one line: numbers, lists of numbers (one per layer) and text, by name."""

    def close(self) -> None:
        """Ends, after the last line."""


# Of the run folder and the config.
Factory = Callable[[str, Mapping[str, Any]], Tracker]


def find(names: str) -> dict[str, Factory]:
    """Returns what makes the trackers of a list such as "wandb,mine:track"; UserError for one unknown."""
    asked = [name.strip() for name in names.split(",") if name.strip()]
    return {name: _factory(name, names) for name in asked}


def _factory(name: str, names: str) -> Factory:
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    installed = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    module, colon, function = name.partition(":")
    try:
        if name in installed:
            return installed[name].load()
        if colon:
            return getattr(importlib.import_module(module), function)
    except Exception as e:  # of whatever the module does
        text = f"{name} cannot be imported ({type(e).__name__}: {e}); install it, or set PYTHONPATH"
        raise UserError(text, field=FIELD, value=names) from e
    known = [*_BUILT_IN, *installed]
    near = difflib.get_close_matches(name, known, n=1)
    there = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}, and MODULE:FUNCTION"
    raise UserError(f"there is no tracker {name!r}; {there}", field=FIELD, value=names)


class Trackers:
    """The trackers of a run: one that raises is left out from then on, with a warning, and ends nothing."""

    def __init__(
        self,
        factories: Mapping[str, Factory],
        folder: AnyPath,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ):
        self._warn = warn
        self._trackers: dict[str, Tracker] = {}
        for name, make in factories.items():
            self._try(name, functools.partial(self._start, name, make, str(folder), config))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Gives a line to all of them."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, functools.partial(tracker.write, step, dict(values)))

    def close(self) -> None:
        """Ends all of them."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.close)
        self._trackers = {}

    def _start(self, name: str, make: Factory, folder: str, config: Mapping[str, Any]) -> None:
        self._trackers[name] = make(folder, config)

    def _try(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as e:  # of somebody else's code
            self._trackers.pop(name, None)
            reason = one_line(f"{type(e).__name__}: {e}")
            self._warn(
                f"warning: {FIELD}: {name} failed and gets no more metrics ({reason}); training goes on"
            )


class WandbTracker:
    """Logs to Weights & Biases; its own variables (WANDB_PROJECT, WANDB_MODE, ...) say where and how."""

    def __init__(self, folder: str, config: Mapping[str, Any]):
        wandb = _wandb_module()
        path = as_path(folder)
        id_file = path / _WANDB_ID_FILE
        if not id_file.exists():
            write_atomically(id_file, uuid.uuid4().hex.encode())
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "topklm"),
            name=path.name,
            id=id_file.read_text(),
            resume="allow",
            config=dict(config),
            dir=None if is_bucket(path) else folder,
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs a line, lists as a figure for each layer."""
        flat: dict[str, Any] = {}
        for name, value in values.items():
            flat |= (
                {f"{name}/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {name: value}
            )
        self._run.log(flat, step=step)

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


def _wandb_module() -> Any:
    return optional_module("wandb", "wandb", f"{FIELD} = wandb")


def _wandb() -> Factory:
    _wandb_module()  # if it is missing, that shows before anything is done
    return WandbTracker


_BUILT_IN: dict[str, Callable[[], Factory]] = {"wandb": _wandb}
