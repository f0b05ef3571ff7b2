"""Names that people give neurons, kept in a run folder and shared by all who look at it.

    {"format": 1, "labels": [{"layer": 0, "neuron": 17, "label": "the sea"}]}

The file is read again before each change and replaced whole, under a lock, so nobody's labels are lost.
"""

from collections.abc import Mapping
import csv
import io
import json
from pathlib import Path
import unicodedata

from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.storage.files import folder_lock, parse_json, write_atomically

FORMAT = 1
MAX_CHARACTERS = 200

# Control, surrogate, line and paragraph separators, and what is not seen but turns or hides text; of the last
# kind, the joiners belong to words of several scripts and to emoji.
_REFUSED = ("Cc", "Cs", "Zl", "Zp", "Cf")
_JOINERS = "\u200c\u200d"
# A spreadsheet takes a cell that begins with one of these for a formula; of the wide ones, Japanese ones do.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


class Labels:
    """The labels of a run's neurons, by layer and number.

    Args:
        path: Of the file, which need not be there; its folder gets a lock file.
    """

    def __init__(self, path: Path):
        self._path = path

    def get(self, layer: int, neuron: int) -> str:
        """Returns a neuron's label, "" if it has none; raises as `all`."""
        return self.all().get((layer, neuron), "")

    def all(self) -> dict[tuple[int, int], str]:
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

    def set(self, layer: int, neuron: int, text: str) -> None:
        """Gives a neuron a label, on the disk when this returns.

        Args:
            layer: From 0; whether the model has it is for the caller to check.
            neuron: From 0; likewise.
            text: One line of at most `MAX_CHARACTERS` characters; white space around it is left out. Empty:
                the neuron has no label any more.

        Raises:
            UserError: For other text, or if the file is damaged, and left as it is, or cannot be written.
        """
        if layer < 0 or neuron < 0:
            raise UserError(f"layer {layer}, neuron {neuron}: both must be 0 or more")
        text = text.strip()
        if problem := _problem(text):
            raise UserError(f"label = {text[:40]!a}: {problem}")
        with disk_errors_are_user_errors("writing a label"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Waits in silence: the lock is held for a moment only.
            with folder_lock(self._path.parent, lambda owner: None):
                labels = {**self.all(), (layer, neuron): text}
                if not text:
                    del labels[layer, neuron]
                write_atomically(self._path, _content(labels))

    def as_json(self) -> bytes:
        """Returns all labels as the file itself holds them."""
        return _content(self.all())

    def as_csv(self) -> bytes:
        """Returns all labels as CSV in UTF-8; one that a spreadsheet would take for a formula, after a '."""
        lines = io.StringIO()
        writer = csv.writer(lines)
        writer.writerow(["layer", "neuron", "label"])
        for (layer, neuron), label in self.all().items():
            writer.writerow([layer, neuron, f"'{label}" if label.startswith(_FORMULA) else label])
        return lines.getvalue().encode()


def _problem(text: str) -> str:
    """Returns the problem with a label, and advice; "" if there is none."""
    if len(text) > MAX_CHARACTERS:
        return f"{len(text):,} characters, at most {MAX_CHARACTERS} are allowed; shorten it"
    for character in text:
        if unicodedata.category(character) in _REFUSED and character not in _JOINERS:
            return f"must be one line without control characters; leave U+{ord(character):04X} out"
    return ""


def _content(labels: Mapping[tuple[int, int], str]) -> bytes:
    entries = [{"layer": layer, "neuron": j, "label": text} for (layer, j), text in sorted(labels.items())]
    return (json.dumps({"format": FORMAT, "labels": entries}, ensure_ascii=False, indent=1) + "\n").encode()


def _parse(content: bytes) -> dict[tuple[int, int], str]:
    """Raises ValueError for what is no file of labels."""
    parts = parse_json(content)
    if not isinstance(parts.get("labels"), list):
        raise ValueError('it has no list "labels"')
    if parts.get("format") != FORMAT:
        raise ValueError(f"its format is {parts.get('format')!r}, this topklm reads {FORMAT}")
    labels: dict[tuple[int, int], str] = {}
    for number, entry in enumerate(parts["labels"], start=1):
        if not isinstance(entry, dict) or entry.keys() != {"layer", "neuron", "label"}:
            raise ValueError(f"entry {number} does not have layer, neuron and label")
        layer, neuron, text = entry["layer"], entry["neuron"], entry["label"]
        if not all(type(n) is int and n >= 0 for n in (layer, neuron)) or not isinstance(text, str):
            raise ValueError(f"entry {number}: layer and neuron must be numbers from 0, label a text")
        if problem := _problem(text) or ("" if text else "is empty"):
            raise ValueError(f"entry {number}: label {problem}")
        if (layer, neuron) in labels:
            raise ValueError(f"entry {number} is the second for layer {layer}, neuron {neuron}")
        labels[layer, neuron] = text
    return dict(sorted(labels.items()))
