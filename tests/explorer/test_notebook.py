"""`topklm.open`: what Python and notebooks see of a run is what the pages and commands say."""

import html
import importlib.util
import json
import re
import sys

import explored_run
import numpy as np
import pytest

import topklm
from topklm.checkpoint import run_folder
from topklm.errors import UserError
from topklm.explorer import views
from topklm.inference.interventions import Intervention
from topklm.neurons import ablate_targets, search
from topklm.neurons.display import Columns
from topklm.neurons.labels import Labels

LINES = [
    {"step": 1, "train/loss": 5.0, "tokens": 10},
    {"step": 2, "train/loss": 4.0, "eval/loss": 4.5, "tokens": 20},
    {"step": 3, "train/loss": 3.5, "tokens": 30},
]


@pytest.fixture
def run(explored_copy):
    Labels(explored_copy.labels).set(1, 3, "<b>village")
    path = explored_copy.run / run_folder.METRICS_FILE
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return topklm.open(explored_copy.run)


def test_a_run_says_what_it_is_and_holds_its_model(run):
    assert re.fullmatch(r"Run\(.*village, step 5\)", repr(run))
    assert (run.model.step, run.model.cfg) == (explored_run.STEP, explored_run.CONFIG.model)
    assert run.model is run.model and run.config.model == explored_run.CONFIG.model


def test_the_table_of_neurons_is_the_measured_one_with_labels_and_texts(run, source):
    table = run.neurons
    assert len(table) == source.n_neurons and table.columns[:4] == [
        "layer",
        "neuron",
        "label",
        "input_tokens",
    ]
    np.testing.assert_array_equal(table["density"], source.column("density"))
    np.testing.assert_array_equal(table["ablation_effect"], source.column("ablation_effect"))
    number = source.number(1, 3)
    assert table[number]["label"] == "<b>village"
    assert table[number]["input_tokens"] == source.texts(source.row(number)["top_tokens"][:5])
    densest = table.sort("density", descending=True)
    order = sorted(range(len(table)), key=lambda n: -source.column("density")[n])
    assert [source.number(*at) for at in zip(densest["layer"], densest["neuron"], strict=True)] == order
    some = table[table["density"] > 0.2]
    assert len(some) == int((source.column("density") > 0.2).sum())
    assert "&lt;b&gt;village" in table[number : number + 1]._repr_html_()
    if importlib.util.find_spec("pandas"):
        frame = table.to_pandas()
        assert frame.shape == (len(table), len(table.columns))
        assert frame["density"].idxmax() == int(np.argmax(table["density"]))


def test_a_neuron_shows_its_page_and_runs_nothing(run, source):
    for neuron in (run.neuron(1, 3), run.neuron("1:3"), run.neuron((1, 3))):
        assert (neuron.layer, neuron.neuron, neuron.label) == (1, 3, "<b>village")
    notes = neuron.data["notes"]
    assert [(note["label"], note["holds"]) for note in notes] == [("<b>village", True)]
    assert neuron.data == {**views.neuron(source, 1, 3), "label": "<b>village", "notes": notes}
    assert neuron.figures["density"] == source.row(source.number(1, 3))["density"]
    np.testing.assert_array_equal(neuron.activations.values, source.store.neuron(1, 3).values)
    shown = repr(neuron)
    assert shown.startswith("neuron 1:3 of village (<b>village)\n") and "input tokens: " in shown
    framed = neuron._repr_html_()
    assert framed.startswith("<iframe sandbox srcdoc=") and framed.count("<") == 2
    page = html.unescape(re.search('srcdoc="([^"]*)"', framed)[1])
    assert "Neuron 1:3 · &lt;b&gt;village" in page and "<script" not in page
    assert page.count('class="tile"') == 6
    dead = run.neuron(*explored_run.DEAD)
    assert "dead, active at none of" in repr(dead) and "Dead: not active" in html.unescape(dead._repr_html_())
    with pytest.raises(UserError, match="neuron 99: must be from 0 to 31"):
        run.neuron(1, 99)
    with pytest.raises(UserError, match="'one' names no neuron: must be LAYER:NEURON"):
        run.neuron("one")


def test_finding_is_ranking(run, source):
    found = run.find("farmer|sailor", limit=7)
    matched = source.stored_text.matches("farmer|sailor").touched
    ranked = search.rank(source.store, matched, 7)
    assert [(one["layer"], one["neuron"], one["f1"]) for one in map(found.__getitem__, range(7))] == [
        (one.layer, one.neuron, one.f1) for one in ranked
    ]
    assert found["input_tokens"][0] == run.neurons["input_tokens"][source.number(*_place(ranked[0]))]


