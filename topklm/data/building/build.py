"""Text to a prepared dataset: files are encoded, copies dropped, shards written, and a description last.

The result depends on the sources and the settings alone, never on who does the work or on what was
interrupted: the work lies in a hidden folder beside the dataset, found again by whoever continues, and the
dataset appears whole.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import functools
import hashlib
import json
import time

import tokenizers

from topklm.data.building import chunks as chunks_lib
from topklm.data.building import description as description_lib
from topklm.data.building import encode, work_items
from topklm.data.building.chunks import Chunk
from topklm.data.building.description import DatasetSettings, DatasetSources
from topklm.data.building.encode import FileJob, FileResult, Selection, chunks_of, fitted, training_text
from topklm.data.building.storage import Storage
from topklm.data.building.work_items import all_cores, plan_shards
from topklm.data.dataset import DESCRIPTION_FILE, TOKENIZER_FILE, description_to_bytes, parse_description
from topklm.data.sources import HF, is_remote
from topklm.data.tokenizer import Tokenizer, train_bpe
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.progress import Progress
from topklm.storage.errors import store_errors_are_user_errors
from topklm.storage.files import folder_lock, fsync, parse_json, sealed_json, unsealed

# A byte-level BPE of some ten thousand tokens changes little beyond this much text.
TOKENIZER_TRAINING_BYTES = 1 << 28


def build(
    sources: DatasetSources,
    settings: DatasetSettings,
    out: Storage,
    engine: work_items.Engine,
    progress: Progress,
    *,
    wait: bool = False,
) -> None:
    """Makes the dataset `out`, continues an attempt at it, or finds it made.

    Args:
        sources: Where the text is.
        settings: Of the dataset.
        out: The dataset's folder; must not exist, be empty, or hold this dataset.
        engine: Does the work; no bit of the result depends on it.
        progress: Where it is shown.
        wait: Whether to wait for another process that makes the same, instead of refusing.

    Raises:
        UserError: For text that cannot be read, a split without documents, a disk that refuses, a
            folder that holds something else.
    """
    work = out.parent.child(f".{out.name}.partial")
    with disk_errors_are_user_errors(f"preparing the data in {out.url}"), contextlib.ExitStack() as stack:
        if _is_made(out, sources, settings):
            progress.say(f"data: {out.url} is prepared already")
            return
        if work.is_local:
            work.path.mkdir(parents=True, exist_ok=True)
            busy = functools.partial(_busy, out.url, wait, progress)
            stack.enter_context(folder_lock(work.path, busy, warn=progress.say))
            if _is_made(out, sources, settings):  # by whom we waited for
                work.remove()
                return
        _Build(sources, settings, work, out, engine, progress).run()
        work.remove()


class _Build:
    """One attempt."""

    def __init__(
        self,
        sources: DatasetSources,
        settings: DatasetSettings,
        work: Storage,
        final: Storage,
        engine: work_items.Engine,
        progress: Progress,
    ):
        self._sources, self._settings, self._work, self._final = sources, settings, work, final
        self._engine, self._progress = engine, progress

    def run(self) -> None:
        """Does what is left to do."""
        selection, work = fitted(self._sources.files, self._settings.selection), self._work
        if selection.last_heldout:
            self._progress.say(
                f"data: heldout_fraction = {selection.heldout_fraction} of so few documents leaves a split "
                "without any; those with the lowest hashes are held out"
            )
        tokenizer = self._tokenizer(selection)
        work_items.share_tokenizer(tokenizer, work)
        jobs = [FileJob(file, held, selection, tokenizer.sha256) for file, held in self._sources.files]
        self._discard_damaged([functools.partial(encode.discard_damaged, job, work) for job in jobs])
        results = self._encode(jobs)
        chunks = [c for job, r in zip(jobs, results, strict=True) for c in chunks_of(job, r, work)]
        self._drop_duplicates(chunks)
        totals = self._engine.totals(chunks, self._work)
        description_lib.check_not_empty(results, totals, self._settings)
        # Object stores cannot rename a folder; without its description, a folder is no dataset.
        folder = self._work.child(self._folder_name(jobs)) if self._final.is_local else self._final
        planned = plan_shards(chunks, totals, tokenizer.vocab_size, self._settings.shard_tokens)
        self._discard_damaged([functools.partial(work_items.discard_damaged, job, folder) for job in planned])
        shard_tasks = [work_items.ShardTask(job, folder) for job in planned]
        with self._progress.phase("writing shards", sum(job.tokens for job in planned)) as report:
            made = self._engine.write_shards(shard_tasks, work, report)
        named = [(job.split, shard) for job, shard in zip(planned, made, strict=True)]
        content = description_lib.describe(self._sources, self._settings, tokenizer, results, totals, named)
        for line in description_lib.remarks(content):
            self._progress.say(f"data: {line}")
        folder.write(TOKENIZER_FILE, tokenizer.to_bytes())
        folder.write(DESCRIPTION_FILE, description_to_bytes(content))
        if self._final.is_local:
            # Records of shards, and what processes that were killed left of the files they were creating.
            wanted = {DESCRIPTION_FILE, TOKENIZER_FILE, *(job.name for job in planned)}
            for name in set(folder.names()) - wanted:
                folder.discard(name)
            folder.path.rename(self._final.path)
            fsync(self._final.path.parent)

    def _discard_damaged(self, checks: Sequence[Callable[[], list[str]]]) -> None:
        """Checks unfinished work on this machine before it is used, and says what is made again.

        A bucket compares its files itself.
        """
        if not self._work.is_local:
            return
        with ThreadPoolExecutor(all_cores()) as pool:  # hashing, their work, lets other threads run
            names = [name for found in pool.map(lambda check: check(), checks) for name in found]
        if names:
            self._progress.say(
                f"data: {len(names):,} piece(s) of unfinished work are damaged, and made again: {names[0]}"
                + (" ..." if len(names) > 1 else "")
            )

    def _tokenizer(self, selection: Selection) -> Tokenizer:
        """Reads the tokenizer from its file, or trains it on the training split."""
        vocab_size = self._settings.vocab_size
        if vocab_size is None:
            return self._settings.open_tokenizer()
        files = self._sources.files
        described = [[dataclasses.asdict(file), held] for file, held in files]
        name = f"training-{_digest([described, self._settings.to_json(), tokenizers.__version__])}.json"
        if (trained := self._trained(name)) is not None:
            return trained
        began = time.monotonic()
        self._progress.say(f"data: reading {len(files):,} file(s) to train the tokenizer")
        with self._progress.phase("training the tokenizer", 0) as report:
            text = training_text(files, selection, TOKENIZER_TRAINING_BYTES, report)
            tokenizer = train_bpe(self._announced(text, vocab_size), vocab_size)
        self._progress.say(
            f"data: {tokenizer.vocab_size:,} tokens in the vocabulary, {time.monotonic() - began:.1f} s"
        )
        work_items.share_tokenizer(tokenizer, self._work)
        self._work.write(name, sealed_json({"of": name, "tokenizer": tokenizer.sha256}))
        return tokenizer

    def _trained(self, name: str) -> Tokenizer | None:
        """Reads the tokenizer that an earlier attempt has trained, unless that is damaged."""
        if not self._work.exists(name):
            return None
        with contextlib.suppress(ValueError, KeyError, IsADirectoryError):
            content = unsealed(parse_json(self._work.read(name)))
            if content["of"] == name and (
                found := work_items.shared_tokenizer(content["tokenizer"], self._work)
            ):
                return found
        self._progress.say("data: the tokenizer in the unfinished work is damaged, and trained again")
        return None

    def _announced(self, texts: Iterable[str], vocab_size: int) -> Iterator[str]:
        """Yields the texts; after the last one, says that training begins, which reports nothing itself."""
        yield from texts
        self._progress.say(f"data: training a tokenizer of {vocab_size:,} tokens on what was read")

    def _encode(self, jobs: Sequence[FileJob]) -> list[FileResult]:
        began = time.monotonic()
        # Nobody knows how many rows a Hugging Face dataset has; some stores do not tell the size of a file.
        is_known = all(
            job.file.size or not (job.file.ending == HF or is_remote(job.file.url)) for job in jobs
        )
        with self._progress.phase("encoding", is_known * sum(job.file.size for job in jobs)) as report:
            encode_tasks = [work_items.EncodeTask(job, self._work) for job in jobs]
            results = self._engine.encode(encode_tasks, self._work, report)
        documents = sum(result.documents for result in results)
        self._progress.say(f"data: encoded {documents:,} documents, {time.monotonic() - began:.1f} s")
        return results

    def _drop_duplicates(self, chunks: Sequence[Chunk]) -> None:
        if self._settings.deduplicate:
            self._engine.drop_duplicates(chunks, self._work)
        else:
            chunks_lib.keep_all(chunks)

    def _folder_name(self, jobs: Sequence[FileJob]) -> str:
        """Names the folder of shards: another one for another set of files, or another cut."""
        s = self._settings
        return f"dataset-{_digest([[job.folder for job in jobs], s.deduplicate, s.shard_tokens])}"


def _is_made(final: Storage, sources: DatasetSources, settings: DatasetSettings) -> bool:
    """Tells whether the dataset is there; UserError if another is, or the store cannot be reached."""
    guard = contextlib.nullcontext() if final.is_local else store_errors_are_user_errors("--out", final.url)
    with guard:
        exists = final.exists(DESCRIPTION_FILE)
    if exists:
        made = parse_description(final.read(DESCRIPTION_FILE), f"{final.url}/{DESCRIPTION_FILE}")
        description_lib.check_same(made, sources, settings, final.url)
        return True
    if final.is_local and final.path.exists() and (final.path.is_file() or any(final.path.iterdir())):
        raise UserError(
            f"{final.url} exists and is no prepared dataset: choose another folder, or move it away"
        )
    return False


def _busy(out: str, wait: bool, progress: Progress, owner: str) -> None:
    if not wait:
        raise UserError(
            f"{out} is being prepared by process {owner}: wait for it, stop it, or choose another folder"
        )
    progress.say(f"data: waiting for process {owner}, which prepares {out}")


def _digest(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
