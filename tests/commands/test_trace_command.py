"""`topklm trace` on real runs: a tiny one with its checkpoints, and Base LMs made without training."""

import dataclasses
import json
import shutil
import time

from helpers import in_this_process, sentences, write_documents
import jax
import numpy as np
import pytest
import saved_runs
from scipy.stats import pearsonr

import topklm
from topklm.config import DataConfig
from topklm.data.building.build import prepare
from topklm.model import transformer
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.store import Store
from topklm.trace import tables
from topklm.trace.tables import TraceFolder

TOKENS = 900
FEW = "--tokens", TOKENS, "--min-tokens", 5


def trace(*arguments):
    ended = in_this_process("trace", *arguments)
    assert ended.exit_code == 0, ended.errors
    return ended.output


def refused(*arguments):
    ended = in_this_process("trace", *arguments)
    assert ended.exit_code == 2, (ended.output, ended.errors)
    assert ended.errors.count("\n") == 1
    return ended.errors


@pytest.fixture(scope="module")
def traced(tmp_path_factory, finished_run):
    run = shutil.copytree(finished_run, tmp_path_factory.mktemp("traced") / "run")
    said = trace("run", run, *FEW, "--no-language", "--keep-events", "--json")
    return run, json.loads(said)


def numbers(folder, layer, step, name):
    rows = folder.read_step("neurons", step)
    return tables.numbers(rows, name)[tables.numbers(rows, "layer") == layer]


def test_every_checkpoint_and_step_0_are_compared_with_the_last(traced):
    run, said = traced
    saved = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert said["steps"] == [0, *saved]
    folder = TraceFolder(run)
    model = topklm.load(run)
    for layer in range(model.cfg.n_topk_layers):
        r = numbers(folder, layer, saved[-1], "r_reference")
        np.testing.assert_allclose(r[~np.isnan(r)], 1)
        assert (numbers(folder, layer, saved[-1], "jaccard_reference") == 1)[~np.isnan(r)].all()
        assert np.nanmedian(numbers(folder, layer, 0, "r_reference")) < 0.95


def test_r_is_that_of_the_stored_activations(traced):
    run, said = traced
    folder = TraceFolder(run)
    first, *_, last = (Store(folder.store(step)) for step in said["steps"])
    dense = []
    for store in (first, last):
        block = store.block(0, 0, store.metadata.d_model)
        values = np.zeros((store.n_tokens, store.metadata.d_model))
        values[block.tokens, np.repeat(np.arange(values.shape[1]), np.diff(block.offsets))] = block.values
        dense.append(values)
    n_active = numbers(folder, 0, 0, "n_active")
    np.testing.assert_array_equal(n_active, (dense[0] != 0).sum(axis=0))
    r = numbers(folder, 0, 0, "r_reference")
    both = np.flatnonzero(~np.isnan(r))
    assert len(both)
    np.testing.assert_allclose(
        r[both], [pearsonr(dense[0][:, j], dense[1][:, j])[0] for j in both], rtol=1e-9
    )


def test_step_0_is_what_the_trainer_starts_from(traced):
    run, _ = traced
    model = topklm.load(run)
    params = jax.jit(transformer.create, static_argnums=(0, 1))(model.cfg, model.config.train.seed)
    row = TraceFolder(run).read_step("run", 0).to_pylist()[0]
    store = Store(TraceFolder(run).store(0))
    n = min(int(store.document_bounds()[1]), model.cfg.context_length - 1)
    ids = [model.tokenizer.separator_id, *store.tokens(0, n).tolist()]
    _, cache = dataclasses.replace(model, params=params).run_with_cache(ids)
    block, found = store.block(0, 0, model.cfg.d_model), np.zeros((n, model.cfg.d_model))
    neurons = np.repeat(np.arange(model.cfg.d_model), np.diff(block.offsets))
    inside = block.tokens < n
    found[block.tokens[inside], neurons[inside]] = block.values[inside]
    np.testing.assert_allclose(found, cache["blocks.0.hook_topk"][0, 1:], rtol=0.01, atol=1e-3)
    assert row["loss"] == pytest.approx(np.mean(store.losses(0, store.n_tokens)), rel=1e-3)


def same(one, other):
    for name in ("neurons", "layers", "pairs", "run"):
        here, there = TraceFolder(one).read(name), TraceFolder(other).read(name)
        for column in here.column_names:
            a, b = here[column].to_pylist(), there[column].to_pylist()
            if (
                column.startswith(("best", "matched", "r_", "carried", "loss", "bits", "r"))
                and a
                and not isinstance(a[0], str)
            ):
                x, y = (np.array([np.nan if v is None else v for v in values], float) for values in (a, b))
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=f"{name} {column}")
            else:
                assert a == b, (name, column)


