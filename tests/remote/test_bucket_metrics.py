import json
import threading

import pytest

from topklm.errors import UserError
from topklm.storage import remote
from topklm.storage.files import as_path
from topklm.training import metrics

FOLDER = as_path("gs://bucket/runs/x")


def lines_in(bucket):
    content = bucket.objects["runs/x/metrics.jsonl"].content.decode()
    return [json.loads(line)["step"] for line in content.splitlines()]


def write(writer, *steps):
    for step in steps:
        writer.write(step, {"train/loss": step / 7})


def is_upload(request):
    return request.method == "POST"


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(remote, "_SECONDS_BETWEEN_COPIES", 0.0)


def test_lines_and_tensorboard_files_are_there_after_a_sync(bucket):
    writer = metrics.MetricsWriter(FOLDER, resume_step=0)
    write(writer, 1, 2)
    writer.sync()
    assert lines_in(bucket) == [1, 2]
    assert any(name.startswith("runs/x/tensorboard/events") for name in bucket.objects)
    write(writer, 3)
    writer.close()
    assert lines_in(bucket) == [1, 2, 3]
    assert [line["train/loss"] for line in metrics.read(FOLDER)] == [1 / 7, 2 / 7, 3 / 7]


def test_another_machine_continues_where_the_checkpoint_is(bucket):
    writer = metrics.MetricsWriter(FOLDER, resume_step=0)
    write(writer, 1, 2, 3, 4)
    writer.close()
    resumed = metrics.MetricsWriter(FOLDER, resume_step=2)
    write(resumed, 3)
    resumed.close()
    assert lines_in(bucket) == [1, 2, 3]


def test_a_killed_process_loses_only_what_was_not_synced(bucket):
    writer = metrics.MetricsWriter(FOLDER, resume_step=0)
    write(writer, 1)
    writer.sync()
    write(writer, 2)  # and no close
    assert [line["step"] for line in metrics.read(FOLDER)] == [1]


def test_evaluated_steps_are_found(bucket):
    assert not metrics.is_evaluated(FOLDER, 2)
    writer = metrics.MetricsWriter(FOLDER, resume_step=0)
    writer.write(2, {"eval/loss": 0.2})
    writer.close()
    assert [metrics.is_evaluated(FOLDER, step) for step in (1, 2)] == [False, True]


def test_between_syncs_lines_arrive_by_themselves_without_training_waiting(bucket, no_pause):
    entered, go = threading.Event(), threading.Event()

    def is_held_up(request):
        if is_upload(request):
            entered.set()
            assert go.wait(300)
        return False

    bucket.fail(503, is_held_up)
    writer = metrics.MetricsWriter(FOLDER, resume_step=0)
    write(writer, 1)
    assert entered.wait(300)
    write(writer, 2, 3)  # while the first copy is still under way
    go.set()
    writer.close()
    assert lines_in(bucket) == [1, 2, 3]


def test_a_bucket_that_fails_is_said_once_and_caught_up_with(bucket):
    warnings = []
    writer = metrics.MetricsWriter(FOLDER, resume_step=0, warn=warnings.append)
    bucket.fail(403, is_upload)
    for step in (1, 2, 3):
        write(writer, step)
        writer.sync()
    (warning,) = warnings
    assert "writing gs://bucket/runs/x/" in warning
    assert "training goes on" in warning
    bucket.recover()
    writer.sync()
    assert lines_in(bucket) == [1, 2, 3]
    bucket.fail(403, is_upload)
    write(writer, 4)
    writer.sync()
    assert len(warnings) == 2  # it had been well in between
    bucket.recover()
    writer.close()
    assert lines_in(bucket) == [1, 2, 3, 4]


def test_a_bucket_that_fails_to_the_end_is_an_error_and_the_lines_are_kept(bucket):
    writer = metrics.MetricsWriter(FOLDER, resume_step=0, warn=lambda _: None)
    write(writer, 1)
    bucket.fail(403, is_upload)
    with pytest.raises(UserError, match=r"no access to gs://bucket.* is kept in (\S+): copy it") as refused:
        writer.close()
    kept = as_path(str(refused.value).partition("kept in ")[2].partition(":")[0])
    assert [line["step"] for line in metrics.read(kept)] == [1]


def test_a_bucket_that_gives_no_answer_holds_nobody_up_for_long(bucket, monkeypatch):
    monkeypatch.setattr(remote, "_COPY_SECONDS", 0.3)
    go = threading.Event()
    bucket.fail(503, lambda request: is_upload(request) and not go.wait(300))
    warnings = []
    writer = metrics.MetricsWriter(FOLDER, resume_step=0, warn=warnings.append)
    write(writer, 1)
    writer.sync()
    assert len(warnings) == 1
    go.set()
    monkeypatch.setattr(remote, "_COPY_SECONDS", 60.0)
    writer.close()
    assert lines_in(bucket) == [1]


def test_damaged_lines_that_another_process_left_do_not_stop_a_run(bucket):
    bucket.put("runs/x/metrics.jsonl", b'{"step": 1}\n{"step": 2, "tr')
    writer = metrics.MetricsWriter(FOLDER, resume_step=5)
    write(writer, 6)
    writer.close()
    assert lines_in(bucket) == [1, 6]
