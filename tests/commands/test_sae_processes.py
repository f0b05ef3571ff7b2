"""Autoencoders by several real processes: the bytes of one with as many devices, whatever the kills."""

import signal

from helpers import Job, devices
import pytest
from test_trace_command import base

# Batches of few tokens, four groups of them; and a signal to a process that is about to save.
FIRST = """
import os, signal
from topklm.neurons import documents
from topklm.sae import train

save, saves = train._Training.save, []

def hit(self, n_done):
    saves.append(n_done)
    if len(saves) == {at}:
        os.kill(os.getpid(), {number})
    save(self, n_done)

if "{index}" == os.environ["TOPKLM_PROCESS_ID"]:
    train._Training.save = hit
documents._BATCH_TOKENS = 256
"""
SIZES = ("--width", 40, "--k", 3, "--minibatch", 512)


def train(run, out, count, *flags, killed=None, by=signal.SIGKILL, at=2, tokens=16_000, kind="topk"):
    """Trains by so many processes, two devices in all, of which one gets a signal; returns the job."""
    arguments = ["sae", "train", run, "--out", out, *SIZES, "--kind", kind, "--tokens", tokens, *flags]
    first = FIRST.format(index=killed, number=int(by), at=at)
    return Job(out.parent, count, arguments, first, **devices(2 // count))


def content(out):
    return {name: (out / name).read_bytes() for name in ("dictionary.npz", "history.json")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def by_one(run, tmp_path_factory):
    """The folder of one process that was not stopped."""
    out = tmp_path_factory.mktemp("one") / "out"
    job = train(run, out, 1)
    assert job.codes == [0], job.errors
    return out


KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("batchtopk", "jumprelu", "gba")]


@pytest.mark.parametrize("kind", ["matryoshka", *KINDS])
def test_two_processes_write_the_bytes_of_one_with_two_devices(run, tmp_path, kind):
    job = train(run, tmp_path / "two", 2, tokens=4000, kind=kind)
    assert job.codes == [0, 0], job.errors
    assert f"{tmp_path / 'two'}: post-hoc" in job.processes[0].output.splitlines()[-1]
    assert "post-hoc" not in job.processes[1].output
    assert train(run, tmp_path / "one", 1, tokens=4000, kind=kind).codes == [0]
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_kill_ends_all_and_any_number_of_processes_goes_on_to_the_same_bytes(run, by_one, tmp_path, count):
    out = tmp_path / "out"
    job = train(run, out, 2, "--save-every", 0, killed=1)
    assert job.codes == [75, -signal.SIGKILL], job.errors
    assert "process 1 is gone" in job.errors[0].splitlines()[-1]
    assert (out / "state.npz").exists() and not (out / "dictionary.npz").exists()
    job = train(run, out, count, "--resume")
    assert job.codes == [0] * count, job.errors
    assert content(out) == content(by_one)
    assert not (out / "state.npz").exists()


@pytest.mark.slow
def test_a_signal_to_one_process_has_all_stop_and_the_same_command_goes_on(run, by_one, tmp_path):
    out, command = tmp_path / "out", ("--save-every", 0)
    job = train(run, out, 2, *command, killed=1, by=signal.SIGTERM, at=1)
    assert job.codes == [0, 0], job.errors
    line = job.processes[0].output.splitlines()[-1]
    assert line.startswith("SIGTERM: stopped after ") and line.endswith("Resume with the same command")
    assert "stopped" not in job.processes[1].output and (out / "state.npz").exists()
    job = train(run, out, 2, *command)
    assert job.codes == [0, 0], job.errors
    assert content(out) == content(by_one)


@pytest.mark.slow
def test_processes_make_the_ensembles_of_one(run, tmp_path):
    for kind in ("bag", "boost"):
        flags = ("--ensemble", kind, "--members", 2)
        for name, count in (("one", 1), ("two", 2)):
            job = train(run, tmp_path / f"{kind}-{name}", count, *flags, tokens=3000)
            assert not any(job.codes), job.errors
        assert content(tmp_path / f"{kind}-two") == content(tmp_path / f"{kind}-one")


@pytest.mark.slow
def test_a_minibatch_that_the_devices_do_not_divide_is_a_line_of_all(run, tmp_path):
    job = train(run, tmp_path / "out", 2, "--minibatch", 511)
    assert job.codes == [2, 2]
    assert "--minibatch = 511: must be a multiple of the 2 devices" in job.errors[0] + job.errors[1]
