"""The content of pages, against the store and the table read directly, and against the model."""

import math

import explored_run
import numpy as np
import pyarrow as pa
import pytest
from serve_site import serving

from topklm.errors import UserError
from topklm.explorer import finding, views
from topklm.explorer.neuron_data import NeuronData, NotThereError, shown
from topklm.explorer.steering import LiveModel
from topklm.explorer.views import Asked
from topklm.neurons.search import rank
from topklm.neurons.statistics import catalog, table


@pytest.fixture(scope="module")
def reader(source):
    return LiveModel(str(source.folder.run), source.store.metadata)


@pytest.fixture(scope="module")
def dense(source):
    """Returns float32[S, N, D] from the store's events."""
    store = source.store
    found = np.zeros((2, store.n_tokens, explored_run.D), np.float32)
    for layer in explored_run.LAYERS:
        for neuron in range(explored_run.D):
            events = store.neuron(layer, neuron)
            found[layer, events.tokens, neuron] = events.values
    return found


def test_examples_hold_the_tokens_and_activations_of_the_store(source, dense):
    store = source.store
    for layer, neuron in ((0, 3), (1, 17)):
        data = views.neuron(source, layer, neuron)
        assert {example["part"] for example in data["examples"]} >= {0, 1, 5}
        for example in data["examples"]:
            begin, n = example["begin"], len(example["tokens"])
            ids = store.tokens(begin, begin + n)
            assert "".join(example["tokens"]) == shown(source.tokenizer.decode(ids))
            np.testing.assert_array_equal(example["values"], dense[layer, begin : begin + n, neuron])
            assert set(store.documents(begin, begin + n)) == {example["document"]}
            assert begin + example["example"] == example["at"]
            assert example["values"][example["example"]] == pytest.approx(example["activation"], rel=1e-6)


def test_tokens_are_counted_and_a_neuron_is_ranked_in_its_layer(source, dense):
    ids = source.store.tokens(0, source.store.n_tokens)
    for layer, neuron in ((0, 3), (1, 17)):
        data = views.neuron(source, layer, neuron)
        for item in data["input_tokens"]:
            there = ids == item["id"]
            assert item["occurrences"] == there.sum()
            assert item["active"] == (dense[layer, there, neuron] != 0).sum() > 0
        for name, share in data["ranks"].items():
            column = source.column(name)[layer * explored_run.D : (layer + 1) * explored_run.D]
            column = column[np.isfinite(column)]
            assert share == pytest.approx((column < data["figures"][name]).mean())
        (other,) = data["same_index"]
        assert (other["layer"], other["neuron"]) == (1 - layer, neuron)
        assert other["density"] == pytest.approx((dense[1 - layer, :, neuron] != 0).mean())
    dead = views.neuron(source, *explored_run.DEAD)
    assert dead["input_tokens"] == [] and dead["ranks"]["max_activation"] is None


def test_a_row_is_what_arrow_itself_makes_of_it(source):
    for number in (0, 7, source.number(*explored_run.DEAD), source.n_neurons - 1):
        wanted = {name: source.rows[name][number].as_py() for name in source.rows.schema.names}
        row = source.row(number)
        assert row == wanted
        assert list(map(type, row.values())) == list(map(type, wanted.values()))
        assert source.row(number, ["examples"]) == {"examples": wanted["examples"]}
    assert any(value is None for value in source.row(source.number(*explored_run.DEAD)).values())


@pytest.mark.parametrize("size", [1, 2, 7, 128, 1000])
def test_a_window_is_as_large_as_its_document_lets_it_be_and_holds_its_token(source, size):
    documents = source.store.documents(0, source.store.n_tokens)
    for at in range(0, source.store.n_tokens, 37):
        window = source.window(at, size)
        assert window.begin <= at < window.begin + len(window.ids)
        assert len(window.ids) == min(size, int((documents == documents[at]).sum()))
        assert (documents[window.begin : window.begin + len(window.ids)] == documents[at]).all()
        assert window.document == documents[at]


def test_a_neurons_page_says_what_the_table_says(source):
    data, row = views.neuron(source, 1, 4), source.row(explored_run.D + 4)
    assert data["figures"] == {name: row[name] for name in catalog.numbers()}
    assert data["effective_tokens"] == pytest.approx(math.exp(row["token_entropy_corrected"]))
    assert data["histogram"]["counts"] == row["histogram"]
    assert sum(data["histogram"]["counts"]) == row["n_active"]
    assert [item["id"] for item in data["input_tokens"]] == row["top_tokens"]
    assert [item["share"] for item in data["input_tokens"]] == row["top_token_shares"]
    for lens in ("identity", "jacobian"):
        for end in ("top", "bottom"):
            assert [item["effect"] for item in data["output_tokens"][lens][end]] == row[
                f"{lens}_{end}_effects"
            ]
    assert [item["neuron"] for item in data["similar"]["coactive"]] == row["coactive"]
    assert (data["previous"], data["next"]) == ({"layer": 1, "neuron": 3}, {"layer": 1, "neuron": 5})


