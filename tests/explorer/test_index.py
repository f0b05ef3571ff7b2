"""The explorer's index: found things against plain loops, and files that are damaged or of something else."""

import contextlib
import sqlite3
import threading

import numpy as np
import pyarrow as pa
import pytest

from topklm.explorer.finding import Index
from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.views import Asked, select
from topklm.explorer.views import table as page_of
from topklm.neurons.statistics import catalog, table
from topklm.neurons.statistics.table import readable_first


@contextlib.contextmanager
def opened(folder, said):
    with contextlib.closing(Index(NeuronData(folder), said.append)) as index:
        yield index


def numbers(source, asked=None, labels=()):
    return select(source, asked or Asked(), labels).tolist()


def found_words(index):
    return [index.passages("lantern", 50), index.active_at("the", 50)]


@pytest.mark.parametrize("name", catalog.numbers())
@pytest.mark.parametrize("falling", [False, True])
def test_neurons_are_sorted_by_every_figure_with_those_without_it_last(source, name, falling):
    found = source.column(name)[numbers(source, Asked(name, falling))]
    there = found[np.isfinite(found)]
    assert np.isnan(found[len(there) :]).all()
    np.testing.assert_array_equal(there, np.sort(there)[::-1] if falling else np.sort(there))


def test_without_a_wish_the_readable_come_first(source):
    assert numbers(source) == readable_first(source.rows).tolist()
    assert numbers(source, Asked(falling=True)) == numbers(source)[::-1]


def test_neurons_are_filtered_by_layer_range_and_label(source):
    density = source.column("density")
    low, high = np.quantile(density, [0.3, 0.6])
    asked = Asked(layers=(1,), ranges={"density": (low, high)}, labelled=True)
    expected = {n for n in range(32, 64, 2) if low <= density[n] <= high}
    assert expected
    found = numbers(source, asked, [source.place(n) for n in range(0, 64, 2)])
    assert (len(found), set(found)) == (len(expected), expected)
    assert numbers(source, Asked(ranges={"density": (None, low)})) == [
        n for n in numbers(source) if density[n] <= low
    ]


def test_a_page_is_a_part_of_the_whole(source):
    page = page_of(source, Asked(page=2))
    assert page["count"] == 64
    assert [(n["layer"], n["neuron"]) for n in page["neurons"]] == [
        source.place(n) for n in numbers(source)[50:]
    ]


def test_words_are_found_in_the_text_of_the_store(source, index):
    found = index.passages("lantern", 1000)
    assert found
    for passage in found:
        assert "lantern" in "".join(text for text, _ in passage.pieces).lower()
        assert any(matched and text.lower() == "lantern" for text, matched in passage.pieces)
        assert "lantern" in source.plain_text(passage.begin, passage.begin + 128)
        assert source.store.documents(passage.begin, passage.begin + 1)[0] == passage.document


@pytest.mark.parametrize("words", ['"', "a OR", "NEAR(", "x*y^z", "-- ;drop table", "col:", "\x00", "(", "'"])
def test_no_word_has_a_meaning_to_the_database(index, words):
    index.passages(words, 5)
    index.active_at(words, 5)


def test_words_are_found_under_the_neurons_whose_examples_hold_them(source, index):
    for number in index.active_at("lantern", 100):
        row = source.row(number, ["examples", "example_parts"])
        texts = [
            source.plain_text(max(0, at - 40), at + 10)
            for at, part in zip(row["examples"], row["example_parts"], strict=True)
            if part == 0
        ]
        assert any("lantern" in text for text in texts)


def test_it_is_made_once_and_opened_after_that(explored_copy):
    said = []
    for _ in range(3):
        with opened(explored_copy, said) as index:
            assert index.active_at("the", 50)
    assert len(said) == 1


def spoil_middle(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 4
    content[middle : 3 * middle] = b"\xaa" * (2 * middle)
    path.write_bytes(content)


DAMAGE = {
    "rubbish": lambda path: path.write_bytes(b"this is no database " * 1000),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "middle": spoil_middle,
    "another database": lambda path: (path.unlink(), sqlite3.connect(path).execute("CREATE TABLE x (y)")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_made_anew(explored_copy, damage):
    said = []
    with opened(explored_copy, said) as index:
        expected = found_words(index)
    DAMAGE[damage](explored_copy.index)
    with opened(explored_copy, said) as index:
        assert found_words(index) == expected
    assert len(said) == 2
    with opened(explored_copy, said) as index:
        assert found_words(index) == expected
    assert len(said) == 2


def test_an_index_of_other_examples_is_made_anew_and_one_of_other_figures_is_kept(explored_copy):
    said = []
    with opened(explored_copy, said):
        pass
    rows, measured = table.read(explored_copy.table)
    for name, n_made in (("ablation_effect", 1), ("top_tokens", 2)):
        at = rows.column_names.index(name)
        column = pa.nulls(rows.num_rows, rows.schema.field(name).type)
        table.write(explored_copy.table, rows.set_column(at, name, column), measured)
        with opened(explored_copy, said):
            pass
        assert len(said) == n_made


def test_where_nothing_can_be_written_it_is_held_in_memory(explored_copy):
    explored_copy.index.mkdir()  # root may write everywhere, but not over a folder
    said = []
    with opened(explored_copy, said) as index:
        assert index.active_at("the", 50)
    assert list(explored_copy.path.glob(".index*")) == []


def test_two_explorers_of_one_run_do_not_disturb_each_other(explored_copy):
    results, errors = [], []

    def explore():
        try:
            with opened(explored_copy, []) as index:
                results.append(found_words(index))
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=explore) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(results) == 4
    assert all(result == results[0] for result in results)
    assert [path.name for path in explored_copy.path.iterdir() if "index" in path.name] == ["index.sqlite"]
