"""The notebook about steering from a clean kernel, against the library called here."""

import json
import re

from executing import assert_all_ran, assert_committed_without_outputs, execute, outputs, said
import jax
import numpy as np
import pytest

import topklm

REPORTS = """
import contextlib, io, json
with contextlib.redirect_stdout(io.StringIO()) as written:  # where widgets keep it, nobody sees it here
    write()
print(json.dumps({
    "neuron": [LAYER, NEURON],
    "strongest": strongest,
    "prompt": PROMPT,
    "sentence": SENTENCE,
    "gain": gain.tolist(),
    "change": change.tolist(),
    "written": written.getvalue(),
}))
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory, trainer, finished_run):
    """The notebook's cells after they ran, by id."""
    return execute("steer.ipynb", finished_run, tmp_path_factory.mktemp("notebook"), trainer, REPORTS)


@pytest.fixture(scope="module")
def report(executed):
    return json.loads(said(executed["report"]))


@pytest.fixture(scope="module")
def model(finished_run):
    return topklm.load(finished_run)


@pytest.mark.slow
def test_every_cell_runs_from_top_to_bottom_without_an_error(executed):
    assert_all_ran(executed)


@pytest.mark.slow
def test_the_neuron_is_the_strongest_of_the_last_layer_with_topk(report, model):
    layer, neuron = report["neuron"]
    assert layer == model.config.model.n_topk_layers - 1
    _, cache = model.run_with_cache(report["sentence"])
    dense = np.asarray(cache[f"blocks.{layer}.hook_topk"])[0, 1:]
    assert dense.max() == pytest.approx(dense[:, neuron].max(), rel=1e-5)
    assert report["strongest"] == pytest.approx(dense[:, neuron].max(), rel=1e-5)


@pytest.mark.slow
def test_the_gain_is_that_of_a_hook_that_sets_the_neuron(report, model):
    layer, neuron = report["neuron"]

    def clamp(h, _name):
        return h.at[..., neuron].set(report["strongest"])

    steered = model.run_with_hooks(report["prompt"], [(f"blocks.{layer}.hook_topk", clamp)])[0, -1]
    plain = model(report["prompt"])[0, -1]
    expected = jax.nn.log_softmax(steered) - jax.nn.log_softmax(plain)
    np.testing.assert_allclose(report["gain"], expected, atol=1e-4)


@pytest.mark.slow
def test_losing_the_neuron_changes_nothing_before_it_was_active(report, model):
    layer, neuron = report["neuron"]
    _, cache = model.run_with_cache(report["sentence"])
    first = np.flatnonzero(np.asarray(cache[f"blocks.{layer}.hook_topk"])[0, :, neuron])[0]
    np.testing.assert_allclose(report["change"][:first], 0, atol=1e-5)
    assert len(report["change"]) == len(model.to_str_tokens(report["sentence"])) - 1


@pytest.mark.slow
def test_the_texts_and_the_picture_are_there(executed, model, report):
    assert len(outputs(executed["dose"], "image/png")) > 1000
    layer, neuron = report["neuron"]
    plain = model.generate(report["prompt"], max_new_tokens=40, temperature=0.7)
    steer = {(layer, neuron): 0.5 * report["strongest"]}
    steered = model.generate(report["prompt"], max_new_tokens=40, temperature=0.7, steer=steer)
    assert report["written"] == f"left alone:\n{plain}\n\nclamp, 0.5:\n{steered}\n"
    assert "application/vnd.jupyter.widget-view+json" in json.dumps(executed["write"].outputs)
    assert re.search(r'"mode": "force"', said(executed["modes"]))


def test_the_committed_notebook_is_valid_and_holds_no_outputs():
    assert_committed_without_outputs("steer.ipynb")
