"""Heads as parsers: a hand-made attention on a tree, halves, the baseline; and as copiers."""

import jax.numpy as jnp
import numpy as np
import pytest
from references import attention_in_float64
import saved_runs

from topklm.model import transformer
from topklm.neurons.labelled_texts import Trees
from topklm.trace import language

# The old miller sees ships: det(2, 0), amod(2, 1), nsubj(3, 2), obj(3, 4); words are tokens 1 to 5.
ARCS = [(2, 0, "det/head"), (2, 1, "amod/head"), (3, 2, "nsubj/head"), (4, 3, "obj/dependent")]


def trees_of(n, seed=0):
    """The same tree n times."""
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([np.zeros((n, 1), int), rng.integers(1, 257, (n, 5))], axis=1)
    words = np.tile([-1, 0, 1, 2, 3, 4], (n, 1))
    arcs = np.tile([[later, earlier] for later, earlier, _ in ARCS], (n, 1, 1))
    relations = np.tile([relation for _, _, relation in ARCS], (n, 1))
    whole = np.ones(tokens.shape, np.int32)
    return Trees(tokens.astype(np.int32), whole, words.astype(np.int32), arcs, relations, {})


@pytest.fixture(autouse=True)
def few_arcs(monkeypatch):
    monkeypatch.setattr(language, "LEAST_ARCS", 4)


def test_a_head_that_looks_along_the_arcs_has_them_all():
    attention = np.full((1, 2, 6, 6), 0.01)
    for later, earlier, _ in ARCS:
        attention[0, 0, later, earlier] += 0.5
    attention[0, 0, 2, 1] += 0.1  # of two arcs from one word it can have one
    attention[0, 1, range(1, 6), range(5)] = 0.9  # the second head looks at the word before
    attention[0, :, range(6), range(6)] = 3.0  # nobody is its own head, and nobody looks ahead
    attention[0, :, 0, 5] = 3.0
    answers = np.asarray(language.answers_of(jnp.asarray(attention)))
    assert answers[0, 0, 1:5].tolist() == [0, 1, 2, 3]
    rows = language.Parsing(trees_of(4)).rows_of(np.tile(answers[None], (1, 4, 1, 1)))
    found = {one.relation: one for one in language.attachment(rows)}
    assert {name: one.uas for name, one in found.items()} == {
        "amod/head": 1,
        "det/head": 0,
        "nsubj/head": 1,
        "obj/dependent": 1,
    }
    assert {name: one.distance for name, one in found.items()} == dict.fromkeys(found, 1)
    assert language.over_relations(list(found.values())) == {"uas": 0.75, "uas_distance": 1}
    assert {one.n for one in found.values()} == {4}


def test_the_head_is_chosen_on_one_half_and_scored_on_the_other():
    answers = np.full((2, 6, 1, 6), -1)  # layers, sentences, heads, words
    answers[0, 0::2, 0, 2] = 1  # layer 0 has amod in the even sentences alone, layer 1 in the odd ones
    answers[1, 1::2, 0, 2] = 1
    rows = language.Parsing(trees_of(6)).rows_of(answers)
    found = {one.relation: one for one in language.attachment(rows)}
    assert found["amod/head"].uas == 0  # chosen in-sample it would be 1
    hits = {
        (r["layer"], r["half"]): r["hits"] for r in rows if r["relation"] == "amod/head" and r["head"] < 1
    }
    assert hits == {(0, 0): 3, (0, 1): 0, (1, 0): 0, (1, 1): 3}
    assert all(row["score"] == row["hits"] / row["n"] for row in rows)


def test_a_relation_with_few_arcs_is_not_scored(monkeypatch):
    monkeypatch.setattr(language, "LEAST_ARCS", 7)
    assert language.Parsing(trees_of(6)).relations == []
    assert np.isnan(language.over_relations([])["uas"])


@pytest.mark.parametrize("short", [5, 32])
def test_rows_of_a_model_are_those_of_its_attention_in_float64(monkeypatch, short):
    monkeypatch.setattr(language, "_BATCH_SENTENCES", 4)
    monkeypatch.setattr(language, "_SHORT", short)
    trees = trees_of(6)
    trees.segment_ids[1, 5:] = 0  # the last word of one sentence sees itself alone
    params = transformer.create(saved_runs.MODEL, 0)
    rows = language.Parsing(trees).rows(saved_runs.MODEL, params)
    weights = attention_in_float64(saved_runs.MODEL, params, trees.tokens, trees.segment_ids)
    hits = {}
    for s in range(6):
        for later, earlier, relation in ARCS:
            for layer in range(2):
                for head in range(2):
                    seen = weights[layer, s, head, later + 1, 1 : later + 1]
                    key = layer, head, relation, s % 2
                    if s == 1 and later == 4:
                        seen = np.zeros(4)
                    hits[key] = hits.get(key, 0) + int(seen.argmax() == earlier)
    got = {(r["layer"], r["head"], r["relation"], r["half"]): r["hits"] for r in rows if r["layer"] >= 0}
    assert got == hits


def test_an_induction_pattern_matches_prefixes_and_one_that_repeats_does_not():
    period = 4
    weights = np.zeros((2, 2, 9, 9), np.float32)
    for i in range(period + 1, 2 * period + 1):
        weights[:, 0, i, i - period + 1] = 1  # the token after the same one
        weights[:, 1, i, i - period] = 1  # the same one
    assert np.asarray(language.prefix_scores(jnp.asarray(weights))).tolist() == [1, 0]
