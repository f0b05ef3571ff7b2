"""Hits, counted by hand; and the identity lens against NumPy."""

import numpy as np
from plain_model import configured, params, unembedding
import pytest
import saved_runs

from topklm.errors import UserError
from topklm.steering import concepts


def test_a_set_of_tokens_is_hit_by_each_of_them():
    tokenizer = saved_runs.tokenizer()
    ids = tokenizer.encode("se").tolist()
    found = concepts.of_tokens("input", "its own", ids, tokenizer)
    text = "the sea sees"
    tokens = tokenizer.encode(text)
    assert found.count(tokens, text) == sum(1 for token in tokens.tolist() if token in ids) == 7
    assert found.description == "its own: 's', 'e'"
    assert found.count([], "") == 0


def test_words_are_whole_and_of_any_case():
    found = concepts.of_words(["sea", " ship's ", "", "C++"])
    assert found.count([], "Sea, seas, oversea; the ship's sea. C++, C++11") == 4
    with pytest.raises(UserError, match="holds no word"):
        concepts.of_words([" ", ""])


def test_a_regular_expression_is_hit_where_it_matches_something():
    assert concepts.of_regex("s(ea|hip)|x*").count([], "Sea ship xx axe") == 4
    with pytest.raises(UserError, match=r"--concept-regex = \(: is no regular expression"):
        concepts.of_regex("(")


def test_raised_tokens_are_the_largest_effects_of_the_identity_lens():
    config = configured()
    scale = np.asarray(params()["final_norm"]["scale"], np.float64)
    effects = scale[:, None] * unembedding()
    for neuron in (0, 11):
        expected = np.argsort(-effects[neuron], kind="stable")[:10]
        assert concepts.raised_tokens(config, params(), neuron).tolist() == expected.tolist()
