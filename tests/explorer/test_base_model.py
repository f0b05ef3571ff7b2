"""A Base LM from text to pages: its neurons are the positive parts of its hidden state."""

import dataclasses
import json
import re

import explored_run
from helpers import sentences, write_documents
import pytest
import saved_runs
from serve_site import serving

import topklm
from topklm import cli
from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.steering import spelled
from topklm.neurons import NeuronsFolder
from topklm.neurons.statistics import table
from topklm.neurons.store import Store


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = dataclasses.replace(
        explored_run.CONFIG, model=dataclasses.replace(explored_run.CONFIG.model, n_nontopk=3)
    )
    place = tmp_path_factory.mktemp("base")
    saved_runs.save(place / "village", [5], config)
    text = write_documents(place / "text.jsonl", sentences(1, 20))
    run = str(place / "village")
    cli.dispatch(["neurons", "harvest", run, "--source", str(text), "--tokens", "3000"])
    cli.dispatch(["neurons", "measure", run, "--ablation-samples", "4", "--lens-contexts", "4"])
    return NeuronsFolder(place / "village", 5)


def test_every_layer_has_neurons_of_which_some_half_is_active(base):
    store, (rows, measured) = Store(base.store), table.read(base.table)
    assert (measured.kind, measured.layers, rows.num_rows) == ("dense", (0, 1, 2), 3 * 32)
    assert 0.3 < store.n_events / (store.n_tokens * rows.num_rows) < 0.7
    assert min(rows["max_activation"].to_pylist()) > 0
    assert None not in rows["ablation_effect"].to_pylist()


def test_its_pages_say_what_is_shown(base):
    with serving(NeuronData(base)) as site:
        assert "positive parts of its hidden state" in site.ask("/").text
        page = site.ask("/neurons/2/7")
        assert page.status == 200
        assert "positive part of a Base LM" in page.text
        assert site.ask("/search?kind=regex&q=lantern").status == 200
        for path in ("/prompt?text=the+old+baker", "/neurons/2/7?text=the+old+baker"):
            answer = site.ask(path)
            assert answer.status == 200, answer.text
        shown = site.ask("/api/neurons/2/7").json
        assert shown["kind"] == "dense"


@pytest.mark.slow
def test_its_neurons_are_steered_too(base):
    asked = {"prompt": "The baker", "value": "40", "max_new_tokens": "22"}
    with serving(NeuronData(base)) as site:
        page = site.ask("/neurons/2/7").text
        assert re.findall(r'<option value="(\w+)"[^>]*>\1: ', page) == ["clamp", "add", "scale", "ablate"]
        answer = site.ask("/api/neurons/2/7/steer", form=asked)
        assert answer.status == 200
        *pieces, last = map(json.loads, answer.text.splitlines())
        assert 0 <= last["ends"]["unsteered"]["active"] <= 1
        refused = site.ask("/api/neurons/2/7/steer", form={**asked, "mode": "ban"})
        assert refused.status == 400
        assert "the layer has no TopK" in refused.json["error"]
    model = topklm.load(base.run)
    options = {"max_new_tokens": 22, "temperature": 0.7, "steer": {(2, 7): 40.0}}
    written = "".join(piece["text"] for piece in pieces[1:] if piece["column"] == "steered")
    assert written == spelled(model.generate(["The baker", ""], **options)[0].removeprefix("The baker"))
