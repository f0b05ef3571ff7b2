"""`topklm data`: looks into a prepared dataset, checks all of it, and writes its documents as text."""

import argparse
from collections.abc import Iterator
import dataclasses
import gzip
import json
from pathlib import Path
import re

import rich.console
import rich.rule
import rich.text

from topklm.commands import shared
from topklm.commands.shared import Output, Verb
from topklm.data.dataset import (
    SPLITS,
    Dataset,
    TextWindow,
    VerifyReport,
    is_dataset,
    load_dataset,
    sample_windows,
    verify,
)
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.imports import when_used
from topklm.storage.files import as_path, local_path, replacing

with when_used():
    from topklm.checkpoint import run_folder
    from topklm.data import stream
    from topklm.data.building import build

DESCRIPTION = "Looks into a dataset of `topklm prepare`, checks all of it, or writes its documents as text."
EXAMPLE = "topklm data verify datasets/books"

_ENDINGS = (".jsonl", ".jsonl.gz")
# A terminal acts on them; line feed and tab are text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        "export": Verb(
            "write documents as JSON lines",
            'Writes the documents of a dataset, or of the data of a run, as lines {"text": ...}, to contrast '
            "them, say.",
            "topklm data export runs/small --regex 'river|sea' --out water.jsonl",
            _add_export,
            _export,
        ),
    }
    shared.add_verbs(parser, verbs, "show|verify|export")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    shared.flags(parser, "json")("dataset DIR", "folder of a dataset, e.g. datasets/books")


def _add_show(parser: argparse.ArgumentParser) -> None:
    _add_folder(parser)
    add = shared.flags(parser)
    add("--split", "", "train", choices=SPLITS)
    add("--windows N", "", 3)
    add("--context-length T", "tokens per window", 256)
    add("--seed N", "of the choice of windows", 0)


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "case", "json")
    add("dataset DIR|RUN", "folder of a dataset or of a run")
    add("--split", "", "heldout", choices=SPLITS)
    add("--regex PATTERN", "only documents in which it is found")
    add("--out FILE", f"where to write; ends in {' or '.join(_ENDINGS)}", required=True)


def run(arguments: argparse.Namespace) -> None:
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


def _export(arguments: argparse.Namespace) -> None:
    out = local_path(arguments.out, "--out")
    if not arguments.out.endswith(_ENDINGS):
        raise shared.wrong(arguments, "out", allowed=f"a name that ends in {' or '.join(_ENDINGS)}")
    shared.check_can_write(arguments, "out")
    if arguments.regex is None:
        shared.check_goes_with(arguments, "regex", "case")
    pattern = shared.compiled(arguments, "regex")
    output = Output(arguments.json)
    datasets = _datasets(arguments.dataset)
    splits = [dataset.splits[arguments.split] for dataset in datasets]
    n_read = n_written = 0
    with (
        disk_errors_are_user_errors(f"writing {out}"),
        replacing(out) as temporary,
        temporary.open("wb") as raw,
        # The same bytes whenever they are written: neither name nor time.
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if out.suffix == ".gz" else raw as file,
        output.progress.phase("exporting", sum(split.tokens for split in splits)) as report,
    ):
        for dataset in datasets:
            for text, n_tokens in _documents(dataset, arguments.split):
                n_read += 1
                if pattern.search(text):
                    n_written += 1
                    file.write((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())
                report(n_tokens, 1, n_tokens)
        if not n_written:
            looked_for = f" matches --regex = {arguments.regex}" if arguments.regex else " is there"
            raise UserError(f"{arguments.dataset}: no document{looked_for}: nothing is written")
    facts = {"file": str(out), "split": arguments.split, "documents": n_read, "written": n_written}
    output.give(
        facts, lambda: output.say(f"{out}: {n_written:,} of {n_read:,} documents ({arguments.split})")
    )


def _datasets(name: str) -> tuple[Dataset, ...]:
    """Opens a dataset, or a run's, prepared again where missing; UserError for a folder of neither."""
    folder = Path(as_path(name, "DIR"))
    if is_dataset(folder) or not folder.is_dir():
        return (load_dataset(folder),)
    config = run_folder.saved_config(folder)
    if config is None:
        raise UserError(field="DIR", value=name, allowed="the folder of a dataset or of a run")
    return tuple(build.prepare(config.data, lambda line: None).datasets)


def _documents(dataset: Dataset, split: str) -> Iterator[tuple[str, int]]:
    """Yields the text of each document, and its tokens with the separator."""
    tokens = dataset.tokens(dataset.splits[split])
    if not len(tokens):
        return
    for begin, end in stream.document_bounds(tokens, dataset.tokenizer.separator_id):
        yield dataset.tokenizer.decode(tokens.read(begin + 1, end)), end - begin
