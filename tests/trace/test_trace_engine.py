"""The whole trace of planted activations, whose onsets, turnovers and partners are known."""

import hashlib
import json
import types

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from test_trace_compare import block_of

from topklm import distributed
from topklm.errors import UserError
from topklm.explorer.traced import Trace
from topklm.neurons.segment import from_dense
from topklm.neurons.store import Metadata, StoreWriter
from topklm.progress import Progress
from topklm.trace import measure as measure_lib
from topklm.trace import tables
from topklm.trace.measure import Reading, Text
from topklm.trace.summary import Summary, against, shared_steps
from topklm.trace.tables import Settings, TraceFolder

N, V, D = 4000, 60, 6
A, B, C, C2, DEAD, F = range(D)
STEPS = [0, 1, 4, 16, 64, 256]
REFERENCE = 256


def text():
    tokens = np.random.default_rng(0).integers(0, V, N).astype(np.uint16)
    return Text(tokens, np.arange(0, N + 1, 100), V, n_bytes=3 * N)


def detector(tokens, ids, seed):
    """A neuron that is active at these tokens, with strengths of its own."""
    strengths = 1 + np.random.default_rng(seed).random(V)
    return np.where(np.isin(tokens, ids), strengths[tokens], 0)


def planted(step, tokens):
    """Activations of two layers, [N, D] each, at a step.

    A is what it is at the reference from step 4 on; B changes from one set of tokens to another at 64; C and
    C2 swap their indices at 64; one neuron is dead; F of the second layer is a copy of F of the first.
    """
    early, final = np.arange(10), np.arange(10, 20)
    one = np.zeros((N, D), np.float32)
    one[:, A] = detector(tokens, final if step >= 4 else early, 1)
    one[:, B] = detector(tokens, final + 10 if step >= 64 else early + 30, 2)
    pair = [detector(tokens, np.arange(40, 50), 3), detector(tokens, np.arange(50, 60), 4)]
    one[:, C], one[:, C2] = pair if step >= 64 else pair[::-1]
    one[:, F] = detector(tokens, np.arange(0, V, 7), 5)
    other = np.random.default_rng(6).permutation(one)
    other[:, F], other[:, DEAD] = one[:, F], 0
    return [one, other]


