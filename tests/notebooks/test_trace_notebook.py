"""The notebook about traces from a clean kernel, against the tables that it made."""

import json
import shutil

from executing import assert_all_ran, assert_committed_without_outputs, execute, outputs, said
import numpy as np
import pytest

import topklm

NOTEBOOK = "trace.ipynb"
REPORTS = """
import json
print(json.dumps({"onsets": np.nan_to_num(onsets, nan=-1).tolist(), "neuron": [LAYER, NEURON]}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, finished_run):
    """A copy, which the notebook traces."""
    return shutil.copytree(finished_run, tmp_path_factory.mktemp("traced") / "run")


@pytest.fixture(scope="module")
def executed(tmp_path_factory, trainer, run):
    """The notebook's cells after they ran, by id."""
    place = tmp_path_factory.mktemp("notebook")
    return execute(NOTEBOOK, run, place, trainer, REPORTS, {"TOPKLM_TOKENS": "600"})


@pytest.mark.slow
def test_every_cell_runs_from_top_to_bottom_without_an_error(executed):
    assert_all_ran(executed)


@pytest.mark.slow
def test_the_onsets_and_the_neuron_are_those_of_the_tables(executed, run):
    report, trace = json.loads(said(executed["report"])), topklm.trace(run)
    rows = trace.table("formation").to_pylist()
    expected = [-1 if row["onset_50"] is None else row["onset_50"] for row in rows]
    np.testing.assert_array_equal(np.ravel(report["onsets"]), expected)
    layer, neuron = report["neuron"]
    turns = {(row["layer"], row["neuron"]): row["turnovers"] for row in rows if row["turnovers"] is not None}
    assert turns[layer, neuron] == max(turns.values())
    assert f"neuron {layer}:{neuron}, onset" in outputs(executed["life"], "text/plain")


@pytest.mark.slow
def test_the_figures_are_there(executed):
    for cell in ("open", "loss", "layers", "base"):
        data = [output.data for output in executed[cell].outputs]
        assert any("<svg" in "".join(part.values()) for part in data), cell
    for cell in ("onset", "life-plot"):
        assert len(outputs(executed[cell], "image/png")) > 1000
    assert "r_written" in said(executed["carried"])


def test_the_committed_notebook_is_valid_and_holds_no_outputs():
    assert_committed_without_outputs(NOTEBOOK)
