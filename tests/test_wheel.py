"""A wheel holds all that its commands need, away from any clone."""

import os
from pathlib import Path
import shutil
import site
import subprocess
import sys

from helpers import TINY, sentences, write_documents
import pytest

import topklm

ROOT = Path(__file__).parents[1]
SETTINGS = {**TINY, "model.n_layers": 4, "train.steps": 1, "data.source": "mine.jsonl"}


def called(*command, **options):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TOPKLM_COMPILATION_CACHE": "off"}
    ended = subprocess.run(
        [*map(str, command)], env=variables, capture_output=True, text=True, check=False, **options
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", "77")
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    for name in ("topklm", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "-q", "-w", place, source]
    called(sys.executable, "-m", "pip", *build)
    [made] = place.glob("*.whl")
    return made


def environment(folder, python, wheel, *options):
    """A fresh virtual environment that holds the wheel; returns its folder of commands."""
    called(python, "-m", "venv", folder, "--without-pip")
    commands = folder / "bin"
    called(sys.executable, "-m", "pip", "-q", "--python", commands / "python", "install", *options, wheel)
    return commands


def check_commands(commands, folder):
    """Runs them in an empty folder, on a text of its own."""
    write_documents(folder / "mine.jsonl", sentences(seed=3, n_documents=60))
    flags = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    for config in ("small", "configs/small.py:base"):
        output = called(commands / "topklm", "train", f"--config={config}", *flags, cwd=folder)
        assert "step 1/1 | loss" in output
    assert (folder / "runs/small/checkpoints/1").is_dir()
    assert (folder / "runs/small-base/metrics.jsonl").is_file()
    assert called(commands / "topklm", "--version", cwd=folder).startswith(f"topklm {topklm.__version__}\n")
    where = called(commands / "python", "-c", "import topklm; print(*topklm.__path__)", cwd=folder).strip()
    assert Path(where).is_relative_to(commands.parent)
    assert {path.name for path in Path(where, "configs").glob("*.py")} == {
        path.name for path in (ROOT / "configs").glob("*.py")
    }
    assert Path(where, "py.typed").is_file()


def test_the_commands_of_a_wheel_run_in_an_empty_folder(tmp_path, wheel):
    commands = environment(tmp_path / "venv", sys.executable, wheel, "--no-deps", "--no-index")
    # The packages of this environment, and not what their own .pth files add, such as a clone of topklm.
    [packages] = (tmp_path / "venv/lib").glob("python*/site-packages")
    shared = [*site.getsitepackages(), site.getusersitepackages()]
    (packages / "shared.pth").write_text("\n".join(shared) + "\n")
    (tmp_path / "empty").mkdir()
    check_commands(commands, tmp_path / "empty")


def newer_python():
    """A Python 3.13 other than this one, if there is any that starts."""
    named = shutil.which("python3.13"), *Path.home().glob(".pyenv/versions/3.13*/bin/python3")
    for python in filter(None, () if sys.version_info[:2] == (3, 13) else named):
        if not subprocess.run([python, "-c", "import venv"], capture_output=True, check=False).returncode:
            return python
    return None


@pytest.mark.slow  # installs all that topklm depends on
@pytest.mark.skipif(newer_python() is None, reason="there is no Python 3.13 here")
def test_the_commands_of_a_wheel_run_with_python_3_13(tmp_path, wheel):
    commands = environment(tmp_path / "venv", newer_python(), wheel)
    (tmp_path / "empty").mkdir()
    check_commands(commands, tmp_path / "empty")
