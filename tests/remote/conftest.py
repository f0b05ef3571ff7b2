"""A bucket on loopback, which gcsfs, google-cloud-storage and TensorStore take for Google's."""

from collections.abc import Iterator
import contextlib
import tempfile

import gcs
import pytest


@pytest.fixture
def bucket(monkeypatch, tmp_path) -> Iterator[gcs.Bucket]:
    """The bucket gs://bucket, empty."""
    # Processes that are killed leave their spool behind.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bucket = gcs.Bucket()
    with bucket.served() as url, contextlib.ExitStack() as stack:
        stack.callback(gcs.forget_connections)
        for name, value in gcs.environment(url).items():
            monkeypatch.setenv(name, value)
        yield bucket
