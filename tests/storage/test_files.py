from pathlib import Path
import subprocess
import sys

import pytest

from topklm.errors import UserError
from topklm.storage.files import absolute, as_path, is_bucket, new_folder, write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_local_path_stays_a_local_path(tmp_path, monkeypatch):
    for name in ("runs/x", str(tmp_path), tmp_path):
        path = as_path(name)
        assert isinstance(path, Path)
        assert str(path) == str(name)
        assert not is_bucket(path)
    monkeypatch.chdir(tmp_path)
    assert str(absolute(Path("runs/x"))) == f"{tmp_path}/runs/x"


def test_a_path_into_a_bucket_keeps_its_slashes():
    path = as_path("gs://bucket/runs/x/")
    assert str(path / "config.json") == "gs://bucket/runs/x/config.json"
    assert is_bucket(path)
    assert as_path(path) == absolute(path) == path


@pytest.mark.parametrize("name", ["gs://", "gs://bucket", "gs://bucket/", "gs:///runs"])
def test_a_bucket_without_a_folder_is_refused(name):
    with pytest.raises(UserError, match=rf"^--workdir = '{name}': must name a folder in a bucket"):
        as_path(name, "--workdir")


@pytest.mark.parametrize("name", ["s3://bucket/x", "https://example.com/x", "hdfs://x/y"])
def test_other_stores_are_refused(name):
    with pytest.raises(
        UserError, match=rf"^--workdir = '{name}': must be a local folder or gs://BUCKET/FOLD"
    ):
        as_path(name, "--workdir")


# Begins a folder and waits to be killed: `SCRIPT PATH`.
BEGINS_A_FOLDER = """
import pathlib, sys, time
from topklm.storage.files import new_folder

with new_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    print("begun", flush=True)
    time.sleep(600)
"""


def test_folder_of_a_killed_process_is_removed_and_that_of_a_living_one_stays(tmp_path):
    path = tmp_path / "name[1]"
    command = [sys.executable, "-c", BEGINS_A_FOLDER, str(path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in processes] == ["begun\n"] * 2
        processes[0].kill()
        processes[0].wait()
        (tmp_path / ".other.1.tmp").mkdir()
        assert len(list(tmp_path.glob(".name*"))) == 2
        with new_folder(path) as folder:
            (folder / "whole").write_text("written")
        assert len(list(tmp_path.glob(".name*"))) == 1
        assert [file.name for file in path.iterdir()] == ["whole"]
        assert (tmp_path / ".other.1.tmp").exists()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
