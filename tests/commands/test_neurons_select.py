"""`topklm neurons select` on a store whose neurons are made to stand for something."""

import argparse
import contextlib
import json

import pytest
import saved_runs
from test_neurons_find import write_store

import topklm
from topklm.checkpoint.checksums import fingerprint
from topklm.commands.neurons_find import SELECT
from topklm.errors import UserError
from topklm.inference.interventions import Intervention, load_interventions
from topklm.neurons import NeuronsFolder
from topklm.neurons.labels import Labels
from topklm.neurons.search import read_contrast
from topklm.storage.files import sealed_json

STEP = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    saved_runs.save(folder, [10, 17, STEP])
    write_store(folder, STEP)
    write_store(folder, 17, kind="sae")
    labels = Labels(NeuronsFolder(folder, STEP).labels)
    for layer, neuron, label in ((1, 3, "The SEA"), (0, 7, "sea birds"), (0, 2, "towns")):
        labels.set(layer, neuron, label)
    return folder


@pytest.fixture
def select(capsys, tmp_path, run):
    """Runs the command; gives back the interventions that it wrote, and what it printed."""

    def call(*arguments):
        parser = argparse.ArgumentParser()
        SELECT.add_arguments(parser)
        file = tmp_path / "set.json"
        SELECT.run(parser.parse_args([str(a) for a in (run, "--save", file, *arguments)]))
        return load_interventions(file), capsys.readouterr().out

    return call


def neuron(layer, number, difference, score, q_value=0.01):
    figures = {
        "difference": difference,
        "score": score,
        "p_value": 0.01,
        "q_value": q_value,
        "family_p_value": 0.02,
    }
    return {"layer": layer, "neuron": number, **figures}


@pytest.fixture
def contrast(tmp_path):
    neurons = [neuron(0, 4, 0.1, 5), neuron(0, 5, 0.3, 3), neuron(1, 6, 0.2, 2, 0.4), neuron(1, 7, -0.5, -6)]
    file = tmp_path / "contrast.json"
    file.write_text(json.dumps({"step": STEP, "by": "difference", "neurons": neurons}))
    return file


def test_those_that_stand_for_a_pattern_are_written_best_first(select):
    found, printed = select("--regex", "sea", "--mode", "add", "--value", 2.5)
    assert found == [Intervention(layer, n, 2.5, "add") for layer, n in ((1, 3), (1, 9), (0, 5))]
    assert "precision 1.000, recall 0.333" in printed and "3 neurons, mode add, value 2.5" in printed
    precise, _ = select("--regex", "sea", "--min-precision", 0.9, "--mode", "ablate")
    assert precise == [Intervention(1, 3, mode="ablate"), Intervention(1, 9, mode="ablate")]
    narrow = {"--min-recall 0.9": [(1, 3), (0, 5)], "--layer 0": [(0, 5)], "--top 1": [(1, 3)]}
    for flags, places in {**narrow, "--ends --top 1": [(1, 9)]}.items():
        found, _ = select("--regex", "sea", "--mode", "ablate", *flags.split())
        assert [(one.layer, one.neuron) for one in found] == places


def test_the_file_names_the_model(select, run, tmp_path):
    select("--label", "sea", "--value", 1)
    (file,) = tmp_path.glob("*.json")
    model = topklm.load(run)
    named = json.loads(file.read_text())["model"]
    assert named == {
        "run": "small",
        "step": STEP,
        "n_layers": 2,
        "d_model": 32,
        "parameters": fingerprint(model.params),
    }


def test_those_with_a_label_are_written_in_order(select):
    found, printed = select("--label", "Sea", "--value", -1)
    assert found == [Intervention(0, 7, -1.0), Intervention(1, 3, -1.0)]
    assert "label 'The SEA'" in printed
    assert select("--label", "sea", "--layer", 1, "--value", 1)[0] == [Intervention(1, 3, 1.0)]


