"""Pages about a trace, against its tables."""

import html
import json
import re
import shutil

import explored_run
import numpy as np
import pyarrow as pa
import pytest
from serve_site import serving
import traced_run
from traced_run import LEAVES, MIN_TOKENS, REFERENCE, STEPS, rows_of

from topklm.explorer.markup import MISSING
from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.traces import Traces
from topklm.neurons import NeuronsFolder
from topklm.neurons.labels import Labels, read_export
from topklm.trace import changes

D, DEAD = explored_run.D, explored_run.DEAD


@pytest.fixture(scope="module")
def traced(explored, tmp_path_factory):
    """A copy of the explored run with two traces."""
    run = shutil.copytree(explored.run, tmp_path_factory.mktemp("traced") / "village")
    source = traced_run.Source(*explored_run.activations(run))
    for dictionary in ("", "coordinates"):
        traced_run.make(run, source, dictionary)
    return NeuronsFolder(run, explored.step)


@pytest.fixture(scope="module")
def folder(traced):
    return Traces(traced.run, NeuronData(traced)).open("trace").folder


@pytest.fixture(scope="module")
def site(traced):
    with serving(NeuronData(traced)) as served:
        yield served


@pytest.fixture
def traced_copy(traced, tmp_path):
    return NeuronsFolder(shutil.copytree(traced.run, tmp_path / "village"), traced.step)


def of(folder, layer, neuron):
    """The rows of a neuron, by step."""
    return {r["step"]: r for r in rows_of(folder, "neurons") if (r["layer"], r["neuron"]) == (layer, neuron)}


def formed(folder, layer, neuron):
    rows = rows_of(folder, "formation")
    return next(r for r in rows if (r["layer"], r["neuron"]) == (layer, neuron))


def r_as_written(value):
    return MISSING if value is None else f"{abs(round(value, 2)):.2f}".lstrip("0") or ".00"


def cells(text, head):
    """The texts of a row of the strip."""
    row = next(row for row in re.findall(r"<tr.*?</tr>", text, re.DOTALL) if f">{head}</th>" in row)
    found = re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]*>", "", cell)).strip().replace("\u2212", "") for cell in found]


@pytest.mark.parametrize("place", [(0, 3), (1, 20), (0, LEAVES)])
def test_the_strip_has_the_tables_figures_and_its_cells_open_their_step(site, folder, place):
    text = site.ask(f"/neurons/{place[0]}/{place[1]}").text
    rows = of(folder, *place)
    for head, name in (
        ("r, same index", "r_reference"),
        ("null: best other index", "r_other"),
        ("null: tokens shifted", "r_shifted"),
    ):
        assert cells(text, head) == [r_as_written(rows[step][name]) for step in STEPS]
    links = re.findall(r'class="of-step" href="([^"]*)"', text)
    assert links == [f"/neurons/{place[0]}/{place[1]}?step={step}" for step in STEPS]
    for link in links:
        assert site.ask(link).status == 200
    tokens = site.source.texts([t for step in STEPS for t in rows[step]["top_tokens"][:3]])
    assert "".join(cells(text, "strongest tokens")).replace(" ", "") == "".join(
        t.replace(" ", "␣") for t in tokens
    ).replace(" ", "")


def test_onsets_stand_at_the_steps_where_they_were_planted(site, folder):
    found = {place: site.ask(f"/neurons/0/{place}").text for place in (3, 20, LEAVES)}
    assert formed(folder, 0, 3)["onset_50"] == 2
    assert re.search(r'<th scope="col">2<small class="onset"[^>]*>▼ .5</small>', found[3])
    assert re.search(r'<th scope="col">4<small class="onset"[^>]*>▼ .5</small>', found[20])
    assert formed(folder, 0, LEAVES)["onset_50"] is None
    assert "above .5 never" in found[LEAVES]
    assert "▼" not in found[LEAVES]


