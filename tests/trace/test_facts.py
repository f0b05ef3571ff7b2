"""Facts of articles, and neurons that tell known from forgotten ones."""

import dataclasses
import json

import helpers
import numpy as np
import pytest
import saved_runs

from topklm.config import Config
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel
from topklm.model import transformer
from topklm.trace import facts

BYTES = train_bpe([], 257)


def fact(text, tokenizer=BYTES):
    return facts.fact_of(tokenizer.encode(text), tokenizer)


@pytest.mark.parametrize(
    ("text", "kind", "name", "before"),
    [
        ("Ada Byron was an English writer. She", "origin", "Ada Byron", " was an"),
        ("Lima (say it) is the capital city", "class", "Lima", " (say it) is the"),
        (
            "Oslo, a port, is the 1st city in the North Sea.",
            "place",
            "Oslo",
            ", a port, is the 1st city in the",
        ),
        ("Oslo is the 1st city of Norway.", "belonging", "Oslo", " is the 1st city of"),
        ("It was the 2nd flood. It came in 1953 at night", "year", "It", " was the 2nd flood. It came in"),
    ],
)
def test_a_fact_is_the_text_up_to_a_word_that_a_pattern_finds(text, kind, name, before):
    found = fact(text)
    assert found.kind == kind
    assert BYTES.decode(found.tokens[: found.name_end + 1]) == name
    assert BYTES.decode(found.tokens[found.name_end + 1 :]) == before
    assert BYTES.decode([found.answer]) == " "  # of bytes, the blank is the answer's first token


