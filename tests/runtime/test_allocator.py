"""A process starts itself again with tcmalloc, once, with the same command; the user can say otherwise."""

import os
from pathlib import Path
import shutil
import subprocess
import sys

import pytest

from topklm.runtime import process

PROGRAM = """
import os, pathlib, sys
from topklm import errors
from topklm.runtime import process

def main():
    print("started", os.getpid(), *sys.argv[1:], flush=True)
    process.restart_with_tcmalloc()
    print("mapped:", "libtcmalloc" in pathlib.Path("/proc/self/maps").read_text())
    print(process.keep_freed_memory())

sys.exit(errors.guarded(main))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")


@pytest.fixture
def environment(tmp_path):
    """Lets a tcmalloc be found: another small library under its name."""
    maps = Path("/proc/self/maps").read_text().split()
    library = next(word for word in maps if "/libm.so" in word or "/libm-" in word)
    (tmp_path / "lib").mkdir()
    shutil.copy(library, tmp_path / "lib" / "libtcmalloc_minimal.so.4")
    outside = {
        name: v for name, v in os.environ.items() if name not in ("LD_PRELOAD", process.ALLOCATOR_VARIABLE)
    }
    return {**outside, "CONDA_PREFIX": str(tmp_path)}


def run(environment, *arguments):
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)


def test_the_same_command_starts_again_once_as_the_same_process(environment):
    done = run(environment, "--flag", "two words")
    assert done.returncode == 0, done.stderr
    first, second, mapped, name = done.stdout.splitlines()
    assert first == second
    assert first.endswith("--flag two words")
    assert mapped == "mapped: True"
    assert name.startswith("libtcmalloc")


@pytest.mark.parametrize("choice", ["glibc", "system"])
def test_the_c_librarys_allocator_can_be_kept(environment, choice):
    started, mapped, name = run({**environment, process.ALLOCATOR_VARIABLE: choice}).stdout.splitlines()
    assert started.startswith("started")
    assert mapped == "mapped: False"
    assert ("glibc" in name) == (choice == "glibc")


def test_another_allocator_that_was_preloaded_is_left_alone(environment, tmp_path):
    library = tmp_path / "lib" / "libjemalloc.so.2"
    shutil.copy(tmp_path / "lib" / "libtcmalloc_minimal.so.4", library)
    lines = run({**environment, "LD_PRELOAD": str(library)}).stdout.splitlines()
    assert lines[1:] == [
        "mapped: False",
        f"libjemalloc.so.2 ({process.ALLOCATOR_VARIABLE}=system turns it off)",
    ]


def test_an_unknown_choice_ends_in_one_line(environment):
    done = run({**environment, process.ALLOCATOR_VARIABLE: "hoard"})
    assert done.returncode == 2
    assert (
        done.stderr == "error: TOPKLM_ALLOCATOR = hoard: must be one of tcmalloc, glibc, system, or not set\n"
    )


def test_a_tcmalloc_that_is_asked_for_must_be_there(monkeypatch):
    monkeypatch.setattr(process, "_FOLDERS", ("/nonexistent",))
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setenv(process.ALLOCATOR_VARIABLE, "tcmalloc")
    with pytest.raises(process.UserError, match="not installed"):
        process.restart_with_tcmalloc()
