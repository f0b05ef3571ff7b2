"""Which links a group of chips has, and what is refused by name."""

import importlib.util
import itertools
import types

import pytest

from topklm.compile_check.check import CHIPS, Topology, find
from topklm.errors import UserError

LINK = CHIPS["v5e"].link_bytes_per_second


def slice_of(*dims):
    """Makes a v5e slice whose devices are only coordinates."""
    places = itertools.product(*map(range, dims))
    devices = tuple(types.SimpleNamespace(coords=(*place, 0)) for place in places)
    return Topology("v5e:made", devices, CHIPS["v5e"], dims, 1)


@pytest.mark.parametrize(
    ("dims", "group", "links"),
    [
        ((16, 16), lambda x, y: y == 0, 2),  # a closed ring, both ways
        ((16, 16), lambda x, y: True, 4),  # two of them
        ((8, 16), lambda x, y: True, 3),  # one ring and a line
        ((8, 8), lambda x, y: y == 0, 1),  # a line
        ((16, 16), lambda x, y: y == 0 and x < 4, 1),  # a part of a ring is a line
        ((16, 16), lambda x, y: y == 0 and x % 4 == 0, 1 / 4),  # four such groups share the links
        ((16, 16), lambda x, y: x < 2 and y < 2, 2),
    ],
)
def test_a_group_has_the_links_of_the_rings_and_lines_it_spans(dims, group, links):
    topology = slice_of(*dims)
    devices = tuple(device for device in topology.devices if group(*device.coords[:2]))
    assert topology.link_bandwidth(devices) == links * LINK


@pytest.mark.parametrize(
    ("chip", "dims", "closed"),
    [
        ("v5e", (16, 16), (True, True)),
        ("v6e", (8, 16), (False, True)),
        ("v5p", (4, 4, 8), (True, True, True)),
        ("v5p", (2, 4, 4), (False, False, False)),
    ],
)
def test_a_slice_wraps_around_where_it_spans_the_pod_or_whole_cubes(chip, dims, closed):
    assert CHIPS[chip].closes_to_rings(dims) == closed


NO_TOPOLOGIES = [
    "v5e",
    "v4:2x2x2",
    "v5e:4by4",
    "gpu:8",
    "",
    "cpu:0",
    "v5e:0x4",
    "v5e:123456x4",
    "v5e:\u0664x4",
]


@pytest.mark.parametrize("name", NO_TOPOLOGIES)
def test_a_name_that_is_no_topology_is_refused_with_examples(name):
    with pytest.raises(UserError, match=r"--topology = .*: must be like v5e:16x16"):
        find(name)


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        ("v5p:4x4", 1, "a v5p slice has 3 dims"),
        ("v5e:32x32", 1, "a v5e pod has 256 chips; use more --slices"),
        ("v5e:4x4", 0, "--slices = 0: must be 1 or more"),
        ("cpu:8", 2, "has no slices"),
        ("cpu:64x64", 1, "at most 1024 virtual devices"),
    ],
)
def test_a_slice_that_cannot_be_is_refused(name, slices, message):
    with pytest.raises(UserError, match=message):
        find(name, slices)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs libtpu.*pip install "topklm\[tpu-compile\]"'):
        find("v5e:4x4")
