"""The best rule on the text that says where a neuron is active: a set of tokens, of pairs, or a pattern.

Kinds of rules: a set of tokens; a set of pairs, the token before and the token; or one of `PATTERNS`, marking
all tokens of its matches or the last of each. A set is grown greedily: tokens (pairs) by falling share of
their occurrences at which the neuron is active, on a tie the more frequent first, up to the prefix with the
highest F1. "Right" is to say "active" where the activation is not 0.

Documents of even number find the rule, those of odd number score it. Which kind is taken is found within the
first half as well: rules found on one part of it (documents 0, 4, 8, ...) are compared on the other, so a
kind with many parameters has no advantage; the best kind's rule is then found on all of the half.
Dims: N tokens, E keys.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import re

import numpy as np

# On the bytes of the text; letters are those of ASCII.
PATTERNS = {
    "capitalised word": rb"\b[A-Z][a-z]+",
    "capitals": rb"\b[A-Z]{2,}\b",
    "word": rb"[A-Za-z]+",
    "start of a word": rb"(?<![A-Za-z])[A-Za-z]",
    "inside a word": rb"(?<=[A-Za-z])[A-Za-z]+",
    "start of a sentence": rb"(?:\A|(?<=[.!?] )|(?<=\n))[A-Za-z]+",
    "number": rb"\d+",
    "year": rb"\b(?:1\d|20)\d\d\b",
    "number with a point or comma": rb"\d+[.,]\d+",
    "-ing": rb"\w+ing\b",
    "-ed": rb"\w+ed\b",
    "-ly": rb"\w+ly\b",
    "-s": rb"\w+s\b",
    "-er": rb"\w+er\b",
    "-tion": rb"\w+tions?\b",
    "word after the": rb"(?<=\b[Tt]he )\w+",
    "word after of": rb"(?<=\bof )\w+",
    "word after in": rb"(?<=\b[Ii]n )\w+",
    "word after a": rb"(?<=\ba )\w+",
    "word after and": rb"(?<=\band )\w+",
    "end of a sentence": rb"[.!?]",
    "comma": rb",",
    "punctuation": rb"[.,;:!?]",
    "in parentheses": rb"\([^()\n]*\)",
    "in quotation marks": rb"\"[^\"\n]*\"",
    "hyphen": rb"-",
    "line": rb"\n",
    "no ASCII": rb"[\x80-\xff]+",
}

_LAST = ", last token"


@dataclasses.dataclass(frozen=True)
class Detector:
    """The best rule of a neuron."""

    rule: str  # its kind, or the pattern's name
    f1: float  # on the half that it was not found on; NaN where the neuron is not active there


class DetectorSearch:
    """Finds rules on one text: ids int[N], the bytes of each token, and rising numbers of documents from 0.

    The ids before, int[N], are below 0 where there is none.
    """

    def __init__(
        self,
        token_ids: np.ndarray,
        documents: np.ndarray,
        previous_ids: np.ndarray,
        pieces: Sequence[bytes],
    ):
        pairs = (previous_ids.astype(np.int64) + 1) * (int(token_ids.max()) + 1) + token_ids
        keys = {"tokens": token_ids, "pairs of tokens": pairs}
        self._keys = {name: np.unique(x, return_inverse=True)[1] for name, x in keys.items()}
        self._patterns = marked(pieces, documents)
        self._found_on, self._compared_on = documents % 4 == 0, documents % 4 == 2

    def best(self, is_active: np.ndarray) -> Detector:
        """Returns the best rule for bool[N]."""
        candidates = {**self._said(is_active, self._found_on), **self._patterns}
        compared = self._compared_on
        scores = {name: f1(says[compared], is_active[compared]) for name, says in candidates.items()}
        rule = max(scores, key=lambda name: np.nan_to_num(scores[name], nan=-1.0))
        half = self._found_on | compared
        says = self._said(is_active, half, rule)[rule] if rule in self._keys else candidates[rule]
        return Detector(rule, f1(says[~half], is_active[~half]))

    def _said(self, is_active: np.ndarray, found_on: np.ndarray, only: str = "") -> dict[str, np.ndarray]:
        """Returns bool[N] of each set, grown on some tokens."""
        return {
            name: grow(keys[found_on], is_active[found_on], int(keys.max()) + 1)[keys]
            for name, keys in self._keys.items()
            if only in ("", name)
        }


def grow(keys: np.ndarray, is_active: np.ndarray, n_keys: int) -> np.ndarray:
    """Returns bool[E], the set of keys with the highest F1, grown greedily on int[N] keys below E."""
    seen = np.bincount(keys, minlength=n_keys)
    active = np.bincount(keys, is_active, n_keys)
    share = np.divide(active, seen, out=np.zeros(n_keys), where=seen > 0)
    order = np.lexsort((-seen, -share))
    hits = np.cumsum(active[order])
    scores = 2 * hits / np.maximum(np.cumsum(seen[order]) + active.sum(), 1)
    chosen = np.zeros(n_keys, bool)
    if hits[-1] > 0:
        chosen[order[: int(np.argmax(scores)) + 1]] = True
    return chosen


def f1(says: np.ndarray, is_active: np.ndarray) -> float:
    """Returns the harmonic mean of precision and recall of bool[N]; NaN where nothing is active."""
    if not is_active.any():
        return float("nan")
    return 2 * float((says & is_active).sum()) / float(says.sum() + is_active.sum())


def marked(pieces: Sequence[bytes], documents: np.ndarray) -> dict[str, np.ndarray]:
    """Returns bool[N] of each pattern twice: the tokens of its matches, and the last of each match."""
    names = [f"{name}{part}" for name in PATTERNS for part in ("", _LAST)]
    found = {name: np.zeros(len(pieces), bool) for name in names}
    compiled = {name: re.compile(pattern) for name, pattern in PATTERNS.items()}
    starts = np.flatnonzero(np.diff(documents, prepend=-1)).tolist()
    for first, stop in itertools.pairwise([*starts, len(pieces)]):
        text = b"".join(pieces[first:stop])
        ends = np.cumsum([len(piece) for piece in pieces[first:stop]])
        for name, pattern in compiled.items():
            for match in pattern.finditer(text):
                a = first + int(np.searchsorted(ends, match.start(), side="right"))
                b = first + int(np.searchsorted(ends, match.end() - 1, side="right"))
                found[name][a : b + 1] = True
                found[f"{name}{_LAST}"][b] = True
    return found
