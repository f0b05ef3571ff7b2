"""What `topklm neurons harvest` says while it works, and the store that it leaves; in this process."""

import argparse
import contextlib
import json
import threading

import pytest
import saved_runs

import topklm
from topklm.checkpoint.checksums import fingerprint
from topklm.commands import neurons
from topklm.config import MeshConfig
from topklm.errors import UserError
from topklm.layout import make_layout
from topklm.neurons import NeuronsFolder, documents
from topklm.neurons.store import Store, StoreWriter, wait_for_writers
from topklm.progress import Progress

STEP = 24


class Told(Progress):
    """Remembers what it is told."""

    def __init__(self):
        self.lines, self.totals = [], []
        super().__init__(self.lines.append)

    @contextlib.contextmanager
    def phase(self, what, total):
        self.totals.append(total)
        yield lambda units, documents=0, tokens=0: None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    saved_runs.save(folder, [STEP])
    return topklm.load(folder)


@pytest.fixture
def harvest(model, tmp_path, monkeypatch):
    """Harvests a text into a folder of its own."""
    monkeypatch.setattr(documents, "_BATCH_TOKENS", 256)
    folder = NeuronsFolder(tmp_path / "run", STEP)

    def call(source, **options):
        told = Told()
        layout = make_layout(MeshConfig())
        settings = neurons.HarvestSettings(source=str(source), **options)
        neurons.harvest_into(folder, model, layout, told, settings)
        return told, Store(folder.store)

    return call


def write(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def test_copies_and_unreadable_documents_are_left_out_with_a_line(harvest, model, tmp_path):
    texts = ["a town by the sea", "a village", "a town by the sea", "", "a village", "a\0town"]
    told, store = harvest(write(tmp_path / "odd.jsonl", texts))
    assert model.tokenizer.decode(store.tokens(0, 100)) == "a town by the seaa village"
    said = [line for line in told.lines if "left out" in line]
    assert len(said) == 1
    assert said[0].endswith(": 1 x NUL bytes, 1 x empty, 2 x exact copy of a document before")


def test_nobody_is_told_a_share_of_text_of_unknown_length(harvest, tmp_path):
    told, _ = harvest(write(tmp_path / "some.jsonl", ["a town by the sea"]))
    assert told.totals == [0]


def test_text_without_a_document_names_the_field(harvest, tmp_path):
    with pytest.raises(
        UserError, match=r"no text in it \(1 x no text field; the field 'text' was looked for\)"
    ):
        harvest(write(tmp_path / "other.jsonl", ["a town"], field="txt"))


def test_a_store_names_the_parameters_that_it_is_of(harvest, model, tmp_path):
    source = write(tmp_path / "some.jsonl", ["a town by the sea"])
    _, store = harvest(source)
    assert store.metadata.parameters == fingerprint(model.params)
    other = {**model.params, "embed": {"embedding": model.params["embed"]["embedding"] + 1}}
    assert fingerprint(other) != fingerprint(model.params)


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "٣", "1" * 5000, "_1", "10**3"])
def test_a_count_that_is_none_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must "):
        neurons._count(text)


def test_whoever_writes_is_waited_for_before_anything_is_measured(harvest, tmp_path):
    _, store = harvest(write(tmp_path / "some.jsonl", ["a town by the sea"]))
    lines = []
    with StoreWriter(store.folder, store.metadata):
        waiting = threading.Thread(target=wait_for_writers, args=(store.folder, lines.append))
        waiting.start()
        while not lines:
            assert waiting.is_alive()
        assert "is harvesting into" in lines[0]
    waiting.join()
    wait_for_writers(store.folder, pytest.fail)
