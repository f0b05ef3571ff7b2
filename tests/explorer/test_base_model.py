"""A Base LM from text to pages: its neurons are the positive parts of its hidden state."""

import dataclasses

from conftest import serving
import explored_run
from helpers import sentences, write_documents
import pytest
import saved_runs

from topklm import cli
from topklm.explorer.source import Source
from topklm.neurons.folder import NeuronsFolder
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
    with serving(Source(base)) as site:
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
