"""Neurons and interventions as a command line names them."""

import argparse
import dataclasses
import json

import jax.numpy as jnp
import pytest
import saved_runs

import topklm
from topklm.commands import shared
from topklm.config import Config
from topklm.errors import UserError
from topklm.inference.interventions import MODES, Intervention, save_interventions

CONFIG = saved_runs.MODEL  # two layers of 32 neurons, the first with TopK


def parsed(*arguments, config=CONFIG):
    parser = argparse.ArgumentParser()
    shared.add_steering(parser)
    model = topklm.LanguageModel("a run", 7, Config(model=config), saved_runs.tokenizer(), {})
    return shared.interventions(parser.parse_args(list(arguments)), model)


def test_a_neuron_is_layer_and_number():
    assert shared.neuron("3:117") == shared.neuron(" 3 : 117 ") == (3, 117)
    for text in ("3", "3:", ":1", "3:1:2", "-1:2", "3:x", "3:1=2", "", "3.0:1", "1:9999999999"):
        with pytest.raises(UserError, match=r"--neuron = .*: must be LAYER:NEURON, e\.g\. 3:117"):
            shared.neuron(text)


def test_flags_and_a_file_add_up(tmp_path):
    assert parsed() is None
    assert parsed("--steer", "0:3=4", "--steer", "1:31=-2.5e-1") == [
        Intervention(0, 3, 4.0),
        Intervention(1, 31, -0.25),
    ]
    file = tmp_path / "set.json"
    kept = [Intervention(0, 9, mode="ablate"), Intervention(1, 2, 3.0, "add", "generated")]
    save_interventions(file, kept)
    assert parsed("--steer-file", str(file)) == kept
    both = parsed("--steer", "0:3=4", "--steer-mode", "scale", "--steer-file", str(file))
    assert both == [Intervention(0, 3, 4.0, "scale"), *kept]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_can_be_given_and_those_without_a_value_need_none(mode):
    assert parsed("--steer", "0:3=0.5", "--steer-mode", mode) == [Intervention(0, 3, 0.5, mode)]
    if mode in ("ablate", "ban"):
        assert parsed("--steer", "0:3", "--steer-mode", mode) == [Intervention(0, 3, mode=mode)]
    else:
        with pytest.raises(UserError, match=f"--steer = 0:3: must be LAYER:NEURON=VALUE for mode {mode}"):
            parsed("--steer", "0:3", "--steer-mode", mode)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steer", "0:3="], "--steer = 0:3=: '' is no number"),
        (["--steer", "0:3=x"], "--steer = 0:3=x: 'x' is no number"),
        (["--steer", "0:3=nan"], "--steer = 0:3=nan: value = nan of layer 0, neuron 3: must be a finite"),
        (["--steer", "0:3=1e39"], "--steer = 0:3=1e39: value = 1e.39 .* must be at most"),
        (["--steer", "x=3"], "--steer = x: must be LAYER:NEURON"),
        (["--steer", "2:0=1"], "--steer = 2:0=1: layer = 2: must be an integer from 0 to 1"),
        (["--steer", "0:32=1"], "--steer = 0:32=1: neuron = 32: must be an integer from 0 to 31"),
        (["--steer", "1:3", "--steer-mode", "ban"], "--steer = 1:3: mode = 'ban' .* the layer has no TopK"),
        (["--steer-file", "/nowhere.json"], "/nowhere.json: there is no such file of interventions"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        parsed(*arguments)


@pytest.mark.parametrize("mode", ["ban", "force"])
def test_a_model_without_topk_has_no_competition(mode):
    base = dataclasses.replace(CONFIG, n_nontopk=CONFIG.n_layers)
    with pytest.raises(UserError, match="of layer 0, neuron 3: the layer has no TopK"):
        parsed("--steer", "0:3=1", "--steer-mode", mode, config=base)


def model_of(seed, run="runs/small"):
    params = {"embed": {"embedding": jnp.full((4, 3), seed, jnp.float32)}}
    return topklm.LanguageModel(run, 24, saved_runs.CONFIG, saved_runs.tokenizer(), params)


def warned(file, model, capsys):
    shared.warn_of_another_model(argparse.Namespace(steer_file=file and str(file)), model)
    output, errors = capsys.readouterr()
    assert output == ""
    return errors


def test_a_file_of_another_models_neurons_is_taken_with_a_warning(tmp_path, capsys):
    file, entries = tmp_path / "set.json", [Intervention(0, 9, mode="ablate")]
    save_interventions(file, entries, model=shared.name_of(model_of(1)))
    assert parsed("--steer-file", str(file)) == entries
    assert warned(file, model_of(1, "elsewhere/small"), capsys) == ""
    said = warned(file, model_of(2, "runs/ot\x1bher"), capsys)
    assert said.count("\n") == 1
    assert "its neurons are of small, step 24; in this model, ot\\x1bher, step 24" in said


def test_a_file_that_names_no_model_is_taken(tmp_path, capsys):
    save_interventions(tmp_path / "set.json", [Intervention(0, 9, mode="ablate")])
    assert warned(tmp_path / "set.json", model_of(1), capsys) == ""
    assert warned(None, model_of(1), capsys) == ""


@pytest.mark.parametrize("model", [3, [], {}, {"run": "small", "step": 1}])
def test_a_file_that_names_its_model_in_another_way_is_refused(tmp_path, capsys, model):
    content = {"format": "topklm-interventions", "version": 1, "model": model, "interventions": []}
    (tmp_path / "set.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="model: must be an object with run, step, parameters; or leave it"):
        warned(tmp_path / "set.json", model_of(1), capsys)
