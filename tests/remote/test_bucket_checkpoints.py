import re

from helpers import assert_same_bits
import pytest
import saved_runs

import topklm
from topklm.checkpoint.manager import CheckpointManager
from topklm.errors import UserError
from topklm.layout import one_device
from topklm.storage.files import as_path
from topklm.training.step import abstract_state, make_optimizer

RUN = "gs://bucket/runs/x"


def is_read_by_tensorstore(request):
    return "tensorstore" in request.query and request.method == "GET"


def is_written_by_tensorstore(request):
    return request.method == "POST" and "/upload/" in request.path and "/d/" in request.query.get("name", "")


def test_a_checkpoint_saved_to_a_bucket_is_loaded_bit_for_bit(bucket):
    saved = saved_runs.save(as_path(RUN), [5, 10])
    model = topklm.load(RUN)
    assert (model.run, model.step, model.config) == (RUN, 10, saved_runs.CONFIG)
    assert_same_bits(model.params, saved[10])
    assert_same_bits(topklm.load(f"{RUN}/", step=5).params, saved[5])


def test_loading_reads_no_optimizer_and_writes_nothing(bucket):
    saved_runs.save(as_path(RUN), [5])
    objects, n_before = dict(bucket.objects), len(bucket.requests)
    topklm.load(RUN)
    assert bucket.objects == objects
    assert not [r for r in bucket.requests[n_before:] if r.method != "GET" or "/optimizer" in r.path]


@pytest.mark.parametrize("failure", [503, "drop"])
def test_hiccups_of_the_bucket_while_saving_and_loading_change_nothing(bucket, failure):
    bucket.fail(failure, is_written_by_tensorstore, times=1)
    saved = saved_runs.save(as_path(RUN), [5])
    bucket.fail(failure, is_read_by_tensorstore, times=1)
    bucket.fail(failure, lambda request: request.path.startswith("/download"), times=1)
    assert_same_bits(topklm.load(RUN).params, saved[5])


def test_a_checkpoint_that_was_not_finished_is_passed_over(bucket):
    saved = saved_runs.save(as_path(RUN), [5, 10])
    del bucket.objects["runs/x/checkpoints/10/commit_success.txt"]
    model = topklm.load(RUN)
    assert model.step == 5
    assert_same_bits(model.params, saved[5])
    with pytest.raises(UserError, match=r"step = 10: gs://bucket/runs/x has checkpoints 5$"):
        topklm.load(RUN, step=10)


def test_a_folder_or_bucket_that_is_not_there_is_named(bucket):
    with pytest.raises(UserError, match=r"gs://bucket/runs/x is not a run folder with checkpoints"):
        topklm.load(RUN)
    with pytest.raises(UserError, match=r"run = gs://other/x: there is no bucket gs://other"):
        topklm.load("gs://other/x")


# TensorStore's threads complain that nobody listens any more (`errors.report_each_failure_once`).
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_access_that_is_lost_while_reading_is_not_mistaken_for_damage(bucket):
    saved_runs.save(as_path(RUN), [5, 10])
    bucket.fail(403, is_read_by_tensorstore)
    with pytest.raises(UserError, match=r"no access to gs://bucket .*gcloud auth") as refused:
        topklm.load(RUN)
    assert "damaged" not in str(refused.value)


def test_a_damaged_object_is_named_with_an_older_checkpoint(bucket):
    saved = saved_runs.save(as_path(RUN), [5, 10])
    (name,) = [name for name in bucket.objects if re.search(r"/10/params/d/", name)]
    bucket.put(name, bucket.objects[name].content[:-20])
    with pytest.raises(UserError, match=r"checkpoint 10 of gs://bucket/runs/x is damaged .* step=5"):
        topklm.load(RUN)
    assert_same_bits(topklm.load(RUN, step=5).params, saved[5])


def test_a_run_copied_from_a_disk_into_a_bucket_is_loaded(bucket, tmp_path):
    saved = saved_runs.save(tmp_path / "x", [5])
    for path in (tmp_path / "x").rglob("*"):
        if path.is_file():
            bucket.put(f"runs/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    assert_same_bits(topklm.load(RUN).params, saved[5])


def restored():
    """Step, parameters and what was said, of a run that is opened again."""
    config, said = saved_runs.CONFIG, []
    layout = one_device()
    checkpoints = CheckpointManager(as_path(RUN) / "checkpoints", config.checkpoint, said.append)
    state, data, _ = checkpoints.restore(abstract_state(config, make_optimizer(config.optim, 100)), layout)
    checkpoints.close()
    assert data == {"position": int(state.step)}
    return int(state.step), state.params, said


def test_a_run_in_a_bucket_is_continued(bucket):
    saved = saved_runs.save(as_path(RUN), [5, 10])
    step, params, said = restored()
    assert (step, said) == (10, [])
    assert_same_bits(params, saved[10])


def test_a_damaged_newest_checkpoint_in_a_bucket_gives_way_to_the_one_before(bucket):
    saved = saved_runs.save(as_path(RUN), [5, 10])
    for name in [name for name in bucket.objects if "/10/params/d/" in name]:
        bucket.put(name, bucket.objects[name].content[:-20])
    step, params, said = restored()
    assert (step, len(said)) == (5, 1)
    assert_same_bits(params, saved[5])
    assert topklm.load(RUN).step == 5
