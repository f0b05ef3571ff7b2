"""Reads text: from one source file to its documents, and to what is wrong with it.

Knows where bytes lie and whether they have changed; formats are those of `topklm.data.formats`. Documents and
problems are the caller's.
"""

from collections.abc import Iterator
import contextlib
import functools
import hashlib
import io
import os
from typing import Any

from topklm.data import formats, sources, tables
from topklm.data.documents import BLOCK_BYTES, Items
from topklm.data.sources import SourceFile
from topklm.errors import UserError
from topklm.storage.errors import store_errors_are_user_errors


class FileReader:
    """Iterates over the documents and problems of a file, in order.

    A `.txt` file is cut after blank lines into documents of at least 16 KiB (after a line where 1 MiB has no
    blank line, anywhere where 2 MiB have no line). A `.jsonl` file holds one JSON object a line; a `.json`
    file that, or an array of objects, or one object over several lines; a `.parquet` file and a Hugging Face
    dataset one document a row. Blank lines are no documents.

    A file that is damaged yields what came before the damage, then a Problem("damaged file", ...), and ends.

    Attributes:
        bytes_read: Stored bytes read so far (rows for a Hugging Face dataset); may be read from any thread.
        sha256: After the end, hex digest of the bytes as stored; for a Hugging Face dataset of all texts
            (empty where there is none), each after its length in UTF-8 bytes as 8 bytes, little-endian.

    Raises:
        UserError: While iterating: if the file is not there any more, has changed since it was found, or
            may not be read, if its store does not answer, if a package is missing, or if a whole table
            lacks the column.
    """

    def __init__(self, file: SourceFile, text_field: str):
        """Opens nothing yet.

        Args:
            file: To be read.
            text_field: Key of the text in a JSON object, or column of a table; "doc.text" is also the key
                "text" in the object "doc".
        """
        self.bytes_read = 0
        self.sha256 = ""
        self._file, self._text_field = file, text_field
        self._hash = hashlib.sha256()

    def __iter__(self) -> Items:
        self.bytes_read, self._hash = 0, hashlib.sha256()
        if self._file.ending == tables.HF:
            yield from self._read_hf()
        else:
            with contextlib.closing(_StoredFile(self._file)) as stored:
                yield from self._read_stored(stored)
                stored.check_unchanged()
        self.sha256 = self._hash.hexdigest()

    def _read_stored(self, stored: "_StoredFile") -> Items:
        read = functools.partial(self._next_bytes, stored)
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

    def _next_bytes(self, stored: "_StoredFile", size: int) -> bytes:
        block = stored.read(size)
        self._hash.update(block)
        self.bytes_read += len(block)
        return block

    def _read_hf(self) -> Items:
        for raw, item in tables.read_hf(self._file.url, self._file.version, self._text_field):
            if raw is not None:
                self.bytes_read += 1
                self._hash.update(len(raw).to_bytes(8, "little"))
                self._hash.update(raw)
            yield item


class _StoredFile(io.RawIOBase):
    """A file's bytes, local or not; errors of its store become a UserError."""

    def __init__(self, file: SourceFile):
        self._file = file
        self._is_remote = sources.is_remote(file.url)
        self._handle: Any = io.BytesIO()
        with self._errors_are_user_errors():
            self._check_version()
            if self._is_remote:
                fs, path = sources.file_system(file.url, "reading")
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
        """Seeks, as in any file."""
        with self._errors_are_user_errors():
            return self._handle.seek(offset, whence)

    def readable(self) -> bool:
        """Tells that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tells that it can seek."""
        return True

    def close(self) -> None:
        """Closes it."""
        super().close()
        self._handle.close()

    def check_unchanged(self) -> None:
        """Raises a UserError if a local file is another one now."""
        if not self._is_remote:
            with self._errors_are_user_errors():
                self._check_version()

    def _check_version(self) -> None:
        if not self._file.version:
            return
        if self._is_remote:
            fs, path = sources.file_system(self._file.url, "reading")
            is_same = sources.is_version(self._file.version, fs.info(path))
        else:
            is_same = sources.local_version(os.stat(self._file.url)) == self._file.version
        if not is_same:
            raise UserError(f"{self._file.url} has changed since the command began; start it again")

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
