"""Text to a prepared dataset: files are encoded, copies dropped, shards written, and a description last.

The result depends on the sources and the settings alone, never on who does the work or on what was
interrupted: the work lies in a hidden folder beside the dataset, found again by the next attempt, and the
dataset appears whole.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import os
from pathlib import Path
import shutil
import time
from typing import Any

import numpy as np
import tokenizers

from topklm.config import DataConfig
from topklm.data.building.chunks import ShardTask, Storage, Totals, plan_shards
from topklm.data.building.encode import (
    DatasetSettings,
    DatasetSources,
    FileResult,
    FileTask,
    Selection,
    fingerprint,
    fitted,
    share_tokenizer,
    shared_tokenizer,
    training_text,
)
from topklm.data.building.engines import Engine, LocalEngine, all_cores
from topklm.data.dataset import (
    DESCRIPTION_FILE,
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_FILE,
    Mixture,
    damaged,
    is_dataset,
    load_dataset,
    open_mixture,
    parse_description,
)
from topklm.data.records import Shard, sha256_of_file
from topklm.data.sources import HF, corpus_name, find, is_remote
from topklm.data.tokenizer import Tokenizer, train_bpe
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.progress import Progress
from topklm.storage.files import (
    check_name,
    folder_lock,
    fsync,
    is_bucket,
    is_locked,
    json_digest,
    sealed_json,
    store_errors_are_user_errors,
)

# A byte-level BPE of some ten thousand tokens changes little beyond this much text.
TOKENIZER_TRAINING_BYTES = 1 << 28
MAX_EXAMPLES = 100  # problems kept word for word
_STALE_SECONDS = 24 * 3600  # unfinished work of a trainer that nobody has touched for this long is given up


def prepare(data: DataConfig, announce: Callable[[str], None] = print) -> Mixture:
    """Opens the prepared datasets that a run's settings name, or makes one of the text that they name.

    Text goes into a folder named after a fingerprint of all that shapes it, so that it can be reused without
    asking. A document is held out when a hash of its text says so, so that a corpus may grow without any
    document changing sides (but see `encode.fitted` for very few); the tokenizer is trained on the training
    split. UserError for text that cannot be read, a split without documents, a disk that refuses, a damaged
    folder.
    """
    if data.mixture:
        return open_mixture(data.mixture, data.cache_gib)

    def opened(folder: str | Path, how: str = "") -> Mixture:
        dataset = load_dataset(folder, data.cache_gib)
        announce(f"data: {how}{folder} ({dataset})")
        return Mixture.single(dataset)

    folder = data.source if is_bucket(data.source) else os.path.expanduser(data.source)
    if is_dataset(folder):
        return opened(folder)
    names = [part.strip() for part in data.source.split(",") if part.strip()]
    files = find(names, flag="data.source", say=announce)
    selection = Selection(text_field=data.text_field, heldout_fraction=data.heldout_fraction)
    settings = DatasetSettings(selection, tokenizer=f"train:{data.vocab_size}")
    check_name(data.dir, "data.dir")
    root = Path(os.path.expanduser(data.dir)).absolute()
    with disk_errors_are_user_errors("preparing the data"):
        # A file's contents go by a hash, or by facts that a remote store gives.
        contents = [
            sha256_of_file(Path(file.url))
            if os.path.isfile(file.url)
            else f"{file.url} {file.size} {file.version}"
            for file in files
        ]
        identity = [(file.ending, content, False) for file, content in zip(files, contents, strict=True)]
        name = fingerprint(identity, settings)
        _remove_stale(root)
    out = root / f"{corpus_name(files)}-{name[:12]}"
    if is_dataset(out):  # its name says what it holds, wherever its sources lay at the time
        return opened(out, "reusing ")
    with LocalEngine(all_cores(), in_this_process=True) as engine:
        build(DatasetSources(files), settings, Storage(out), engine, Progress(announce), wait=True)
    return opened(out, "wrote ")


def _remove_stale(root: Path) -> None:
    for folder in root.glob(".*.partial"):
        # Another process may remove its folder while we look at it.
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
            if time.time() - newest > _STALE_SECONDS and not is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)


def build(
    sources: DatasetSources,
    settings: DatasetSettings,
    out: Storage,
    engine: Engine,
    progress: Progress,
    *,
    wait: bool = False,
) -> None:
    """Makes the dataset `out`, continues an attempt at it, or finds it made.

    No bit of the result depends on the engine. The folder must not exist, be empty, or hold this dataset.
    With `wait` another process that makes the same is waited for, not refused. UserError for text that cannot
    be read, a split without documents, a disk that refuses, a folder that holds something else.
    """
    work = out.parent.child(f".{out.name}.partial")

    def busy(owner: str) -> None:
        if not wait:
            raise UserError(
                f"{out.url} is being prepared by process {owner}: wait for it, stop it, or choose another "
                "folder"
            )
        progress.say(f"data: waiting for process {owner}, which prepares {out.url}")

    with disk_errors_are_user_errors(f"preparing the data in {out.url}"), contextlib.ExitStack() as stack:
        if _is_made(out, sources, settings):
            progress.say(f"data: {out.url} is prepared already")
            return
        if work.is_local:
            work.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(work.path, busy, warn=progress.say))
        if not (work.is_local and _is_made(out, sources, settings)):  # by the process that was waited for
            _Build(sources, settings, work, out, engine, progress).run()
        work.remove()


@dataclasses.dataclass
class _Build:
    sources: DatasetSources
    settings: DatasetSettings
    work: Storage
    final: Storage
    engine: Engine
    progress: Progress

    def run(self) -> None:
        settings, work, say = self.settings, self.work, self.progress.say
        selection = fitted(self.sources.files, settings.selection)
        if selection.last_heldout:
            say(
                f"data: heldout_fraction = {selection.heldout_fraction} of so few documents leaves a split "
                "without any; those with the lowest hashes are held out"
            )
        tokenizer = self._tokenizer(selection)
        share_tokenizer(tokenizer, work)
        files = [FileTask(file, held, selection, tokenizer.sha256, work) for file, held in self.sources.files]
        results = self._encode(files)
        chunks = [c for task, result in zip(files, results, strict=True) for c in task.chunks(result)]
        if settings.deduplicate:
            self.engine.drop_duplicates(chunks, work)
        else:
            for chunk in chunks:
                chunk.drop(np.zeros(0, np.int64))  # of what an earlier attempt may have marked
        totals = self.engine.totals(chunks, work)
        _check_not_empty(results, totals, settings)
        # Another folder for another set of files, or another cut. Object stores cannot rename a folder;
        # without its description, a folder is no dataset.
        identity = [[task.name for task in files], settings.deduplicate, settings.shard_tokens]
        folder = work.child(f"dataset-{json_digest(identity)[:24]}") if self.final.is_local else self.final
        planned = plan_shards(chunks, totals, tokenizer.vocab_size, settings.shard_tokens, folder)
        self._discard_damaged(planned)
        with self.progress.phase("writing shards", sum(task.size for task in planned)) as report:
            made = self.engine.run(planned, work, report)
        shards = [(task.split, shard) for task, shard in zip(planned, made, strict=True)]
        description = _describe(self.sources, settings, tokenizer, results, totals, shards)
        for line in _remarks(description):
            say(f"data: {line}")
        folder.write(TOKENIZER_FILE, tokenizer.to_bytes())
        folder.write(DESCRIPTION_FILE, sealed_json(description, indent=1))
        if self.final.is_local:
            # Records of shards, and what processes that were killed left of the files they were creating.
            wanted = {DESCRIPTION_FILE, TOKENIZER_FILE, *(task.name for task in planned)}
            for name in set(folder.names()) - wanted:
                folder.discard(name)
            folder.path.rename(self.final.path)
            fsync(self.final.path.parent)

    def _discard_damaged(self, tasks: Sequence[FileTask] | Sequence[ShardTask]) -> None:
        """Checks unfinished work on this machine before its use; a bucket compares its files itself."""
        if not self.work.is_local:
            return
        with ThreadPoolExecutor(all_cores()) as pool:  # hashing, their work, lets other threads run
            names = [name for found in pool.map(lambda task: task.discard_damaged(), tasks) for name in found]
        if names:
            self.progress.say(
                f"data: {len(names):,} piece(s) of unfinished work are damaged, and made again: {names[0]}"
                + (" ..." if len(names) > 1 else "")
            )

    def _tokenizer(self, selection: Selection) -> Tokenizer:
        """Reads the tokenizer from its file or an earlier attempt, or trains it on the training split."""
        vocab_size = self.settings.vocab_size
        if vocab_size is None:
            return self.settings.tokenizer_of_file
        files, work, say = self.sources.files, self.work, self.progress.say
        described = [[dataclasses.asdict(file), held] for file, held in files]
        identity = [described, self.settings.to_json(), tokenizers.__version__]
        name = f"training-{json_digest(identity)[:24]}.json"
        if work.exists(name):
            done = work.read_sealed(name) or {}
            if done.get("of") == name and (found := shared_tokenizer(done["tokenizer"], work)):
                return found
            say("data: the tokenizer in the unfinished work is damaged, and trained again")

        def announced(texts: Iterable[str]) -> Iterator[str]:
            yield from texts
            # Training, which reports nothing itself, begins after the last one.
            say(f"data: training a tokenizer of {vocab_size:,} tokens on what was read")

        began = time.monotonic()
        say(f"data: reading {len(files):,} file(s) to train the tokenizer")
        with self.progress.phase("training the tokenizer", 0) as report:
            text = training_text(files, selection, TOKENIZER_TRAINING_BYTES, report)
            tokenizer = train_bpe(announced(text), vocab_size)
        say(f"data: {tokenizer.vocab_size:,} tokens in the vocabulary, {time.monotonic() - began:.1f} s")
        share_tokenizer(tokenizer, work)
        work.write_sealed(name, {"of": name, "tokenizer": tokenizer.sha256})
        return tokenizer

    def _encode(self, files: Sequence[FileTask]) -> list[FileResult]:
        self._discard_damaged(files)
        began = time.monotonic()
        # Nobody knows how many rows a Hugging Face dataset has; some stores do not tell the size of a file.
        is_known = all(
            task.size or not (task.file.ending == HF or is_remote(task.file.url)) for task in files
        )
        with self.progress.phase("encoding", is_known * sum(task.size for task in files)) as report:
            results = self.engine.run(files, self.work, report)
        documents = sum(result.documents for result in results)
        self.progress.say(f"data: encoded {documents:,} documents, {time.monotonic() - began:.1f} s")
        return results


def _is_made(final: Storage, sources: DatasetSources, settings: DatasetSettings) -> bool:
    """Tells whether the dataset is there; UserError if another is, or the store cannot be reached."""
    guard = contextlib.nullcontext() if final.is_local else store_errors_are_user_errors("--out", final.url)
    with guard:
        exists = final.exists(DESCRIPTION_FILE)
    if exists:
        file = f"{final.url}/{DESCRIPTION_FILE}"
        made, asked = parse_description(final.read(DESCRIPTION_FILE), file), settings.to_json()
        try:
            old = dict(made["settings"])
            is_same = _same_sources(made["sources"], sources)
        except (KeyError, TypeError, ValueError) as e:
            raise damaged(file, e) from e
        different = [f"{k} was {old.get(k)!r}, now {v!r}" for k, v in asked.items() if old.get(k) != v]
        if not is_same:
            different.append("its sources are others or have changed")
        if different:
            raise UserError(
                f"{final.url} holds another dataset: {'; '.join(different)}. Choose another folder, or "
                "delete it"
            )
    elif final.is_local and final.path.exists() and (final.path.is_file() or any(final.path.iterdir())):
        raise UserError(
            f"{final.url} exists and is no prepared dataset: choose another folder, or move it away"
        )
    return exists


def _same_sources(made: Sequence[dict[str, Any]], asked: DatasetSources) -> bool:
    if [(s["url"], s["size"], s["heldout"]) for s in made] != [(f.url, f.size, h) for f, h in asked.files]:
        return False
    # A file that was copied or touched has another version, and perhaps the same content.
    return all(
        old["version"] == file.version
        or (os.path.isfile(file.url) and sha256_of_file(Path(file.url)) == old["sha256"])
        for old, (file, _) in zip(made, asked.files, strict=True)
    )


def _describe(
    sources: DatasetSources,
    settings: DatasetSettings,
    tokenizer: Tokenizer,
    results: Sequence[FileResult],
    totals: Sequence[Totals],
    shards: Sequence[tuple[str, Shard]],
) -> dict[str, Any]:
    """Makes dataset.json of a result for each file, totals of each chunk, and (split, shard) in order."""
    contents = [(f.ending, r.sha256, held) for (f, held), r in zip(sources.files, results, strict=True)]
    splits = {}
    for number, split in enumerate(SPLITS):
        documents, tokens, utf8_bytes = (
            sum(getattr(total, name)[number] for total in totals)
            for name in ("documents", "tokens", "utf8_bytes")
        )
        splits[split] = {
            "documents": documents,
            "tokens": tokens,
            "text_tokens": tokens - documents,
            "utf8_bytes": utf8_bytes,
            "shards": [dataclasses.asdict(shard) for name, shard in shards if name == split],
        }
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(contents, settings),
        "settings": settings.to_json(),
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "separator_id": tokenizer.separator_id,
        },
        "sources": [
            {**dataclasses.asdict(file), "heldout": held, "sha256": r.sha256, "documents": r.documents}
            for (file, held), r in zip(sources.files, results, strict=True)
        ],
        "text": _text_counts(results, totals),
        "problem_examples": [example for r in results for example in r.examples][:MAX_EXAMPLES],
        "splits": splits,
    }


def _text_counts(results: Sequence[FileResult], totals: Sequence[Totals]) -> dict[str, Any]:
    names = ("too_short", "too_long", "documents_with_replacements", "replaced_sequences")
    read = sum(result.documents for result in results)
    kept = sum(sum(total.documents) for total in totals)
    problems = sum((Counter(result.problems) for result in results), Counter())
    return {
        "documents": read,  # before copies were dropped
        "utf8_bytes": sum(result.utf8_bytes for result in results),
        "duplicates": read - kept,
        **{name: sum(getattr(result, name) for result in results) for name in names},
        "problems": dict(sorted(problems.items())),
    }


def _remarks(description: dict[str, Any]) -> list[str]:
    """Returns lines on all documents that were left out or mended."""
    text, lines = description["text"], []
    if text["replaced_sequences"]:
        lines.append(
            f"replaced {text['replaced_sequences']:,} invalid UTF-8 sequences in "
            f"{text['documents_with_replacements']:,} documents with U+FFFD"
        )
    if text["duplicates"]:
        lines.append(f"dropped {text['duplicates']:,} documents that are copies of others")
    for name, what in (("too_short", "shorter than min_chars"), ("too_long", "longer than max_chars")):
        if text[name]:
            lines.append(f"left out {text[name]:,} documents {what}")
    for kind, n in text["problems"].items():
        example = next((e for e in description["problem_examples"] if f": {kind} (" in e), None)
        lines.append(f"{n:,} x {kind}" + (f"; the first: {example}" if example else ""))
    return lines


def _check_not_empty(
    results: Sequence[FileResult], totals: Sequence[Totals], settings: DatasetSettings
) -> None:
    """Refuses a dataset without training text, or with none held out where some was asked for."""
    documents = [sum(total.documents[split] for total in totals) for split in (0, 1)]
    if not any(documents):
        raise _no_text(results, _text_counts(results, totals), settings.selection)
    fraction = settings.selection.heldout_fraction
    for name, n in zip(SPLITS, documents, strict=True):
        if n == 0 and (name == "train" or fraction > 0):
            raise UserError(
                f"heldout_fraction = {fraction}: of {sum(documents)} document(s) none came into the {name} "
                "split; give more documents (three that differ are enough), or name the text to hold out "
                "(topklm prepare --heldout FILE)"
            )


def _no_text(results: Sequence[FileResult], text: dict[str, Any], selection: Selection) -> UserError:
    names = ", ".join(result.url for result in results[:3]) + (" ..." if len(results) > 3 else "")
    counts = {
        f"too short (min_chars = {selection.min_chars})": text["too_short"],
        f"too long (max_chars = {selection.max_chars})": text["too_long"],
        **text["problems"],
    }
    left_out = ", ".join(f"{what}: {n:,}" for what, n in counts.items() if n)
    advice = "give files that hold text"
    if text["too_short"] or text["too_long"]:
        advice = "give longer documents or other limits (--min-chars, --max-chars)"
    elif text["problems"]:
        advice += ", and its key (--text-field, data.text_field)"
    first = next((example for result in results for example in result.examples), "")
    return UserError(
        f"no text in {names}{f', left out {left_out}' if left_out else ''}: {advice}"
        f"{f'; the first problem: {first}' if first else ''}"
    )
