"""k-sparse probing: how well a label of a text is read off the k codes that tell most of it.

A question is a label against the rest. Of the training examples, the k codes are those with the largest

    |mean over the label's examples - mean over the others| / standard deviation over all of them

on a tie the lower index; the rule is fixed, for it moves the result more than the basis does. On these codes,
standardised, a logistic regression is fitted, both classes weighted equally, with the penalty
`PENALTY` / 2 * |weights|^2 beside the mean loss (the intercept goes free). It is scored on the test examples:
the area under the ROC curve (ties count half), and balanced accuracy, the mean of both classes' shares of
right answers. This is "sparse probing" of Gurnee et al. 2023, arXiv:2305.01610, with the selection above.

Intervals come from drawing the texts of the test examples with replacement: a draw is a weight for each text.
Dims: n examples, M codes, Q questions, K sizes of a probe, R draws, the first of which may be the sample.
"""

from collections.abc import Callable, Sequence
import dataclasses

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
