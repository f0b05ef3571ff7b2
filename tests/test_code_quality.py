"""The style and type checks are tests too."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


RUFF = [["ruff", "check"], ["ruff", "format", "--check"]]


def run(tool, folder):
    command = [sys.executable, "-m", *tool]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("tool", RUFF, ids=" ".join)
def test_the_code_is_clean(tool):
    result = run(tool, ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow  # most of a minute; a step of its own in .ci/run
def test_types_agree(tmp_path):
    # mypy takes any folder in the current one for a package, also one that a run has left in a clone.
    for name in ("pyproject.toml", "topklm", "configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    result = run(["mypy", "--cache-dir", str(ROOT / ".mypy_cache")], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("tool", RUFF, ids=" ".join)
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
    result = run(tool, clone)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No Python files" not in result.stderr
