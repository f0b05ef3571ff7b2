"""Names that people give neurons, kept in a run folder and shared by all who look at it.

    {"format": 1, "labels": [{"layer": 0, "neuron": 17, "label": "the sea"}]}

An entry may also have a "comment", and say who wrote it ("by"); a neuron may have several. A file with any of
these is of format 2, which earlier versions do not read; one with a label that holds at some steps of the run
alone ("from_step", "to_step", both optional) is of format 3. The file is read again before each change and
replaced whole, under a lock, so nobody's labels are lost.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any
import unicodedata

from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.storage.files import folder_lock, parse_json, write_atomically

FORMATS = (1, 2, 3)
MAX_CHARACTERS = 200
MAX_COMMENT = 1000  # characters
BETWEEN = " \N{MIDDLE DOT} "  # labels of one neuron where they stand in a line

# Control, surrogate, line and paragraph separators, and what is not seen but turns or hides text; of the last
# kind, the joiners belong to words of several scripts and to emoji.
_REFUSED = ("Cc", "Cs", "Zl", "Zp", "Cf")
_JOINERS = "\u200c\u200d"
_TEXTS, _STEPS = ("label", "comment", "by"), ("from_step", "to_step")
_CSV = ("layer", "neuron", *_TEXTS, *_STEPS)
_DIGITS = 9  # of a number of a layer, neuron or step
# A spreadsheet takes a cell that begins with one of these for a formula; of the wide ones, Japanese ones do.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@dataclasses.dataclass(frozen=True)
class Note:
    """A label of a neuron."""

    label: str
    comment: str = ""
    by: str = ""  # who wrote it
    from_step: int | None = None  # the first step of the run that it holds at; None: the beginning
    to_step: int | None = None  # the last; None: the end

    def holds(self, step: int) -> bool:
        """Returns whether the label is meant for a step."""
        after = self.from_step is None or step >= self.from_step
        return after and (self.to_step is None or step <= self.to_step)

    @property
    def steps(self) -> str:
        """The range of steps in words; "" for all."""
        if self.from_step is None:
            return "" if self.to_step is None else f"to step {self.to_step:,}"
        last = "" if self.to_step is None else f" to {self.to_step:,}"
        return f"from step {self.from_step:,}{last}"

    def at(self, step: int) -> str:
        """Returns the label; where it does not hold at a step, with the range in words."""
        return self.label if self.holds(step) else f"{self.label} ({self.steps})"

    def check(self) -> "Note":
        """Returns the note without white space around its texts; raises UserError for other values."""
        limits = {"label": MAX_CHARACTERS, "comment": MAX_COMMENT, "by": MAX_CHARACTERS}
        stripped = {name: getattr(self, name).strip() for name in limits}
        for name, most in limits.items():
            if problem := _problem(stripped[name], most):
                raise UserError(f"{name} = {stripped[name][:40]!a}: {problem}")
        if None not in (self.from_step, self.to_step) and not self.holds(self.to_step or 0):
            raise UserError(f"from_step = {self.from_step}: must be at most to_step, {self.to_step}")
        return dataclasses.replace(self, **stripped)


Neuron = tuple[int, int]  # layer and number
Notes = Mapping[Neuron, tuple[Note, ...]]


class Labels:
    """The labels of a run's neurons, by layer and number; the file may be missing, its folder gets a lock."""

    def __init__(self, path: Path):
        self._path = path

    def all(self, step: int | None = None) -> dict[Neuron, str]:
        """Returns labels as one text, by (layer, neuron), rising; at another step, with where they hold."""
        return {
            place: BETWEEN.join(note.label if step is None else note.at(step) for note in some)
            for place, some in self.notes().items()
        }

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

    def set(self, layer: int, neuron: int, note: Note | str, at: int = 0) -> None:
        """Gives a neuron a label, on the disk when this returns; whether the model has it is not checked.

        Its text is one line of at most `MAX_CHARACTERS`, without white space around it; empty: the neuron
        does not have this label any more. `at` says which of the neuron's labels it replaces, from 0; one
        more is added after the last. UserError for other text, or if the file is damaged, and left as it is,
        or cannot be written.
        """
        if layer < 0 or neuron < 0:
            raise UserError(f"layer {layer}, neuron {neuron}: both must be 0 or more")
        note = (note if isinstance(note, Note) else Note(note)).check()

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
        """Adds labels of a file, or their comments; returns how many were added, and how many changed."""
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
                texts = (getattr(note, name) for name in _TEXTS)
                cells = (f"'{text}" if text.startswith(_FORMULA) else text for text in texts)
                writer.writerow([layer, neuron, *cells, note.from_step, note.to_step])
        return lines.getvalue().encode()


