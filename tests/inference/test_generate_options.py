"""What `LanguageModel.generate`, `topklm generate` and hooks do with their settings."""

import argparse
import dataclasses
import json

import numpy as np
from plain_loop import CONFIG, params_of
import pytest

import topklm
from topklm.commands import generate as command
from topklm.config import Config
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.inference.intervention import Intervention, save_interventions
from topklm.inference.interventions import Interventions

MODEL = dataclasses.replace(CONFIG, vocab_size=257)
PROMPT = "old"


@pytest.fixture(scope="module")
def model():
    """Of random parameters: its text is any bytes."""
    return topklm.LanguageModel("a run", 7, Config(model=MODEL), train_bpe([], 257), params_of(MODEL))


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
    np.testing.assert_array_equal(model("some text", steer=Interventions.of(MODEL, entries)), pairs)
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


def test_hooks_see_arrays_in_order_and_may_change_them(model):
    text, seen = "some text", {}

    def look(array, name):
        seen[name] = np.asarray(array)

    names = ["blocks.1.hook_resid_post", "blocks.0.hook_resid_post", "blocks.0.hook_topk"]
    logits = model.run_with_hooks(text, fwd_hooks=[(name, look) for name in names])
    assert list(seen) == names[::-1]
    np.testing.assert_allclose(logits, model(text), rtol=1e-4, atol=1e-4)
    _, cache = model.run_with_cache(text, names)
    for name in names:
        np.testing.assert_allclose(seen[name], cache[name], rtol=1e-4, atol=1e-5)

    def ablated(array, name):
        return array.at[..., 3].set(0)

    changed = model.run_with_hooks(text, [("blocks.0.hook_topk", ablated)])
    steered = model(text, steer={(0, 3): 0.0}, steer_mode="ablate")
    np.testing.assert_allclose(changed, steered, rtol=1e-4, atol=1e-4)
    # Another function of the same name is not mistaken for it.
    doubled = model.run_with_hooks(text, [("blocks.0.hook_topk", lambda array, name: 2 * array)])
    assert np.abs(doubled - changed).max() > 0.01


def test_hooks_that_cannot_be_are_refused(model):
    for name in ("blocks.1.hook_topk", "blocks.2.hook_resid_post", "hook_embed", "h"):
        with pytest.raises(ValueError, match=f"fwd_hooks: '{name}' is none of this model's names; close: "):
            model.run_with_hooks("a", [(name, lambda array, name: None)])
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_topk gave \(2, 24\): must be \(1, 2, 24\)"):
        model.run_with_hooks("a", [("blocks.0.hook_topk", lambda array, name: array[0])])
