"""Shared by the explorer's tests: one explored run, and a server of it."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import shutil

import explored_run
import pytest
from serve_site import Site, serving

from topklm.explorer.finding import Index
from topklm.explorer.neuron_data import NeuronData
from topklm.neurons import NeuronsFolder


@pytest.fixture(scope="session")
def explored(tmp_path_factory) -> NeuronsFolder:
    """Returns a run that is not to be changed."""
    return explored_run.make(tmp_path_factory.mktemp("explored") / "village")


@pytest.fixture
def explored_copy(explored, tmp_path) -> NeuronsFolder:
    """Returns a copy that may be changed; labels written there go nowhere else."""
    ignored = shutil.ignore_patterns(explored.index.name)
    return NeuronsFolder(
        Path(shutil.copytree(explored.run, tmp_path / "village", ignore=ignored)), explored.step
    )


@pytest.fixture(scope="module")
def source(explored) -> NeuronData:
    return NeuronData(explored)


@pytest.fixture(scope="module")
def index(source) -> Iterator[Index]:
    with contextlib.closing(Index(source, lambda line: None)) as opened:
        yield opened


@pytest.fixture(scope="module")
def site(explored, tmp_path_factory) -> Iterator[Site]:
    """Serves a copy, whose labels may be changed."""
    run = shutil.copytree(explored.run, tmp_path_factory.mktemp("site") / "village")
    with serving(NeuronData(NeuronsFolder(Path(run), explored.step))) as served:
        yield served