def test_neighbours_go_on_from_layer_to_layer_and_round(source):
    assert views.neuron(source, 0, 31)["next"] == {"layer": 1, "neuron": 0}
    assert views.neuron(source, 1, 31)["next"] == {"layer": 0, "neuron": 0}
    assert views.neuron(source, 0, 0)["previous"] == {"layer": 1, "neuron": 31}


def test_a_dead_neuron_has_a_page_too(source):
    data = views.neuron(source, *explored_run.DEAD)
    assert data["dead"]
    assert data["examples"] == []
    assert data["figures"]["token_entropy"] is None
    assert data["output_tokens"]["identity"]["top"]


@pytest.mark.parametrize(("layer", "neuron"), [(2, 0), (-1, 0), (0, 32), (0, -1)])
def test_neurons_that_there_are_not_are_said_to_be_none(source, reader, layer, neuron):
    for view in (
        lambda: views.neuron(source, layer, neuron),
        lambda: views.context(source, layer, neuron, 0, 10),
        lambda: views.on_text(source, reader, layer, neuron, "text"),
    ):
        with pytest.raises(NotThereError, match="must be"):
            view()


@pytest.mark.parametrize("at", [-1, 10**9])
def test_tokens_that_there_are_not_are_said_to_be_none(source, at):
    with pytest.raises(NotThereError, match="token"):
        views.context(source, 0, 0, at, 10)


def test_what_is_read_ahead_is_what_is_read_singly(source, dense):
    numbers = [3, 4, *range(20, 45), 60]  # the second layer begins at 32
    found = []
    for number in source.reading_ahead(numbers):
        layer, neuron = source.place(number)
        events = source.events(layer, neuron)
        np.testing.assert_array_equal(events.tokens, np.flatnonzero(dense[layer, :, neuron]))
        np.testing.assert_array_equal(events.values, dense[layer, events.tokens, neuron])
        found.append(number)
    assert found == numbers


def test_a_text_of_ones_own_gives_what_the_store_holds_of_the_same_text(source, reader, dense):
    text = explored_run.DOCUMENTS[2][:100]
    begin = int(source.documents[0][2])
    for layer, neuron in ((0, 3), (1, 17)):
        data = views.on_text(source, reader, layer, neuron, text)
        expected = dense[layer, begin : begin + len(data["tokens"]), neuron]
        # The store keeps bfloat16.
        np.testing.assert_allclose(data["values"], expected, rtol=2**-8, atol=1e-3)


def test_a_prompt_shows_every_active_neuron_of_every_token_the_strongest_first(source, reader, dense):
    text = explored_run.DOCUMENTS[4][:90]
    begin = int(source.documents[0][4])
    data = views.prompt(source, reader, text)
    assert len(data["tokens"]) == len(source.tokenizer.encode(text))
    for place, token in enumerate(data["tokens"]):
        for layer in token["layers"]:
            found = np.zeros(explored_run.D)
            strengths = [abs(neuron["activation"]) for neuron in layer["neurons"]]
            assert strengths == sorted(strengths, reverse=True)
            for neuron in layer["neurons"]:
                found[neuron["neuron"]] = neuron["activation"]
            if layer["layer"] == 0:  # silenced in the store only
                found[explored_run.DEAD[1]] = 0
            np.testing.assert_allclose(found, dense[layer["layer"], begin + place], rtol=2**-7, atol=1e-3)


def test_texts_of_all_lengths_up_to_the_limit_are_read(source, reader):
    assert reader.most_tokens == 127
    for n in (1, 31, 32, 33, 127):
        assert len(views.prompt(source, reader, "a" * n)["tokens"]) == n
    with pytest.raises(UserError, match="text has 128 tokens: at most 127"):
        views.prompt(source, reader, "a" * 128)


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_prompt_is_refused(source, reader, text):
    with pytest.raises(UserError, match="text is empty"):
        views.prompt(source, reader, text)


def test_half_a_character_is_read_as_a_sign_for_it(source, reader):
    assert views.prompt(source, reader, "a\ud800b")["tokens"]


def test_the_overview_counts_dead_neurons_and_gives_medians_of_the_living(source):
    data = views.overview(source, Asked())
    assert [layer["n_dead"] for layer in data["layers"]] == [1, 0]
    alive = source.column("density")[:32][source.column("n_active")[:32] > 0]
    assert data["layers"][0]["median"]["density"] == pytest.approx(np.median(alive))
    assert data["table"]["count"] == 64
    assert len(data["table"]["neurons"]) == 50


