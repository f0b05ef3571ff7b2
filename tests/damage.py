"""Damages the files of a folder, one at a time, and asks whether a reader notices.

A reader that notices gives one line (`UserError`, or an error of the system that the command line makes one
line of); a reader that need not, because the file does not matter to it, gives what it gave before. There is
no third.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import os
from pathlib import Path
import random
import shutil
import stat
from typing import Any

import numpy as np

from topklm import errors

# "remove" and "swap" are done to folders, too.
KINDS = ("flip", "cut", "empty", "zero", "grow", "remove", "swap", "folder")

Apply = Callable[[Path], None]
Reader = Callable[[Path], Any]

COUNT: collections.Counter[str] = collections.Counter()  # "tried": damages since somebody took it out

_NOBODY = 65534
_ANYBODY_ENTERS = stat.S_IXGRP | stat.S_IXOTH
_PAGE = 512  # bytes that a disk loses at once, at least


def damages(
    folder: Path,
    seed: int = 0,
    per_file: int = 2,
    kinds: Sequence[str] = KINDS,
    other: Path | None = None,
    ignore: Callable[[Path], bool] = lambda path: False,
) -> Iterator[tuple[str, Apply]]:
    """Damages of each file of a folder, and of the folders in it.

    Args:
        folder: Is looked at, and not changed.
        seed: Of where bits are flipped, files cut, and what is swapped with what.
        per_file: How many of the kinds that a file can suffer in many places.
        kinds: Some of `KINDS`.
        other: A folder of the same kind and other content, whose files are put in the place of these.
        ignore: Told a path relative to the folder; such files and folders are left alone.

    Yields:
        What is done, in words; and what does it to a copy of the folder that is given to it.
    """
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    files = [path for path in paths if (folder / path).is_file() and not ignore(path)]
    folders = [path for path in paths if (folder / path).is_dir() and not ignore(path)]
    for path in files:
        draw = random.Random(f"{seed} {path}")
        content = (folder / path).read_bytes()
        for kind in kinds:
            for words, spoilt in _spoilt(kind, content, draw, per_file):
                yield f"{path}: {words}", _writing(path, spoilt)
        if "remove" in kinds:
            yield f"{path}: removed", _removing(path)
        if "folder" in kinds:
            yield f"{path}: a folder in its place", _folder_instead(path)
        if "swap" in kinds:
            yield from _swaps(folder, path, files, draw, per_file)
            if other is not None and (other / path).is_file():
                yield f"{path}: that of another in its place", _writing(path, (other / path).read_bytes())
    for path in folders:
        draw = random.Random(f"{seed} {path}")
        if "remove" in kinds:
            yield f"{path}/: removed", _removing(path)
        if "swap" in kinds:
            yield from _swaps(folder, path, folders, draw, per_file)
            yield f"{path}/: renamed", _renaming(path)
            yield f"{path}/: a second time under another name", _doubling(path)
            if other is not None and (other / path).is_dir():
                yield f"{path}/: that of another in its place", _replacing(path, other / path)


def check(
    make_copy: Callable[[], Path],
    reader: Reader,
    reference: Any,
    *,
    seed: int = 0,
    per_file: int = 2,
    kinds: Sequence[str] = KINDS,
    other: Path | None = None,
    ignore: Callable[[Path], bool] = lambda path: False,
    share: float = 1.0,
) -> int:
    """Asserts that a reader gives the same answer or one line, whatever is damaged.

    Args:
        make_copy: Makes a copy that may be damaged, in a new folder.
        reader: Given the damaged copy.
        reference: What the reader gives for one that is whole.
        seed: As in `damages`, as all that follow but the last.
        per_file: Likewise.
        kinds: Likewise.
        other: Likewise.
        ignore: Likewise.
        share: Of all damages, which part is done; drawn at random.

    Returns:
        How many damages were done.
    """
    wanted, draw = fingerprint(reference), random.Random(seed)
    assert fingerprint(reader(make_copy())) == wanted, "it differs without any damage"
    whole = make_copy()
    todo = [
        damage for damage in damages(whole, seed, per_file, kinds, other, ignore) if draw.random() <= share
    ]
    bad = []
    for words, apply in todo:
        copy = make_copy()
        apply(copy)
        if problem := _problem(reader, copy, wanted):
            bad.append(f"{words}: {problem}")
        shutil.rmtree(copy, ignore_errors=True)
    COUNT["tried"] += len(todo)
    assert not bad, f"{len(bad)} of {len(todo)} were not noticed:\n" + "\n".join(bad)
    return len(todo)


def check_unreadable(
    make_copy: Callable[[], Path],
    reader: Reader,
    reference: Any,
    ignore: Callable[[Path], bool] = lambda path: False,
    seed: int = 0,
    share: float = 1.0,
) -> int:
    """Asserts that what may not be read is named as that: never as damaged, missing, or to be deleted.

    Args:
        make_copy: Makes a copy that may be changed, in a new folder.
        reader: Given the copy, of which one file or folder cannot be read.
        reference: What the reader gives for one that is whole; it may give that too.
        ignore: As in `damages`.
        seed: Of what is drawn.
        share: Of all files and folders, which part is tried.

    Returns:
        How many files and folders were tried.
    """
    wanted, bad, draw = fingerprint(reference), [], random.Random(seed)
    paths = [Path(), *sorted(path.relative_to(copy) for copy in [make_copy()] for path in copy.rglob("*"))]
    paths = [path for path in paths if not ignore(path) and draw.random() <= share]
    for path in paths:
        copy = make_copy()
        with _mode(copy / path, 0), _nobody(copy):
            problem = _problem(reader, copy, wanted, about_permissions=True)
        if problem:
            bad.append(f"{path}: {problem}")
        shutil.rmtree(copy, ignore_errors=True)
    COUNT["tried"] += len(paths)
    assert not bad, f"{len(bad)} of {len(paths)} were not named as unreadable:\n" + "\n".join(bad)
    return len(paths)


def fingerprint(value: Any) -> str:
    """Of a value made of arrays, dataclasses and plain Python; equal bits give equal ones, NaN or not."""
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _add(digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, dict):
        _add(digest, list(value.items()))
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} parts".encode())
        for part in value:
            _add(digest, part)
    else:
        digest.update(f"{type(value).__name__} {value!r}".encode())


def _problem(reader: Reader, copy: Path, wanted: str, about_permissions: bool = False) -> str:
    """What is wrong with what a reader gives; "" if nothing is."""
    try:
        answer = reader(copy)
    except (errors.UserError, OSError, MemoryError) as e:
        text = str(e) if isinstance(e, errors.UserError) else errors.explain(e)
        if text is None:
            return f"{type(e).__name__}: {e}"
        if not text or "\n" in text or "Traceback" in text:
            return f"an error that is no line: {text!r}"
        claims = ("damaged", "delete", "missing", "there are no", "no such")
        if about_permissions and ("permission" not in text or any(claim in text for claim in claims)):
            return f"says {text!r}"
        return ""
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:300]}"
    return "" if fingerprint(answer) == wanted else "another answer, and not a word"


def _spoilt(kind: str, content: bytes, draw: random.Random, n: int) -> Iterator[tuple[str, bytes]]:
    size = len(content)
    if kind == "empty":
        if size:
            yield "emptied", b""
    elif kind == "grow":
        yield "a line of text appended", content + b"\n{}\n"
        yield "zeros appended", content + bytes(_PAGE)
    elif kind == "flip":
        for place in draw.sample(range(8 * size), min(n, 8 * size)):
            spoilt = bytearray(content)
            spoilt[place // 8] ^= 1 << place % 8
            yield f"bit {place % 8} of byte {place // 8} of {size} flipped", bytes(spoilt)
    elif kind == "cut":
        drawn = {draw.randrange(size) for _ in range(n - 2) if size}
        for end in sorted({size // 2, size - 1} | drawn):
            if 0 < end < size:
                yield f"cut to {end} of {size} bytes", content[:end]
    elif kind == "zero":
        for _ in range(max(n // 2, 1)):
            begin = draw.randrange(size) // _PAGE * _PAGE if size else 0
            spoilt = content[:begin] + bytes(len(content[begin : begin + _PAGE])) + content[begin + _PAGE :]
            if spoilt != content:
                yield f"bytes {begin} to {begin + _PAGE} of {size} are 0", spoilt


def _swaps(
    folder: Path, path: Path, others: Sequence[Path], draw: random.Random, n: int
) -> Iterator[tuple[str, Apply]]:
    """With some of the same name, and with some beside it."""
    free = [p for p in others if p != path and path not in p.parents and p not in path.parents]
    same = [p for p in free if p.name == path.name]
    beside = [p for p in free if p.parent == path.parent]
    for group in (same, beside):
        for partner in draw.sample(group, min(max(n // 2, 1), len(group))):
            yield f"{path}: swapped with {partner}", _swapping(path, partner)


def _writing(path: Path, content: bytes) -> Apply:
    return lambda copy: _write(copy / path, content)


def _write(path: Path, content: bytes) -> None:
    path.unlink()  # it may be a link to the original
    path.write_bytes(content)


def _removing(path: Path) -> Apply:
    def apply(copy: Path) -> None:
        shutil.rmtree(copy / path) if (copy / path).is_dir() else (copy / path).unlink()

    return apply


def _folder_instead(path: Path) -> Apply:
    def apply(copy: Path) -> None:
        (copy / path).unlink()
        (copy / path).mkdir()

    return apply


def _swapping(path: Path, partner: Path) -> Apply:
    def apply(copy: Path) -> None:
        aside = copy / "aside"
        (copy / path).rename(aside)
        (copy / partner).rename(copy / path)
        aside.rename(copy / partner)

    return apply


def _other_name(path: Path) -> str:
    """With its last number made larger, where it has one: folders are often numbered."""
    digits = len(path.name) - len(path.name.rstrip("0123456789"))
    if not digits:
        return f"{path.name}-1"
    return path.name[:-digits] + str(int(path.name[-digits:]) + 9).zfill(digits)


def _renaming(path: Path) -> Apply:
    return lambda copy: (copy / path).rename((copy / path).with_name(_other_name(path))) and None


def _doubling(path: Path) -> Apply:
    return lambda copy: shutil.copytree(copy / path, (copy / path).with_name(_other_name(path))) and None


def _replacing(path: Path, content: Path) -> Apply:
    def apply(copy: Path) -> None:
        shutil.rmtree(copy / path)
        shutil.copytree(content, copy / path)

    return apply


@contextlib.contextmanager
def _mode(path: Path, mode: int) -> Iterator[None]:
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(before)


@contextlib.contextmanager
def _nobody(folder: Path) -> Iterator[None]:
    """Makes this process, if root runs it, one whom permissions bind, and the folder that one's own."""
    if os.geteuid():
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, _NOBODY, -1)
    for path in folder.absolute().parents:
        mode = path.stat().st_mode
        if mode & _ANYBODY_ENTERS != _ANYBODY_ENTERS:
            path.chmod(mode | _ANYBODY_ENTERS)
    os.seteuid(_NOBODY)  # of all threads: those of libraries, too
    try:
        yield
    finally:
        os.seteuid(0)
