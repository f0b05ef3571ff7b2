"""Where numbers go: metrics.jsonl, TensorBoard files, trackers such as Weights & Biases, and the console.

metrics.jsonl is the record. `log.trackers` names the trackers, which get a copy of every line. One is made by
a function of a run folder and a config, a dict of sections, and has `write(step, values)` and `close()`. The
function is named as "module:function", or by an entry point of the group `topklm.trackers`, so that a package
can bring its own. The console has a live line on a terminal, plain lines elsewhere, and tables.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import difflib
import functools
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import shlex
import sys
import time
from typing import Any, Protocol
import uuid
import zlib

import rich.console
import rich.progress
import rich.table

from topklm.checkpoint import run_folder
from topklm.config import Config, ModelConfig
from topklm.errors import UserError, disk_errors_are_user_errors, one_line
from topklm.imports import optional_module, without
from topklm.layout import ParameterLayout
from topklm.storage import files
from topklm.storage.files import (
    AnyPath,
    as_path,
    is_bucket,
    parse_json,
    storage_errors_are_user_errors,
    write_atomically,
)
from topklm.storage.remote import GcsMirror

# tensorboardX looks for them, which takes seconds, for what is not used here.
with without("torch", "boto3", "google.cloud.storage"):
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog


class MetricsWriter:
    """Appends one JSON line a call, and the same numbers to TensorBoard files.

    Of a run in a bucket the files are local and are copied: every minute, at every `sync`, and at the end.
    """

    def __init__(
        self,
        folder: AnyPath,
        resume_step: int,
        synced: Mapping[str, int] | None = None,
        warn: Callable[[str], None] = print,
    ):
        """Opens a run's metrics; lines of steps after `resume_step`, which will be done again, are dropped.

        Metrics are no state: lines that do not parse never keep a run from going on. They are left out, and
        the file as it was found stays beside the new one. `synced` is the result of `sync` after that step,
        if it is known. `warn` is told, a line each, what became of lines that are not as they were written;
        and, once in a row, when a bucket does not take them: training goes on; `close` raises.
        """
        self._mirror = GcsMirror(folder, warn) if is_bucket(folder) else None
        if self._mirror:
            self._mirror.fetch(run_folder.METRICS_FILE)
            folder = self._mirror.local
        path = self._path = pathlib.Path(folder) / run_folder.METRICS_FILE
        found = _content(path)
        kept, n_unreadable = _parsed(found)
        lines = [line for line, values in kept if values["step"] <= resume_step]
        self._synced = {"lines": len(lines), "crc32": zlib.crc32(b"".join(lines))}
        with disk_errors_are_user_errors(f"writing {path}"):
            if problem := _problem(n_unreadable, self._synced, synced, kept):
                aside = files.beside(path, "damaged")
                write_atomically(aside, found)
                warn(f"warning: {path}: {problem}. Training goes on; the file as it was is {aside.name}")
            write_atomically(path, b"".join(lines))
            self._file = path.open("ab")
            self._board = _Board(path.parent / "tensorboard", first_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line; numbers, lists of numbers (one per layer) and text are understood."""
        with disk_errors_are_user_errors(f"writing {self._path}"):
            line = (json.dumps({"step": step, **values}) + "\n").encode()
            self._file.write(line)
            self._file.flush()
            crc32 = zlib.crc32(line, self._synced["crc32"])
            self._synced = {"lines": self._synced["lines"] + 1, "crc32": crc32}
            for name, value in values.items():
                if isinstance(value, str):
                    self._board.add(step, summary=summary.text(name, value))
                elif isinstance(value, list):
                    for layer, x in enumerate(value):
                        self._board.add(step, summary=summary.scalar(f"{name}/{layer}", x))
                else:
                    self._board.add(step, summary=summary.scalar(name, value))
        if self._mirror:
            self._mirror.copy_soon()

    def sync(self) -> dict[str, int]:
        """Returns when lines are where checkpoints are, with their number and CRC-32, to be compared."""
        with disk_errors_are_user_errors(f"writing {self._path}"):
            os.fsync(self._file.fileno())
            self._board.flush()
        if self._mirror:
            self._mirror.copy()
        return dict(self._synced)

    def close(self) -> None:
        """Brings everything to its place and closes the files."""
        with disk_errors_are_user_errors(f"writing {self._path}"):
            self._file.close()
            self._board.close()
        if self._mirror:
            self._mirror.close()


