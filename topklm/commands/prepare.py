"""`topklm prepare`: turns text into a dataset of token shards."""

import argparse
import shlex
import time
from typing import Any

import rich.table

from topklm.commands import shared
from topklm.commands.shared import Output
from topklm.data import formats
from topklm.data.building.build import build
from topklm.data.building.encode import DatasetSettings, DatasetSources, Selection
from topklm.data.building.engines import BeamEngine, LocalEngine, all_cores
from topklm.data.building.storage import Storage
from topklm.data.dataset import DESCRIPTION_FILE, parse_description
from topklm.data.records import SHARD_TOKENS
from topklm.data.sources import find
from topklm.errors import UserError
from topklm.progress import Progress
from topklm.storage.files import check_name

DESCRIPTION = (
    "Turns text into a dataset of token shards, which training streams. SOURCE is a file, a folder, a glob, "
    "a URL (gs://, s3://) or hf:NAME[:CONFIG][:SPLIT]; files end in "
    f"{formats.described()}. "
    "Killed, it continues when started again; finished, it does nothing."
)
EXAMPLE = "topklm prepare 'texts/*.jsonl.gz' --tokenizer train:16384 --out datasets/mine"

_HELDOUT_FRACTION = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""

    def add(flag: str, text: str, **options: Any) -> None:
        shown = "" if options.get("default") in (None, [], 0) else "; default %(default)s"
        parser.add_argument(flag, help=text + shown, **options)

    add("sources", "where the text is, see above", nargs="+", metavar="SOURCE")
    add("--out", "folder of the dataset, e.g. datasets/mine", required=True, metavar="DIR")
    add(
        "--text-field",
        "key or column of the text; doc.text: inside another",
        default="text",
        metavar="NAME",
    )
    add(
        "--tokenizer",
        "a tokenizer.json, a SentencePiece .model, a .tiktoken file, or train:VOCAB: a byte-level BPE "
        "trained on the training split",
        default="train:16384",
        metavar="T",
    )
    add("--heldout", "hold out all of this; may be repeated", action="append", default=[], metavar="SOURCE")
    add(
        "--heldout-fraction",
        "share of the other documents held out, chosen by a hash of their text; default "
        f"{_HELDOUT_FRACTION}, or 0 with --heldout",
        type=float,
        metavar="F",
    )
    add("--min-chars", "leave out shorter documents", type=int, default=0, metavar="N")
    add("--max-chars", "leave out longer documents; 0: none", type=int, default=0, metavar="N")
    parser.add_argument("--keep-duplicates", action="store_true", help="keep exact copies of documents")
    add("--shard-tokens", "tokens per shard, about", type=int, default=SHARD_TOKENS, metavar="N")
    add("--workers", "cores to use; default all", type=int, metavar="N")
    parser.add_argument("--strict", action="store_true", help="stop at the first thing that is wrong")
    shared.add_json(parser, "print one JSON object at the end")
    add(
        "--runner",
        "run as an Apache Beam pipeline: DirectRunner, FlinkRunner, SparkRunner, DataflowRunner",
        metavar="RUNNER",
    )
    add(
        "--beam-options",
        "for the pipeline, e.g. '--project=P --region=R --temp_location=gs://B/tmp'",
        default="",
        metavar="O",
    )


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    settings = _settings(arguments)
    check_name(arguments.out, "--out")
    output = Output(arguments.json)
    progress = output.progress
    heldout = find(arguments.heldout, flag="--heldout", say=progress.say) if arguments.heldout else ()
    sources = DatasetSources(find(arguments.sources, say=progress.say), heldout)
    out = Storage(arguments.out)
    began = time.monotonic()
    _build(arguments, sources, settings, out, progress)
    seconds = time.monotonic() - began
    description = parse_description(out.read(DESCRIPTION_FILE), f"{out.url}/{DESCRIPTION_FILE}")

    def show() -> None:
        output.console.print(_summary(out, description, seconds))
        for example in description["problem_examples"]:
            output.say(f"  {example}")

    output.give({"path": out.url, "seconds": seconds, **description}, show)


def _build(
    arguments: argparse.Namespace,
    sources: DatasetSources,
    settings: DatasetSettings,
    out: Storage,
    progress: Progress,
) -> None:
    if arguments.runner:
        engine = BeamEngine(arguments.runner, shlex.split(arguments.beam_options))
        build(sources, settings, out, engine, progress)
        return
    if not out.is_local:
        raise UserError(
            f"--out = {arguments.out}: without --runner it must be a local folder; copy it afterwards"
        )
    shared.check_at_least(arguments, 1, "workers")
    with LocalEngine(arguments.workers or all_cores()) as engine:
        build(sources, settings, out, engine, progress)


def _settings(arguments: argparse.Namespace) -> DatasetSettings:
    fraction = arguments.heldout_fraction
    if fraction is None:
        fraction = 0.0 if arguments.heldout else _HELDOUT_FRACTION
    if not 0 <= fraction < 1:
        raise shared.wrong(arguments, "heldout_fraction", allowed="at least 0 and below 1")
    shared.check_at_least(arguments, 0, "min_chars", "max_chars")
    shared.check_at_least(arguments, 1, "shard_tokens")
    selection = Selection(
        text_field=arguments.text_field,
        heldout_fraction=fraction,
        min_chars=arguments.min_chars,
        max_chars=arguments.max_chars,
        strict=arguments.strict,
    )
    return DatasetSettings(
        selection, arguments.tokenizer, not arguments.keep_duplicates, arguments.shard_tokens
    )


def _summary(out: Storage, description: dict[str, Any], seconds: float) -> rich.table.Table:
    table = rich.table.Table(title=f"{out.url}, {seconds:,.1f} s", title_justify="left")
    for column in ("", "train", "held out"):
        table.add_column(column, justify="right" if column else "left")
    splits = description["splits"].values()
    for label, name in (("documents", "documents"), ("tokens", "tokens"), ("bytes of text", "utf8_bytes")):
        table.add_row(label, *(f"{split[name]:,}" for split in splits))
    table.add_row(
        "bytes per token", *(f"{split['utf8_bytes'] / max(1, split['text_tokens']):.2f}" for split in splits)
    )
    table.add_row("shards", *(f"{len(split['shards']):,}" for split in splits))
    table.add_section()
    text = description["text"]
    counts = {
        "vocabulary": description["tokenizer"]["vocab_size"],
        "copies dropped": text["duplicates"],
        "too short": text["too_short"],
        "too long": text["too_long"],
        "invalid UTF-8 replaced in": text["documents_with_replacements"],
        **{f"skipped: {kind}": n for kind, n in text["problems"].items()},
    }
    for label, n in counts.items():
        table.add_row(label, f"{n:,}", "")
    return table
