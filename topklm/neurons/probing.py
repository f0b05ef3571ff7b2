"""How well neurons tell labels of texts (k-sparse probing), and rules on the text tell neurons (detectors).

Probing says how well a label of a text is read off the k codes that tell most of it.

A question is a label against the rest. Of the training examples, the k codes are those with the largest

    |mean over the label's examples - mean over the others| / standard deviation over all of them

on a tie the lower index; the rule is fixed, for it moves the result more than the basis does. On these codes,
standardised, a logistic regression is fitted, both classes weighted equally, with the penalty
`PENALTY` / 2 * |weights|^2 beside the mean loss (the intercept goes free). It is scored on the test examples:
the area under the ROC curve (ties count half), and balanced accuracy, the mean of both classes' shares of
right answers. This is "sparse probing" of Gurnee et al. 2023, arXiv:2305.01610, with the selection above.

Intervals come from drawing the texts of the test examples with replacement: a draw is a weight for each text.
Dims: n examples, M codes, Q questions, K sizes of a probe, R draws, the first of which may be the sample.

A detector is the best rule on the text that says where a neuron is active.

Kinds of rules: a set of tokens; a set of pairs, the token before and the token; or one of `PATTERNS`, marking
all tokens of its matches or the last of each. A set is grown greedily: tokens (pairs) by falling share of
their occurrences at which the neuron is active, on a tie the more frequent first, up to the prefix with the
highest F1. "Right" is to say "active" where the activation is not 0.

Documents of even number find the rule, those of odd number score it. Which kind is taken is found within the
first half as well: rules found on one part of it (documents 0, 4, 8, ...) are compared on the other, so a
kind with many parameters has no advantage; the best kind's rule is then found on all of the half.
Dims: N tokens, E keys.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import re

import numpy as np

KS = (1, 2, 5, 16)
PENALTY = 1e-2
LEAST_FIT, LEAST_TEST = 25, 15  # examples of a label
SELECTION = (
    "the k codes with the largest |difference of class means| / standard deviation over training examples"
)

_STEPS = 25
_TOLERANCE = 1e-8
_STEADY = 1e-8  # added to a standard deviation, so that a constant is no division by 0


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """One label against the rest."""

    label: str
    fit: np.ndarray  # int[n], examples
    is_fit: np.ndarray  # bool[n], which of these have the label
    test: np.ndarray  # int[m], examples
    is_test: np.ndarray  # bool[m]


def ask(labels: np.ndarray, families: np.ndarray, to_fit: np.ndarray) -> tuple[list[Question], int]:
    """Makes the questions of labelled examples, and counts those with too few examples, which are left out.

    Labels are str[n]; the rest of a label is the rest of its family, int[n], and of two labels only the
    second is asked for: the first is the same question. Examples to fit are bool[n]; the others are scored.
    """
    questions, left_out = [], 0
    for family in np.unique(families):
        fit, test = (np.flatnonzero((families == family) & part) for part in (to_fit, ~to_fit))
        names = np.unique(labels[families == family])
        for label in names[1:] if len(names) == 2 else names:
            is_fit, is_test = labels[fit] == label, labels[test] == label
            fewest_fit, fewest_test = (min(y.sum(), (~y).sum()) for y in (is_fit, is_test))
            if fewest_fit < LEAST_FIT or fewest_test < LEAST_TEST:
                left_out += 1
            else:
                questions.append(Question(str(label), fit, is_fit, test, is_test))
    return questions, left_out


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one basis, float64[Q, K, R] each."""

    auc: np.ndarray
    balanced_accuracy: np.ndarray


def probe(
    x_nM: np.ndarray,
    questions: Sequence[Question],
    weights_nR: np.ndarray,
    ks: Sequence[int] = KS,
    report: Callable[[int], None] = lambda n: None,
) -> Scores:
    """Fits and scores probes of Q questions on codes float[n, M] of all examples.

    Weights, float64[n, R], are how often each example's text was drawn; a probe has `ks` codes, more than M
    are M. `report` is told of the questions that are done since the last time.
    """
    scores = np.full((2, len(questions), len(ks), weights_nR.shape[1]), np.nan)
    for number, question in enumerate(questions):
        x_fit, weights = x_nM[question.fit], weights_nR[question.test]
        order = select(x_fit, question.is_fit)
        for place, k in enumerate(ks):
            chosen = order[:k]
            score = logistic(x_fit[:, chosen].astype(np.float64), question.is_fit)
            found = score(x_nM[np.ix_(question.test, chosen)].astype(np.float64))
            scores[0, number, place] = auc(found, question.is_test, weights)
            scores[1, number, place] = balanced_accuracy(found, question.is_test, weights)
        report(1)
    return Scores(*scores)


def select(x_nM: np.ndarray, is_label: np.ndarray) -> np.ndarray:
    """Returns int[M], codes by how well each tells the examples of a label, bool[n], from the others."""
    means = (x_nM[part].mean(axis=0, dtype=np.float64) for part in (is_label, ~is_label))
    gap = np.abs(np.subtract(*means)) / (x_nM.std(axis=0, dtype=np.float64) + _STEADY)
    return np.argsort(-gap, kind="stable")


def logistic(x_nk: np.ndarray, is_label: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fits the regression by Newton's method, in float64; returns the function of its log-odds."""
    mean, deviation = x_nk.mean(axis=0), x_nk.std(axis=0) + _STEADY
    z = np.concatenate([(x_nk - mean) / deviation, np.ones((len(x_nk), 1))], axis=1)
    share = is_label.mean()
    # They add up to n, half of it of each class.
    weights = np.where(is_label, 0.5 / share, 0.5 / (1 - share))
    penalty = np.append(np.full(x_nk.shape[1], PENALTY * len(z)), 1e-9)
    w = np.zeros(z.shape[1])
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-np.clip(z @ w, -30, 30)))
        gradient = z.T @ (weights * (p - is_label)) + penalty * w
        curvature = (z * (weights * p * (1 - p))[:, None]).T @ z + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        w -= step
        if np.abs(step).max() < _TOLERANCE:
            break
    return lambda x: ((x - mean) / deviation) @ w[:-1] + w[-1]


def auc(scores: np.ndarray, is_label: np.ndarray, weights_nR: np.ndarray) -> np.ndarray:
    """Returns float64[R], the area under the ROC curve of float64[n] in each draw; NaN without a class.

    It is the share of the pairs of an example with the label and one without in which the former has the
    higher score; equal ones count half.
    """
    rest = scores[~is_label]
    order = np.argsort(rest)
    lower = np.concatenate([np.zeros((1, weights_nR.shape[1])), weights_nR[~is_label][order]])
    np.cumsum(lower, axis=0, out=lower)
    first, stop = (np.searchsorted(rest[order], scores[is_label], side) for side in ("left", "right"))
    weights = weights_nR[is_label]
    with np.errstate(invalid="ignore"):
        wins = (weights * (lower[first] + lower[stop]) / 2).sum(axis=0)
        return wins / (weights.sum(axis=0) * lower[-1])


def balanced_accuracy(scores: np.ndarray, is_label: np.ndarray, weights_nR: np.ndarray) -> np.ndarray:
    """Returns float64[R], the mean of both classes' shares of right answers: above 0 with the label."""
    is_right = (scores > 0) == is_label
    shares = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for part in (is_label, ~is_label):
            right, wrong = (weights_nR[part & answer].sum(axis=0) for answer in (is_right, ~is_right))
            shares.append(right / (right + wrong))
    return (shares[0] + shares[1]) / 2


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
    """Finds rules on a text: ids int[N] and those before, below 0 for none, bytes, and documents from 0."""

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