class NoWriter:
    """The writer of a process that has nothing to write; methods as of `MetricsWriter`."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def sync(self) -> dict[str, int]:
        """Returns nothing to compare."""
        return {}

    def close(self) -> None:
        """Has nothing to close."""


def is_evaluated(folder: AnyPath, step: int) -> bool:
    """Tells whether the metrics of a run hold the evaluation of a step."""
    return any(line["step"] == step and "eval/loss" in line for line in read(folder))


def read(folder: AnyPath) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics that can be read; none where there is no such file yet."""
    return [values for _, values in _parsed(_content(folder / run_folder.METRICS_FILE))[0]]


class _Board(EventsWriter):
    """A TensorBoard file, written by the caller's own thread.

    tensorboardX would write from a thread that takes events from a short queue: on a full disk that thread
    dies, and the run waits for it for ever.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        folder.mkdir(exist_ok=True)
        super().__init__(str(folder / "events"))
        # Tells TensorBoard to forget what an earlier process wrote of this step and later ones.
        self.add(first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **values: Any) -> None:
        self.write_event(Event(wall_time=time.time(), step=step, **values))


def _content(path: AnyPath) -> bytes:
    with storage_errors_are_user_errors(f"reading {path}", path):
        return path.read_bytes() if path.exists() else b""


def _parsed(content: bytes) -> tuple[list[tuple[bytes, dict[str, Any]]], int]:
    """Parses lines of metrics: every line of a writer with its values, and the number of other lines.

    A killed process can leave half a line, the last one, which does not count.
    """
    lines = [line + b"\n" for line in content.split(b"\n")]
    end = lines.pop().strip()
    if _values(end):
        lines.append(end + b"\n")
    parsed = [(line, _values(line)) for line in lines]
    kept = [(line, values) for line, values in parsed if values is not None]
    return kept, len(parsed) - len(kept)


def _values(line: bytes) -> dict[str, Any] | None:
    try:
        values = parse_json(line)
    except ValueError:
        return None
    return values if type(values.get("step")) is int and all(map(_is_metric, values.values())) else None


def _is_metric(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(x, int | float) for x in value)
    return isinstance(value, int | float | str)


def _problem(
    n_unreadable: int,
    held: Mapping[str, int],
    synced: Mapping[str, int] | None,
    kept: Sequence[tuple[bytes, dict[str, Any]]],
) -> str:
    """Describes what is not as it was written, in a phrase; "" if all is."""
    last = f"the last is of step {kept[-1][1]['step']:,}" if kept else "none is left"
    if synced and held["lines"] < synced["lines"]:
        n, n_lost = synced["lines"], synced["lines"] - held["lines"]
        return f"{n_lost:,} of {n:,} lines are missing or cannot be read; {last}"
    if n_unreadable:
        return f"{n_unreadable:,} lines are no metrics and were left out"
    if synced and dict(held) != dict(synced):
        return "some lines are not as they were written"
    return ""


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


class Console:
    """Progress of one run; a quiet one, of a process that is not the run's first, shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self._rich = rich.console.Console(file=sys.stdout, highlight=False, quiet=quiet)
        self._quiet = quiet
        self._live = self._rich.is_terminal and not quiet
        self._bar: rich.progress.Progress | None = None

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._live:
            self._rich.print(text, markup=False, soft_wrap=True)  # as it is, to be copied
        elif not self._quiet:
            print(text, flush=True)

    def start(self, step: int, steps: int) -> None:
        """Begins the progress display of steps `step` to `steps`."""
        self._first, self._steps, self._began = step, steps, time.monotonic()
        if self._live:
            columns = (
                rich.progress.TextColumn("step {task.completed:,}/{task.total:,}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.fields[figures]}"),
            )
            self._bar = rich.progress.Progress(*columns, console=self._rich)
            self._task = self._bar.add_task("", total=steps, completed=step, figures="")
            self._bar.start()

    def report(self, step: int, *, loss: float, tokens_per_second: float, mfu: float) -> None:
        """Shows the figures of a step: loss in nats per token, throughput, MFU (NaN: unknown), time left."""
        share = "?" if math.isnan(mfu) else f"{mfu:.0%}"
        seconds, done = time.monotonic() - self._began, step - self._first
        left = duration(seconds / done * (self._steps - step)) if done else "?"
        figures = f"loss {loss:.3f} | {tokens_per_second:,.0f} tokens/s | MFU {share} | {left} left"
        if self._bar:
            self._bar.update(self._task, completed=step, figures=figures)
        elif not self._quiet:
            print(f"step {step:,}/{self._steps:,} | {figures}", flush=True)

    def finish(self) -> None:
        """Takes the live line down."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def table(self, title: str, rows: Mapping[str, Any]) -> None:
        """Prints a two-column table."""
        table = rich.table.Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, str(value))
        self._print(table)

    def layout(self, mesh: str, rows: Sequence[ParameterLayout]) -> None:
        """Prints how the parameters lie over the devices."""
        table = rich.table.Table(
            "parameter", "shape", "split over", title=f"parameters on a mesh of {mesh}", title_justify="left"
        )
        table.add_column("MiB", justify="right")
        table.add_column("MiB on a device", justify="right")
        for row in rows:
            shape, unsplit = " x ".join(map(str, row.shape)), len(row.shape) - len(row.spec)
            split = ", ".join([axis or "-" for axis in row.spec] + ["-"] * unsplit)
            table.add_row(row.name, shape, split, _mib(row.n_bytes), _mib(row.n_bytes_on_device))
        table.add_section()
        total, on_device = sum(row.n_bytes for row in rows), sum(row.n_bytes_on_device for row in rows)
        table.add_row("all", "", "", _mib(total), _mib(on_device))
        self._print(table)

    def _print(self, table: rich.table.Table) -> None:
        for column in table.columns:
            column.overflow = "fold"  # so that nothing is cut on a narrow terminal
        self._rich.print(table)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.2f}"


def duration(seconds: float) -> str:
    """Formats a time like 4:05 or 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def percentages(shares: Sequence[float]) -> str:
    """Formats one share per layer like `12 %, 3 %`, or a dash where there are none."""
    return ", ".join(f"{share:.1%}".replace("%", " %") for share in shares) or "-"