@pytest.mark.parametrize(("batch", "segment"), [(64, 100), (10_000, 10_000)])
def test_figures_depend_neither_on_batches_nor_on_segments(traced, tmp_path, monkeypatch, batch, segment):
    run, said = traced
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("neurons"))
    monkeypatch.setattr("topklm.neurons.documents._BATCH_TOKENS", batch)
    monkeypatch.setattr("topklm.neurons.harvest._SEGMENT_TOKENS", segment)
    steps = said["steps"]
    few = f"{steps[0]},{steps[-1]}"
    trace("run", copy, *FEW, "--no-language", "--steps", few)
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("neurons"))
    monkeypatch.undo()
    trace("run", other, *FEW, "--no-language", "--steps", few)
    same(copy, other)


def test_report_show_and_figures(traced, tmp_path):
    run, said = traced
    text = trace("report", run, "--figures", tmp_path / "figures")
    assert max(map(len, text.splitlines())) <= 80
    assert "r, same index" in text
    assert "null: best other index" in text
    figures = ("identity", "loss", "onsets", "layers", "distances", "changes")
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"{name}.svg" for name in figures}
    facts = json.loads(trace("report", run, "--json"))
    assert facts["steps"] == said["steps"]
    assert facts["layers"]["0"]["r_reference"][-1] == pytest.approx(1)
    living = next(
        r for r in TraceFolder(run).read_formation().to_pylist() if r["layer"] == 0 and r["n_active"] >= 5
    )
    name = f"0:{living['neuron']}"
    assert "onsets" in trace("show", run, name)
    shown = json.loads(trace("show", run, name, "--json"))
    assert [row["step"] for row in shown["steps"]] == said["steps"]
    assert topklm.trace(run).neuron(name).words(said["steps"][-1])


def test_a_run_against_itself_matches_by_index(traced, tmp_path):
    run, said = traced
    facts = json.loads(trace("report", run, "--against", run, "--json"))
    (matched,) = facts["matched"]
    assert [row["step"] for row in matched["rows"] if row["layer"] == 0] == said["steps"]
    assert all(row["matched"] == pytest.approx(1) for row in matched["rows"])
    assert all(row["same_index"] == pytest.approx(1) for row in matched["rows"])
    assert max(row["matched_shifted"] for row in matched["rows"]) < 0.9
    found = topklm.trace(run).against(topklm.trace(run))
    np.testing.assert_allclose(found["matched"], 1)


def test_bad_input_is_refused_in_one_line(traced, tmp_path, finished_run):
    run, said = traced
    steps = ", ".join(map(str, said["steps"]))
    assert f"there is no checkpoint 3; there are {steps}" in refused("run", run, "--steps", "0,3")
    assert "numbers with commas" in refused("run", run, "--steps", "0,x")
    assert "--steps = 5: must be two or more" in refused("run", run, "--steps", "5")
    assert "must be one of the steps" in refused("run", run, "--steps", "0,5", "--reference", "10")
    assert "--min-tokens = 30 or more" in refused("run", run, "--tokens", "10")
    assert "is for Base LMs" in refused("run", run, "--dictionary", "coordinates")
    assert "--layers = 9" in refused("run", run, "--layers", "0,9")
    assert "with n tokens" in refused("run", run, "--tokens", "300", "--min-tokens", "5", "--no-language")
    assert "copy the run folder" in refused("run", "gs://bucket/run")
    assert "there is no trace; run topklm trace run" in refused("report", finished_run)
    assert "there is no trace" in refused("report", run, "--against", finished_run)
    assert "there is no such run folder" in refused("report", run, "--against", tmp_path / "nowhere")
    assert "--breaks = 2: must be at most 1, for" in refused("report", run, "--breaks", "2")
    assert "NEURON = 7:0: must be of layers" in refused("show", run, "7:0")
    assert "LAYER:NEURON" in refused("show", run, "7")
    assert "not a run folder" in refused("run", tmp_path)


