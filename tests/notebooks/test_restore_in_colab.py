"""The notebook from a clean kernel on one device, on a run that a mesh of eight devices trained and saved."""

import dataclasses
from html.parser import HTMLParser
import json
import re
import subprocess
import sys

from executing import NOTEBOOKS, assert_all_ran, assert_committed_without_outputs, execute, outputs, said
from helpers import devices
import jax
import nbformat
import numpy as np
import pytest

import topklm
from topklm.model import transformer

NOTEBOOK = NOTEBOOKS / "restore_in_colab.ipynb"
MESH = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}

# What the cells have made, for this process to compare with.
REPORTS = """
import json
print(json.dumps({
    "devices": jax.device_count(),
    "text": text,
    "elsewhere": model.active_neurons(tokens).neuron(layer, neuron).values.tolist(),
    "sentence": SENTENCE,
    "prompt": PROMPT,
    "active": list(active),
    "followed": [layer, neuron],
    "values": active.neuron(layer, neuron).values.tolist(),
}))
"""


@pytest.fixture(scope="module")
def run_of_eight_devices(tmp_path_factory, trainer):
    """A run folder that the trainer left behind after a few steps."""
    run = tmp_path_factory.mktemp("eight") / "run"
    settings = {**MESH, "model.n_layers": 3, "train.steps": 6, "eval.every_steps": 0}
    settings["model.context_length"] = 64  # tokens, for the sentence has more than 32
    process = trainer.start(run, settings, environment=devices(8))
    assert process.finish() == 0, process.errors
    return run


@pytest.fixture(scope="module")
def executed(tmp_path_factory, trainer, run_of_eight_devices):
    """The notebook's cells after they ran, by id."""
    place = tmp_path_factory.mktemp("notebook")
    return execute(NOTEBOOK.name, run_of_eight_devices, place, trainer, REPORTS)


@pytest.fixture(scope="module")
def report(executed):
    return json.loads(said(executed["report"]))


@pytest.fixture(scope="module")
def model(run_of_eight_devices):
    return topklm.load(run_of_eight_devices)


@pytest.fixture(scope="module")
def dense_layers(model, report):
    """What the TopK layers hand on at the notebook's sentence, [S, T, D], from what enters them."""

    def entering(params, tokens):
        config = dataclasses.replace(model.config.model, topk_backend="lax", layer_stack="scanned")
        return transformer.bind(config, params).hidden(tokens, capture=lambda h, u, h_next: u)[1]

    tokens = model.to_tokens(report["sentence"])
    u = np.asarray(jax.jit(entering)(model.params, tokens))[: model.config.model.n_topk_layers, 0]
    _, winners = jax.lax.top_k(u, model.config.model.topk_k)
    kept = np.zeros_like(u)
    np.put_along_axis(kept, np.asarray(winners), np.take_along_axis(u, np.asarray(winners), -1), -1)
    return np.maximum(kept, 0)


