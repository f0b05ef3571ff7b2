"""The style and type checks are tests, so that one command checks everything."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("tool", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_the_code_is_clean(tool):
    result = subprocess.run(
        [sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("tool", [["ruff", "check"], ["ruff", "format", "--check"]], ids=" ".join)
def test_what_runs_leave_in_a_clone_does_not_decide_whether_it_is_clean(tmp_path, tool):
    clone = tmp_path / "clone"
    (clone / "tests").mkdir(parents=True)
    for name in ("pyproject.toml", "tests/conftest.py", "tests/data/test_sources.py"):
        shutil.copy(ROOT / name, clone / "tests" if name.startswith("tests") else clone)
    # Named as packages that these files import, and holding Python that nobody has tidied up.
    for name in ("datasets", "runs", "numpy", "pyarrow", "pytest", "hypothesis", "jax", "build/lib", "mine"):
        (clone / name).mkdir(parents=True)
        (clone / name / "__init__.py").write_text("import sys, os\n")
    (clone / "scratch.py").write_text("import sys, os\n")
    (clone / "scratch.ipynb").write_text("no notebook")
    result = subprocess.run(
        [sys.executable, "-m", *tool], cwd=clone, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No Python files" not in result.stderr