def test_a_step_has_the_figures_tokens_and_examples_of_its_row(site, folder):
    row, answer = of(folder, 1, 20)[2], site.ask("/neurons/1/20?step=2")
    data = site.ask("/api/neurons/1/20?step=2").json
    for name in ("density", "token_entropy_corrected", "r_reference", "jaccard_reference", "by_token"):
        assert data["figures"][name] == row[name]
    assert [t["id"] for t in data["input_tokens"]] == row["top_tokens"][:10]
    assert [t["share"] for t in data["input_tokens"]] == row["top_token_shares"][:10]
    assert [e["at"] for e in data["examples"]] == row["examples"]
    for example, value in zip(data["examples"], row["example_activations"], strict=True):
        assert example["values"][example["example"]] == pytest.approx(value)
        assert (
            example["tokens"][example["example"]]
            == site.source.running_texts(site.source.ids[example["at"] : example["at"] + 1])[0]
        )
    assert "<b>Step 2</b> of the trace" in answer.text
    assert f'<a href="/neurons/1/20">Back to step {REFERENCE}</a>' in answer.text
    assert 'rel="next" href="/neurons/1/21?step=2"' in answer.text
    for not_there in ("Steer", "own-text", "Output tokens", f"loss {MISSING}"):
        assert not_there not in answer.text
    card = site.ask("/neurons/1/20/preview?step=2").text
    assert "1:20 at step 2" in card
    assert card.count('class="snippet"') == min(3, len(row["examples"]))


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/neurons/0/3?step=3", 404, "step 3: must be one of 0, 2, 4, 5"),
        ("/neurons/0/3?step=x", 400, "step = x: must be a whole number"),
        ("/neurons/0/3?step=", 400, "step = : must be a whole number"),
        ("/neurons/0/3?step=-1", 400, "step = -1: must be a whole number"),
        (f"/neurons/0/3?step={'9' * 30}", 400, "must be a whole number"),
        ("/neurons/0/3/preview?step=3", 404, "step 3: must be one of"),
        ("/neurons/9/3?step=2", 404, "layer 9: must be one of 0, 1"),
        ("/?step=3", 404, "step 3: must be one of 0, 2, 4, 5"),
        ("/?step=2&sort=monosemanticity", 400, "sort = monosemanticity: must be readable or one of"),
        ("/formation?step=3", 404, "step 3: must be one of"),
        ("/formation?sort=x", 400, "sort = x: must be"),
        ("/formation?trace=x", 404, "trace x: must be one of trace, trace-coordinates"),
        ("/layers?trace=../trace", 404, "trace ../trace: must be one of"),
        ("/formation?page=99", 400, "page 99: must be from 1 to 2"),
    ],
)
def test_a_wrong_address_is_answered_in_a_line(site, path, status, said):
    answer = site.ask(path)
    assert (answer.status, said in html.unescape(answer.text)) == (status, True)
    base, _, query = path.partition("?")
    if base in ("/formation", "/layers") or base.endswith("/3"):
        answer = site.ask(f"/api{base}?{query}")
        assert (answer.status, said in answer.json["error"]) == (status, True)


def test_the_overview_of_a_step_sorts_and_shows_what_the_trace_has(site, folder):
    data = site.ask("/api/overview?step=2&sort=r_reference&order=falling").json
    known = {(r["layer"], r["neuron"]): r for r in rows_of(folder, "neurons") if r["step"] == 2}
    found = [item["figures"]["r_reference"] for item in data["table"]["neurons"]]
    expected = sorted(
        (r["r_reference"] for r in known.values() if r["r_reference"] is not None), reverse=True
    )
    assert found[: len(expected)] == expected[: len(found)]
    for item in data["table"]["neurons"]:
        row = known[item["layer"], item["neuron"]]
        assert item["figures"]["density"] == row["density"]
        assert item["figures"]["onset_50"] == formed(folder, item["layer"], item["neuron"])["onset_50"]
    text = site.ask("/?step=2&sort=r_reference").text
    assert 'href="/neurons/0/3?step=2"' in text
    # At the other end of the slider there is no r: the order is left out.
    assert re.findall(r'data-(?:earlier|later) href="([^"]*)"', text) == ["/?step=0", "/?step=4"]
    assert 'data-steps="/?step=0 /?step=2 /?step=4 /?"' in text
    text = site.ask("/?sort=density").text
    assert 'data-earlier href="/?step=4&amp;sort=density"' in text
    assert "data-later" not in text


