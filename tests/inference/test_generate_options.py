"""What `LanguageModel.generate` and `topklm generate` do with their settings."""

import argparse
import json

import jax.numpy as jnp
import numpy as np
from plain_loop import byte_model, plain_loop
import pytest

import topklm
from topklm.commands import generate as command
from topklm.errors import UserError
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.interventions import Intervention, save_interventions
from topklm.inference.sequence import Sampling

MODEL = byte_model().cfg
PROMPT = "old"


@pytest.fixture(scope="module")
def model():
    return byte_model()


def test_the_text_is_cut_before_a_stop_string(model):
    free = model.generate(PROMPT, 28, seed=2)[len(PROMPT) :]
    stop = free[9:12]
    expected = PROMPT + free[: free.index(stop)]
    assert model.generate(PROMPT, 28, seed=2, stop=stop) == expected
    assert model.generate(PROMPT, 28, seed=2, stop=["never seen", stop]) == expected
    assert model.generate([PROMPT, "x"], 28, seed=2, stop=stop)[0] == expected


@pytest.mark.parametrize("stop", [None, "used"])
def test_a_stream_is_the_text_in_pieces(model, stop):
    free = model.generate(PROMPT, 60, seed=3)[len(PROMPT) :]
    stop = stop and free[20:22]
    pieces = list(model.generate(PROMPT, 60, seed=3, stop=stop, stream=True))
    assert "".join(pieces) == (free[: free.index(stop)] if stop else free)
    assert len(pieces) > 3
    assert all(pieces)


@pytest.mark.slow
def test_texts_of_a_list_are_what_they_are_alone(model):
    settings = {"top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 4}
    prompts = ["", "a longer prompt than others", PROMPT]
    steer = {(0, 3): 2.0}
    together = model.generate(prompts, 12, steer=steer, **settings)
    assert together == [model.generate(prompt, 12, steer=steer, **settings) for prompt in prompts]
    assert together != model.generate(prompts, 12, **settings)


def test_interventions_can_be_given_in_three_ways(model):
    pairs = model("some text", steer={(0, 3): 2.0, (1, 5): 1.0}, steer_mode="add")
    entries = [Intervention(0, 3, 2.0, "add"), Intervention(1, 5, 1.0, "add")]
    np.testing.assert_array_equal(model("some text", steer=entries), pairs)
    np.testing.assert_array_equal(model("some text", steer=InterventionBatch.of(MODEL, entries)), pairs)
    assert (np.asarray(model("some text")) != pairs).any()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_k": -3}, "top_k = -3: must be an integer, 1 or more, or 0"),
        ({"top_p": 0.0}, "top_p = 0.0: must be above 0"),
        ({"min_p": 1.5}, "min_p = 1.5: must be from 0 to 1"),
        ({"repetition_penalty": -1.0}, "repetition_penalty = -1.0: must be above 0"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1: must be"),
        ({"stop": ""}, "stop = '': must be a text"),
        ({"steer": {(9, 9): 1.0}}, "layer = 9: must be"),
        ({"steer": {(0, 9): 1.0}, "steer_mode": "x"}, "mode = 'x': must be one of"),
        ({"when_full": "wrap"}, "when_full = 'wrap': must be one of"),
        ({"prompt": ["a"], "stream": True}, "stream = True: must be False for a list"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_computed(model, setting, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"prompt": PROMPT, **setting})


def broken(text):
    """Whether a character of it was cut."""
    return "\N{REPLACEMENT CHARACTER}" in text


def test_samples_of_one_prompt_differ_and_the_first_is_that_of_one(model):
    first, second = model.generate(PROMPT, 12, seed=5, n=2)
    assert first == model.generate(PROMPT, 12, seed=5) != second
    assert model.generate([PROMPT, "x"], 12, seed=5)[0] == first
    assert model.generate([], 12, n=2) == []


@pytest.mark.slow
def test_samples_of_a_prompt_stand_together_in_a_list(model):
    both = model.generate([PROMPT, "x"], 12, seed=5, n=3)
    assert both == [*model.generate(PROMPT, 12, seed=5, n=3), *model.generate("x", 12, seed=5, n=3)]
    assert len(set(both)) == 6


def test_a_prompt_of_ids_is_continued_like_its_text(model):
    ids = np.asarray(model.to_tokens(PROMPT))
    alone = model.generate(PROMPT, 12, seed=3)
    for prompt in (ids[0], ids[0].tolist(), tuple(ids[0]), jnp.asarray(ids[0])):
        assert model.generate(prompt, 12, seed=3) == alone
    longer = [0, *b"a longer one"]
    both = model.generate([ids[0], longer], 12, seed=3)
    assert both == [alone, model.generate(longer, 12, seed=3)]
    assert model.generate(ids, 12, seed=3) == model.generate([PROMPT], 12, seed=3) == [alone]
    assert "".join(model.generate(ids[0], 12, seed=3, stream=True)) == alone[len(PROMPT) :]


def test_the_tokens_are_those_that_were_drawn_and_make_the_text(model):
    ids = np.asarray(model.to_tokens(PROMPT))[0].tolist()
    settings = {"max_new_tokens": 24, "seed": 6, "n": 2}
    made = model.generate(PROMPT, **settings, return_tokens=True)
    assert [one.text for one in made] == model.generate(PROMPT, **settings)
    assert any(broken(one.text) for one in made)  # of which the text alone would not give the tokens
    expected = plain_loop(MODEL, model.params, ids, 24, Sampling(seed=6), stop_token=0)
    assert made[0].tokens.tolist() == ids + expected
    for text, tokens in made:
        assert tokens.dtype == np.int32
        assert model.to_string(tokens) == text


def test_the_tokens_of_a_text_that_was_stopped_end_with_the_stop_string(model):
    free = model.generate(PROMPT, 28, seed=2, return_tokens=True)
    pairs = [model.to_string(free.tokens[at : at + 2]) for at in range(4, len(free.tokens) - 1)]
    stop = next(pair for pair in pairs if not broken(pair))
    found = model.generate([PROMPT, "x"], 28, seed=2, stop=stop, return_tokens=True)[0]
    assert found.text + stop == model.to_string(found.tokens)
    assert found.tokens.tolist() == free.tokens[: len(found.tokens)].tolist()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"n": 0}, "n = 0: must be an integer, 1 or more"),
        ({"n": 1.5}, "n = 1.5: must be"),
        ({"n": True}, "n = True: must be"),
        ({"n": 2, "stream": True}, "stream = True: must be False for a list of prompts, several samples"),
        ({"return_tokens": True, "stream": True}, "stream = True: must be False"),
        ({"prompt": [1.5]}, "prompt: 1.5 is no token id: must be an integer"),
        ({"prompt": [[1], []]}, "prompt is empty"),
        ({"prompt": ["a", 5]}, "prompt: 5 is no row of token ids"),
        ({"prompt": [257]}, "prompt: token 257 must be from 0 to 256"),
        ({"prompt": b"a"}, "prompt = b'a': must be a text"),
        ({"steer": Intervention(0, 3, 1.0, row=1)}, "row = 1: must be from 0 to 0, the texts of the batch"),
        ({"steer": [Intervention(0, 3, 1.0, row=4)], "n": 4}, "row = 4: must be from 0 to 3"),
    ],
)
def test_a_prompt_or_number_that_cannot_be_is_refused(model, setting, message):
    with pytest.raises(ValueError, match=message) as refused:
        model.generate(**{"prompt": PROMPT, **setting})
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_an_intervention_on_one_row_acts_on_that_sample(model):
    steer = Intervention(0, 3, 40.0, row=1)
    plain, steered = (model.generate(PROMPT, 12, n=2, steer=one) for one in (None, steer))
    assert [a == b for a, b in zip(plain, steered, strict=True)] == [True, False]