class Cells(HTMLParser):
    """The rows of an HTML table as lists of texts, and the values that show on hover."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.titles = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


@pytest.mark.slow
def test_every_cell_runs_from_top_to_bottom_without_an_error(executed):
    assert_all_ran(executed)


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_is_opened_on_one(executed, report, run_of_eight_devices):
    saved = json.loads((run_of_eight_devices / "config.json").read_text())
    assert {name: saved["mesh"][name.removeprefix("mesh.")] for name in MESH} == MESH
    assert report["devices"] == 1
    assert "fsdp=4, context=1, tensor=2" in said(executed["devices"])
    assert str(run_of_eight_devices) in outputs(executed["open"], "text/html")
    assert "keeps 8 of 32 neurons in the first 2 layers" in outputs(executed["open"], "text/html")
    assert re.search(r"blocks\.mlp\.up\.kernel +\(3, 32, 64\)", said(executed["devices"]))


@pytest.mark.slow
def test_the_text_is_what_the_model_writes_here(executed, report, model):
    expected = model.generate(report["prompt"], max_new_tokens=40, temperature=0.7, seed=0)
    assert report["text"] == expected
    assert said(executed["generate"]) == expected + "\n"


@pytest.mark.slow
def test_the_neuron_is_looked_for_at_the_tokens_that_were_drawn(report, model):
    made = model.generate(report["prompt"], max_new_tokens=40, temperature=0.7, seed=0, return_tokens=True)
    layer, neuron = report["followed"]
    expected = model.run_with_cache(made.tokens)[1]["topk", layer][0, :, neuron]
    np.testing.assert_allclose(report["elsewhere"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_active_neurons_are_those_of_an_independent_computation(report, dense_layers):
    for position, active in enumerate(report["active"]):
        found = {(layer, neuron): value for layer, neuron, value in active}
        assert len(found) == len(active)
        expected = dense_layers[:, position]
        assert set(found) == set(zip(*np.nonzero(expected), strict=True))
        np.testing.assert_allclose(list(found.values()), [expected[at] for at in found], rtol=1e-4, atol=1e-6)
    assert len(report["active"]) == dense_layers.shape[1]


@pytest.mark.slow
def test_the_table_shows_each_token_with_its_strongest_neurons(executed, model, report, dense_layers):
    table = Cells(outputs(executed["active"], "text/html"))
    assert table.rows[0] == ["token", "layer 0", "layer 1"]
    assert [row[0] for row in table.rows[1:]] == model.to_str_tokens(report["sentence"])
    for position, row in enumerate(table.rows[1:]):
        for layer, cell in enumerate(row[1:]):
            expected = dense_layers[layer, position]
            n_active = np.count_nonzero(expected)
            shown = [int(number) for number in re.findall(r"(\d+) [\d.e-]+", cell)]
            assert shown == np.argsort(-expected, kind="stable")[: min(n_active, 5)].tolist()
            assert ("+" in cell) == (n_active > 5)


@pytest.mark.slow
def test_the_picture_and_the_arrays_are_there(executed):
    assert len(outputs(executed["picture"], "image/png")) > 1000
    assert "blocks.1.hook_topk" in said(executed["cache"])


@pytest.mark.slow
def test_the_neuron_that_is_followed_is_the_strongest(executed, report, dense_layers):
    layer, neuron = report["followed"]
    assert dense_layers[layer, 1:, neuron].max() == dense_layers[:, 1:].max()
    np.testing.assert_allclose(report["values"], dense_layers[layer, :, neuron], rtol=1e-4, atol=1e-6)
    for cell in ("follow", "elsewhere"):
        assert f"layer {layer}, neuron {neuron}: active at" in outputs(executed[cell], "text/html")


# What is committed.


def test_the_committed_notebook_is_valid_and_holds_no_outputs():
    assert_committed_without_outputs(NOTEBOOK.name)


INSTALLS = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell

sys.modules["topklm"] = None  # as if it were not installed
cell = json.loads(sys.argv[1])
shell = InteractiveShell.instance()
shell.register_magic_function(lambda line: print("pip", line), "line", "pip")
result = shell.run_cell(cell)
sys.exit(0 if result.success else 1)
"""


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "git+https://example.org/topklm.git",
            'pip install --quiet "topklm[gcs] @ git+https://example.org/topklm.git" matplotlib',
        ),
        ("", "topklm is not installed: set INSTALL_FROM"),
    ],
)
def test_where_topklm_is_missing_it_is_installed_from_the_field_or_the_field_is_named(tmp_path, source, said):
    (cell,) = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.id == "install"]
    filled = cell.source.replace('INSTALL_FROM = ""', f"INSTALL_FROM = {source!r}")
    run = subprocess.run(
        [sys.executable, "-c", INSTALLS, json.dumps(filled)],
        env={"IPYTHONDIR": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said in run.stdout, run.stdout + run.stderr
    assert run.returncode == (0 if source else 1)