class Planted(measure_lib.Source):
    """A run whose checkpoints are functions of the step."""

    def __init__(self, change=lambda step, layers: layers, parameters=str):
        self.text, self.clusters = text(), np.arange(V) // 10
        self.loaded, self._change, self._parameters = [], change, parameters

    def load(self, step):
        self.loaded.append(step)
        return types.SimpleNamespace(step=step)

    def read(self, model, folder, report, store):
        step = model.step
        layers = self._change(step, planted(step, self.text.tokens))
        if store:
            self._write(folder.store(step), step, layers)
        lens = np.random.default_rng(step).standard_normal((D, V)).astype(np.float32)
        return Reading(
            step, self._parameters(step), 5 - step / 256, [block_of(x) for x in layers], [lens] * 2, None
        )

    def _write(self, path, step, layers):
        about = Metadata("planted", step, "0", "planted", "topk", (0, 1), D, 3, "relu", 100)
        rows = self.text.tokens, np.repeat(np.arange(N // 100), 100), np.zeros(N, np.float32)
        with StoreWriter(path, about) as writer:
            if not writer.n_tokens:
                writer.append(from_dense(*rows, [x.astype(ml_dtypes.bfloat16) for x in layers]))


def settings(source, **changes):
    digest = hashlib.sha256(source.text.tokens.tobytes()).hexdigest()
    fields = {
        "run": "planted",
        "tokenizer_sha256": "0",
        "source": "planted",
        "text": digest,
        "n_tokens": N,
        "reference": REFERENCE,
        "kind": "topk",
        "layers": (0, 1),
        "width": D,
        "keep": 3,
        "dictionary": "",
        "sae_tokens": 0,
        "min_tokens": 30,
    }
    return Settings(**{**fields, **changes})


def traced(run, source=None, steps=STEPS, measures=(), **changes):
    source = source or Planted()
    folder = TraceFolder(run)
    about = settings(source, **changes)
    with folder.writing(about):
        measure_lib.trace(folder, about, source, steps, Progress(lambda line: None), measures)
    return folder


class Processes:
    """Plays processes one after another, the first last, as it waits for the others."""

    def __init__(self, monkeypatch, count):
        self._patch, self._count = monkeypatch, count

    def trace(self, folder, about, source, steps):
        made = {}

        def of_first(name, make):
            if name not in made:
                made[name] = json.dumps(make())
            return json.loads(made[name])

        with self._patch.context() as patch:
            patch.setattr(distributed, "process_count", lambda: self._count)
            patch.setattr(distributed, "of_first", of_first)
            for index in reversed(range(self._count)):
                patch.setattr(distributed, "process_index", lambda index=index: index)
                measure_lib.trace(folder, about, source, steps, Progress(lambda line: None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return traced(tmp_path_factory.mktemp("planted"))


def of(folder, layer, neuron):
    return next(
        r for r in folder.read_formation().to_pylist() if (r["layer"], r["neuron"]) == (layer, neuron)
    )


def curve(folder, layer, neuron, name):
    rows = folder.read("neurons")
    at = (tables.numbers(rows, "layer") == layer) & (tables.numbers(rows, "neuron") == neuron)
    return tables.numbers(rows, name)[at]


def test_onsets_and_turnovers_are_those_planted(folder):
    a, b = of(folder, 0, A), of(folder, 0, B)
    assert (a["onset_50"], a["onset_90"], a["onset_excess"], a["turnovers"]) == (4, 4, 4, 1)
    assert (b["onset_50"], b["onset_90"], b["onset_excess"], b["turnovers"]) == (64, 64, 64, 1)
    assert a["settled"] and b["settled"]
    assert of(folder, 0, F)["onset_90"] == 0
    assert of(folder, 0, F)["turnovers"] == 0
    np.testing.assert_allclose(curve(folder, 0, A, "r_reference")[2:], 1)
    np.testing.assert_allclose(curve(folder, 0, A, "r_previous")[3:], 1)
    assert curve(folder, 0, A, "r_reference")[0] == pytest.approx(of(folder, 0, A)["stage0_r"])


def test_a_permutation_is_found_by_the_match_and_not_by_the_index(folder):
    assert of(folder, 0, C)["onset_best"] == of(folder, 0, C2)["onset_best"] == 64
    assert (curve(folder, 0, C, "r_reference")[:4] < 0.1).all()
    np.testing.assert_array_equal(curve(folder, 0, C, "matched"), [C2] * 4 + [C] * 2)
    np.testing.assert_array_equal(curve(folder, 0, C, "best"), [C2] * 4 + [C] * 2)
    np.testing.assert_allclose(curve(folder, 0, C, "r_matched"), 1)


def test_dead_neurons_are_null_and_in_no_median(folder):
    dead = of(folder, 0, DEAD)
    assert dead["n_active"] == 0
    assert {dead[name] for name in dead if name not in ("layer", "neuron", "n_active")} == {None}
    rows = folder.read("neurons").filter(pa.compute.field("neuron") == DEAD).to_pylist()
    for name in (
        "r_reference",
        "r_best",
        "best",
        "matched",
        "jaccard_reference",
        "token_entropy",
        "examples",
    ):
        assert {row[name] for row in rows} == {None}
    summary = Summary(folder)
    np.testing.assert_array_equal(summary.living[0], [True] * 4 + [False, True])
    living = summary.curves(0, "r_reference")[:, summary.living[0]]
    np.testing.assert_allclose(summary.of_layer(0)["r_reference"], np.median(living, axis=1))


def test_a_copy_in_the_next_layer_is_the_best_and_others_are_not(folder):
    rows = folder.read("layers").to_pylist()
    copies = [row for row in rows if row["neuron"] == F]
    assert all(row["same_is_best"] and row["r"] == pytest.approx(1) and row["jaccard"] == 1 for row in copies)
    assert {(row["layer_a"], row["layer_b"]) for row in rows} == {(0, 1)}
    others = [row["r"] for row in rows if row["neuron"] in (A, B, C)]
    assert np.abs(others).max() < 0.1
    assert [row["n"] for row in folder.read("pairs").to_pylist()] == [D - 1] * len(STEPS)


def test_nulls_and_loss(folder):
    assert np.nanmax(np.abs(tables.numbers(folder.read("neurons"), "r_shifted"))) < 0.15
    run = folder.read("run").to_pylist()
    assert [row["step"] for row in run] == STEPS
    assert [row["previous"] for row in run] == [None, *STEPS[:-1]]
    assert run[0]["loss"] == 5
    assert run[0]["bits_per_byte"] == pytest.approx(5 / np.log(2) / 3)


def test_changes_are_those_of_planted_curves(folder):
    found = Summary(folder).changes()
    # The loss, 5 - step / 256, bends down at the last step but one; r's median at that before B and C turn.
    assert found["loss"] == {"rises": None, "falls": 64}
    assert found["r, same index"]["rises"] == 16


def test_relations_and_breaks_are_dated_too(tmp_path):
    def hits_of(step):
        return 10 * (step >= 16)

    def rows(model):
        common = {"relation": "det/head", "n": 10, "layer": 0}
        halves = [{**common, "half": half, "head": head} for half in (0, 1) for head in (0, 1)]
        of_heads = [{**row, "hits": row["head"] * hits_of(model.step), "score": 0.0} for row in halves]
        return of_heads + [{**row, "layer": -1, "head": 1, "hits": 4} for row in of_heads if row["head"]]

    steps = [0, 1, 2, 4, 16, 64, 256]
    found = Summary(traced(tmp_path, steps=steps, measures=[lambda model: ({}, rows(model))]))
    relation = found.relations["det/head"]
    assert [one.uas for one in relation] == [0, 0, 0, 0, 1, 1, 1]
    assert {(one.distance, one.n) for one in relation} == {(0.4, 20)}
    assert (relation[-1].layer, relation[-1].head) == (0, 1)
    assert found.changes(1)["det/head"] == {"rises": 4, "falls": 16, "breaks": [16]}
    assert found.changes(2)["det/head"]["breaks"] == []  # seven points are not three pieces


def test_examples_are_places_where_the_neuron_is_strongest(folder):
    tokens = planted(REFERENCE, text().tokens)[0]
    row = folder.read_step("neurons", REFERENCE).to_pylist()[A]
    values = tokens[row["examples"], A]
    np.testing.assert_array_equal(values, row["example_activations"])
    assert values[0] == tokens[:, A].max()
    assert len({place // 100 for place in row["examples"]}) == 5


def content(run):
    return {
        p.relative_to(run): p.read_bytes()
        for p in sorted(run.rglob("*"))
        if p.suffix in (".parquet", ".json")
    }


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_a_trace_that_was_stopped_goes_on_and_ends_with_the_same_bytes(tmp_path, folder, stop):
    source = Planted()

    def measure(model):
        if model.step == STEPS[stop]:
            raise StoppedError
        return {}, []

    with pytest.raises(StoppedError):
        traced(tmp_path, source, measures=[measure])
    assert TraceFolder(tmp_path).steps() == STEPS[:stop]
    again = Planted()
    traced(tmp_path, again)
    done = again.loaded.count
    assert [step for step in STEPS if done(step) > (step == REFERENCE)] == STEPS[max(stop - 1, 0) :]
    assert content(tmp_path) == content(folder.path.parent.parent)


def test_steps_that_come_later_are_traced_and_those_after_them_again(tmp_path, folder):
    traced(tmp_path, steps=[0, 4, 256])
    traced(tmp_path)
    assert content(tmp_path) == content(folder.path.parent.parent)
    source = Planted()
    traced(tmp_path, source)
    assert source.loaded == []


ORDER = [B, C, A, F, C2, DEAD]


def test_another_seed_is_matched_by_activations_and_not_by_index(tmp_path, folder):
    other = traced(tmp_path, Planted(lambda step, layers: [x[:, ORDER] for x in layers]))
    assert shared_steps(folder, other) == [(REFERENCE, REFERENCE)]
    first, second = against(folder, other, (REFERENCE, REFERENCE))
    for row in (first, second):
        assert row["n"] == D - 1
        assert row["matched"] == pytest.approx(1)
        assert row["matched_strong"] == 1
        assert row["same_index"] < 0.1
        assert row["other_index"] == pytest.approx(1)
        assert abs(row["matched_shifted"]) < 0.1
        assert row["matched_same_index"] == 0
    found = Trace(folder).against(Trace(other))
    assert found["matched"].tolist() == [first["matched"], second["matched"]]


def test_traces_of_other_text_or_tokenizers_are_not_matched(tmp_path, folder):
    for name, value, said in (
        ("text", "0", "other text"),
        ("tokenizer_sha256", "1", "another tokenizer"),
        ("width", 7, "7 neurons in a layer"),
    ):
        other = TraceFolder(tmp_path / name)
        with other.writing(settings(Planted(), **{name: value})):
            pass
        with pytest.raises(UserError, match=said):
            against(folder, other, (REFERENCE, REFERENCE))


def test_values_and_heads_of_the_whole_model_are_kept(tmp_path):
    head = {"layer": 0, "head": 1, "relation": "det", "half": 1, "hits": 3, "n": 4, "score": 0.75}
    folder = traced(tmp_path, measures=[lambda model: ({"uas": model.step / 1000}, [head])])
    assert folder.read("run")["uas"].to_pylist() == [step / 1000 for step in STEPS]
    assert folder.read("heads").to_pylist() == [{"step": step, **head} for step in STEPS]
    np.testing.assert_array_equal(Summary(folder).values()["uas"], np.array(STEPS) / 1000)


def test_checkpoints_with_the_same_parameters_are_refused(tmp_path):
    source = Planted(parameters=lambda step: str(min(step, 64)))
    with pytest.raises(UserError, match="steps 64 and 256 hold the same parameters"):
        traced(tmp_path, source)


def test_other_settings_are_refused_by_name(tmp_path, folder):
    traced(tmp_path)
    with pytest.raises(UserError, match=r"with min tokens 30, not 20: .*--restart"):
        traced(tmp_path, min_tokens=20)
    about = settings(Planted(), min_tokens=20)
    with TraceFolder(tmp_path).writing(about, restart=True):
        assert TraceFolder(tmp_path).steps() == []


def test_a_damaged_table_is_named(tmp_path):
    folder = traced(tmp_path)
    path = folder.path / "neurons" / "4.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"4\.parquet is damaged"):
        Summary(folder).of_layer(0)
    path.unlink()
    with pytest.raises(UserError, match=r"4\.parquet is missing"):
        Summary(folder).of_layer(0)


def test_a_trace_in_python(folder):
    trace = Trace(folder)
    assert trace.steps.tolist() == STEPS
    np.testing.assert_array_equal(trace.onsets(0.5)[0, [A, B, F]], [4, 64, 0])
    assert np.isnan(trace.onsets()[0, DEAD])
    assert trace.neuron(0, B).onset(0.9) == trace.neuron("0:1").onset(0.9) == 64
    assert trace.neuron(0, DEAD).onset() is None
    assert trace.layer(1).r.shape == (len(STEPS), D)
    assert trace.table("formation").num_rows == 2 * D
    for wrong in (
        lambda: trace.neuron(0, D),
        lambda: trace.layer(2),
        lambda: trace.table("x"),
        lambda: trace.plot("x"),
    ):
        with pytest.raises(UserError, match="must be"):
            wrong()
    for name in ("identity", "loss", "onsets", "layers"):
        assert trace.plot(name).startswith("<svg")


def files(folder):
    return {str(p.relative_to(folder.path)): p.read_bytes() for p in folder.path.rglob("*.parquet")}


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_any_number_of_processes_writes_the_tables_of_one(folder, tmp_path, monkeypatch, count):
    other, source = TraceFolder(tmp_path), Planted()
    about = settings(source)
    with other.writing(about):
        Processes(monkeypatch, count).trace(other, about, source, STEPS)
    assert files(other) == files(folder)
    # The reference and the step before: once for each process that has steps, and no step twice.
    n_working = min(count, len(STEPS))
    assert len(source.loaded) == len(STEPS) + n_working + n_working - 1


def test_processes_go_on_where_others_stopped(folder, tmp_path, monkeypatch):
    other, source = TraceFolder(tmp_path), Planted()
    about = settings(source)
    with other.writing(about):
        Processes(monkeypatch, 3).trace(other, about, source, [0, 16, 256])
        Processes(monkeypatch, 2).trace(other, about, source, STEPS)
    assert files(other) == files(folder)


def test_the_same_parameters_read_by_two_processes_are_found_in_the_end(tmp_path, monkeypatch):
    other = TraceFolder(tmp_path)
    source = Planted(parameters=lambda step: "same" if step in (1, 64) else str(step))
    about = settings(source)
    processes = Processes(monkeypatch, 3)
    with other.writing(about):
        for _ in range(2):
            with pytest.raises(UserError, match="steps 1 and 64 hold the same parameters"):
                processes.trace(other, about, source, STEPS)
        without = [step for step in STEPS if step != 64]
        processes.trace(other, about, source, without)
    assert other.steps() == without
