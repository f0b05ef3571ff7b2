"""A statistic is one entry of the catalog, and then seen wherever statistics are; older tables get it too."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from serve_site import serving

import topklm
from topklm.commands.neurons import _measure
from topklm.errors import UserError
from topklm.explorer import pages
from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.views import Asked, select
from topklm.neurons import MeasureSettings
from topklm.neurons.statistics import catalog, table
from topklm.neurons.statistics.catalog import Inputs, Statistic
from topklm.neurons.statistics.table import extend, measure
from topklm.neurons.store import Store, StoreWriter
from topklm.progress import Progress

DOCS = Path(__file__).parents[2] / "docs" / "neurons.md"
SAID = "Sum of the squared activations over all tokens."


def energies(neurons):
    block = neurons.block
    owners = np.repeat(np.arange(len(block.offsets) - 1), np.diff(block.offsets))
    return {"energy": np.bincount(owners, block.values**2, len(block.offsets) - 1)}


@pytest.fixture
def energy(monkeypatch):
    """Adds one entry, and nothing else."""
    added = Statistic(
        "energy",
        "Energy",
        SAID,
        energies,
        kind="number",
        unit="units",
        first=True,
        note="of {n_active} tokens",
    )
    monkeypatch.setattr(catalog, "STATISTICS", (*catalog.STATISTICS, added))


def inputs_of(folder, model, settings):
    store, progress = Store(folder.store), Progress(lambda line: None)
    return Inputs(store, model.cfg, model.params, model.tokenizer.separator_id, settings, progress)


def extended(folder, model=None):
    model = model or topklm.load(folder.run)
    return extend(folder.table, inputs_of(folder, model, MeasureSettings()))


def measured_anew(folder, settings, model):
    measure(folder.table, inputs_of(folder, model, settings))


def without(folder, names):
    """Writes the table as if these columns had never been measured."""
    rows, measured = table.read_stored(folder.table)
    table.write(folder.table, rows.drop_columns(list(names)), measured)


def test_a_statistic_that_is_added_is_seen_in_table_page_export_json_and_definitions(
    explored_copy, energy, tmp_path
):
    assert extended(explored_copy) == ("energy",)
    rows, _ = table.read(explored_copy.table)
    values = Store(explored_copy.store).neuron(1, 17).values
    expected = float((values**2).sum())
    assert rows["energy"].to_pylist()[32 + 17] == pytest.approx(expected)
    source = NeuronData(explored_copy)
    found = select(source, Asked("energy", True), {})[:3].tolist()
    assert found == np.argsort(-source.column("energy"))[:3].tolist()
    with serving(source) as site:
        page = site.ask("/neurons/1/17").text
        assert f'title="{SAID}"><h2>Energy</h2>' in page  # the tile
        assert f"of {len(values):,} tokens<br>above " in page  # and its rank in the layer
        assert f"<dd>{SAID}</dd>" in page
        assert site.ask("/api/neurons/1/17").json["figures"]["energy"] == pytest.approx(expected)
        overview = site.ask("/?sort=energy&order=falling&energy.min=1").text
        assert "by energy, the largest first" in overview.lower()
        few = site.ask(f"/api/overview?energy.min={source.column('energy').max()}").json
        assert few["table"]["count"] == 1
    pages.export(source, tmp_path / "pages.html", [(1, 17)])
    assert f'title="{SAID}"><button type="button" class="sort">' in (tmp_path / "pages.html").read_text()
    assert f"| Energy | `energy` | units | {SAID} |" in catalog.as_markdown()


def test_json_of_the_command_describes_every_statistic(explored_copy, energy, monkeypatch, capsys):
    monkeypatch.setattr("topklm.commands.neurons.measure_into", lambda *arguments: None)
    arguments = {"run": str(explored_copy.run), "step": None, "json": "-", "encoder": None}
    sizes = {"ablation_samples": 1, "lens_contexts": 1}
    _measure(type("Arguments", (), {**arguments, **sizes}))
    described = json.loads(capsys.readouterr().out)["statistics"]
    assert [entry["name"] for entry in described] == [s.name for s in catalog.STATISTICS]
    assert described[-1] == {
        "name": "energy",
        "columns": ["energy"],
        "title": "Energy",
        "unit": "units",
        "definition": SAID,
    }


def test_two_statistics_cannot_have_one_column(monkeypatch):
    before = catalog.STATISTICS
    for name in ("density", "top_token_shares", "layer", "no name"):
        added = Statistic(name, "Another", "Another.", energies)
        monkeypatch.setattr(catalog, "STATISTICS", (*before, added))
        with pytest.raises(ValueError, match=f"statistic {name!r}"):
            catalog.schema()


def test_the_definitions_in_the_docs_are_those_of_the_catalog():
    page = DOCS.read_text("utf-8")
    assert catalog.put_into(page) == page, "run python -m topklm.neurons.statistics.catalog docs/neurons.md"
    for name in catalog.schema().names[2:]:
        assert f"`{name}`" in page


def test_an_older_table_gets_what_it_lacks_with_the_bits_of_a_whole_measurement(explored_copy):
    model = topklm.load(explored_copy.run)
    measured_anew(explored_copy, MeasureSettings(ablation_samples=4, lens_contexts=4, seed=3), model)
    whole, measured = table.read(explored_copy.table)
    removed = [s for s in catalog.STATISTICS if s.name not in ("n_active", "density", "max_activation")]
    without(explored_copy, [name for s in removed for name in s.columns])
    assert not table.is_complete(explored_copy.table)
    missing, _ = table.read(explored_copy.table)
    assert missing["similar_effect"].null_count == missing.num_rows  # until it is measured
    assert missing["density"] == whole["density"]
    assert extended(explored_copy, model) == tuple(s.name for s in removed)
    assert table.read(explored_copy.table) == (whole, measured)
    assert table.is_complete(explored_copy.table)
    assert extended(explored_copy, model) == ()
    settings = MeasureSettings(ablation_samples=4, lens_contexts=4, seed=3)
    measure(explored_copy.table, inputs_of(explored_copy, model, settings), without=("ablation",))
    assert extended(explored_copy, model) == tuple(
        name for name in catalog.numbers() if name.startswith("ablation")
    )
    assert table.read(explored_copy.table) == (whole, measured)


def test_a_statistic_that_has_lost_one_of_its_columns_is_measured_again(explored_copy):
    before, _ = table.read(explored_copy.table)
    without(explored_copy, ["coactive_similarity"])
    assert extended(explored_copy) == ("coactive",)
    found, _ = table.read(explored_copy.table)
    assert found["coactive_similarity"].null_count < found.num_rows
    assert found.drop_columns(["coactive", "coactive_similarity"]) == before.drop_columns(
        ["coactive", "coactive_similarity"]
    )


def test_a_damaged_table_is_not_taken_for_one_that_lacks_something(explored_copy):
    explored_copy.table.write_bytes(explored_copy.table.read_bytes()[:-9])
    assert table.is_complete(explored_copy.table)
    with pytest.raises(UserError, match="is damaged"):
        extended(explored_copy)


def test_columns_of_a_later_version_stay_in_the_file(explored_copy):
    rows, measured = table.read(explored_copy.table)
    later = rows.append_column("later", pa.array(range(rows.num_rows), pa.int16()))
    table.write(explored_copy.table, later, measured)
    assert table.read(explored_copy.table)[0] == rows
    without(explored_copy, ["density"])
    assert extended(explored_copy) == ("density",)
    assert table.read_stored(explored_copy.table)[0]["later"].to_pylist() == list(range(rows.num_rows))


def test_a_table_of_a_shorter_text_is_measured_as_a_whole(explored_copy):
    rows, measured = table.read(explored_copy.table)
    n = Store(explored_copy.store).n_tokens
    details = {"ablation_samples": 0, "lens_contexts": 2}
    shorter = dataclasses.replace(measured, n_tokens=n - 10, details=details)
    table.write(explored_copy.table, rows.drop_columns(["density"]), shorter)
    assert extended(explored_copy) == ("density",)
    found, now = table.read(explored_copy.table)
    assert now.n_tokens == n
    assert now.details["lens_contexts"] == 2
    assert found["token_entropy"] != rows["token_entropy"]  # those of the fixture are made up


def test_what_a_sentence_encoder_took_part_in_is_not_measured_without_it(explored_copy):
    rows, measured = table.read(explored_copy.table)
    encoded = dataclasses.replace(measured, embedding="the sentence encoder lengths, on each token")
    table.write(explored_copy.table, rows.drop_columns(["semantic_entropy"]), encoded)
    with pytest.raises(UserError, match=r"lacks semantic_entropy, .* the same --encoder"):
        extended(explored_copy)
    table.write(explored_copy.table, rows.drop_columns(["density"]), encoded)
    assert extended(explored_copy) == ("density",)


def test_a_store_without_tokens_is_refused(explored_copy, tmp_path):
    StoreWriter(tmp_path / "empty", Store(explored_copy.store).metadata)
    empty = dataclasses.replace(
        inputs_of(explored_copy, topklm.load(explored_copy.run), MeasureSettings()),
        store=Store(tmp_path / "empty"),
    )
    with pytest.raises(UserError, match="empty holds no tokens: run topklm neurons harvest"):
        measure(tmp_path / "table", empty)