def base(folder, **model):
    texts = write_documents(folder / "some.jsonl", sentences(3, 120))
    data = DataConfig(source=str(texts), dir=str(folder / "datasets"), vocab_size=300, heldout_fraction=0.3)
    shape = {"n_nontopk": 2, "d_model": 16, "d_mlp": 16, "vocab_size": 300, **model}
    config = dataclasses.replace(
        saved_runs.CONFIG, model=dataclasses.replace(saved_runs.MODEL, **shape), data=data
    )
    tokenizer = prepare(data, lambda line: None).tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_runs, "tokenizer", lambda: tokenizer)
        saved_runs.save(folder / "village", [3, 7], config)
    return folder / "village"


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    return base(tmp_path_factory.mktemp("base"))


def test_a_base_lm_needs_a_dictionary_and_is_told_which_there_are(base_run):
    said = refused("run", base_run, *FEW)
    assert all(name in said for name in ("coordinates", "sae-fresh", "sae-same-seed", "sae-chained"))


def test_coordinates_of_a_base_lm_are_cut_to_the_largest(base_run):
    trace("run", base_run, *FEW, "--no-language", "--dictionary", "coordinates", "--topk-k", 4)
    folder = TraceFolder(base_run, "trace-coordinates")
    assert folder.steps() == [0, 3, 7]
    store = Store(folder.store(7))
    events = sum(len(store.block(layer, 0, 16).values) for layer in (0, 1))
    assert events <= 4 * 2 * store.n_tokens
    assert folder.settings().keep == 4
    assert folder.read("layers")["carried"].null_count < folder.read("layers").num_rows
    assert "one-to-one match" in trace("report", base_run, "--dictionary", "coordinates")
    assert "there is no trace, but --dictionary coordinates;" in refused("report", base_run)


def test_autoencoders_of_each_checkpoint_are_made_fresh_or_in_a_chain(base_run):
    made = {}
    for name in ("sae-fresh", "sae-chained"):
        flags = "--dictionary", name, "--layers", 1, "--sae-tokens", 3000, "--topk-k", 4
        trace("run", base_run, *FEW, "--no-language", *flags, "--steps", "0,7")
        folder = TraceFolder(base_run, f"trace-{name}")
        assert folder.settings().layers == (1,)
        made[name] = [Dictionary.load(folder.dictionary(step)) for step in (0, 7)]
        assert folder.read("neurons")["r_matched"].null_count < folder.read("neurons").num_rows
    facts = {name: [(d.facts["seed"], d.facts["after_step"]) for d in of] for name, of in made.items()}
    assert facts["sae-fresh"] == [(0, None), (7, None)]
    assert facts["sae-chained"] == [(0, None), (0, 0)]
    first, chained = ([d.decoder[0] for d in made[name]] for name in ("sae-fresh", "sae-chained"))
    np.testing.assert_array_equal(first[0], chained[0])
    # Of unit rows: those of a chain stay near, those from another start do not.
    near = [np.einsum("md,md->m", *of).mean() for of in (chained, first)]
    assert near[0] > near[1] + 0.3
    assert "no step is added to a chain" in refused("run", base_run, *FEW, "--no-language", *flags)


def test_a_checkpoint_that_diverged_is_named(tmp_path):
    run = base(tmp_path)
    import_nan(run, 3)
    said = refused("run", run, *FEW, "--no-language", "--dictionary", "coordinates")
    assert "step 3: activations or losses are NaN" in said


def import_nan(run, step):
    """Writes the checkpoint of a step again with a parameter that is NaN."""
    from topklm.checkpoint.step_folder import FACTS, PARAMS, write_checkpoint  # noqa: PLC0415

    model = topklm.load(run, step=step)
    params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.nan), model.params)
    facts = {"config": model.config.to_dict(), "tokenizer_sha256": model.tokenizer.sha256, "step": step}
    shutil.rmtree(run / "checkpoints" / str(step))
    write_checkpoint(run / "checkpoints", step, {PARAMS: params}, {FACTS: facts})


@pytest.mark.slow  # a process that imports everything and compiles
def test_after_a_kill_the_trace_ends_with_the_same_bytes(traced, tmp_path, trainer):
    run, _ = traced
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("neurons"))
    arguments = [*map(str, (*FEW, "--no-language", "--keep-events"))]
    process = trainer.start_python("-m", "topklm", "trace", "run", str(copy), *arguments)
    folder = TraceFolder(copy)
    while len(folder.steps()) < 2 and process.exit_code is None:
        time.sleep(0.01)
    process.kill()
    assert 2 <= len(folder.steps()) < len(TraceFolder(run).steps())
    trace("run", copy, *arguments)

    def content(path):
        return {
            p.relative_to(path): p.read_bytes() for p in sorted(path.rglob("*")) if p.suffix == ".parquet"
        }

    assert content(copy / "neurons") == content(run / "neurons")
