"""One address goes into the notebooks and their badges."""

import importlib.util
import shutil

from executing import NOTEBOOKS
import nbformat
import pytest

SPEC = importlib.util.spec_from_file_location("publish", NOTEBOOKS / "publish.py")
publish = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(publish)


def test_an_address_is_written_everywhere_and_may_be_changed(tmp_path):
    folder = shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    for owner in ("one", "two"):
        publish.publish(f"https://github.com/{owner}/topklm/", folder)
        page = (folder / "README.md").read_text()
        for notebook in folder.glob("*.ipynb"):
            cells = nbformat.read(notebook, as_version=4).cells
            assert any(f'INSTALL_FROM = "git+https://github.com/{owner}/topklm"' in c.source for c in cells)
            colab = f"colab.research.google.com/github/{owner}/topklm/blob/main/notebooks/{notebook.name})"
            assert page.count(colab) == 1
            assert f"[{notebook.name}]({notebook.name})" in page
    assert "one/topklm" not in page


@pytest.mark.parametrize("address", ["", "github.com/a/b", "https://example.org/a/b", "https://github.com/a"])
def test_another_address_is_refused(address, tmp_path):
    with pytest.raises(SystemExit, match="must be https://"):
        publish.publish(address, tmp_path)
