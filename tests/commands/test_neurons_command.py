"""`topklm neurons harvest` and `measure`: some as real processes, of which one is killed."""

import json
import shutil

from helpers import assert_one_line_error, devices, in_this_process, sentences, wait_until, write_documents
import numpy as np
import pytest

from topklm.neurons import NeuronsFolder
from topklm.neurons.statistics import table
from topklm.neurons.store import Store

STEP = 24


def run(verb, folder, *arguments):
    return in_this_process("neurons", verb, folder, *arguments)


def start(trainer, verb, folder, *arguments, **options):
    return trainer.start_python("-m", "topklm", "neurons", verb, folder, *map(str, arguments), **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some 400,000 tokens."""
    return write_documents(tmp_path_factory.mktemp("text") / "more.jsonl", sentences(1, 5000))


@pytest.fixture(scope="module")
def harvested(tmp_path_factory, finished_run):
    """A copy of the finished run with activations on its training text."""
    folder = tmp_path_factory.mktemp("harvested") / "village"
    shutil.copytree(finished_run, folder)
    process = run("harvest", folder, "--split", "train", "--tokens", "15_000", "--json")
    assert process.exit_code == 0, process.errors
    return NeuronsFolder(folder, STEP), json.loads(process.output)


def test_a_run_is_harvested_and_measured(harvested):
    folder, facts = harvested
    store = Store(folder.store)
    assert facts["tokens"] == store.n_tokens >= 15_000
    assert (facts["run"], facts["step"], facts["kind"], facts["layers"]) == ("village", STEP, "topk", [0])
    assert "training text of" in store.metadata.source
    process = run("measure", folder.run, "--ablation-samples", "8", "--lens-contexts", "4")
    assert process.exit_code == 0, process.errors
    assert f"wrote {folder.table}" in process.output
    rows, measured = table.read(folder.table)
    assert (rows.num_rows, measured.n_tokens) == (32, store.n_tokens)
    assert rows["n_active"].to_pylist() == [len(store.neuron(0, neuron).tokens) for neuron in range(32)]
    assert sum(rows["density"].to_pylist()) == pytest.approx(store.n_events / store.n_tokens)
    for column in rows.column_names:  # every figure was computed, of every living neuron
        living = [
            value
            for value, n in zip(rows[column].to_pylist(), rows["n_active"].to_pylist(), strict=True)
            if n > 100
        ]
        assert living and all(value is not None for value in living), column


@pytest.mark.slow
def test_a_harvest_that_is_killed_goes_on_where_it_was(tmp_path, trainer, finished_run, text):
    whole, killed = (NeuronsFolder(tmp_path / name / "village", STEP) for name in ("whole", "killed"))
    for folder in (whole, killed):
        shutil.copytree(finished_run, folder.run)
    arguments = "--source", text, "--tokens", 120_000
    assert run("harvest", whole.run, *arguments).exit_code == 0
    process = start(trainer, "harvest", killed.run, *arguments)
    segments = killed.store / "segments"
    assert wait_until(lambda: len(list(segments.glob("[0-9]*"))) >= 2, process)
    process.kill()
    n_stored = Store(killed.store).n_tokens
    assert 0 < n_stored < Store(whole.store).n_tokens
    assert run("harvest", killed.run, *arguments).exit_code == 0
    one, other = Store(whole.store), Store(killed.store)
    assert one.n_tokens == other.n_tokens >= 120_000
    np.testing.assert_array_equal(one.tokens(0, one.n_tokens), other.tokens(0, one.n_tokens))
    for neuron in range(32):
        np.testing.assert_array_equal(one.neuron(0, neuron).tokens, other.neuron(0, neuron).tokens)
        np.testing.assert_array_equal(one.neuron(0, neuron).values, other.neuron(0, neuron).values)


@pytest.mark.slow
def test_two_harvests_of_one_run_take_turns(tmp_path, trainer, finished_run, text):
    alone, shared = (NeuronsFolder(tmp_path / name / "village", STEP) for name in ("alone", "shared"))
    for folder in (alone, shared):
        shutil.copytree(finished_run, folder.run)
    arguments = "--source", text, "--tokens", 60_000
    processes = [start(trainer, "harvest", shared.run, *arguments) for _ in range(2)]
    for process in processes:
        assert process.finish() == 0, process.errors
    said = [process.output for process in processes]
    assert sum("is harvesting into" in output for output in said) <= 1
    assert run("harvest", alone.run, *arguments).exit_code == 0
    assert not list(shared.store.glob("segments/.*"))
    for path in alone.store.rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert (shared.store / path.relative_to(alone.store)).read_bytes() == path.read_bytes()


def dense(store, layer, document):
    """Returns the tokens of a document and its activations, [n, 1 + D]."""
    at = np.flatnonzero(store.documents(0, store.n_tokens) == document)
    block, n_neurons = store.block(layer, 0, store.metadata.d_model), store.metadata.d_model
    found = np.zeros((len(at), 1 + n_neurons))
    found[:, 0] = store.tokens(at[0], at[-1] + 1)
    inside = (block.tokens >= at[0]) & (block.tokens <= at[-1])
    neurons = np.repeat(np.arange(n_neurons), np.diff(block.offsets))
    found[block.tokens[inside] - at[0], 1 + neurons[inside]] = block.values[inside]
    return found


@pytest.mark.slow
def test_hosts_write_their_parts_at_the_same_time_on_as_many_devices_as_they_have(
    tmp_path, trainer, finished_run
):
    alone, shared = (NeuronsFolder(tmp_path / name / "village", STEP) for name in ("alone", "shared"))
    for folder in (alone, shared):
        shutil.copytree(finished_run, folder.run)
    arguments = "--source", write_documents(tmp_path / "some.jsonl", sentences(2, 600)), "--tokens", 10**6
    processes = [
        start(trainer, "harvest", shared.run, *arguments, "--part", f"{part}/2", environment=environment)
        for part, environment in enumerate((devices(2), {}))
    ]
    for process in processes:
        assert process.finish() == 0, process.errors
    assert run("harvest", alone.run, *arguments).exit_code == 0
    one, parts = Store(alone.store), Store(shared.store)
    assert one.n_tokens == parts.n_tokens > 30_000
    assert {reader.folder.name[0] for reader in parts.segments} == {"0", "1"}
    for number in (0, 1, 2, 77, 598, 599):
        for layer in one.metadata.layers:
            left, right = (dense(store, layer, number) for store in (one, parts))
            assert left[:, 1:].any()
            np.testing.assert_array_equal(left != 0, right != 0)
            np.testing.assert_allclose(left, right, rtol=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "7"], "step = 7"),
        (["--tokens", "0"], "'0': must be a whole number, 1 or more"),
        (["--part", "4/4"], "must be I/N with I from 0 to N - 1"),
        (["--source", "/nothing/here.txt"], "/nothing/here.txt"),
        (["--split", "train", "--source", "datasets-of-another"], "datasets-of-another"),
    ],
)
def test_harvest_refuses_in_one_line(harvested, arguments, words):
    process = run("harvest", harvested[0].run, *arguments)
    assert process.exit_code == 2
    assert words in assert_one_line_error(process.errors)


def test_text_other_than_before_is_refused(harvested, text):
    process = run("harvest", harvested[0].run, "--source", text)
    assert process.exit_code == 2
    assert "holds activations of another source" in assert_one_line_error(process.errors)


def test_measuring_needs_a_harvest(finished_run):
    process = run("measure", finished_run)
    assert process.exit_code == 2
    assert "run topklm neurons harvest" in assert_one_line_error(process.errors)
