"""Runs the stream in processes that play the hosts of a run, kills them all, and goes on with fewer.

Run as a script, this file is one host. Each notes what it got from the tokens themselves: every token of
every dataset is another number, so a batch says which windows it holds.
"""

from collections import Counter
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from topklm.data.dataset import Dataset, Mixture, SplitInfo
from topklm.data.records import Shard, shard_bounds, shard_name, write_shard
from topklm.data.stream import train_stream, window_ids
from topklm.storage.files import write_atomically

T, B, SEED = 8, 8, 11  # context length, batch size over all hosts, seed of the order
VOCAB = 30_000
FIRST_TOKEN = (1, 10_000, 20_000)  # of each dataset
N_WINDOWS = (53, 31, 19)
MIXTURES = {"single": (1,), "three": (5, 3, 2)}  # weights
SAVE_EVERY = 5  # batches
PATIENCE_SECONDS = 300  # other work may share the cores


def write_datasets(folder):
    """Datasets of rising numbers without separators; the last window of each overlaps the one before."""
    descriptions = []
    for i, (first, n_windows) in enumerate(zip(FIRST_TOKEN, N_WINDOWS, strict=True)):
        path = folder / str(i)
        path.mkdir()
        tokens = first + np.arange(n_windows * T - 3)
        bounds = shard_bounds(tokens.size)
        shards = [
            write_shard(path / shard_name("train", j, len(bounds)), [tokens[start:stop]], VOCAB)
            for j, (start, stop) in enumerate(bounds)
        ]
        descriptions.append({"tokens": tokens.size, "shards": [vars(shard) for shard in shards]})
    (folder / "datasets.json").write_text(json.dumps(descriptions))


def open_mixture(folder, weights):
    tokenizer = SimpleNamespace(separator_id=0, vocab_size=VOCAB, sha256="")
    datasets = []
    for i, description in enumerate(json.loads((folder / "datasets.json").read_text())[: len(weights)]):
        shards = tuple(Shard(**shard) for shard in description["shards"])
        info = SplitInfo(0, description["tokens"], 0, shards)
        datasets.append(Dataset(folder / str(i), tokenizer, info, info, ""))
    return Mixture(tuple(datasets), weights)


