from pathlib import Path

import pytest

from topklm.errors import UserError
from topklm.storage.files import absolute, as_path, is_bucket, write_atomically


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
