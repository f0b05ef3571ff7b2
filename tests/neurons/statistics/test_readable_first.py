"""The order of neurons that nobody has to ask for, against plain sorting."""

import math

import numpy as np
import pyarrow as pa

from topklm.neurons.statistics.table import is_fair, readable_first


def rows(*neurons):
    """Makes rows of (n_active, density, semantic entropy, distinct tokens) and perhaps token entropy."""
    names = ("n_active", "density", "semantic_entropy_corrected", "n_distinct_tokens")
    names += ("token_entropy_corrected",)
    neurons = [(*neuron, 4.0) if len(neuron) == 4 else neuron for neuron in neurons]
    return pa.table(
        {name: list(column) for name, column in zip(names, zip(*neurons, strict=True), strict=True)}
    )


def test_fair_neurons_come_first_then_the_living_then_the_dead():
    neurons = rows(
        (0, 0.0, None, None),
        (500, 0.2, 0.1, 5),  # active too often
        (500, 0.01, 2.0, 5),
        (500, 0.01, 1.0, 5),
        (10, 0.01, 0.0, 1),  # seen too seldom
        (500, 0.00005, 0.5, 3),
    )
    assert readable_first(neurons).tolist() == [3, 2, 4, 1, 5, 0]
    assert is_fair(neurons).tolist() == [False, False, True, True, False, False]


def test_neurons_for_a_token_or_two_come_behind_those_for_several():
    neurons = rows(
        (500, 0.01, 0.1, 9, math.log(2.9)),
        (500, 0.01, 2.0, 9, math.log(3.1)),
        (500, 0.2, 0.0, 9, 4.0),
        (500, 0.01, 0.2, 9, None),
    )
    assert readable_first(neurons).tolist() == [1, 0, 3, 2]


def test_of_equal_entropies_more_distinct_tokens_come_first():
    assert readable_first(rows((99, 0.01, 1.0, 2), (99, 0.01, 1.0, 9), (99, 0.01, 1.0, None))).tolist() == [
        1,
        0,
        2,
    ]


def test_a_neuron_without_entropy_comes_behind_those_with_one():
    assert readable_first(rows((99, 0.01, None, 2), (99, 0.01, 3.0, 2))).tolist() == [1, 0]


def test_it_is_what_sorting_by_hand_gives():
    random = np.random.default_rng(0)
    neurons = [
        (int(n), float(d), None if s > 2.9 else round(float(s), 1), int(t), round(float(h), 2))
        for n, d, s, t, h in zip(
            random.integers(0, 80, 300),
            10 ** random.uniform(-5, 0, 300),
            random.uniform(0, 3, 300),
            random.integers(1, 9, 300),
            random.uniform(0, 3, 300),
            strict=True,
        )
    ]

    def key(number):
        n, density, entropy, distinct, tokens = neurons[number]
        fair = 1e-4 <= density <= 0.05 and n >= 30
        group = 3 if n == 0 else 2 if not fair else 1 if math.exp(tokens) < 3 else 0
        return group, math.inf if entropy is None else entropy, -distinct, number

    assert readable_first(rows(*neurons)).tolist() == sorted(range(300), key=key)
