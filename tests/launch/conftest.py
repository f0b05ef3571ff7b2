"""A small git working tree with the launchers in it, and stand-ins for the programs that they call."""

import os
from pathlib import Path
import shutil
import subprocess

from helpers import ROOT
import pytest
from stand_ins import Stage


@pytest.fixture
def stage(tmp_path):
    """Provides the stand-ins."""
    stage = Stage(tmp_path / "stage")
    yield stage
    stage.end_processes()


@pytest.fixture(scope="session")
def original_tree(tmp_path_factory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "launch", tree / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / ".gitignore").write_text("/datasets/\n")
    (tree / "configs").mkdir()
    (tree / "configs" / "with space.py").write_text("# a config\n")
    (tree / "deleted.py").write_text("# gone\n")
    git = ["git", "-C", str(tree), "-c", "user.name=t", "-c", "user.email=t@t"]
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True, env=environment)
    return tree


@pytest.fixture
def tree(tmp_path, original_tree) -> Path:
    """Makes a working tree with a committed file that is deleted, a new one, and one that git ignores."""
    tree = Path(shutil.copytree(original_tree, tmp_path / "tree"))
    (tree / "deleted.py").unlink()
    (tree / "new.py").write_text("# new\n")
    (tree / "datasets").mkdir()
    (tree / "datasets" / "huge").write_text("not for the workers\n")
    return tree
