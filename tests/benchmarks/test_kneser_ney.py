"""The n-gram baseline against the formulas, written out by hand."""

from collections import Counter
import itertools

import numpy as np
import pytest

from benchmarks.kneser_ney import KneserNey

VOCABULARY = 7


def corpus(seed=0, n=60):
    """Sequences that begin with the separator 0 and go on with tokens 1 to 6, small ones more often."""
    rng = np.random.default_rng(seed)
    return [[0, *np.minimum(rng.geometric(0.35, rng.integers(1, 12)), 6).tolist()] for _ in range(n)]


def fitted(order, sequences):
    model = KneserNey(order, VOCABULARY)
    for sequence in sequences:
        model.add(sequence)
    model.finish()
    return model


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_after_any_context(order):
    model = fitted(order, corpus())
    for length in range(4):
        for context in itertools.islice(itertools.product(range(VOCABULARY), repeat=length), 0, None, 5):
            total = sum(model.probability(context, token) for token in range(VOCABULARY))
            assert total == pytest.approx(1.0, abs=1e-12)


def test_bigrams_follow_the_formula_of_chen_and_goodman():
    sequences = corpus()
    model = fitted(2, sequences)
    pairs = Counter(pair for s in sequences for pair in itertools.pairwise(s))
    preceded_by = Counter(second for _, second in pairs)  # in how many contexts a token was seen

    def discounts(counts):
        n = Counter(counts)
        y = n[1] / (n[1] + 2 * n[2])
        return {1: 1 - 2 * y * n[2] / n[1], 2: 2 - 3 * y * n[3] / n[2], 3: 3 - 4 * y * n[4] / n[3]}

    def clamped(values):
        return {i: min(max(d, 0.0), i) for i, d in values.items()}

    def interpolate(counts, d, lower, token):
        total = sum(counts.values())
        kept = max(counts[token] - d[min(counts[token], 3)], 0) if counts[token] else 0
        mass = sum(d[min(c, 3)] for c in counts.values())
        return (kept + mass * lower) / total

    d2 = clamped(discounts(pairs.values()))
    few = Counter(preceded_by.values())
    d1 = clamped(discounts(preceded_by.values())) if few[1] and few[2] and few[3] else dict.fromkeys(d2, 0.5)
    for first, second in itertools.product(range(VOCABULARY), repeat=2):
        unigram = interpolate(preceded_by, d1, 1 / VOCABULARY, second)
        after = Counter({b: c for (a, b), c in pairs.items() if a == first})
        want = interpolate(after, d2, unigram, second) if after else unigram
        assert model.probability((first,), second) == pytest.approx(want, rel=1e-12)


def test_it_predicts_what_it_has_seen_better_than_chance():
    model = fitted(3, corpus())
    losses = [
        -np.log(model.probability(tuple(s[:i]), s[i])) for s in corpus(seed=1) for i in range(1, len(s))
    ]
    assert np.mean(losses) < np.log(VOCABULARY) - 0.1
