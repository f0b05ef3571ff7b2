"""A bucket on loopback, which gcsfs, google-cloud-storage and TensorStore take for Google's."""

from collections.abc import Iterator
import contextlib

import gcs
import pytest


@pytest.fixture
def bucket(monkeypatch) -> Iterator[gcs.Bucket]:
    """The bucket gs://bucket, empty."""
    bucket = gcs.Bucket()
    with bucket.served() as url, contextlib.ExitStack() as stack:
        stack.callback(gcs.forget_connections)
        for name, value in gcs.environment(url).items():
            monkeypatch.setenv(name, value)
        yield bucket
