"""Batches under way: their order, saved states, the seconds waited, and the rows of each process."""

from types import SimpleNamespace

import grain
import jax
import numpy as np
import pytest

from topklm.config import MeshConfig
from topklm.data import stream as prefetch_module
from topklm.data.stream import Feed
from topklm.layout import Layout, make_layout


class CountingStream:
    """Gives 0, 1, 2, ... up to `n`; `taken` is how many were asked for."""

    def __init__(self, n):
        self.n, self.taken = n, 0

    def __next__(self):
        if self.taken == self.n:
            raise StopIteration
        self.taken += 1
        return self.taken - 1

    def get_state(self):
        return {"next_index": self.taken}

    def set_state(self, state):
        self.taken = state["next_index"]


def test_the_next_batches_are_sent_before_they_are_asked_for():
    stream, sent = CountingStream(100), []
    feed = Feed(stream, lambda batch: sent.append(batch) or batch, ahead=2)
    assert sent == []
    assert next(feed) == 0
    assert sent == [0, 1, 2]
    assert next(feed) == 1
    assert sent == [0, 1, 2, 3]


@pytest.mark.parametrize("ahead", [0, 1, 2, 50])
def test_every_batch_of_a_stream_that_ends_is_given_out_once(ahead):
    feed = Feed(CountingStream(7), str, ahead)
    assert list(feed) == list("0123456")
    with pytest.raises(StopIteration):
        next(feed)
    assert feed.state() == {"next_index": 7}


@pytest.mark.parametrize("ahead", [0, 2])
def test_the_state_is_that_of_the_last_batch_given_out(ahead):
    feed = Feed(CountingStream(100), int, ahead)
    assert feed.state() == {"next_index": 0}
    for n in range(1, 20):
        next(feed)
        assert feed.state() == {"next_index": n}


def test_a_feed_goes_on_where_a_state_was_taken_and_forgets_what_was_under_way():
    feed = Feed(CountingStream(100), int)
    feed.set_state({"next_index": 5})
    assert feed.state() == {"next_index": 5}
    assert [next(feed) for _ in range(3)] == [5, 6, 7]
    state = feed.state()
    assert [next(feed) for _ in range(3)] == [8, 9, 10]
    feed.set_state(state)
    assert [next(feed) for _ in range(3)] == [8, 9, 10]
    resumed = Feed(CountingStream(100), int)
    resumed.set_state(state)
    assert [next(resumed) for _ in range(3)] == [8, 9, 10]


def test_a_stream_of_grain_resumes_exactly_although_it_was_read_ahead():
    def stream():
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        return iter(grain.MapDataset.range(1000).seed(3).shuffle().to_iter_dataset(options))

    feed = Feed(stream(), int)
    first = [next(feed) for _ in range(10)]
    state = feed.state()
    expected = [next(feed) for _ in range(10)]
    resumed = Feed(stream(), int)
    resumed.set_state(state)
    assert [next(resumed) for _ in range(10)] == expected
    assert len({*first, *expected}) == 20


def test_only_the_time_that_the_stream_takes_counts_as_waiting(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(prefetch_module.time, "perf_counter", lambda: clock.now)

    class Slow(CountingStream):
        def __next__(self):
            clock.now += 0.5
            return super().__next__()

    def put(batch):
        clock.now += 3.0
        return batch

    feed = Feed(Slow(100), put, ahead=2)
    assert feed.waited == 0.0
    for seconds in (1.5, 2.0, 2.5):  # for three batches at first, then for one
        next(feed)
        assert feed.waited == seconds
        clock.now += 10.0  # a training step


@pytest.fixture(scope="module")
def layout():
    return make_layout(MeshConfig())


def make_batch(rows):
    numbers = np.arange(rows * 3, dtype=np.int32).reshape(rows, 3)
    return {"inputs": numbers, "loss_weights": numbers.astype(np.float32)}


def test_batches_arrive_whole_and_laid_out_over_the_devices(layout):
    batch_size = 4 * len(jax.devices())
    batch = make_batch(batch_size)
    arrived = layout.put_batch(batch, batch_size)
    assert list(arrived) == ["inputs", "loss_weights"]
    for name, array in arrived.items():
        assert array.sharding == layout.batch
        assert (array.shape, array.dtype) == ((batch_size, 3), batch[name].dtype)
        np.testing.assert_array_equal(np.asarray(array), batch[name])


def test_a_whole_batch_gives_only_the_rows_of_this_process(layout):
    batch_size = len(jax.devices())
    rows = np.arange(batch_size)[::-1]
    arrived = layout.put_batch(make_batch(batch_size), batch_size, rows)
    np.testing.assert_array_equal(np.asarray(arrived["inputs"]), make_batch(batch_size)["inputs"][::-1])


class OfAProcess:
    """A sharding as a process sees it that holds some of eight devices."""

    def __init__(self, spec, devices):
        self.spec, self.devices = spec, devices

    def addressable_devices_indices_map(self, shape):
        mesh = np.arange(8).reshape(self.spec)  # batch ways, devices that hold the same rows
        n = shape[0] // mesh.shape[0]
        return {
            d: (slice(way * n, way * n + n),)
            for way, d in np.ndindex(mesh.shape)
            for d in [mesh[way, d]]
            if d in self.devices
        }


@pytest.mark.parametrize(
    ("shape", "devices", "rows"),
    [
        ((8, 1), [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]),
        ((8, 1), [6, 4, 2, 0], [0, 1, 4, 5, 8, 9, 12, 13]),
        ((4, 2), [2, 3, 4, 5], [4, 5, 6, 7, 8, 9, 10, 11]),
        ((4, 2), [0, 2], [0, 1, 2, 3, 4, 5, 6, 7]),
        ((2, 4), [7], list(range(8, 16))),
        ((1, 8), [3, 5], list(range(16))),
    ],
)
def test_a_process_provides_the_rows_that_its_devices_hold_once_and_rising(shape, devices, rows):
    seen = SimpleNamespace(batch=OfAProcess(shape, devices))
    assert Layout.process_rows(seen, 16).tolist() == rows