def windows_of(batch):
    """Which windows a batch holds, (dataset, window) for each row, as told by its tokens alone."""
    pairs = []
    for inputs, targets in zip(batch["inputs"].tolist(), batch["targets"].tolist(), strict=True):
        dataset = max(i for i, first in enumerate(FIRST_TOKEN) if first <= inputs[0])
        place = inputs[0] - FIRST_TOKEN[dataset]
        assert inputs == list(range(inputs[0], inputs[0] + T))
        assert targets == list(range(inputs[0] + 1, inputs[0] + T + 1))
        pairs.append([dataset, -(-place // T)])  # only the last window is moved back
    return pairs


def be_a_host(folder, place, host, n_hosts):
    """Consumes batches until killed, or up to the batch where the run is over."""
    orders = json.loads((place / "orders.json").read_text())
    # Hosts own runs of rows, or take turns.
    rows = (
        slice(host * B // n_hosts, (host + 1) * B // n_hosts) if n_hosts == 4 else np.arange(host, B, n_hosts)
    )
    streams, notes = {}, {}
    for name, weights in MIXTURES.items():
        settings = {"context_length": T, "batch_size": B, "seed": SEED}
        mixture = open_mixture(folder, weights)
        streams[name] = train_stream(mixture, **settings, rows=rows, threads=host % 3)
        if orders["state"]:
            streams[name].set_state(orders["state"])
        notes[name] = (place / f"{name}-{host}.jsonl").open("a")
    row_numbers = np.arange(B)[rows].tolist()
    for b in range((orders["state"] or {"next_index": 0})["next_index"], orders["stop"]):
        for name, stream in streams.items():
            note = {"batch": b, "rows": row_numbers, "windows": windows_of(next(stream))}
            notes[name].write(json.dumps(note) + "\n")
            notes[name].flush()
        if (b + 1) % SAVE_EVERY == 0:
            states = {name: stream.get_state() for name, stream in streams.items()}
            write_atomically(place / f"state-{b + 1}-{host}.json", json.dumps(states).encode())
        time.sleep(0.003 * host)  # hosts are not equally fast


def run_hosts(folder, n_hosts, state, kill_after=None, stop=100_000):
    """Plays hosts until each has saved the state after batch `kill_after`, then kills all; or to `stop`.

    Returns:
        The folder with their notes and states.
    """
    place = folder / f"on-{n_hosts}-hosts"
    place.mkdir()
    (place / "orders.json").write_text(json.dumps({"state": state, "stop": stop}))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    hosts = []
    try:
        for host in range(n_hosts):
            command = [sys.executable, __file__, str(folder), str(place), str(host), str(n_hosts)]
            with (place / f"errors-{host}").open("w") as errors:
                hosts.append(subprocess.Popen(command, env=environment, stderr=errors))
        if kill_after is not None:
            wait_for([place / f"state-{kill_after}-{host}.json" for host in range(n_hosts)], hosts)
            for host in hosts:
                host.send_signal(signal.SIGKILL)
        codes = [host.wait(timeout=PATIENCE_SECONDS) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    errors = [path.read_text() for path in place.glob("errors-*")]
    assert codes == [0 if kill_after is None else -signal.SIGKILL] * n_hosts, errors
    return place


def wait_for(paths, hosts):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all(path.exists() for path in paths):
        assert all(host.poll() is None for host in hosts), "a host ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def newest_state_of_all(place, n_hosts):
    """The state after the last batch that every host has saved: the newest whole checkpoint."""
    saved = [
        {int(path.name.split("-")[1]) for path in place.glob(f"state-*-{h}.json")} for h in range(n_hosts)
    ]
    newest = max(set.intersection(*saved))
    states = [json.loads((place / f"state-{newest}-{h}.json").read_text()) for h in range(n_hosts)]
    for state in states:  # the same on every host and for every mixture
        assert state == {name: {"next_index": newest} for name in MIXTURES}
    return states[0]["single"]


def noted(place, name, start, stop):
    """(batch, row) -> window of all batches from `start` to `stop` that the hosts of a place noted."""
    found = {}
    for path in place.glob(f"{name}-*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                continue  # the host was killed while it wrote
            note = json.loads(line)
            if start <= note["batch"] < stop:
                for row, window in zip(note["rows"], note["windows"], strict=True):
                    assert (note["batch"], row) not in found
                    found[note["batch"], row] = tuple(window)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on four hosts, killed; continued on two, killed; finished on one: places and bounds of each."""
    folder = tmp_path_factory.mktemp("hosts")
    write_datasets(folder)
    four = run_hosts(folder, 4, None, kill_after=3 * SAVE_EVERY)
    after_four = newest_state_of_all(four, 4)
    middle = after_four["next_index"]
    two = run_hosts(folder, 2, after_four, kill_after=middle + 2 * SAVE_EVERY)
    after_two = newest_state_of_all(two, 2)
    late = after_two["next_index"]
    one = run_hosts(folder, 1, after_two, stop=late + 8)
    return folder, [(four, 0, middle), (two, middle, late), (one, late, late + 8)]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_run_killed_and_continued_on_fewer_hosts_loses_and_repeats_no_window(runs, name):
    folder, parts = runs
    mixture, (*_, (_, _, stop)) = open_mixture(folder, MIXTURES[name]), parts
    settings = {"context_length": T, "batch_size": B, "seed": SEED}
    consumed = {}
    for place, start, end in parts:
        part = noted(place, name, start, end)
        assert len(part) == (end - start) * B
        consumed |= part

    undisturbed = train_stream(mixture, **settings)
    ids = window_ids(mixture, **settings)
    expected = {}
    for b in range(stop):
        windows = windows_of(next(undisturbed))
        assert windows == ids[b].tolist()
        expected |= {(b, row): tuple(window) for row, window in enumerate(windows)}
    assert consumed == expected
    assert_whole_epochs(consumed)


def assert_whole_epochs(consumed):
    """Each dataset gave every window equally often, but for the last epoch, and more than one epoch."""
    times = Counter(consumed.values())
    for dataset in {dataset for dataset, _ in times}:
        seen = [times[dataset, window] for window in range(N_WINDOWS[dataset])]
        assert min(seen) >= 1
        assert max(seen) >= 2
        assert max(seen) - min(seen) <= 1


if __name__ == "__main__":
    be_a_host(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