def _place(neuron):
    return neuron.layer, neuron.neuron


def test_ablating_is_the_loss_of_the_model_without_these_neurons(run, source):
    n = run.model.cfg.context_length - 1  # one window, of the first document
    found = run.ablate([(0, 3), "1:4"], targets="the", random_sets=1, tokens=n)
    assert found["neurons"].tolist() == ["0:3 1:4"] * 4
    assert found["group"].tolist() == list(ablate_targets.GROUPS)
    matched = source.stored_text.matches("the").touched[:n]
    steer = [Intervention(0, 3, mode="ablate"), Intervention(1, 4, mode="ablate")]
    tokens = np.concatenate([[run.model.tokenizer.separator_id], source.store.tokens(0, n)])
    after, before = (run.model.loss(tokens, per_token=True, steer=given) for given in (steer, None))
    rise = np.asarray(after - before)[0]
    assert found["tokens"][0] == matched.sum() and found["tokens"][[0, 2, 3]].sum() == n
    assert found["change"][0] == pytest.approx(rise[matched].mean(), abs=1e-4)
    chosen = run.ablate(regex="farmer", count=1, random_sets=1)
    assert len(set(chosen["neurons"])) == 1
    with pytest.raises(UserError, match="give one of neurons and regex"):
        run.ablate(targets="farmer")
    with pytest.raises(UserError, match="targets is missing"):
        run.ablate([(0, 3)])


def test_metrics_are_columns_and_a_plot(run):
    table = run.metrics
    assert table["step"].tolist() == [1, 2, 3] and table["train/loss"].tolist() == [5.0, 4.0, 3.5]
    assert np.isnan(table["eval/loss"][[0, 2]]).all() and table["eval/loss"][1] == 4.5
    svg = table.plot().svg
    assert svg.count("<path") == 2 and "eval/loss" in svg
    # Rising across, falling down: losses fall.
    points = [tuple(map(float, point.split())) for point in re.search('d="M([^"]*)"', svg)[1].split(" L")]
    assert points == sorted(points) and len(points) == 3
    assert "iframe" in table.plot("tokens")._repr_html_()
    with pytest.raises(UserError, match="column = lost: must be one of step, train/loss"):
        table.plot("lost")


def test_a_run_without_neurons_says_what_to_do(run, tmp_path, explored_copy):
    explored_copy.table.unlink()
    with pytest.raises(UserError, match=r"neurons of step 5 are not measured: run topklm explore"):
        len(topklm.open(explored_copy.run).neurons)
    with pytest.raises(UserError, match="is not a run folder with checkpoints"):
        topklm.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="split = test: must be one of"):
        list(run.documents("test"))


@pytest.mark.parametrize("package", ["pyarrow", "jinja2", "markupsafe"])
def test_packages_of_the_extra_that_are_missing_are_named(run, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package} .* pip install 'topklm\[explore\]'"):
        run.metrics.plot() if package == "markupsafe" else run.neuron(1, 3)


def test_documents_are_the_texts_of_a_split(finished_run):
    run = topklm.open(finished_run)
    texts = list(run.documents())
    assert texts and all(isinstance(text, str) for text in texts)
    assert not set(texts) & set(run.documents("train"))


def test_columns_are_sorted_cut_and_shown():
    table = Columns({"n": [3, 1, 2, 1], "x": [0.5, None, 2.0, 0.25], "name": ["a", "b\x1b", "c", "d"]})
    assert table["n"].dtype == np.int64 and np.isnan(table["x"][1])
    assert table.sort("n")["name"].tolist() == ["b\x1b", "d", "c", "a"]
    assert table.sort("n", descending=True)["name"].tolist() == ["a", "c", "b\x1b", "d"]
    assert table.sort("x", descending=True)["n"].tolist() == [2, 3, 1, 1]  # NaN last
    assert table[["n"]].columns == ["n"] and table[-1] == {"n": 1, "x": 0.25, "name": "d"}
    assert table[table["n"] == 1]["name"].tolist() == ["b\x1b", "d"]
    assert repr(table).splitlines()[2].split() == ["1", "b\\x1b"]
    assert repr(Columns({"n": range(100)})).endswith("20 of 100 rows")
    with pytest.raises(UserError, match="column = y: must be one of n, x, name"):
        table["y"]
