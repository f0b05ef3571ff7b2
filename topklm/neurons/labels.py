"""Names that people give neurons, kept in a run folder and shared by all who look at it.

    {"format": 1, "labels": [{"layer": 0, "neuron": 17, "label": "the sea"}]}

An entry may also have a "comment", and say who wrote it ("by"); a neuron may have several. A file with any of
these is of format 2, which earlier versions do not read. The file is read again before each change and
replaced whole, under a lock, so nobody's labels are lost.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import csv
import dataclasses
import io
import json
from pathlib import Path
import unicodedata

from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.storage.files import folder_lock, parse_json, write_atomically

FORMATS = (1, 2)
MAX_CHARACTERS = 200
MAX_COMMENT = 1000  # characters
BETWEEN = " \N{MIDDLE DOT} "  # labels of one neuron where they stand in a line

# Control, surrogate, line and paragraph separators, and what is not seen but turns or hides text; of the last
# kind, the joiners belong to words of several scripts and to emoji.
_REFUSED = ("Cc", "Cs", "Zl", "Zp", "Cf")
_JOINERS = "\u200c\u200d"
_CSV = ("layer", "neuron", "label", "comment", "by")
_DIGITS = 9  # of a number of a layer or neuron
# A spreadsheet takes a cell that begins with one of these for a formula; of the wide ones, Japanese ones do.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@dataclasses.dataclass(frozen=True)
class Note:
    """A label of a neuron."""

    label: str
    comment: str = ""
    by: str = ""  # who wrote it

    def check(self) -> "Note":
        """Returns the note without white space around its texts; raises UserError for other texts."""
        limits = {"label": MAX_CHARACTERS, "comment": MAX_COMMENT, "by": MAX_CHARACTERS}
        stripped = {name: getattr(self, name).strip() for name in limits}
        for name, most in limits.items():
            if problem := _problem(stripped[name], most):
                raise UserError(f"{name} = {stripped[name][:40]!a}: {problem}")
        return Note(**stripped)


Neuron = tuple[int, int]  # layer and number
Notes = Mapping[Neuron, tuple[Note, ...]]


class Labels:
    """The labels of a run's neurons, by layer and number; the file may be missing, its folder gets a lock."""

    def __init__(self, path: Path):
        self._path = path

    def all(self) -> dict[Neuron, str]:
        """Returns the labels of each neuron as one text, by (layer, neuron), rising; raises as `notes`."""
        return {place: BETWEEN.join(note.label for note in some) for place, some in self.notes().items()}

    def notes(self) -> dict[Neuron, tuple[Note, ...]]:
        """Returns all labels by (layer, neuron), rising; raises UserError for a file that cannot be read."""
        try:
            return _parse(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as e:
            raise UserError(f"{self._path} cannot be read ({e.strerror or e}): mend its permissions") from e
        except ValueError as e:
            raise UserError(
                f"{self._path} is damaged ({e}): mend it, put a copy back, or move it away to begin anew"
            ) from e

    def set(self, layer: int, neuron: int, text: str, comment: str = "", by: str = "", at: int = 0) -> None:
        """Gives a neuron a label, on the disk when this returns; whether the model has it is not checked.

        The text is one line of at most `MAX_CHARACTERS`, without white space around it; empty: the neuron
        does not have this label any more. `at` says which of the neuron's labels it replaces, from 0; one
        more is added after the last. UserError for other text, or if the file is damaged, and left as it is,
        or cannot be written.
        """
        if layer < 0 or neuron < 0:
            raise UserError(f"layer {layer}, neuron {neuron}: both must be 0 or more")
        note = Note(text, comment, by).check()

        def change(notes: dict[Neuron, tuple[Note, ...]]) -> None:
            there = notes.get((layer, neuron), ())
            place = min(max(at, 0), len(there))
            if note.label in {one.label for one in (*there[:place], *there[place + 1 :])}:
                raise UserError(f"label = {note.label!a}: the neuron has it already; choose another")
            changed = (*there[:place], *((note,) if note.label else ()), *there[place + 1 :])
            if changed:
                notes[layer, neuron] = changed
            else:
                notes.pop((layer, neuron), None)

        self._change(change)

    def add(self, read: Iterable[tuple[Neuron, Note]]) -> tuple[int, int]:
        """Adds labels that were read from a file; one that a neuron has already gets their comment.

        Returns how many were added, and how many were there and are changed; errors as of `set`.
        """
        counts = [0, 0]

        def change(notes: dict[Neuron, tuple[Note, ...]]) -> None:
            for place, note in read:
                there = {one.label: one for one in notes.get(place, ())}
                counts[0] += note.label not in there
                counts[1] += note.label in there and there[note.label] != note
                notes[place] = tuple((there | {note.label: note}).values())

        self._change(change)
        return counts[0], counts[1]

    def _change(self, change: Callable[[dict[Neuron, tuple[Note, ...]]], None]) -> None:
        with disk_errors_are_user_errors("writing a label"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Waits in silence: the lock is held for a moment only.
            with folder_lock(self._path.parent, lambda owner: None):
                notes = self.notes()
                change(notes)
                write_atomically(self._path, _content(notes))

    def as_json(self) -> bytes:
        """Returns all labels as the file itself holds them."""
        return _content(self.notes())

    def as_csv(self) -> bytes:
        """Returns all labels as CSV in UTF-8; one that a spreadsheet would take for a formula, after a '."""
        lines = io.StringIO()
        writer = csv.writer(lines)
        writer.writerow(_CSV)
        for (layer, neuron), some in self.notes().items():
            for note in some:
                texts = (
                    f"'{text}" if text.startswith(_FORMULA) else text for text in dataclasses.astuple(note)
                )
                writer.writerow([layer, neuron, *texts])
        return lines.getvalue().encode()


def read_export(content: str) -> list[tuple[Neuron, Note]]:
    """Reads labels of `as_json` or `as_csv`, comment and by optional; UserError with the line or entry."""
    try:
        if content.lstrip("\ufeff \r\n\t").startswith("{"):
            notes = _parse(content.lstrip("\ufeff").encode())
            return [(place, note) for place, some in notes.items() for note in some]
        return list(_of_csv(content.lstrip("\ufeff")))
    except (ValueError, csv.Error) as e:
        raise UserError(
            f"labels cannot be read ({e}): give a file as it was downloaded here, CSV with layer, neuron and "
            "label, or JSON"
        ) from e


def _of_csv(content: str) -> Iterator[tuple[Neuron, Note]]:
    rows = csv.reader(io.StringIO(content))
    heads = [head.strip().casefold() for head in next(rows, [])]
    if not {"layer", "neuron", "label"} <= {*heads}:
        raise ValueError("its first line does not name the columns layer, neuron and label")
    for row in rows:
        if not any(row):
            continue
        cells = dict(zip(heads, row, strict=False))
        layer, neuron = (cells.get(name, "").strip() for name in ("layer", "neuron"))
        if not (layer.isascii() and layer.isdigit() and neuron.isascii() and neuron.isdigit()):
            raise ValueError(f"line {rows.line_num}: layer and neuron must be numbers from 0")
        if len(layer) > _DIGITS or len(neuron) > _DIGITS:
            raise ValueError(f"line {rows.line_num}: there is no neuron {layer[:20]}:{neuron[:20]}")
        texts = {name: cells.get(name, "") for name in _CSV[2:]}
        unquoted = {n: t[1:] if t[:1] == "'" and t[1:].startswith(_FORMULA) else t for n, t in texts.items()}
        try:
            note = Note(**unquoted).check()
        except UserError as e:
            raise ValueError(f"line {rows.line_num}: {e}") from e
        if note.label:
            yield (int(layer), int(neuron)), note


def _problem(text: str, most: int = MAX_CHARACTERS) -> str:
    """Returns the problem with a text, and advice; "" if there is none."""
    if len(text) > most:
        return f"{len(text):,} characters, at most {most} are allowed; shorten it"
    for character in text:
        if unicodedata.category(character) in _REFUSED and character not in _JOINERS:
            return f"must be one line without control characters; leave U+{ord(character):04X} out"
    return ""


def _content(notes: Notes) -> bytes:
    entries = [
        {
            "layer": layer,
            "neuron": j,
            **{name: text for name, text in dataclasses.asdict(note).items() if text},
        }
        for (layer, j), some in sorted(notes.items())
        for note in some
    ]
    is_first = all(len(entry) == 3 for entry in entries) and len(entries) == len(notes)
    content = {"format": FORMATS[not is_first], "labels": entries}
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _parse(content: bytes) -> dict[Neuron, tuple[Note, ...]]:
    """Raises ValueError for what is no file of labels."""
    parts = parse_json(content)
    if not isinstance(parts.get("labels"), list):
        raise ValueError('it has no list "labels"')
    if (form := parts.get("format")) not in FORMATS:
        raise ValueError(f"its format is {form!r}, this topklm reads 1 and 2")
    needed = {"layer", "neuron", "label"}
    notes: dict[Neuron, tuple[Note, ...]] = {}
    for number, entry in enumerate(parts["labels"], start=1):
        if not isinstance(entry, dict) or not needed <= entry.keys() <= {*_CSV}:
            raise ValueError(f"entry {number} does not have layer, neuron and label")
        texts = {name: entry.get(name, "") for name in _CSV[2:]}
        layer, neuron = entry["layer"], entry["neuron"]
        is_place = all(type(n) is int and n >= 0 for n in (layer, neuron))
        if not is_place or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"entry {number}: layer and neuron must be numbers from 0, label a text")
        problem = _problem(texts["label"]) or ("" if texts["label"] else "is empty")
        problem = problem or _problem(texts["comment"], MAX_COMMENT) or _problem(texts["by"])
        if problem:
            raise ValueError(f"entry {number}: label {problem}")
        there = notes.get((layer, neuron), ())
        if there and (form == FORMATS[0] or texts["label"] in {note.label for note in there}):
            raise ValueError(f"entry {number} is the second for layer {layer}, neuron {neuron}")
        notes[layer, neuron] = (*there, Note(**texts))
    return dict(sorted(notes.items()))
