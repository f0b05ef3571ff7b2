"""`topklm neurons ablate` on a small run, against the model steered by interventions."""

import argparse
import json

import jax
import numpy as np
import pytest
import saved_runs
from test_neurons_find import write_store

import topklm
from topklm.commands.neurons_find import ABLATE
from topklm.config import MeshConfig
from topklm.errors import UserError
from topklm.inference.interventions import Intervention, load_interventions, save_interventions
from topklm.layout import make_layout
from topklm.neurons.ablate_set import AblatedLosses, halves
from topklm.neurons.documents import TextModel

pytestmark = pytest.mark.usefixtures("small_batches")

STEP = 24
TEXTS = [
    "the sea and the Sea",
    "no ships at sea [bold]",
    "towns 12 sea",
    "a sea, seas",
    "by sea",
    "the end sea",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a store in which neurons of layer 1 are active at "sea", and some everywhere."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    saved_runs.save(folder, [STEP])
    write_store(folder, STEP, TEXTS, everywhere=range(5, 12))
    return folder


@pytest.fixture
def ablate(capsys, monkeypatch, run):
    """Runs the command; gives back what it printed, with --json what that says."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments):
        parser = argparse.ArgumentParser()
        ABLATE.add_arguments(parser)
        parsed = parser.parse_args([str(argument) for argument in (run, *arguments)])
        ABLATE.run(parsed)
        output, _ = capsys.readouterr()
        return json.loads(output) if parsed.json == "-" else output

    return call


def changes(run, numbers, pattern, neurons):
    """The mean rise of the loss at characters of a word, at others after one, and elsewhere: by loops."""
    model = topklm.load(run)
    texts = [TEXTS[number] for number in numbers]
    ids = [model.tokenizer.encode(text) for text in texts]
    assert [len(one) for one in ids] == [len(text) for text in texts]  # a token for each character
    layout = make_layout(MeshConfig(), jax.local_devices())
    text_model = TextModel(model.cfg, model.params, layout, model.tokenizer.separator_id)
    losses = AblatedLosses(text_model, ids, {})
    rise = (losses.of_tokens(neurons) - losses.of_tokens()).tolist()
    found = {"targets": [], "targets after targets": [], "others after targets": [], "elsewhere": []}
    for text in texts:
        is_target = [False] * len(text)
        for at in range(len(text)):
            if text[at : at + len(pattern)].lower() == pattern:
                is_target[at : at + len(pattern)] = [True] * len(pattern)
        for at, target in enumerate(is_target):
            one, after = rise.pop(0), at > 0 and is_target[at - 1]
            if target:
                found["targets"].append(one)
                if after:
                    found["targets after targets"].append(one)
            else:
                found["others after targets" if after else "elsewhere"].append(one)
    return {name: (len(rises), np.mean(rises) if rises else None) for name, rises in found.items()}


def check(found, expected):
    for name, (n, mean) in expected.items():
        one = found["sets"][0]["change"][name]
        assert found["tokens"][name] == n
        assert one["value"] == (None if mean is None else pytest.approx(mean, abs=1e-6))
        if mean is not None:
            assert one["low"] <= one["value"] <= one["high"]


def test_neurons_of_a_pattern_are_chosen_on_one_half_and_measured_on_the_other(ablate, run, tmp_path):
    file, kept = tmp_path / "set.json", tmp_path / "found.json"
    arguments = "--regex", "sea", "--count", 1, "--random-sets", 3, "--save", file
    found = ablate(*arguments, "--json")
    choose, measure = halves(len(TEXTS))
    assert found["documents"] == {"chosen_on": len(choose), "measured_on": len(measure)}
    # Neuron 3 is active at exactly these tokens.
    assert found["sets"][0]["neurons"] == [[1, 3]] and found["sets"][0]["f1"] == [1.0]
    check(found, changes(run, measure, "sea", [(1, 3)]))
    random = found["sets"][0]["random"]
    assert len(random) == 3 and all(one["neurons"] not in ([], [[1, 3]]) for one in random)
    gaps = [
        one["change"]["targets"]["value"] - one["change"]["elsewhere"]["value"]
        for one in (found["sets"][0], *random)
    ]
    assert found["sets"][0]["p_value"] == (1 + sum(gap >= gaps[0] for gap in gaps[1:])) / 4
    assert load_interventions(file) == [Intervention(1, 3, mode="ablate")]
    table = ablate(*arguments, "--json", kept)
    assert json.loads(kept.read_text()) == found
    assert max(map(len, table.splitlines()[1:6])) <= 80


def test_given_neurons_are_measured_on_all_documents(ablate, run, tmp_path):
    neurons = [(0, 5), (1, 6)]
    given = "--targets", "SEA", "--random-sets", 1
    found = ablate("--neurons", "0:5,1:6", *given, "--json")
    check(found, changes(run, range(len(TEXTS)), "sea", neurons))
    assert found["sets"][0]["density"] == 1.0 and found["sets"][0]["f1"] == []
    file = tmp_path / "set.json"
    save_interventions(file, dict.fromkeys(neurons, 2.0))
    of_file = ablate("--set", file, *given, "--json")
    assert of_file == found
    shown = ablate("--neurons", "0:5,1:6", *given)
    assert "neurons were given, and may have been chosen on this text" in shown
    # With --case, capitals are other letters, and there are none of these.
    with pytest.raises(UserError, match=r"^--targets: none of the \d+ tokens that are measured match"):
        ablate("--neurons", "0:5", *given, "--case")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--neurons", "0:5"], "--targets is missing"),
        (["--neurons", "0:5", "--targets", "sea", "--count", "2"], "--count: goes with --regex only"),
        (["--neurons", "0:40", "--targets", "sea"], "--neurons = 0:40: must be a neuron from 0 to 31"),
        (["--neurons", "0:1", "--targets", "sea"], "--neurons = 0:1: is active at none of the"),
        (["--neurons", "all", "--targets", "sea"], "--neurons names none"),
        (["--regex", "sea", "--random-sets", "0"], "--random-sets = 0: must be 1 or more"),
        (["--regex", "sea", "--count", "1,2", "--save", "x.json"], "--save with --count = 1,2"),
        (["--regex", "sea", "--count", "90"], "--count = 90: must be at most"),
        (["--regex", "(", "--count", "1"], "is no regular expression"),
    ],
)
def test_mistakes_are_named(ablate, arguments, message):
    with pytest.raises(UserError, match=message):
        ablate(*arguments)
