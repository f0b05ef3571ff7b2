"""`topklm prepare`: turns text into a dataset of token shards."""

import argparse
import shlex
import time
from typing import Any

from topklm.commands import shared
from topklm.commands.shared import Output
from topklm.data import formats
from topklm.data.building.build import build
from topklm.data.building.chunks import Storage
from topklm.data.building.encode import DatasetSettings, DatasetSources, Selection
from topklm.data.building.engines import BeamEngine, LocalEngine, all_cores
from topklm.data.dataset import DESCRIPTION_FILE, parse_description
from topklm.data.records import SHARD_TOKENS
from topklm.data.sources import find
from topklm.errors import UserError
from topklm.storage.files import check_name

DESCRIPTION = (
    "Turns text into a dataset of token shards, which training streams. SOURCE is a file, a folder, a glob, "
    "a URL (gs://, s3://) or hf:NAME[:CONFIG][:SPLIT]; files end in "
    f"{formats.described()}. "
    "Killed, it continues when started again; finished, it does nothing."
)
READS_FILES = True
EXAMPLE = "topklm prepare 'texts/*.jsonl.gz' --tokenizer train:16384 --out datasets/mine"

_HELDOUT_FRACTION = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser)
    add("sources SOURCE", "where the text is, see above", nargs="+")
    add("--out DIR", "folder of the dataset, e.g. datasets/mine", required=True)
    add("--text-field NAME", "key or column of the text; doc.text: inside another", "text")
    add(
        "--tokenizer T",
        "a tokenizer.json, a SentencePiece .model, a .tiktoken file, or train:VOCAB: a byte-level BPE "
        "trained on the training split",
        "train:16384",
    )
    text = "hold out all of this; may be repeated"
    add("--heldout SOURCE", text, action="append", default=[])
    text = (
        "share of the other documents held out, chosen by a hash of their text; default "
        f"{_HELDOUT_FRACTION}, or 0 with --heldout"
    )
    add("--heldout-fraction F", text, float)
    add("--min-chars N", "leave out shorter documents", 0)
    add("--max-chars N", "leave out longer documents; 0: none", 0)
    add("--keep-duplicates", "keep exact copies of documents", False)
    add("--shard-tokens N", "tokens per shard, about", SHARD_TOKENS)
    add("--workers N", "cores to use; default all", int)
    add("--strict", "stop at the first thing that is wrong", False)
    shared.flags(parser, "json")
    text = "run as an Apache Beam pipeline: DirectRunner, FlinkRunner, SparkRunner, DataflowRunner"
    add("--runner RUNNER", text)
    text = "for the pipeline, e.g. '--project=P --region=R --temp_location=gs://B/tmp'"
    add("--beam-options O", text, default="")


def run(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments)
    check_name(arguments.out, "--out")
    output = Output(arguments.json)
    progress = output.progress
    heldout = find(arguments.heldout, flag="--heldout", say=progress.say) if arguments.heldout else ()
    sources = DatasetSources(find(arguments.sources, say=progress.say), heldout)
    out = Storage(arguments.out)
    began = time.monotonic()
    if arguments.runner:
        beam = BeamEngine(arguments.runner, shlex.split(arguments.beam_options))
        build(sources, settings, out, beam, progress)
    elif not out.is_local:
        raise UserError(
            f"--out = {arguments.out}: without --runner it must be a local folder; copy it afterwards"
        )
    else:
        shared.check_at_least(arguments, 1, "workers")
        with LocalEngine(arguments.workers or all_cores()) as engine:
            build(sources, settings, out, engine, progress)
    seconds = time.monotonic() - began
    description = parse_description(out.read(DESCRIPTION_FILE), f"{out.url}/{DESCRIPTION_FILE}")

    def show() -> None:
        title = f"{out.url}, {seconds:,.1f} s"
        rows = _summary(description)
        output.console.print(shared.table(("", "train", "held out"), rows, title, left=[""]))
        for example in description["problem_examples"]:
            output.say(f"  {example}")

    output.give({"path": out.url, "seconds": seconds, **description}, show)


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


def _summary(description: dict[str, Any]) -> list[list[str] | None]:
    """Returns rows: a figure of both splits, then figures of all text."""
    splits, text = description["splits"].values(), description["text"]
    counts = {
        "vocabulary": description["tokenizer"]["vocab_size"],
        "copies dropped": text["duplicates"],
        "too short": text["too_short"],
        "too long": text["too_long"],
        "invalid UTF-8 replaced in": text["documents_with_replacements"],
        **{f"skipped: {kind}": n for kind, n in text["problems"].items()},
    }
    figures = {
        "documents": [f"{split['documents']:,}" for split in splits],
        "tokens": [f"{split['tokens']:,}" for split in splits],
        "bytes of text": [f"{split['utf8_bytes']:,}" for split in splits],
        "bytes per token": [f"{split['utf8_bytes'] / max(1, split['text_tokens']):.2f}" for split in splits],
        "shards": [f"{len(split['shards']):,}" for split in splits],
    }
    of_splits = [[label, *cells] for label, cells in figures.items()]
    return [*of_splits, None, *([label, f"{n:,}", ""] for label, n in counts.items())]
