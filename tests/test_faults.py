"""A job of four processes that is killed, stopped and preempted ends as if nothing had happened."""

import faults
import pytest


@pytest.fixture(scope="module")
def undisturbed(trainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    faults.train_undisturbed(trainer, folder / "run", folder / "logs")
    return folder / "run"


def test_a_job_disturbed_in_every_way_ends_as_if_undisturbed(trainer, undisturbed, tmp_path):
    done = faults.train_disturbed(trainer, tmp_path / "run", tmp_path / "logs", n_faults=4, seed=0)
    assert all(done.values())
    faults.assert_as_if_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 3))
def test_a_job_disturbed_at_twenty_random_moments_ends_as_if_undisturbed(
    trainer, undisturbed, tmp_path, seed
):
    faults.train_disturbed(trainer, tmp_path / "run", tmp_path / "logs", n_faults=20, seed=seed)
    faults.assert_as_if_undisturbed(tmp_path / "run", undisturbed)
