"""`topklm data show` and `topklm data verify`: looks into a prepared dataset, and checks all of it."""

import argparse
import dataclasses
import re

import rich.console
import rich.rule
import rich.text

from topklm.commands import shared
from topklm.commands.shared import Output, Verb
from topklm.data.dataset import SPLITS, load_dataset
from topklm.data.verify import TextWindow, VerifyReport, sample_windows, verify
from topklm.errors import UserError

DESCRIPTION = "Looks into a dataset that `topklm prepare` wrote, or checks all of it."
EXAMPLE = "topklm data verify datasets/books"

# A terminal acts on them; line feed and tab are text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    verbs = {
        "show": Verb(
            "print a few decoded windows",
            "Prints a few windows of a dataset as text, with a rule where a document begins.",
            "topklm data show datasets/books --windows 5",
            _add_show,
            _show,
        ),
        "verify": Verb(
            "read everything and compare it with dataset.json",
            "Reads every byte of a dataset and lists everything that is not as it was written.",
            EXAMPLE,
            _add_folder,
            _verify,
        ),
    }
    shared.add_verbs(parser, verbs, "show|verify")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    shared.flags(parser, "json")("dataset DIR", "folder of a dataset, e.g. datasets/books")


def _add_show(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    add = shared.flags(parser)
    add("--split", "", "train", choices=SPLITS)
    add("--windows N", "", 3)
    add("--context-length T", "tokens per window", 256)
    add("--seed N", "of the choice of windows", 0)


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    if "://" in arguments.dataset:
        allowed = "a local or mounted folder"
        raise UserError(field="DIR", value=arguments.dataset, allowed=allowed, advice="copy or mount it")
    arguments.call(arguments)


def _show(arguments: argparse.Namespace) -> None:
    shared.check_at_least(arguments, 1, "windows", "context_length")
    dataset, split = load_dataset(arguments.dataset), arguments.split
    windows = [*sample_windows(dataset, split, arguments.windows, arguments.context_length, arguments.seed)]
    separator = dataset.tokenizer.token_strings([dataset.tokenizer.separator_id])[0]
    output = Output(arguments.json)

    def show() -> None:
        for window in windows:
            _print_window(output.console, window, split, separator)

    found = [{**dataclasses.asdict(window), "documents": window.documents} for window in windows]
    output.give({"path": str(dataset.path), "split": split, "windows": found}, show)


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
    output = Output(arguments.json)
    report = verify(arguments.dataset, output.progress)
    facts = {**dataclasses.asdict(report), "path": str(report.path), "ok": not report.problems}
    output.give(facts, lambda: _print_report(output, report))
    if report.problems:
        raise UserError(
            f"{report.path}: {len(report.problems):,} problem(s), listed above; put the files back, or "
            "delete the folder and prepare the data again"
        )


def _print_report(output: Output, report: VerifyReport) -> None:
    rows = []
    labels = ("shards read", "documents", "tokens", "bytes of text, recounted")
    for label, field in zip(labels, ("shards", "documents", "tokens", "utf8_bytes"), strict=True):
        counts = [getattr(report.splits[split], field) for split in SPLITS]
        rows.append([label, *("not counted" if count is None else f"{count:,}" for count in counts)])
    output.console.print(shared.table(("", "train", "held out"), rows, str(report.path), left=[""]))
    for problem in report.problems:
        output.say(f"{problem.file}: {problem.what}")
    for name in report.other_files:
        output.say(f"{name}: not a file of this dataset")
    if not report.problems:
        output.say("everything is as it was written")