def test_those_of_a_contrast_are_the_first_of_all_layers_in_its_order(select, contrast):
    found, printed = select("--contrast-json", contrast, "--mode", "ablate", "--json")
    assert [(one.layer, one.neuron) for one in found] == [(0, 5), (1, 6), (0, 4)]
    facts = json.loads(printed)
    assert facts["neurons"][0] == {
        "layer": 0,
        "neuron": 5,
        "reason": "difference +30.00%, score +3.0, q 0.01",
    }
    assert (facts["step"], facts["mode"], facts["value"]) == (STEP, "ablate", None)
    found, _ = select("--contrast-json", contrast, "--mode", "ablate", "--max-q", 0.05, "--top", 5)
    assert [(one.layer, one.neuron) for one in found] == [(0, 5), (0, 4)]
    contrast.write_text(contrast.read_text().replace('"by": "difference"', '"by": "score"'))
    found, _ = select("--contrast-json", contrast, "--mode", "ablate")
    assert [(one.layer, one.neuron) for one in found] == [(0, 4), (0, 5), (1, 6)]


def test_a_contrast_that_carries_a_digest_must_be_as_it_was_printed(select, contrast):
    content = sealed_json(json.loads(contrast.read_text()))
    contrast.write_bytes(content)
    whole = read_contrast(contrast)
    assert len(select("--contrast-json", contrast, "--mode", "ablate")[0]) == 3
    for place in range(8 * len(content)):
        spoilt = bytearray(content)
        spoilt[place // 8] ^= 1 << place % 8
        contrast.write_bytes(spoilt)
        with contextlib.suppress(UserError):
            assert read_contrast(contrast) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "ablate"], "give one of --regex, --label and --contrast-json"),
        (
            ["--regex", "a", "--label", "b", "--value", "1"],
            "give one of --regex, --label and --contrast-json",
        ),
        (["--regex", "sea"], "--mode = clamp: needs --value, a number"),
        (["--regex", "sea", "--mode", "ablate", "--value", "2"], "--mode = ablate: needs no --value"),
        (
            ["--regex", "sea", "--value", "nan"],
            "--value = nan: value = nan of layer 1, neuron 3: must be a fin",
        ),
        (["--label", "sea", "--min-recall", "0.5", "--value", "1"], "--min-recall: goes with --regex only"),
        (["--regex", "sea", "--max-q", "0.5", "--value", "1"], "--max-q: goes with --contrast-json only"),
        (
            ["--regex", "sea", "--min-precision", "2", "--value", "1"],
            "--min-precision = 2.0: must be from 0 to",
        ),
        (["--regex", "sea", "--top", "0", "--value", "1"], "--top = 0: must be 1 or more"),
        (["--label", "", "--value", "1"], "--label is empty"),
        (["--label", "nothing", "--value", "1"], "no neuron is like that: nothing is written"),
        (["--regex", "sea", "--layer", "9", "--value", "1"], "layer = 9: must be one of 0, 1"),
        (
            ["--regex", "sea", "--step", "10", "--value", "1"],
            "no activations of step 10: run topklm neurons harv",
        ),
        (["--regex", "sea", "--mode", "ban"], "neuron 1:3: mode = 'ban' .*: the layer has no TopK"),
        (["--contrast-json", "/nowhere.json", "--value", "1"], "/nowhere.json: there is no such file"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(select, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        select(*arguments)
    assert not (tmp_path / "set.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged .*: run topklm neurons contrast --json, and give its output"),
        ("[1]", "is damaged .JSON that holds a list and no dict"),
        ("[" * 100_000, "is damaged .JSON that is nested too deeply"),
        ('{"step": 24, "sha256": "ab"}', "is not as it was written .its digest differs.*remove 'sha256'"),
        ('{"step": 24, "by": "score", "neurons": [{"layer": 0}]}', "is not what topklm neurons contrast"),
        ('{"step": 24, "by": "x", "neurons": []}', "is not what topklm neurons contrast"),
        (
            '{"step": 10, "by": "score", "neurons": []}',
            "is of step 10, this checkpoint of 24; give --step 10",
        ),
    ],
)
def test_a_file_that_is_no_contrast_of_this_checkpoint_is_refused(select, contrast, content, message):
    contrast.write_text(content)
    with pytest.raises(UserError, match=message):
        select("--contrast-json", contrast, "--mode", "ablate")


def test_codes_of_a_dictionary_cannot_be_set(select):
    with pytest.raises(UserError, match="holds codes of a dictionary, which no intervention can set"):
        select("--regex", "sea", "--value", 1, "--step", 17)
