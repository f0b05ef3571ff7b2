"""`topklm data show` and `topklm data verify`: looks into a prepared dataset, and checks all of it."""

import argparse
import dataclasses
import json
import re

import rich.console
import rich.rule
import rich.table
import rich.text

from topklm.data.dataset import SPLITS, TextWindow, load_dataset, sample_windows
from topklm.data.verify import VerifyReport, verify
from topklm.errors import UserError
from topklm.progress import TerminalProgress

DESCRIPTION = "Looks into a dataset that `topklm prepare` wrote, or checks all of it."
EXAMPLE = "topklm data verify datasets/books"

_SHOW_EXAMPLE = "topklm data show datasets/books --windows 5"
# A terminal acts on them; line feed and tab are text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="show|verify")
    show = verbs.add_parser(
        "show",
        help="print a few decoded windows",
        description="Prints a few windows of a dataset as text, with a rule where a document begins.",
        epilog=f"example: {_SHOW_EXAMPLE}",
    )
    show.add_argument("--split", choices=SPLITS, default="train", help="default %(default)s")
    show.add_argument("--windows", type=int, default=3, metavar="N", help="default %(default)s")
    show.add_argument(
        "--context-length", type=int, default=256, metavar="T", help="tokens per window; default %(default)s"
    )
    show.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the choice of windows; default %(default)s"
    )
    check = verbs.add_parser(
        "verify",
        help="read everything and compare it with dataset.json",
        description="Reads every byte of a dataset and lists everything that is not as it was written.",
        epilog=f"example: {EXAMPLE}",
    )
    for verb, call in ((show, _show), (check, _verify)):
        verb.add_argument("dataset", metavar="DIR", help="folder of a dataset, e.g. datasets/books")
        verb.add_argument("--json", action="store_true", help="print one JSON object")
        verb.set_defaults(call=call)


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    if "://" in arguments.dataset:
        raise UserError(f"DIR = {arguments.dataset}: must be a local or mounted folder; copy or mount it")
    arguments.call(arguments)


def _show(arguments: argparse.Namespace) -> None:
    for flag in ("windows", "context_length"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} = {getattr(arguments, flag)}: must be 1 or more")
    dataset, split = load_dataset(arguments.dataset), arguments.split
    windows = sample_windows(dataset, split, arguments.windows, arguments.context_length, arguments.seed)
    if arguments.json:
        shown = [{**dataclasses.asdict(window), "documents": window.documents} for window in windows]
        print(json.dumps({"path": str(dataset.path), "split": split, "windows": shown}))
        return
    console = rich.console.Console()
    separator = dataset.tokenizer.token_strings([dataset.tokenizer.separator_id])[0]
    for window in windows:
        _print_window(console, window, split, separator)


def _print_window(console: rich.console.Console, window: TextWindow, split: str, separator: str) -> None:
    n = f"{window.documents:,} document{'s' if window.documents > 1 else ''}"
    title = rich.text.Text(f"{split}, tokens {window.start:,} to {window.stop - 1:,}, {n}", style="bold")
    console.print(rich.rule.Rule(title, characters="═", style="bold", align="left"))
    for piece in window.pieces:
        if piece.begins:
            mark = rich.text.Text(separator, style="cyan")
            console.print(rich.rule.Rule(mark, characters="┄", style="cyan", align="left"))
        text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", piece.text)
        console.out(text, highlight=False)


def _verify(arguments: argparse.Namespace) -> None:
    console = rich.console.Console(stderr=arguments.json)
    report = verify(arguments.dataset, TerminalProgress(console))
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(report), "path": str(report.path), "ok": not report.problems}))
    else:
        _print_report(console, report)
    if report.problems:
        raise UserError(
            f"{report.path}: {len(report.problems):,} problem(s), listed above; put the files back, or "
            "delete the folder and prepare the data again"
        )


def _print_report(console: rich.console.Console, report: VerifyReport) -> None:
    table = rich.table.Table(title=str(report.path), title_justify="left")
    for column in ("", "train", "held out"):
        table.add_column(column, justify="right" if column else "left")
    labels = ("shards read", "documents", "tokens", "bytes of text, recounted")
    for label, field in zip(labels, ("shards", "documents", "tokens", "utf8_bytes"), strict=True):
        counts = [getattr(report.splits[split], field) for split in SPLITS]
        table.add_row(label, *("not counted" if count is None else f"{count:,}" for count in counts))
    console.print(table)
    lines = [f"{problem.file}: {problem.what}" for problem in report.problems]
    lines += [f"{name}: not a file of this dataset" for name in report.other_files]
    if not report.problems:
        lines.append("everything is as it was written")
    for line in lines:
        console.out(line, highlight=False)
