"""Searches for words: each list against plain loops over the store, and sets that the command reads."""

import dataclasses
import json
import re

import explored_run
import numpy as np
import pytest

from topklm.errors import UserError
from topklm.explorer import finding
from topklm.inference.interventions import Intervention, load_interventions
from topklm.neurons.search import count_active


@pytest.fixture(scope="module")
def data(source, index):
    return finding.words(source, index, "lantern")


def test_active_tokens_are_counted(source):
    matched = np.random.default_rng(0).random(source.store.n_tokens) < 0.1
    found = count_active(source.store, matched)
    for place, layer in enumerate(explored_run.LAYERS):
        for neuron in range(explored_run.D):
            assert found[place, neuron] == matched[source.store.neuron(layer, neuron).tokens].sum()


def test_neurons_active_at_a_word_are_those_of_a_loop(source, data):
    text = source.plain_text(0, source.store.n_tokens)  # a token for each byte
    ends = [found.end() - 1 for found in re.finditer(rb"\blantern\b", text.encode())]
    at = np.zeros(source.store.n_tokens, bool)
    at[ends] = True
    assert data["occurrences"] == len(ends) > 5
    expected = {}
    for number in range(source.n_neurons):
        layer, neuron = source.place(number)
        tokens = source.store.neuron(layer, neuron).tokens
        share = at[tokens].sum() / len(ends)
        beyond = share - len(tokens) / source.store.n_tokens
        if beyond > 0:
            expected[layer, neuron] = (beyond, share)
    found = [(n["layer"], n["neuron"]) for n in data["literal"]]
    assert found == sorted(expected, key=lambda place: -expected[place][0])[: finding.MOST_FOUND]
    for n in data["literal"]:
        assert n["probability"] == pytest.approx(expected[n["layer"], n["neuron"]][1])
        assert n["active"] == round(n["probability"] * len(ends))


def test_the_example_near_a_word_holds_it_and_both_are_marked(source, data):
    assert data["neurons"]
    for n in data["neurons"]:
        assert n["found"] or n["matched"]
        if n["found"] is None:
            continue
        marks = [mark for _, mark in n["found"]]
        assert {"here"} <= set(marks) <= {"here", "found", ""}
        whole = "".join(text for text, _ in n["found"])
        assert "lantern" in whole
        # The example's own token may stand within the word.
        marked = "".join(text if mark else "\n" for text, mark in n["found"])
        assert any(word.startswith("lantern") for word in marked.split("\n"))


def test_words_are_found_whatever_their_case_and_accents():
    assert finding._folded("ÉCOLE ﬁ straße") == "ecole ﬁ straße"
    assert len(finding._folded("İstanbul ǅ")) == len("İstanbul ǅ")


def test_neurons_that_raise_a_word_are_those_whose_lens_has_it(source, index):
    data = finding.words(source, index, "q")
    ids = {int(source.tokenizer.encode("q")[0])}
    expected = {}
    for number in range(source.n_neurons):
        row = source.row(number, ["jacobian_top", "jacobian_top_effects"])
        places = [at for at, one in enumerate(row["jacobian_top"]) if one in ids]
        if places:
            expected[source.place(number)] = (places[0] + 1, row["jacobian_top_effects"][places[0]])
    assert expected
    found = {(n["layer"], n["neuron"]): (n["place"], n["effect"]) for n in data["raising"]}
    assert found == expected
    places = [n["place"] for n in data["raising"]]
    assert places == sorted(places)


def test_a_large_store_is_counted_only_where_that_is_asked_for(source, index, monkeypatch):
    monkeypatch.setattr(finding, "COUNTED_EVENTS", 10)
    assert finding.words(source, index, "lantern")["literal"] is None
    assert finding.words(source, index, "lantern", literal=True)["literal"]


@pytest.mark.parametrize(
    "query",
    ["q=lantern&list=literal&top=3", "q=lantern&list=neurons&top=3", "kind=regex&q=lan+tern|boat&top=3"],
)
def test_results_are_saved_as_a_set_that_the_command_reads(site, tmp_path, query):
    answer = site.ask(f"/api/set?{query}")
    assert answer.status == 200
    assert re.fullmatch(r'attachment; filename="[a-z0-9-]+\.json"', answer.headers["content-disposition"])
    path = tmp_path / "set.json"
    path.write_bytes(answer.body)
    search = site.ask(f"/api/search?{query}").json
    listed = search["literal" if "literal" in query else "neurons"][:3]
    assert load_interventions(path) == [Intervention(n["layer"], n["neuron"], mode="ablate") for n in listed]


@pytest.mark.parametrize("parameters", ["", "abc"])
def test_a_set_names_the_model_whose_neurons_these_are(source, data, monkeypatch, parameters):
    metadata = dataclasses.replace(source.store.metadata, parameters=parameters)
    monkeypatch.setattr(source.store, "metadata", metadata)
    name, content = finding.as_set(source, data, "literal", 2)
    assert name == "active-at-lantern.json"
    said = json.loads(content)
    assert len(said["interventions"]) == 2
    # Stores of earlier versions do not know their parameters.
    assert said.get("model", {}).get("parameters", "") == parameters


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("q=lantern&list=best&top=3", "list = best: must be one of neurons, literal, raising"),
        ("q=lantern&top=0", "top = 0: must be from 1 to 50"),
        ("q=lantern&top=x", "top = x: must be a whole number"),
        ("q=zzzz&top=3", "zzzz: no neuron was found"),
        ("kind=regex&q=lantern&list=literal&top=3", "list = literal: must be one of neurons"),
    ],
)
def test_a_set_that_cannot_be_is_refused(site, query, said):
    answer = site.ask(f"/api/set?{query}")
    assert answer.status == 400
    assert said in answer.json["error"]


def test_words_are_needed(source, index):
    with pytest.raises(UserError, match="search is empty"):
        finding.words(source, index, " ")