def run_command(model, monkeypatch, *arguments):
    monkeypatch.setattr(topklm, "load", lambda run, step: model)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(["runs/x", PROMPT, "--max-new-tokens", "20", *arguments]))


def test_the_command_passes_its_settings_on(model, monkeypatch, capsys):
    flags = ["--top-k", "40", "--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.2"]
    flags += ["--seed", "5", "--stop", "zz", "--stop", "qq", "--when-full", "halve"]
    run_command(model, monkeypatch, *flags, "--json")
    text = json.loads(capsys.readouterr().out)["text"]
    settings = {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "stop": ["zz", "qq"]}
    assert text == model.generate(PROMPT, 20, 0.7, 5, when_full="halve", **settings)
    run_command(model, monkeypatch, *flags, "--stream")
    assert capsys.readouterr().out == text + "\n"


def test_the_command_steers_by_flags_and_by_a_file(model, monkeypatch, capsys, tmp_path):
    file = tmp_path / "set.json"
    save_interventions(file, [Intervention(1, 5, 2.0, "add")])
    steer = ["--steer", "0:3=4", "--steer", "0:4=-1", "--steer-mode", "scale", "--steer-file", str(file)]
    run_command(model, monkeypatch, *steer)
    pairs = [Intervention(0, 3, 4.0, "scale"), Intervention(0, 4, -1.0, "scale")]
    steered = model.generate(PROMPT, 20, 0.7, 0, steer=[*pairs, Intervention(1, 5, 2.0, "add")])
    assert capsys.readouterr().out == steered + "\n"
    assert steered != model.generate(PROMPT, 20, 0.7, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steer", "0:3"], "--steer = 0:3: must be LAYER:NEURON=VALUE"),
        (["--steer", "9:3=1"], "--steer = 9:3=1: layer = 9: must be"),
        (["--steer", "0:3=1", "--steer", "0:3=2"], "steer: two interventions on neuron 3 of layer 0"),
        (["--top-p", "2"], "--top-p = 2.0: must be above 0 and at most 1"),
        (["--stop", ""], "--stop = '': must be a text"),
        (["--topk-k", "0"], "--topk-k = 0: must be an integer from 1 to"),
        (["--json", "--stream"], "--stream with --json"),
    ],
)
def test_the_command_names_its_flag(model, monkeypatch, flags, message):
    with pytest.raises(UserError, match=message):
        run_command(model, monkeypatch, *flags)
