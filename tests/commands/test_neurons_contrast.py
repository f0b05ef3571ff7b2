"""`topklm neurons contrast` and `ablate-set` on small texts that differ."""

import argparse
import dataclasses
import json

import jax
import making
import numpy as np
import pytest
import saved_runs

import topklm
from topklm.commands.neurons_compare import ABLATE_SET, CONTRAST
from topklm.config import MeshConfig
from topklm.errors import UserError
from topklm.inference.interventions import Intervention, load_interventions
from topklm.layout import make_layout
from topklm.neurons import NeuronsFolder
from topklm.neurons.ablate_set import AblatedLosses, halves
from topklm.neurons.documents import TextModel
from topklm.neurons.harvest import count
from topklm.neurons.labels import Labels

pytestmark = pytest.mark.usefixtures("small_batches")

STEP = 24
VOWELS = ["aeiou eau", "iou aie", "oui a oui", "eieio", "aa ee ii oo", "you eau"]
NUMBERS = ["12 34 56", "1999 2000", "777", "3.14159 2.71", "0042 0043", "8 6 4 2"]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, and texts."""
    folder = tmp_path_factory.mktemp("place")
    saved_runs.save(folder / "small", [STEP])
    write(folder / "vowels.jsonl", VOWELS)
    write(folder / "numbers.jsonl", NUMBERS)
    return folder


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs a command; gives back what it printed, with --json what that says."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(command, *arguments):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        parsed = parser.parse_args([str(argument) for argument in arguments])
        command.run(parsed)
        output, _ = capsys.readouterr()
        return json.loads(output) if parsed.json else output

    return run


def contrast_of(place):
    names = "--positive", place / "vowels.jsonl", "--negative", place / "numbers.jsonl"
    return CONTRAST, place / "small", *names


def ablate_of(place):
    names = "--forget", place / "vowels.jsonl", "--retain", place / "numbers.jsonl"
    return ABLATE_SET, place / "small", *names


@pytest.fixture(scope="module")
def model(place):
    return topklm.load(place / "small")


def text_model(model):
    layout = make_layout(MeshConfig(), jax.local_devices())
    return TextModel(model.config.model, model.params, layout, model.tokenizer.separator_id)


@pytest.fixture(scope="module")
def frequencies(model):
    """[2, D], the share of tokens at which neurons of layer 0 are active, text by text."""
    documents = [model.tokenizer.encode(text) for text in (*VOWELS, *NUMBERS)]
    counts = count(text_model(model), documents)
    active, n_tokens = counts.active[:, 0].reshape(2, 6, 32).sum(axis=1), counts.n_tokens.reshape(2, 6)
    return active / n_tokens.sum(axis=1, keepdims=True)


def test_the_neurons_are_those_of_the_model_the_largest_difference_first(call, place, frequencies):
    labels = Labels(NeuronsFolder(place / "small", STEP).labels)
    best = int(np.argmax(frequencies[0] - frequencies[1]))
    labels.set(0, best, "[red]vowels")
    found = call(*contrast_of(place), "--top", 5, "--json")
    assert (found["step"], found["unit"], found["permutations"], found["is_exact"]) == (
        STEP,
        "document",
        924,
        True,
    )
    assert (found["positive"]["units"], found["positive"]["tokens"]) == (6, sum(map(len, VOWELS)))
    order = np.argsort(frequencies[1] - frequencies[0], kind="stable")[:5]
    assert [(r["layer"], r["neuron"]) for r in found["neurons"]] == [(0, n) for n in order]
    for row in found["neurons"]:
        got = row["frequency_positive"], row["frequency_negative"]
        assert got == pytest.approx(tuple(frequencies[:, row["neuron"]]))
    assert found["neurons"][0]["label"] == "[red]vowels"
    lowest = min(r["p_value"] for r in found["neurons"])
    assert lowest < 0.05 and all(r["p_value"] <= r["q_value"] for r in found["neurons"])
    table = call(*contrast_of(place), "--top", 5)
    row = next(line for line in table.splitlines() if "[red]vowels" in line).replace("│", " ").split()
    assert row[:3] == ["0", str(best), f"{found['neurons'][0]['frequency_positive']:.2%}"]
    assert "924 ways (all) to deal the documents" in table


def test_a_text_that_is_one_document_is_dealt_in_windows_and_that_is_said(call, place, tmp_path):
    one = write(tmp_path / "one.jsonl", [" ".join(VOWELS * 8)])
    command, run, _, _, *negative = contrast_of(place)
    found = call(command, run, "--positive", one, *negative, "--window", 9, "--json", "--permutations", 50)
    n = len(" ".join(VOWELS * 8))
    assert (found["unit"], found["window"], found["positive"]["units"]) == ("window", 9, -(-n // 9))
    assert found["positive"]["documents"] == 1 and not found["is_exact"]
    assert any("windows of one document are alike" in line for line in found["warnings"])
    few = write(tmp_path / "few.jsonl", VOWELS[:2])
    found = call(
        command, run, "--positive", few, "--negative", write(tmp_path / "b.jsonl", NUMBERS[:2]), "--json"
    )
    assert found["lowest_p_value"] == pytest.approx(1 / 3)
    assert found["warnings"] == [
        "there are only 6 ways to deal 4 documents: no p-value can be below 0.33; give more"
    ]


def test_repeated_documents_and_those_behind_the_limit_are_left_out_and_that_is_said(call, place, tmp_path):
    twice = write(tmp_path / "twice.jsonl", [*VOWELS, VOWELS[2], "", VOWELS[0]])
    command, run, _, _, *negative = contrast_of(place)
    found = call(command, run, "--positive", twice, *negative, "--json")
    assert found["positive"]["units"] == 6 and found["positive"]["repeated_documents_left_out"] == 2
    assert found["warnings"] == [
        "--positive: 2 repeated documents are left out",
        "--positive: left out: 1 x empty",
    ]
    whole = call(*contrast_of(place), "--json")
    assert found["neurons"] == whole["neurons"]
    cut = call(*contrast_of(place), "--tokens", 20, "--json")
    assert (cut["positive"]["tokens"], cut["positive"]["units"]) == (20, 3)
    assert "--positive: only the first 20 tokens are read (--tokens)" in cut["warnings"]


def mean_loss(model, texts, neurons=()):
    documents = [model.tokenizer.encode(text) for text in texts]
    n = sum(map(len, documents))
    losses = AblatedLosses(text_model(model), documents, {"all": np.ones(n, bool)})
    return losses.of_tokens(neurons).sum() / n


def test_ablating_reports_the_losses_of_documents_that_nothing_was_chosen_on(call, place, model, tmp_path):
    file = tmp_path / "set.json"
    arguments = "--neurons", 3, "--random-sets", 2
    found = call(*ablate_of(place), *arguments, "--save", file, "--json")
    (one,) = found["sets"]
    neurons = [tuple(neuron) for neuron in one["neurons"]]
    assert load_interventions(file) == [Intervention(0, n, mode="ablate") for _, n in neurons]
    scored = [[texts[i] for i in halves(6)[1]] for texts in (VOWELS, NUMBERS)]
    for name, texts in zip(("forget", "retain"), scored, strict=True):
        before, after = mean_loss(model, texts), mean_loss(model, texts, neurons)
        assert found[f"{name}_loss"] == pytest.approx(before)
        assert one[name] == pytest.approx(after - before, abs=1e-9)
        low, high = one[f"{name}_interval"]
        assert low <= one[name] <= high and one["random"][name]["low"] <= one["random"][name]["high"]
    # Chosen are the largest differences of the other half, as a contrast of it finds them.
    halved = [
        write(tmp_path / f"{n}.jsonl", [texts[i] for i in halves(6)[0]])
        for n, texts in enumerate((VOWELS, NUMBERS))
    ]
    contrasted = call(
        CONTRAST,
        place / "small",
        "--positive",
        halved[0],
        "--negative",
        halved[1],
        "--top",
        3,
        "--json",
    )
    assert [(r["layer"], r["neuron"]) for r in contrasted["neurons"]] == neurons
    assert one["q_values"] == [r["q_value"] for r in contrasted["neurons"]]
    table = call(*ablate_of(place), *arguments, "--save", file)
    assert f"{one['forget']:+.3f}" in table and "3 random, 2 sets" in table
    assert f"wrote {file}: 3 neurons, mode ablate" in table


def test_documents_that_are_scored_have_no_part_in_choosing(call, place, tmp_path):
    """Other documents in the half that is scored change the losses and not the neurons, and the reverse."""
    before = call(*ablate_of(place), "--neurons", "2,5", "--random-sets", 1, "--json")
    changed = {}
    for half in (0, 1):
        texts = list(VOWELS)
        for i in halves(6)[half]:
            texts[i] = f"other {i}"
        file = write(tmp_path / f"other{half}.jsonl", texts)
        command, run, _, _, *retain = ablate_of(place)
        changed[half] = call(
            command, run, "--forget", file, *retain, "--neurons", "2,5", "--random-sets", 1, "--json"
        )
    sets = [[one["neurons"] for one in found["sets"]] for found in (before, changed[1], changed[0])]
    assert sets[0] == sets[1] != sets[2]
    assert before["forget_loss"] == changed[0]["forget_loss"] != changed[1]["forget_loss"]
    assert [len(neurons) for neurons in sets[0]] == [2, 5]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("contrast", ["--tokens", "0"], "--tokens = 0: must be 1 or more"),
        ("contrast", ["--permutations", "0"], "--permutations = 0: must be 1 or more"),
        ("contrast", ["--seed", "-1"], "--seed = -1: must be 0 or more"),
        ("contrast", ["--layers", "0,1"], "--layers = 0,1: must be TopK layers, from 0 to 0"),
        ("contrast", ["--keep", "3"], "--keep = 3: is for Base LMs"),
        ("contrast", ["--step", "7"], "step = 7: .* has checkpoints 24"),
        ("contrast", ["--positive", "nowhere.jsonl"], "--positive: 'nowhere.jsonl' matches no file"),
        (
            "contrast",
            ["--positive", "empty.jsonl"],
            r"--positive = .*empty.jsonl: there is no text in it \(.*the field 'text' was looked for\)",
        ),
        ("contrast", ["--positive", "numbers.jsonl"], "--positive and --negative are both .*numbers.jsonl"),
        ("contrast", ["--positive", "mixed.jsonl"], "have 2 documents in common: each must be in one text"),
        (
            "contrast",
            ["--positive", "one.jsonl", "--unit", "document"],
            "--positive = .*one.jsonl: is one document: give more documents, or --unit window",
        ),
        ("contrast", ["--positive", "one.jsonl"], "1 documents, 3 tokens: makes 1 windows of 64 tokens"),
        (
            "ablate",
            ["--forget", "one.jsonl"],
            "--forget = .*one.jsonl: is one document: neurons are chosen on",
        ),
        ("ablate", ["--count", "40"], "--count = 40: must be from 1 to"),
        ("ablate", ["--count", "1,2", "--save", "x.json"], "--save with --count = 1,2: one set is saved"),
        ("ablate", ["--random-sets", "0"], "--random-sets = 0: must be 1 or more"),
    ],
)
def test_mistakes_are_named(call, place, monkeypatch, command, arguments, message):
    monkeypatch.chdir(place)
    write(place / "empty.jsonl", [])
    write(place / "one.jsonl", ["eau"])
    write(place / "mixed.jsonl", [*VOWELS, *NUMBERS[:2]])
    whole = contrast_of(place) if command == "contrast" else ablate_of(place)
    with pytest.raises(UserError, match=message):
        call(*whole, *arguments)


@pytest.mark.parametrize("neurons", ["0", "3,x", "", "1.5"])
def test_numbers_of_neurons_must_be_whole(call, place, neurons, capsys):
    with pytest.raises(SystemExit):
        call(*ablate_of(place), "--neurons", neurons)
    assert "must be whole numbers, 1 or more" in capsys.readouterr().err


OWN = [*VOWELS, *NUMBERS, "aeiou 12 eau", "xyz", "zyx rst"]


@pytest.fixture(scope="module")
def own(tmp_path_factory, place):
    """The same run, whose own held-out documents are of both texts, of both at once, and of neither."""
    folder = tmp_path_factory.mktemp("own")
    making.make_dataset(folder / "data", ["something else 1"], OWN, tokenizer=saved_runs.tokenizer())
    data = dataclasses.replace(saved_runs.CONFIG.data, source=str(folder / "data"))
    saved_runs.save(folder / "small", [STEP], dataclasses.replace(saved_runs.CONFIG, data=data))
    return folder / "small"


def test_documents_of_the_runs_own_data_are_told_apart_by_patterns(call, own, place):
    given = call(*contrast_of(place), "--json")
    regexes = "--positive-regex", "[AEIOU]{2}", "--negative-regex", r"\d"
    found = call(CONTRAST, own, *regexes, "--json")
    assert [{**one, "label": ""} for one in found["neurons"]] == [
        {**one, "label": ""} for one in given["neurons"]
    ]
    assert (found["positive"]["source"], found["negative"]["source"]) == ("[AEIOU]{2}", r"\d")
    assert found["warnings"] == [
        "--positive-regex: left out: 1 x match of both patterns",
        "--negative-regex: left out: 1 x match of both patterns",
    ]
    # Without the second pattern, all that does not match the first: the numbers, and what is neither.
    rest = call(CONTRAST, own, *regexes[:2], "--json")
    assert rest["positive"]["documents"] == len(VOWELS) + 1
    assert rest["negative"]["documents"] == len(NUMBERS) + 2 and rest["warnings"] == []
    assert rest["negative"]["source"] == "all but [AEIOU]{2}"
    ablated = call(
        ABLATE_SET, own, "--forget-regex", "[aeiou]{2}", "--retain-regex", r"\d", "--count", 3, "--json"
    )
    expected = call(*ablate_of(place), "--count", 3, "--json")
    assert ablated["sets"] == expected["sets"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--positive-regex", "q"],
            "--positive-regex = q: no document of the held-out text of data .* is like that",
        ),
        (
            ["--positive-regex", "aeiou", "--negative-regex", "12 eau"],
            r"--negative-regex = 12 eau: .*\(1 x match of",
        ),
        (
            ["--positive-regex", "eau", "--case", "--split", "train"],
            "--positive-regex = eau: no document of the tra",
        ),
        (["--positive-regex", "("], r"--positive-regex = \(: is no regular expression"),
        (["--negative-regex", "a"], "--positive-regex and --negative-regex go together"),
        (
            ["--positive-regex", "a", "--negative", "x.jsonl"],
            "--positive-regex and --negative-regex go together",
        ),
        (["--positive", "x.jsonl"], "--negative is missing: give text, or --positive-regex"),
        ([], "--positive is missing"),
        (
            ["--positive", "x.jsonl", "--negative", "y.jsonl", "--case"],
            "--case: goes with --positive-regex only",
        ),
    ],
)
def test_mistakes_in_patterns_are_named(call, own, arguments, message):
    with pytest.raises(UserError, match=message):
        call(CONTRAST, own, *arguments)