def test_formation_counts_sorts_and_dates_as_the_tables_do(site, folder):
    data, rows = site.ask("/api/formation").json, rows_of(folder, "formation")
    for layer in data["layers"]:
        alive = [r for r in rows if r["layer"] == layer["layer"] and r["n_active"] >= MIN_TOKENS]
        assert layer["living"] == len(alive)
        onsets = [r["onset_50"] for r in alive]
        counts = {str(step): onsets.count(step) for step in {*onsets} - {None}}
        assert layer["onsets"]["onset_50"] == counts | {"never": onsets.count(None)}
    run = rows_of(folder, "run")
    for name in ("loss", "kl_bigram", "uas"):
        assert data["values"][name] == [r[name] for r in run]
    for name in ("loss", "uas"):
        values = [r[name] for r in run]
        assert data["changes"][name]["rises"] == changes.onset(STEPS, values)
        assert data["changes"][name]["falls"] == changes.onset(STEPS, values, rises=False)
    table = site.ask("/api/formation?sort=turnovers&order=falling").json["table"]
    assert table["count"] == 2 * D
    turns = [item["figures"]["turnovers"] for item in table["neurons"]]
    known = [t for t in turns if t is not None]
    assert known == sorted(known, reverse=True)
    assert None not in turns[: len(known)]
    assert max(known) == max(r["turnovers"] for r in rows if r["turnovers"] is not None)
    table = site.ask("/api/formation?step=2").json["table"]["neurons"]
    onsets = [item["figures"]["onset_50"] for item in table]
    assert onsets == sorted(onsets, key=lambda step: np.inf if step is None else step)
    assert all(
        item["figures"]["r_reference"] == of(folder, item["layer"], item["neuron"])[2]["r_reference"]
        for item in table[:5]
    )


def test_the_page_of_formation_draws_every_neuron_and_names_the_other_trace(site, folder):
    text = site.ask("/formation").text
    rows = [r for r in rows_of(folder, "formation") if r["n_active"] >= MIN_TOKENS]
    titles = re.findall(r'<rect class="row"[^>]*data-address="([^"]*)"><title>([^<]*)</title>', text)
    assert sorted(link for link, _ in titles) == sorted(f"/neurons/{r['layer']}/{r['neuron']}" for r in rows)
    for link, title in titles:
        layer, neuron = map(int, link.split("/")[2:])
        step = formed(folder, layer, neuron)["onset_50"]
        said = "never for good" if step is None else f"from step {step} on"
        assert title == f"{layer}:{neuron}, above .5 {said}"
    for said in ("Beside n-grams", "KL to bigram", "loss, nats", "onset .5, layer 1", "a &lt;b&gt;village"):
        assert said in text
    assert "village coordinates" in text  # the curve beside
    assert '<a href="/formation?trace=trace-coordinates">' in text
    other = site.ask("/formation?trace=trace-coordinates").text
    assert 'href="/neurons/0/3"' not in other  # its neurons are others
    assert 'href="/formation?trace=trace-coordinates&amp;sort=turnovers"' in other


def test_cells_of_the_heat_map_are_as_dark_as_r(site, folder):
    """A column is covered by as many cells of each shade as neurons have such an r."""
    text = site.ask("/formation").text
    heat = text[text.index('<div class="plots heats">') :]
    plot = re.search(r"<svg.*?</svg>", heat, re.DOTALL)[0]
    found = {}
    for kind, shade, path in re.findall(r'class="cell (\w+)" fill-opacity="([\d.]+)" d="([^"]*)"', plot):
        width = sum(float(w) for w in re.findall(r"h([\d.]+)v", path))
        found[kind, round(10 * float(shade))] = width
    alive = {
        r["neuron"] for r in rows_of(folder, "formation") if r["layer"] == 0 and r["n_active"] >= MIN_TOKENS
    }
    r = [
        row["r_reference"]
        for row in rows_of(folder, "neurons")
        if row["layer"] == 0 and row["neuron"] in alive and row["r_reference"]
    ]
    total = sum(found.values()) / len(r)
    expected = {}
    for value in r:
        key = ("up" if value > 0 else "down", min(10, max(1, int(np.ceil(10 * abs(value))))))
        expected[key] = expected.get(key, 0) + 1
    assert {key: round(width / total) for key, width in found.items()} == expected


