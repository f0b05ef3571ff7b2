import dataclasses

import pytest
from test_build import SELECTION, SETTINGS, TEXTS, contents, make, write_lines

from topklm.data.building import encode
from topklm.data.building.build import build
from topklm.data.building.chunks import Storage
from topklm.data.building.encode import DatasetSources
from topklm.data.building.engines import BeamEngine
from topklm.data.records import RECORD_TOKENS
from topklm.data.sources import find
from topklm.errors import UserError
from topklm.progress import Progress


def build_with_beam(given, out, settings, *options):
    build(given, settings, Storage(out), BeamEngine("DirectRunner", options), Progress(lambda _: None))


@pytest.fixture
def corpus(tmp_path):
    """Files with copies within and across them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(3):
        write_lines(folder / f"{i}.jsonl.gz", [*TEXTS[100 * i : 100 * i + 120], *TEXTS[:10]])
    return DatasetSources(find([str(folder)]))


def test_a_pipeline_gives_the_bytes_of_the_local_command(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 30)
    settings = dataclasses.replace(SETTINGS, shard_tokens=2 * RECORD_TOKENS)
    local, _ = make(corpus, tmp_path / "local", settings)
    build_with_beam(corpus, tmp_path / "beam", settings)
    assert contents(tmp_path / "beam") == contents(local.path)
    assert len(local.train.shards) > 1
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_dataset_without_dropping_copies_is_the_same_too(corpus, tmp_path):
    settings = dataclasses.replace(SETTINGS, deduplicate=False)
    local, _ = make(corpus, tmp_path / "local", settings)
    build_with_beam(corpus, tmp_path / "beam", settings)
    assert contents(tmp_path / "beam") == contents(local.path)


def test_a_pipeline_writes_to_a_bucket(corpus, tmp_path):
    local, _ = make(corpus, tmp_path / "local")
    build_with_beam(corpus, "memory://bucket/datasets/beam", SETTINGS)
    bucket = Storage("memory://bucket/datasets/beam")
    assert {name: bucket.read(name) for name in contents(local.path)} == contents(local.path)
    assert not Storage("memory://bucket/datasets/.beam.partial").exists("")


def test_strict_ends_a_pipeline_with_the_first_problem(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nno json')
    strict = dataclasses.replace(SETTINGS, selection=dataclasses.replace(SELECTION, strict=True))
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: invalid JSON"):
        build_with_beam(DatasetSources(find([str(tmp_path / "bad.jsonl")])), tmp_path / "out", strict)


def test_an_unknown_runner_is_refused(corpus, tmp_path):
    engine = BeamEngine("NoSuchRunner", [])
    with pytest.raises(UserError, match="NoSuchRunner"):
        build(corpus, SETTINGS, Storage(tmp_path / "out"), engine, Progress(lambda _: None))
