"""Whatever happens to a file of unfinished work, the dataset is the same, and there is a line."""

import dataclasses
import itertools
import shutil

import damage
import pytest
from test_build import SETTINGS, Interruption, contents, make, write_lines

from topklm.data.building import encode
from topklm.data.building.chunks import ShardTask
from topklm.data.building.encode import DatasetSources
from topklm.data.building.engines import LocalEngine
from topklm.data.records import RECORD_TOKENS
from topklm.data.sources import find
from topklm.errors import UserError

TEXTS = [f"Crate {n} of {n % 11} went to shelf {n * n}. " * (1 + n % 6) for n in range(120)]
MANY_SHARDS = dataclasses.replace(SETTINGS, shard_tokens=RECORD_TOKENS)


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "CHUNK_DOCUMENTS", 15)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(3):
        write_lines(folder / f"{number}.jsonl", [*TEXTS[40 * number : 40 * number + 40], TEXTS[0]])
    return DatasetSources(find([str(folder)]))


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory):
    return contents(make(sources, tmp_path_factory.mktemp("undisturbed") / "out", MANY_SHARDS)[0].path)


@pytest.fixture(scope="module")
def left_behind(sources, tmp_path_factory):
    """What an attempt leaves that ends after its last shard: every kind of piece."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    run = LocalEngine.run

    def ends(self, tasks, *arguments):
        results = run(self, tasks, *arguments)
        if isinstance(tasks[0], ShardTask):
            raise Interruption
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalEngine, "run", ends)
        with pytest.raises(Interruption):
            make(sources, out, MANY_SHARDS)
    return out.with_name(".out.partial")


def copier(folder, place):
    numbers = itertools.count()
    return lambda: shutil.copytree(folder, place / str(next(numbers)) / folder.name)


@pytest.mark.parametrize(
    "piece",
    ["*/000000.index", "*/000001.tokens", "*/done.json", "dataset-*/*00001-*", "tokenizer-*", "training-*"],
)
def test_a_line_names_a_damaged_piece(sources, undisturbed, left_behind, tmp_path, piece):
    work = copier(left_behind, tmp_path)()
    file = sorted(work.glob(piece))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    dataset, lines = make(sources, work.with_name("out"), MANY_SHARDS)
    assert contents(dataset.path) == undisturbed
    said = [line for line in lines if "damaged" in line]
    assert len(said) == 1
    assert ("tokenizer" if "tokenizer" in said[0] else f"{work}/") in said[0]


def test_unfinished_work_that_is_whole_is_used_without_a_word(
    sources, undisturbed, left_behind, tmp_path, monkeypatch
):
    monkeypatch.setattr(encode, "_encode", None)  # nothing is encoded
    work = copier(left_behind, tmp_path)()
    shards = {path.name: path.stat().st_ino for path in work.glob("dataset-*/*.arrayrecord")}
    dataset, lines = make(sources, work.with_name("out"), MANY_SHARDS)
    assert contents(dataset.path) == undisturbed
    assert {path.name: path.stat().st_ino for path in dataset.path.glob("*.arrayrecord")} == shards
    assert not [line for line in lines if "again" in line]


def without_the_end_of_a_file(folder):
    """As an attempt leaves it that ends while it encodes."""
    for done in folder.glob("*/done.json"):
        (done.parent / "000001.index").unlink(missing_ok=True)
        done.unlink() if done.is_file() else done.rmdir()
    for shards in folder.glob("dataset-*/"):
        shutil.rmtree(shards)


@pytest.mark.parametrize(
    ("is_young", "share"),
    [(False, 0.2), *(pytest.param(young, 1.0, marks=pytest.mark.slow) for young in (False, True))],
)
def test_damaged_work_is_made_again_to_the_same_bytes(
    sources, undisturbed, left_behind, tmp_path, is_young, share
):
    def continued(work):
        if is_young:
            without_the_end_of_a_file(work)
        try:
            return contents(make(sources, work.with_name("out"), MANY_SHARDS)[0].path)
        except UserError as e:  # it would come again at every start
            return str(e)

    n = damage.check(
        copier(left_behind, tmp_path),
        continued,
        undisturbed,
        ignore=lambda path: path.name == ".lock",
        share=share,
    )
    assert n > 150 * share
