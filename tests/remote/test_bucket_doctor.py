"""`topklm doctor` tries out a folder in a bucket: the file it writes is read, and gone afterwards."""

import datetime

from helpers import assert_one_line_error, in_this_process
import pytest

from topklm.commands import doctor

# The server's clock stands still.
THEN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).timestamp()


@pytest.fixture(autouse=True)
def without_devices(monkeypatch):
    """Leaves out what has nothing to do with buckets."""
    for name in ("_devices", "_matrix_product", "_all_reduce", "_compiled_programs", "_memory"):
        monkeypatch.setattr(doctor, name, lambda: "not looked at")


def test_a_bucket_is_written_read_and_deleted_from(bucket, monkeypatch):
    monkeypatch.setattr(doctor.time, "time", lambda: THEN + 3)
    process = in_this_process("doctor", "--workdir", "gs://bucket/runs/first")
    assert process.exit_code == 0, process.output + process.errors
    assert "ok    run folder: gs://bucket/runs/first can be written, read and deleted from" in process.output
    assert "agree within 3 s" in process.output
    assert bucket.objects == {}
    methods = {request.method for request in bucket.requests if ".doctor-" in str(request)}
    assert {"GET", "DELETE"} <= methods and methods & {"POST", "PUT"}


def test_a_clock_that_is_off_is_told(bucket, monkeypatch):
    monkeypatch.setattr(doctor.time, "time", lambda: THEN - 3600)
    process = in_this_process("doctor", "--workdir", "gs://bucket/runs/first")
    assert process.exit_code == 2
    assert "is 3,600 s ahead of this machine's: set the clock" in process.output
    assert "not in order: run folder" in assert_one_line_error(process.errors)


@pytest.mark.parametrize(
    ("folder", "failing", "words"),
    [
        ("gs://nobodys/run", (), "there is no bucket gs://nobodys"),
        ("gs://bucket/run", (403, ("POST", "PUT")), "gs://bucket/run"),
        ("gs://bucket/run", (403, ("DELETE",)), "gs://bucket/run"),
    ],
)
def test_a_bucket_that_refuses_is_one_line(bucket, monkeypatch, folder, failing, words):
    monkeypatch.setattr(doctor.time, "time", lambda: THEN)
    if failing:
        status, methods = failing
        bucket.fail(status, lambda request: request.method in methods)
    process = in_this_process("doctor", "--workdir", folder)
    assert process.exit_code == 2
    assert "not in order: run folder" in assert_one_line_error(process.errors)
    (line,) = [line for line in process.output.splitlines() if line.startswith("WRONG")]
    assert words in line