def evaluation_line(step: int, result: Mapping[str, Any]) -> str:
    """Formats a held-out evaluation as one line."""
    part = ""
    if "of_tokens" in result:
        part = f" (the first {result['tokens']:,} of {result['of_tokens']:,} tokens)"
    line = (
        f"held-out at step {step:,}{part}: {result['bits_per_byte']:.4f} bits/byte | "
        f"loss {result['loss']:.4f} nats/token | perplexity {result['perplexity']:.2f}"
    )
    if result["dead_neurons"]:
        line += (
            f" | per TopK layer: dead {percentages(result['dead_neurons'])}; "
            f"norm kept {percentages(result['norm_kept'])}; "
            f"overlap with layer below {percentages(result['overlap_below'])}"
        )
    return line


def summary_rows(lines: Iterable[Mapping[str, Any]], step: int) -> dict[str, str]:
    """Returns rows of the last table, label to text, of metrics, oldest first, and the newest checkpoint."""
    newest = {name: value for line in lines for name, value in line.items()}
    formats: dict[str, tuple[str, Callable[[Any], str]]] = {
        "tokens_seen": ("tokens seen", "{:,}".format),
        "seconds_trained": ("time in training steps", duration),
        "goodput": ("share of the time since the run began", "{:.1%}".format),
        "train/loss": ("last train loss, nats/token", "{:.4f}".format),
        "eval/loss": ("held-out loss, nats/token", "{:.4f}".format),
        "eval/perplexity": ("held-out perplexity", "{:.2f}".format),
        "eval/bits_per_byte": ("held-out bits per byte", "{:.4f}".format),
        "eval/of_tokens": (
            f"held-out figures are of {newest.get('eval/tokens', 0):,} tokens of",
            "{:,}".format,
        ),
        "eval/dead_neurons": ("dead neurons, per TopK layer", percentages),
        "eval/norm_kept": ("squared norm kept, per TopK layer", percentages),
        "eval/overlap_below": ("active in the layer below too", percentages),
    }
    rows = {label: show(newest[key]) for key, (label, show) in formats.items() if key in newest}
    return {"steps": f"{step:,}", **rows}


def next_commands(folder: AnyPath) -> list[str]:
    """Returns commands that show a trained model; of one in a bucket not those of neurons, kept on disks."""
    run = shlex.quote(str(folder))
    explore = [] if is_bucket(folder) else [f"topklm explore {run}"]
    return [f'topklm generate {run} "The city of"', *explore]


def describe_model(config: Config) -> str:
    """Describes a model, such as "4 layers, TopK keeps 32 of 256 (relu) in 3 of them"."""
    m = config.model
    how = [m.topk_activation]
    how += [f"groups {m.topk_groups}"] if m.topk_groups else []
    how += ["centred"] if m.topk_centred else []
    how += [f"token input {m.token_input}"] if m.token_input != ModelConfig.token_input else []
    sparse = f"TopK keeps {m.topk_k} of {m.d_model} ({', '.join(how)}) in {m.n_topk_layers}"
    return f"{m.n_layers} layers, {sparse if m.n_topk_layers else 'TopK in none'} of them"
