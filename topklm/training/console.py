"""The output of a run: a live line on a terminal, plain lines elsewhere, and tables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
import shlex
import sys
import time
from typing import Any

import rich.console
import rich.progress
import rich.table

from topklm.config import Config, ModelConfig
from topklm.layout import ParameterLayout
from topklm.storage.files import AnyPath, is_bucket


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


def summary(lines: Iterable[Mapping[str, Any]], step: int) -> dict[str, str]:
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