def test_figures_of_layers_are_medians_of_the_tables(site, folder):
    data, rows = site.ask("/api/layers").json, rows_of(folder, "layers")
    alive = {(r["layer"], r["neuron"]) for r in rows_of(folder, "formation") if r["n_active"] >= MIN_TOKENS}
    assert data["steps"] == STEPS
    shown = {row["column"]: row for group in data["groups"] for row in group["rows"]}
    for name in ("r", "jaccard", "jaccard_other", "r_written", "r_written_other", "r_written_input"):
        expected = []
        for step in STEPS:
            values = [r[name] for r in rows if r["step"] == step and (r["layer_b"], r["neuron"]) in alive]
            expected.append(np.median([v for v in values if v is not None]))
        np.testing.assert_allclose(shown[name]["values"], expected, atol=1e-12)
        assert shown[name]["null"] == ("other" in name)
    pairs = rows_of(folder, "pairs")
    assert shown["r_other_95"]["values"] == [r["r_other_95"] for r in pairs]
    text = site.ask("/layers").text
    assert cells(text, "0 → 1 <small>null: other indices, 95 %</small>") == [
        r_as_written(r["r_other_95"]) for r in pairs
    ]
    kept = {
        step: sum(
            r["n_active"] * (r["mean_activation"] or 0)
            for r in rows_of(folder, "neurons")
            if (r["step"], r["layer"]) == (step, 1)
        )
        for step in STEPS
    }
    for step, value in zip(STEPS, shown["carried"]["values"], strict=True):
        carried = {r["neuron"]: r["carried"] for r in rows if r["step"] == step}
        weighed = sum(
            carried[r["neuron"]] * r["n_active"] * (r["mean_activation"] or 0)
            for r in rows_of(folder, "neurons")
            if (r["step"], r["layer"]) == (step, 1)
        )
        assert value == pytest.approx(weighed / kept[step])


def test_dead_neurons_have_empty_cells_and_no_onset(site, folder):
    layer, neuron = DEAD
    text = site.ask(f"/neurons/{layer}/{neuron}").text
    assert cells(text, "r, same index") == [MISSING] * len(STEPS)
    assert cells(text, "strongest tokens") == ["dead"] * len(STEPS)
    assert f"No onset: active at fewer than {MIN_TOKENS} tokens" in text
    text = site.ask(f"/neurons/{layer}/{neuron}?step=2").text
    assert "Dead: not active" in text


def test_tokens_with_markup_are_shown_and_not_made(traced_copy):
    source = NeuronData(traced_copy)
    trace = Traces(traced_copy.run, source).open("trace").folder
    texts = source.texts(range(traced_run.V))
    ids = [number for number, text in enumerate(texts) if {*text} & {*"<>&"}][:3]
    assert ids
    rows = trace.read_step("neurons", 2)
    for name, value in (("top_tokens", ids), ("top_token_shares", [0.2] * len(ids))):
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, name, pa.array([value] * len(rows), rows.schema.field(at).type))
    trace.write("neurons", 2, rows)
    with serving(source) as site:
        for path in ("/neurons/0/3", "/neurons/0/3?step=2", "/neurons/0/3/preview?step=2", "/?step=2"):
            text = site.ask(path).text
            for number in ids:
                assert f'<span class="chip">{html.escape(texts[number])}' in text
            assert text.count("<script") == (0 if "preview" in path else 1)


def test_values_that_are_no_numbers_leave_their_places_empty(traced_copy):
    trace = Traces(traced_copy.run, NeuronData(traced_copy)).open("trace").folder
    rows = trace.read_step("run", 2)
    for name in ("loss", "kl_bigram", "uas"):
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array([np.nan]))
    trace.write("run", 2, rows)
    rows = trace.read_step("neurons", 2)
    for name in ("r_reference", "density", "by_token"):
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.nulls(len(rows), pa.float64()))
    for name in ("r_other", "r_shifted"):
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array([np.nan] * len(rows)))
    trace.write("neurons", 2, rows)
    with serving(NeuronData(traced_copy)) as site:
        for path in (
            "/formation",
            "/layers",
            "/?step=2",
            "/neurons/0/3",
            "/neurons/0/3?step=2",
            "/formation?step=2",
        ):
            text = site.ask(path).text
            assert (
                site.ask(path).status,
                "nan" in re.sub(r"<title>.*?</title>", "", text).lower().split(),
            ) == (200, False)
            assert "NaN" not in text
        assert cells(site.ask("/neurons/0/3").text, "null: tokens shifted")[1] == MISSING
        assert site.ask("/api/formation").json["values"]["loss"][1] is None


