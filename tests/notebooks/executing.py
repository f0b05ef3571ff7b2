"""Runs a notebook as Jupyter would, from a clean kernel on one device, in a process of its own."""

import json
import sys

from helpers import ROOT, devices
import nbformat

NOTEBOOKS = ROOT / "notebooks"
# For each cell; other work may share the cores. An answer can get lost between ipykernel 7 and nbclient: the
# kernel then idles while the client waits. So the notebook has a second try, in a kernel of its own.
PATIENCE_SECONDS = (90, 200)

# `argv` is that of a kernel which nobody has used or configured before.
_EXECUTES = f"""
import sys
import nbclient, nbformat

for patience in {PATIENCE_SECONDS}:
    notebook = nbformat.read(sys.argv[1], as_version=4)
    client = nbclient.NotebookClient(
        notebook, kernel_name="clean", timeout=patience, startup_timeout=patience,
        allow_errors=True, resources={{"metadata": {{"path": sys.argv[3]}}}},
    )
    try:
        client.execute()
        break
    except nbclient.exceptions.CellTimeoutError:
        if patience == {PATIENCE_SECONDS[-1]}:
            raise
nbformat.write(notebook, sys.argv[2])
"""


def execute(name, run, place, trainer, reports, settings=None):
    """The cells of a committed notebook after they ran on a run folder, by id; `reports` is a last cell.

    `settings` are environment variables that come before the notebook's fields.
    """
    kernel = place / "jupyter" / "kernels" / "clean"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "clean", "language": "python"})
    )
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(reports, id="report"))
    nbformat.write(notebook, place / "before.ipynb")
    environment = {
        "TOPKLM_RUN": str(run),
        **(settings or {}),
        **devices(1),
        "JUPYTER_PATH": str(place / "jupyter"),
        "JUPYTER_RUNTIME_DIR": str(place / "runtime"),
        "IPYTHONDIR": str(place / "ipython"),
    }
    files = [str(place / name) for name in ("before.ipynb", "after.ipynb")]
    process = trainer.start_python("-c", _EXECUTES, *files, str(place), environment=environment)
    assert process.finish() == 0, process.errors
    return {cell.id: cell for cell in nbformat.read(place / "after.ipynb", as_version=4).cells}


def outputs(cell, mime):
    """What a cell shows in one form."""
    return "".join(output.data[mime] for output in cell.outputs if mime in output.get("data", {}))


def said(cell):
    """What a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def assert_all_ran(executed):
    """Every code cell, from top to bottom, without an error or a warning."""
    code = [cell for cell in executed.values() if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert not [output for output in cell.outputs if output.output_type == "error"], cell.outputs
        assert not [output for output in cell.outputs if output.get("name") == "stderr"], cell.outputs


def assert_committed_without_outputs(name):
    """A notebook in the repository is valid and as if never run."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
