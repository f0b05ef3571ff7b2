"""Neurons that tell topics: the label that one tells best, and the tables of the page."""

import numpy as np
import pytest

from benchmarks import topics
from benchmarks.harness import results
from topklm.neurons import probing


def test_the_best_label_is_chosen_on_one_part_and_scored_on_the_other():
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b", "c"] * 100)
    to_fit = np.arange(300) < 200
    means = np.where(labels == "b", 2.0, 0.0) + rng.random(300)
    means[~to_fit & (labels == "b")] *= -1  # what held on the first part is turned round on the second
    questions, _ = probing.ask(labels, np.zeros(300, int), to_fit)
    assert topics.best_label(means, questions) == ("b", 0.0)
    assert topics.best_label(np.abs(means), questions) == ("b", pytest.approx(1.0, abs=0.01))


def test_the_tables_of_the_page_are_those_of_the_result():
    page = topics.PAGE.read_text(encoding="utf-8")
    assert results.fill(page, topics.tables(results.read(topics.OUT)), topics.PAGE.name) == page