def read_export(content: str) -> list[tuple[Neuron, Note]]:
    """Reads labels of `as_json` or `as_csv`, where comment, by and steps may lack; UserError otherwise."""
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
        texts = {name: cells.get(name, "") for name in _TEXTS}
        unquoted = {n: t[1:] if t[:1] == "'" and t[1:].startswith(_FORMULA) else t for n, t in texts.items()}
        try:
            steps = (step_of(name, cells.get(name, "")) for name in _STEPS)
            note = Note(unquoted["label"], unquoted["comment"], unquoted["by"], *steps).check()
        except UserError as e:
            raise ValueError(f"line {rows.line_num}: {e}") from e
        if note.label:
            yield (int(layer), int(neuron)), note


def step_of(name: str, text: str) -> int | None:
    """Returns a step that was typed, None for none; raises UserError for other text."""
    text = text.strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise UserError(f"{name} = {text[:20]}: must be a step, a whole number from 0, or empty")
    return int(text)


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
            **{name: x for name, x in dataclasses.asdict(note).items() if x not in ("", None)},
        }
        for (layer, j), some in sorted(notes.items())
        for note in some
    ]
    is_first = all(len(entry) == 3 for entry in entries) and len(entries) == len(notes)
    form = 3 if any(name in entry for entry in entries for name in _STEPS) else 1 if is_first else 2
    content = {"format": form, "labels": entries}
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _parse(content: bytes) -> dict[Neuron, tuple[Note, ...]]:
    """Raises ValueError for what is no file of labels."""
    parts = parse_json(content)
    if not isinstance(parts.get("labels"), list):
        raise ValueError('it has no list "labels"')
    if (form := parts.get("format")) not in FORMATS:
        raise ValueError(f"its format is {form!r}, this topklm reads 1 to 3")
    needed = {"layer", "neuron", "label"}
    notes: dict[Neuron, tuple[Note, ...]] = {}
    for number, entry in enumerate(parts["labels"], start=1):
        if not isinstance(entry, dict) or not needed <= entry.keys() <= {*_CSV}:
            raise ValueError(f"entry {number} does not have layer, neuron and label")
        texts = {name: entry.get(name, "") for name in _TEXTS}
        steps: dict[str, Any] = {name: entry.get(name) for name in _STEPS}
        layer, neuron = entry["layer"], entry["neuron"]
        is_place = all(type(n) is int and n >= 0 for n in (layer, neuron))
        if not is_place or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"entry {number}: layer and neuron must be numbers from 0, label a text")
        if not all(step is None or (type(step) is int and step >= 0) for step in steps.values()):
            raise ValueError(f"entry {number}: from_step and to_step must be steps, numbers from 0")
        problem = _problem(texts["label"]) or ("" if texts["label"] else "is empty")
        problem = problem or _problem(texts["comment"], MAX_COMMENT) or _problem(texts["by"])
        if problem:
            raise ValueError(f"entry {number}: label {problem}")
        there = notes.get((layer, neuron), ())
        if there and (form == FORMATS[0] or texts["label"] in {note.label for note in there}):
            raise ValueError(f"entry {number} is the second for layer {layer}, neuron {neuron}")
        note = Note(*texts.values(), *steps.values())
        if None not in (note.from_step, note.to_step) and not note.holds(note.to_step or 0):
            raise ValueError(f"entry {number}: from_step is after to_step")
        notes[layer, neuron] = (*there, note)
    return dict(sorted(notes.items()))
