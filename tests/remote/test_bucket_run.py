"""A whole run in a bucket: killed in its middle, continued, and the same to the last bit as one on a disk."""

import os

import gcs
from helpers import (
    STEPS,
    WALL_CLOCK_FIGURES,
    arrays,
    assert_one_line_error,
    assert_same_bits,
    metrics,
    wait_until,
)
import pytest

import topklm
from topklm.checkpoint import run_folder
from topklm.storage.files import as_path
from topklm.training import metrics as metrics_lib

RUN = "gs://bucket/runs/x"

pytestmark = pytest.mark.slow


def environment():
    """That of this process, which `bucket` has set."""
    return {name: os.environ[name] for name in gcs.environment("")}


def test_a_killed_run_in_a_bucket_goes_on_to_the_same_model(bucket, trainer, finished_run):
    process = trainer.start(RUN, environment=environment())
    assert wait_until(lambda: 10 in run_folder.complete_steps(as_path(RUN)), process)
    process.kill()
    resumed = trainer.run(RUN, environment=environment())
    assert resumed.exit_code == 0, resumed.errors
    assert "was left without notice by process" in resumed.output
    assert "continuing gs://bucket/runs/x from its checkpoint of step 1" in resumed.output
    assert ".owner" not in "".join(bucket.objects)
    assert_same_bits(topklm.load(RUN).params, arrays(finished_run, STEPS)["params"])
    lines = metrics_lib.read(as_path(RUN))
    assert [{k: v for k, v in line.items() if k not in WALL_CLOCK_FIGURES} for line in lines] == metrics(
        finished_run
    )


def test_a_run_in_a_bucket_that_is_not_there_ends_in_one_line(bucket, trainer):
    refused = trainer.run("gs://nosuch/x", environment=environment())
    assert refused.exit_code == 2
    assert "there is no bucket gs://nosuch" in assert_one_line_error(refused.errors)
