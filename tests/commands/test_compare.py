"""`topklm compare` on two small runs of the same data, against loops and the model itself."""

import dataclasses
import json
import math
import shutil

import making
import numpy as np
import pytest
import saved_runs
from test_neurons_find import write_store

import topklm
from topklm import cli
from topklm.commands import compare
from topklm.errors import UserError
from topklm.neurons import NeuronsFolder, ablate_targets
from topklm.neurons.ablate_set import halves
from topklm.neurons.store import Store

pytestmark = pytest.mark.usefixtures("small_batches")

STEP = 24
TEXTS = [
    "the sea and the Sea",
    "no ships at sea [bold]",
    "towns 12 sea",
    "a sea, s\u00e9as",
    "by sea",
    "the end sea",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs, the second without TopK, of one dataset; both harvested."""
    folder = tmp_path_factory.mktemp("compare")
    making.make_dataset(folder / "data", ["nothing"], TEXTS, tokenizer=saved_runs.tokenizer())
    data = dataclasses.replace(saved_runs.CONFIG.data, source=str(folder / "data"))
    config = dataclasses.replace(saved_runs.CONFIG, data=data)
    base = dataclasses.replace(config, model=dataclasses.replace(saved_runs.MODEL, n_nontopk=2))
    saved_runs.save(folder / "small", [STEP], config)
    saved_runs.save(folder / "small-base", [STEP], base)
    for name in ("small", "small-base"):
        write_store(folder / name, STEP, TEXTS, everywhere=range(5, 12))
    return folder


@pytest.fixture
def call(capsys, monkeypatch, place):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(place)

    def run(*arguments):
        cli.dispatch(["compare", "small", *map(str, arguments)])
        return capsys.readouterr().out

    return run


def bits_by_hand(folder):
    """Bits of each document by the model itself; all fit one window."""
    model = topklm.load(folder)
    found = []
    for text in TEXTS:
        tokens = np.concatenate([[model.tokenizer.separator_id], model.tokenizer.encode(text)])
        assert len(tokens) <= model.cfg.context_length
        found.append(float(np.asarray(model.loss(tokens, per_token=True), np.float64).sum()) / math.log(2))
    return np.array(found)


def test_bits_per_byte_are_paired_over_documents(call, place):
    found = json.loads(call("small-base", "--json"))
    assert [one["run"] for one in found["runs"]] == ["small", "small-base"]
    bits = found["bits_per_byte"]
    n_bytes = np.array([len(text.encode()) for text in TEXTS])
    assert (bits["documents"], bits["bytes"]) == (len(TEXTS), n_bytes.sum())
    expected = [bits_by_hand(place / name) for name in ("small", "small-base")]
    for one, by_hand in zip(bits["runs"], expected, strict=True):
        assert one["value"] == pytest.approx(by_hand.sum() / n_bytes.sum(), rel=1e-4)
        assert one["low"] <= one["value"] <= one["high"]
    gap = bits["difference"]
    assert gap["value"] == pytest.approx(bits["runs"][0]["value"] - bits["runs"][1]["value"], abs=1e-9)
    # Documents are drawn together: the interval is that of differences of each.
    drawn = np.random.default_rng(0).integers(0, len(TEXTS), (2000, len(TEXTS)))
    differences = (expected[0] - expected[1])[drawn].sum(axis=1) / n_bytes[drawn].sum(axis=1)
    assert (gap["low"], gap["high"]) == pytest.approx(
        np.percentile(differences, (2.5, 97.5)), rel=1e-3, abs=1e-4
    )
    same = json.loads(call("small", "--json"))["bits_per_byte"]["difference"]
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}
    cut = json.loads(call("small-base", "--tokens", 25, "--json"))["bits_per_byte"]
    assert (cut["documents"], cut["bytes"]) == (2, 25)


def test_the_best_neuron_is_found_on_one_half_and_scored_on_the_other(place):
    store = Store(NeuronsFolder(place / "small", STEP).store)
    matched = np.concatenate(
        [[c in "aeiou" for c in text] for text in (t.encode().decode("latin-1") for t in TEXTS)]
    )
    layer_0, layer_1 = ablate_targets.best_neurons(store, matched, seed=3)
    assert (layer_0.layer, layer_1.layer) == (0, 1)
    bounds, (choose, other) = store.document_bounds(), halves(len(TEXTS), 3)
    scores = {}
    for half, numbers in (("choose", choose), ("other", other)):
        at = np.concatenate([np.arange(bounds[n], bounds[n + 1]) for n in numbers])
        for layer in (0, 1):
            for neuron in range(store.metadata.d_model):
                block = store.neuron(layer, neuron)
                values = np.zeros(store.n_tokens)
                values[block.tokens] = block.values
                for threshold in {v for v in values[at] if v}:
                    fires = values[at] >= threshold
                    f1 = 2 * (fires & matched[at]).sum() / (fires.sum() + matched[at].sum())
                    scores[half, layer, neuron, float(threshold)] = f1
    for best in (layer_0, layer_1):
        of_layer = {key[2:]: f1 for key, f1 in scores.items() if key[:2] == ("choose", best.layer)}
        assert of_layer[best.neuron, best.threshold] == max(of_layer.values())
        assert best.f1 == pytest.approx(scores["other", best.layer, best.neuron, best.threshold])
        assert best.low <= best.f1 <= best.high


def test_patterns_are_looked_for_and_ablated_in_both(call, place):
    arguments = ("small-base", "--regex", "sea", "--regex", "E", "--count", 1, "--random-sets", 2)
    found = json.loads(call(*arguments, "--tokens", 60, "--json"))
    assert [one["regex"] for one in found["patterns"]] == ["sea", "E"]
    for one in found["patterns"][0]["runs"]:
        # Neuron 3 of layer 1 is active at exactly these tokens.
        assert (one["best"][-1]["layer"], one["best"][-1]["neuron"], one["best"][-1]["f1"]) == (1, 3, 1.0)
        (chosen,) = one["ablation"]["sets"]
        assert chosen["neurons"] == [[1, 3]] and len(chosen["random"]) == 2
    changes = [
        one["ablation"]["sets"][0]["change"]["targets"]["value"] for one in found["patterns"][0]["runs"]
    ]
    assert changes[0] != changes[1] and all(np.isfinite(changes))
    assert found["notes"] == []
    shown = call(*arguments[:3])
    assert (
        "bits per byte" in shown and "targets" in shown and "topklm neurons card small --json small" in shown
    )


def test_what_was_harvested_of_other_text_is_said(call, place, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(place / "small-base", other)
    shutil.rmtree(NeuronsFolder(other, STEP).path)
    write_store(other, STEP, TEXTS[::-1], everywhere=range(5, 12), source="another", topk_k=4)
    notes = json.loads(call(other, "--regex", "sea", "--random-sets", 1, "--json"))["notes"]
    assert len(notes) == 2 and "different text was harvested" in notes[0]
    assert notes[1].startswith(
        "harvested are the 8 largest activations of a token of the first and 4 of the other"
    )


def test_the_card_in_a_run_folder_is_shown(call, place):
    figure = {"value": 0.5, "low": 0.25, "high": 0.75}
    layer = {"layer": 0, "density": figure}
    entry = {"run": "runs/small", "step": STEP, "bases": [{"name": "own", "layers": [layer]}]}
    card = place / "small" / compare.CARD_FILE
    card.write_text(json.dumps({"runs": [{**entry, "run": "else"}, entry]}))
    found = json.loads(call("small-base", "--json"))
    assert found["cards"] == [{"run": "small", "bases": entry["bases"]}, None]
    row = next(line for line in call("small-base").splitlines() if "│ density" in line)
    assert "50.00% ± 25.00%" in row
    card.write_text(json.dumps({"runs": [{**entry, "step": 7}]}))
    found = json.loads(call("small-base", "--json"))
    assert found["cards"] == [None, None]
    assert found["notes"] == [f"small/card.json holds no card of step {STEP} of small"]
    card.write_text("{}")
    with pytest.raises(UserError, match=r"small/card.json is no readability card"):
        call("small-base")
    card.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a run folder"),
        (["small-base", "--base-step", "7"], "step = 7: .*small-base has checkpoints 24"),
        (["small-base", "--count", "0"], "--count = 0: must be 1 or more"),
        (["small-base", "--regex", "sea", "--count", "40"], "--count = 40: must be at most"),
        (
            ["small-base", "--regex", "12"],
            "^--regex = 12: targets: none of the .* tokens that are measured match",
        ),
        (["small-base", "--regex", "("], "is no regular expression"),
        (
            ["unharvested", "--regex", "sea"],
            "unharvested has no activations of step 24: run topklm neurons harvest",
        ),
    ],
)
def test_mistakes_are_named(call, place, arguments, message):
    if not (place / "unharvested").exists():
        shutil.copytree(place / "small", place / "unharvested")
        shutil.rmtree(place / "unharvested/neurons")
    with pytest.raises(UserError, match=message):
        call(*arguments)
