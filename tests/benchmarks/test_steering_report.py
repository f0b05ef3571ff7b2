"""When a text counts as turned to a concept."""

import math

from benchmarks import steering


def response(times, low, high, perplexity):
    return {
        "times": times,
        "rates": {"next": {"value": (low + high) / 2, "low": low, "high": high}},
        "perplexity": {"value": perplexity},
    }


UNSTEERED = response(None, 0.01, 0.02, 20.0)


def test_a_text_turns_at_the_first_value_whose_interval_lies_above_while_it_is_fluent():
    steered = [
        response(0.5, 0.015, 0.04, 20.0),
        response(1.0, 0.03, 0.05, 40.0),
        response(2.0, 0.2, 0.3, 41.0),
    ]
    assert steering.turned_at([UNSTEERED, *steered], "next", steering.KEPT) == 1.0
    assert steering.turned_at([UNSTEERED, steered[0], steered[2]], "next", steering.KEPT) is None
    assert steering.turned_at([UNSTEERED, steered[0], steered[2]], "next", math.inf) == 2.0