def test_a_link_says_what_it_asked_for():
    asked = Asked.of(
        {
            "sort": "density",
            "order": "falling",
            "layer": "1,0",
            "density.min": "1e-3",
            "page": "2",
            "columns": "all",
        },
        (0, 1),
    )
    assert asked == Asked("density", True, (1, 0), {"density": (0.001, None)}, False, True, 2)
    assert Asked.of(asked.query(), (0, 1)) == asked
    assert Asked().query() == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"sort": "name; DROP TABLE neurons"},
        {"layer": "2"},
        {"layer": "x"},
        {"page": "0"},
        {"page": "-1"},
        {"page": "²"},
        {"density.min": "much"},
        {"density.max": "nan"},
        {"density.max": "inf"},
    ],
)
def test_a_link_without_sense_is_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).split(".")[0]):
        Asked.of(wrong, (0, 1))


def test_a_page_that_is_not_there_is_refused(source):
    with pytest.raises(UserError, match="page 3: must be from 1 to 2"):
        views.overview(source, Asked(page=3))


def test_a_random_neuron_is_alive_and_not_always_the_same(source):
    found = {views.random_neuron(source, seed) for seed in range(300)}
    assert explored_run.DEAD not in found
    assert len(found) > 50


def test_words_find_passages_neurons_and_labels(source, index):
    data = finding.words(source, index, "lantern")
    assert data["passages"]
    assert data["neurons"]
    assert data["labelled"] == []
    with pytest.raises(UserError, match="empty"):
        finding.words(source, index, " ")


def test_a_pattern_ranks_neurons_as_find_does(source):
    data = finding.regex(source, "lan?tern|boat")
    text = source.plain_text(0, source.store.n_tokens)
    assert data["n_matches"] == text.count("lantern") + text.count("latern") + text.count("boat")
    found = rank(source.store, source.stored_text.matches("lan?tern|boat").touched, 50)
    assert [(n["layer"], n["neuron"], n["f1"]) for n in data["neurons"]] == [
        (r.layer, r.neuron, r.f1) for r in found
    ]


@pytest.mark.parametrize("pattern", ["(", "", "a" * 1001, "x*"])
def test_a_pattern_of_no_use_is_refused(source, pattern):
    with pytest.raises(UserError, match="regex"):
        finding.regex(source, pattern)


def test_a_character_of_several_tokens_stands_whole_at_its_last(source):
    ids = source.tokenizer.encode("a\u00e9\u4e2db")
    assert source.running_texts(ids) == ["a", "", "\u00e9", "", "", "\u4e2d", "b"]
    cut = source.running_texts(ids[2:])  # it begins within a character, which is shown by its bytes
    assert cut[0] == "\\xa9"
    assert cut[1:] == ["", "", "\u4e2d", "b"]


def test_a_line_of_a_table_shows_the_strongest_example(source):
    number = source.number(1, 17)
    at = source.row(number)["examples"][0]
    before, token, after = views.summary(source, number, {})["snippet"]
    ids = source.store.tokens(0, source.store.n_tokens)
    assert token == shown(source.tokenizer.decode(ids[at : at + 1]))
    assert before + token + after in shown(source.tokenizer.decode(ids[at - 6 : at + 6]))
    assert 2 <= len(before) <= 6 and len(after) == 5  # a token a byte
    assert views.summary(source, source.number(*explored_run.DEAD), {})["snippet"] is None


def test_a_space_that_does_not_break_is_a_sign():
    assert shown("250\N{NO-BREAK SPACE}km") == "250⍽km"


def test_examples_have_the_loss_of_their_token_and_of_the_next_of_the_document(source):
    losses = source.store.losses(0, source.store.n_tokens)
    starts = set(source.documents[0].tolist())
    ends = 0
    for layer, neuron in ((0, 3), (1, 17), (1, 5)):
        for example in views.neuron(source, layer, neuron)["examples"]:
            at = example["at"]
            assert example["loss"] == losses[at]
            assert example["next_loss"] == (None if at + 1 in starts else losses[at + 1])
            ends += at + 1 in starts
    assert ends  # at the end of a document there is no next token


def test_output_tokens_are_the_common_ones_where_those_were_measured(explored_copy):
    rows, measured = table.read(explored_copy.table)
    row = rows.to_pylist()[35]
    for end in ("top", "bottom"):
        for lens in ("jacobian", "identity"):
            row |= {f"{lens}_common_{end}": [65, 66], f"{lens}_common_{end}_effects": [0.5, 0.25]}
    changed = rows.to_pylist()
    changed[35] = row
    table.write(explored_copy.table, pa.Table.from_pylist(changed, schema=rows.schema), measured)
    source = NeuronData(explored_copy)
    found = views.neuron(source, 1, 3)["output_tokens"]["jacobian"]
    assert [item["token"] for item in found["common"]["top"]] == source.texts([65, 66])
    assert len(found["top"]) == 10
    assert views.neuron(source, 1, 4)["output_tokens"]["jacobian"]["common"] is None
    with serving(source) as site:
        page = site.ask("/neurons/1/3").text
        assert page.count("Of tokens seen 20 times or more") == 2
        assert page.count("<summary>All tokens</summary>") == 2
        assert "All tokens" not in site.ask("/neurons/1/4").text