def test_without_a_trace_a_line_has_the_command_and_nothing_else_is_there(explored_copy):
    with serving(NeuronData(explored_copy)) as site:
        command = f"topklm trace run {explored_copy.run}"
        text = site.ask("/neurons/0/3").text
        assert text.count(command) == 1
        for not_there in ("stepper", "of-step", "/formation", "/layers", "<kbd>]</kbd>"):
            assert not_there not in text
        assert "stepper" not in site.ask("/").text
        for path in ("/formation", "/layers"):
            assert (site.ask(path).status, command in site.ask(path).text) == (200, True)
            assert (site.ask(f"/api{path}").status, command in site.ask(f"/api{path}").text) == (404, True)
        answer = site.ask("/neurons/0/3?step=2")
        assert (answer.status, command in answer.text) == (404, True)


def test_a_trace_that_is_damaged_or_of_other_tokens_is_named_and_pages_go_on(traced_copy):
    about = traced_copy.run / "neurons/trace/trace.json"
    content = about.read_bytes()
    with serving(NeuronData(traced_copy)) as site:
        for damaged in ("trace.json", "formation.parquet"):
            if damaged == "trace.json":
                about.write_text(json.dumps(json.loads(content) | {"width": 33}))
            else:
                about.write_bytes(content)
                (about.parent / damaged).write_bytes(b"PAR1")
            answer = site.ask("/neurons/0/3")
            assert (answer.status, "trace" in answer.text, "of-step" in answer.text) == (200, True, False)
            assert site.ask("/").status == 200
            for path in ("/formation", "/neurons/0/3?step=2"):
                answer = site.ask(path)
                assert (answer.status, "run topklm trace run" in answer.text) == (400, True)


def test_a_trace_that_grows_is_read_again(traced_copy):
    step = traced_copy.run / "neurons/trace/run/4.parquet"
    moved = step.rename(step.with_suffix(".aside"))
    with serving(NeuronData(traced_copy)) as site:
        assert re.findall(r"step=(\d+)", site.ask("/neurons/0/3").text).count("4") == 0
        moved.rename(step)
        assert len(re.findall(r'class="of-step"', site.ask("/neurons/0/3").text)) == len(STEPS)


def test_a_label_with_steps_is_grey_elsewhere_and_kept_by_export_and_import(traced_copy, tmp_path):
    with serving(NeuronData(traced_copy)) as site:
        form = {"label": "early", "from_step": "0", "to_step": "2"}
        answer = site.ask("/neurons/0/3/label?step=2", form=form)
        assert (answer.status, answer.headers["location"]) == (303, "/neurons/0/3?step=2")
        inside, outside = site.ask("/neurons/0/3?step=2").text, site.ask("/neurons/0/3").text
        assert 'class="out"' not in inside
        assert "holds from" not in inside
        assert 'class="out"' in outside
        assert "“early” holds from step 0 to 2; this is step 5." in outside
        assert 'name="from_step" value="0"' in outside
        assert "early (from step 0 to 2)" in site.ask("/?labelled=1").text
        assert "(from step" not in site.ask("/?labelled=1&step=0").text
        note = site.ask("/api/neurons/0/3").json["notes"][0]
        assert (note["from_step"], note["to_step"], note["holds"]) == (0, 2, False)
        for name in ("json", "csv"):
            other = Labels(tmp_path / name / "labels.json")
            other.add(read_export(site.ask(f"/api/labels.{name}").text))
            assert other.notes() == site.source.labels.notes()
        for wrong in ({"from_step": "x"}, {"to_step": "-1"}, {"from_step": "3", "to_step": "2"}):
            answer = site.ask("/api/neurons/0/3/label", form={"label": "early"} | wrong)
            assert (answer.status, "_step = " in answer.json["error"]) == (400, True)
        # The form of the label alone does not lose the steps.
        assert '<input type="hidden" name="to_step" value="2">' in outside
