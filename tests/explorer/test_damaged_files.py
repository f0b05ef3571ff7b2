"""Everything that the explorer and the exports read, with any file of a run's neurons damaged or missing."""

import contextlib
import dataclasses
import itertools
import json
import os
from pathlib import Path
import shutil

import damage
import explored_run
import pyarrow.parquet as pq
import pytest

from topklm.commands import neurons_find
from topklm.errors import UserError
from topklm.explorer import neuronpedia, pages, views
from topklm.explorer.finding import Index
from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.views import Asked, select
from topklm.neurons import NeuronsFolder
from topklm.neurons.labels import Labels
from topklm.neurons.search import rank
from topklm.neurons.statistics import catalog, table
from topklm.steering import concepts

STEP = explored_run.STEP


def folder_of(run):
    return NeuronsFolder(run, STEP)


def index_says(run):
    """Returns all that tables and the index can be asked for."""
    source = NeuronData(folder_of(run))
    with contextlib.closing(Index(source, lambda line: None)) as index:
        asked = [Asked(name) for name in catalog.numbers()]
        asked += [Asked(ranges={"density": (None, bound)}) for bound in (0.1, 0.3)]
        orders = [select(source, one, {}).tolist() for one in asked]
        words = [(index.passages(word, 1000), index.active_at(word, 100)) for word in ("lantern", "the", "a")]
        return orders, words


def pages_say(run):
    source = NeuronData(folder_of(run))
    return (
        [
            views.neuron(source, layer, neuron, example_tokens=64, labels=source.named())
            for layer, neuron in ((0, 3), (1, 17))
        ],
        source.row(5),
        source.measured,
    )


def exports_hold(run):
    """Returns the bytes of both kinds of export, of two neurons."""
    out, neurons = run.with_name(f"{run.name}-out"), [(0, 3), (1, 17)]
    out.mkdir()
    source = NeuronData(folder_of(run))
    pages.export(source, out / "page.html", neurons)
    neuronpedia.export(source, out / "pedia", model_id="m", neurons=neurons)
    return [(str(p.relative_to(out)), p.read_bytes()) for p in sorted(out.rglob("*")) if p.is_file()]


def table_says(run):
    rows, measured = table.read(folder_of(run).table)
    return rows.to_pydict(), measured


def is_known(run):
    return concepts.read_facts(folder_of(run), 1, 17)


def is_found(run):
    """Opens the files of `topklm neurons find`."""
    folder, store = neurons_find.open_run(str(run), None)
    return rank(store, store.tokens(0, store.n_tokens) == 33, limit=5), Labels(folder.labels).all()


@pytest.fixture(scope="module")
def run(explored, tmp_path_factory):
    """Returns only what is read here, with an index and a label."""
    run = tmp_path_factory.mktemp("whole") / "village"
    shutil.copytree(explored.run, run, ignore=shutil.ignore_patterns("checkpoints", "*.sqlite"))
    NeuronData(folder_of(run)).labels.set(0, 3, "the sea")
    index_says(run)
    return run


@pytest.fixture(scope="module")
def other(run, tmp_path_factory):
    """Figures of the same shape that were measured on another store."""
    place = Path(shutil.copytree(run, tmp_path_factory.mktemp("other") / "village"))
    rows, measured = table.read(folder_of(place).table)
    at = rows.schema.get_field_index("density")
    rows = rows.set_column(at, "density", rows["density"].take(list(range(rows.num_rows))[::-1]))
    table.write(folder_of(place).table, rows, dataclasses.replace(measured, store="0" * 64))
    return place


@pytest.fixture
def copy(run, tmp_path):
    numbers = itertools.count()

    def make(copy_function=os.link):
        return Path(shutil.copytree(run, tmp_path / str(next(numbers)), copy_function=copy_function))

    return make


def only(name):
    return lambda path: path.name != name


def read_elsewhere(path):
    """Labels are text that people may change, and the config is the run's and not the neurons'."""
    return path.name in ("labels.json", ".lock", "config.json")


def test_no_bit_of_the_table_is_read_as_another_figure(run, copy):
    n = damage.check(copy, table_says, table_says(run), per_file=60, ignore=only("neurons.parquet"))
    assert n > 100


def test_figures_that_were_measured_on_another_store_are_refused(other, copy):
    place = folder_of(copy())
    place.table.unlink()
    shutil.copy(folder_of(other).table, place.table)
    for reader in (NeuronData, lambda folder: is_known(folder.run)):
        with pytest.raises(UserError, match="was measured on another store"):
            reader(place)


def test_a_damaged_index_is_never_believed(run, copy):
    assert damage.check(copy, index_says, index_says(run), per_file=10, ignore=only("index.sqlite")) > 20


def test_pages_are_the_same_or_say_what_is_damaged(run, other, copy):
    damage.check(copy, pages_say, pages_say(run), other=other, ignore=read_elsewhere, share=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("reader", [pages_say, exports_hold, index_says])
def test_every_damage_is_noticed_or_does_not_matter(run, other, copy, reader):
    damage.check(copy, reader, reader(copy()), per_file=4, other=other, ignore=read_elsewhere, share=0.5)


def test_what_may_not_be_read_is_not_called_damaged(run, copy):
    for reader in (pages_say, table_says, is_found):
        damage.check_unreadable(
            lambda: copy(shutil.copy), reader, reader(run), ignore=read_elsewhere, share=0.3
        )


def test_a_table_of_an_earlier_version_is_read(run, copy):
    place = folder_of(copy())
    rows, measured = table.read(place.table)
    about = {name: part for name, part in dataclasses.asdict(measured).items() if name != "store"}
    as_before = rows.replace_schema_metadata({b"topklm": json.dumps({"format": 1, **about}).encode()})
    place.table.unlink()
    pq.write_table(as_before, place.table, compression="zstd")
    assert table_says(place.run) == (rows.to_pydict(), dataclasses.replace(measured, store=""))
    assert pages_say(place.run)[:2] == pages_say(run)[:2]


def test_other_readers_of_parquet_read_a_table(run):
    rows, _ = table.read(folder_of(run).table)
    assert pq.read_table(folder_of(run).table, page_checksum_verification=True) == rows
