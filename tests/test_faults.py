"""A job of four processes that is killed, stopped and preempted ends as if nothing had happened."""

from pathlib import Path
import shutil
import signal

import faults
from helpers import checkpoint_steps, metrics
import pytest

STEPS = 48
SHORT = {"train.steps": STEPS, "eval.every_steps": 20}


@pytest.fixture(scope="module")
def undisturbed(trainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    faults.train_undisturbed(trainer, folder / "run", folder / "logs", SHORT)
    return folder / "run"


@pytest.mark.slow
def test_a_job_disturbed_in_every_way_ends_as_if_undisturbed(trainer, undisturbed, tmp_path):
    run, logs = tmp_path / "run", tmp_path / "logs"
    done = faults.train_disturbed(trainer, run, logs, n_faults=4, seed=0, settings=SHORT)
    assert all(done.values())
    faults.assert_as_if_undisturbed(run, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 3))
def test_a_job_disturbed_at_twenty_random_moments_ends_as_if_undisturbed(trainer, tmp_path, seed):
    faults.train_undisturbed(trainer, tmp_path / "undisturbed", tmp_path / "undisturbed-logs")
    faults.train_disturbed(trainer, tmp_path / "run", tmp_path / "logs", n_faults=20, seed=seed)
    faults.assert_as_if_undisturbed(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_run_continues_exactly_on_another_number_of_hosts(trainer, undisturbed, tmp_path):
    """Runs on four hosts, then two, then one, with the same four devices in all."""
    run = tmp_path / "run"
    for n_processes, stop_after in ((4, 10), (2, 25), (1, None)):
        job = faults.Job(trainer, run, tmp_path / f"logs-{n_processes}", SHORT, n_processes)
        if stop_after is not None:
            job.launcher.wait_for_line(f"step {stop_after}/")
            job.launcher.signal(signal.SIGTERM)
        assert job.launcher.finish() == 0, job.launcher.output + job.launcher.errors
        if stop_after is not None:
            assert "Resume with the same command" in job.launcher.output
            assert stop_after <= max(checkpoint_steps(run)) < STEPS
    faults.assert_same_place_in_the_data(run, undisturbed)
    got, want = metrics(run), metrics(undisturbed)
    assert [line["step"] for line in got] == [line["step"] for line in want]
    losses = [[line["train/loss"] for line in lines if "train/loss" in line] for lines in (got, want)]
    # The windows are the same; sums over devices of one process may be added up in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_a_run_of_four_hosts_continues_on_one_device(trainer, undisturbed, tmp_path):
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    alone = {"train.steps": STEPS + 2, "mesh.data": 1, "mesh.fsdp": 1}
    process = trainer.run(run, {**faults.SETTINGS, **SHORT, **alone})
    assert process.exit_code == 0, process.errors
    assert f"from its checkpoint of step {STEPS}" in process.output