class Pieces:
    """A tokenizer whose token n is piece n."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)

    def token_bytes(self, ids):
        return [self.pieces[i].encode() for i in ids]


@pytest.mark.parametrize(
    ("pieces", "fits"),
    [
        (("The", " sea", " is", " a", " blue", " thing"), True),
        (("The", " sea is", " a", " blue", " thing"), False),
        (("The", " sea", " is", " a blue", " thing"), False),
        (("Sleep", " in", " the", " open"), False),
        ((), False),
    ],
)
def test_a_token_ends_with_the_name_and_another_begins_with_the_answer(pieces, fits):
    found = facts.fact_of(np.arange(len(pieces), dtype=np.int32), Pieces(*pieces))
    assert (found is not None) == fits
    if fits:
        assert (found.tokens.tolist(), found.name_end, found.answer) == ([0, 1, 2, 3], 1, 4)


def articles(n):
    names, places = ["Ada", "Bob", "Cid", "Dov"], ["Rome", "Oslo", "Lima", "Bonn", "Kiev", "Cork"]
    for i in range(n):
        yield f"{names[i % 4]} {i} was the 1st man of {places[i % 6]}, they say"


def words():
    return train_bpe(list(articles(400)), 330)


def collected(n=200, n_facts=150, n_others=3, seed=0):
    tokenizer = words()
    ids = [tokenizer.encode(text) for text in articles(n)]
    return tokenizer, facts.collect(ids, tokenizer, 64, n_facts, n_others, seed)


def test_answers_compete_with_others_of_their_kind():
    _, found = collected()
    assert found.candidates.shape == (len(found.facts), 4)
    assert len(found.facts) == 150
    answers = {one.answer for one in found.facts}
    assert len(answers) == 6
    for one, candidates in zip(found.facts, found.candidates.tolist(), strict=True):
        assert candidates[0] == one.answer
        assert len(set(candidates)) == 4
        assert set(candidates) <= answers
    again = collected()[1]
    np.testing.assert_array_equal(found.candidates, again.candidates)
    assert not np.array_equal(found.candidates, collected(seed=1)[1].candidates)


def test_text_without_facts_is_refused_in_a_line():
    with pytest.raises(
        UserError, match=r"has 20 facts that patterns find, .* and 80 are needed: choose"
    ) as e:
        collected(n=20)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("n_nontopk", [1, 2])
def test_a_checkpoint_is_read_as_one_fact_after_another(n_nontopk):
    tokenizer, found = collected()
    config = dataclasses.replace(
        saved_runs.MODEL, vocab_size=tokenizer.vocab_size, context_length=64, n_nontopk=n_nontopk
    )
    params = transformer.create(config, 1)
    model = LanguageModel("runs/none", 0, Config(model=config), tokenizer, params)
    active, known, greedy = facts.FactReader(model, found).read(params)
    assert active.shape == (150, 1 if n_nontopk == 1 else 2, 32)
    for number in range(0, 150, 17):
        one = found.facts[number]
        row = np.append([tokenizer.separator_id], one.tokens)[None]
        logits, cache = model.run_with_cache(row, names_filter=lambda name: name.endswith("resid_post"))
        last = np.asarray(logits)[0, -1]
        assert known[number] == (last[found.candidates[number, 0]] > last[found.candidates[number, 1:]].max())
        assert greedy[number] == (last.argmax() == one.answer)
        for layer in range(active.shape[1]):
            h = np.asarray(cache[f"blocks.{layer}.hook_resid_post"])[0, 1 + one.name_end]
            kept = (h > 0) & (h >= np.sort(h)[-config.topk_k])
            np.testing.assert_array_equal(active[number, layer], kept)


def planted(strength, n=2000, seed=0):
    """Active neurons of two layers; in the second, neurons 3 to 7 know, as often as `strength` says."""
    rng = np.random.default_rng(seed)
    known = rng.random(n) < 0.3
    active = rng.random((n, 2, 40)) < 0.2
    active[:, 1, 3:8] |= known[:, None] & (rng.random((n, 5)) < strength)
    return active, known, rng.choice(["a", "b"], n)


def test_planted_neurons_are_found_on_the_half_that_did_not_choose_them():
    silent, knowing = facts.separations(*planted(0.5))
    assert sorted(knowing.neurons) == [3, 4, 5, 6, 7]
    # Active at 20 % of forgotten facts, at 60 % of known ones.
    assert knowing.held_out == pytest.approx(0.4, abs=0.03)
    assert knowing.in_sample == pytest.approx(knowing.held_out, abs=0.01)
    for one in (silent, knowing):
        assert abs(one.held_out_shuffled) < 0.01
    assert abs(silent.held_out) < 0.02
    # Chosen and scored on the same facts, chance alone looks like knowledge.
    assert silent.in_sample > 0.02
    assert silent.in_sample == pytest.approx(silent.in_sample_shuffled, abs=0.01)


def test_a_difference_between_kinds_stays_in_the_shuffled_labels():
    active, known, kinds = planted(0.0)
    known = np.where(kinds == "a", np.random.default_rng(1).random(len(known)) < 0.8, known & (kinds == "b"))
    active[:, 0, 5] = kinds == "a"  # tells kinds, not facts
    found = facts.separations(active, known, kinds)[0]
    assert found.held_out > 0.08
    assert found.held_out_shuffled == pytest.approx(found.held_out, abs=0.02)


def test_too_few_known_facts_give_no_figure():
    active, known, kinds = planted(0.5)
    known[:] = np.arange(len(known)) < 30
    (first, _) = facts.separations(active, known, kinds)
    assert np.isnan([first.in_sample, first.held_out, first.in_sample_shuffled]).all()
    assert first.neurons == []


def test_the_command_reads_every_checkpoint(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "_SENTENCE", facts.re.compile(r"(?P<name>\w+ \w+)(?P<rest> [^\n]*)"))
    monkeypatch.setattr(facts, "_KINDS", {"next": facts.re.compile(r"[^.]*? \w+(?P<answer> [a-z]+)\b")})
    ended = helpers.in_this_process(
        "trace", "facts", finished_run, "--steps", "0,24", "--others", "2", "--json"
    )
    assert ended.exit_code == 0, ended.errors
    content = json.loads(ended.output)
    assert [one["step"] for one in content["steps"]] == [0, 24]
    assert all(one["n_known"] + one["n_forgotten"] == content["facts"] for one in content["steps"])
    assert content["facts"] == sum(content["by_kind"].values()) > 100
    ended = helpers.in_this_process("trace", "facts", finished_run, "--steps", "0,24", "--others", "2")
    assert ended.exit_code == 0, ended.errors
    assert "held out" in ended.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "7"], "--steps = 7: there is no checkpoint 7; there are 0, 5, 10"),
        (["--facts", "0"], "--facts = 0: must be 80 or more"),
        (["--steps", "0"], "facts that patterns find"),
    ],
)
def test_mistakes_end_in_a_line(finished_run, flags, words):
    ended = helpers.in_this_process("trace", "facts", finished_run, *flags)
    assert ended.exit_code == 2
    assert words in helpers.assert_one_line_error(ended.errors)
