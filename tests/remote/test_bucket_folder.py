import json
import os
import socket
import subprocess
import sys

import pytest
import saved_runs

from topklm.checkpoint import run_folder
from topklm.errors import UserError
from topklm.storage import remote
from topklm.storage.files import as_path, write_atomically

FOLDER = as_path("gs://bucket/runs/x")


def owner_of(bucket):
    return json.loads(bucket.objects["runs/x/.owner"].content)


def leave_owner(bucket, **facts):
    before = {"host": "pod-3", "process": 7, "birth": 1, "since": "2026-01-01T00:00:00+00:00", "token": "t"}
    bucket.put("runs/x/.owner", json.dumps(before | facts).encode())


# What must hold before a run begins.


def test_a_bucket_that_can_be_used_is_let_pass(bucket):
    remote.check_usable(FOLDER, "--workdir", write=True)


def test_a_local_folder_needs_no_bucket(tmp_path):
    remote.check_usable(tmp_path, "--workdir", write=True)


def test_a_bucket_that_does_not_exist_is_named(bucket):
    with pytest.raises(
        UserError, match=r"^--workdir = gs://other/x: there is no bucket gs://other: create it"
    ):
        remote.check_usable(as_path("gs://other/x"), "--workdir", write=True)


@pytest.mark.parametrize("status", [401, 403])
def test_without_access_the_message_says_how_to_get_it(bucket, status, capfd):
    bucket.fail(status, lambda _: True)
    with pytest.raises(UserError, match=r"^--workdir: no access to gs://bucket .*run `gcloud auth applicat"):
        remote.check_usable(FOLDER, "--workdir", write=True)
    assert "Traceback" not in capfd.readouterr().err


def test_a_role_that_cannot_read_the_settings_is_refused_before_orbax_finds_out(bucket):
    bucket.fail(403, lambda request: request.path == "/storage/v1/b/bucket")
    remote.check_usable(FOLDER, "--workdir", write=False)
    with pytest.raises(UserError, match=r"settings of gs://bucket is refused.*grant roles/storage\.legacyB"):
        remote.check_usable(FOLDER, "--workdir", write=True)


def test_a_store_that_does_not_answer_is_given_up_soon(bucket, monkeypatch):
    monkeypatch.setattr(remote, "_ANSWER_SECONDS", 1.0)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.raises(UserError, match=r"gs://bucket gives no answer for .*check the network"):
            remote.check_usable(FOLDER, "--workdir", write=True)


@pytest.mark.parametrize("package", ["gcsfs", "google.cloud.storage"])
def test_without_the_packages_the_extra_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"--workdir = gs://bucket/runs/x: .*pip install 'topklm\[gcs\]'"):
        remote.check_usable(FOLDER, "--workdir", write=True)


# The small files.


def test_what_describes_a_run_is_read_back(bucket):
    assert run_folder.saved_config(FOLDER) is None
    saved_runs.describe(FOLDER)
    assert run_folder.saved_config(FOLDER) == saved_runs.CONFIG
    run_folder.check_same_run(FOLDER, saved_runs.CONFIG)


def test_what_another_machine_writes_is_seen_at_once(bucket):
    assert run_folder.complete_steps(FOLDER) == []
    bucket.put("runs/x/checkpoints/5/commit_success.txt", b"")
    assert run_folder.complete_steps(FOLDER) == [5]
    bucket.put("runs/x/checkpoints/10/commit_success.txt", b"")
    assert run_folder.complete_steps(FOLDER) == [5, 10]


def test_a_checkpoint_counts_only_once_it_is_committed(bucket):
    bucket.put("runs/x/checkpoints/5/params/manifest.ocdbt", b"")
    bucket.put("runs/x/checkpoints/6.damaged-1/commit_success.txt", b"")
    assert not run_folder.has_checkpoint(FOLDER)
    bucket.put("runs/x/checkpoints/5/commit_success.txt", b"")
    assert run_folder.has_checkpoint(FOLDER)


def test_a_failed_write_leaves_the_old_file(bucket):
    write_atomically(FOLDER / "config.json", b"old")
    bucket.fail(403, lambda request: request.method == "POST")
    with pytest.raises(OSError, match="Forbidden"):
        write_atomically(FOLDER / "config.json", b"new")
    assert bucket.objects["runs/x/config.json"].content == b"old"


@pytest.mark.parametrize("failure", [503, "drop"])
def test_a_hiccup_is_not_noticed(bucket, failure):
    bucket.fail(failure, lambda request: request.method == "POST", times=1)
    write_atomically(FOLDER / "config.json", b"new")
    assert bucket.objects["runs/x/config.json"].content == b"new"


def test_a_bucket_that_turns_away_a_reader_is_a_user_error(bucket):
    saved_runs.describe(FOLDER)
    bucket.fail(403, lambda _: True)
    with pytest.raises(UserError, match=r"reading gs://bucket/runs/x/config\.json: no access to gs://bucket"):
        run_folder.saved_config(FOLDER)


# Who may write.


def test_an_owner_signs_and_takes_its_leave(bucket):
    warnings = []
    for _ in range(2):
        with run_folder.owned(FOLDER, warnings.append):
            assert (owner_of(bucket)["host"], owner_of(bucket)["process"]) == (
                socket.gethostname(),
                os.getpid(),
            )
            run_folder.check_owned(FOLDER)
        assert "runs/x/.owner" not in bucket.objects
    assert warnings == []


def test_an_owner_takes_its_leave_also_when_it_fails(bucket):
    with pytest.raises(UserError, match="loss"), run_folder.owned(FOLDER):
        raise UserError("the loss is not finite")
    assert "runs/x/.owner" not in bucket.objects


def test_a_machine_that_was_taken_away_costs_the_next_one_a_warning(bucket):
    leave_owner(bucket)
    warnings = []
    with run_folder.owned(FOLDER, warnings.append):
        assert owner_of(bucket)["host"] == socket.gethostname()
    (warning,) = warnings
    assert "gs://bucket/runs/x was left without notice by process 7 on pod-3 (there since 2026" in warning


def test_an_owner_who_was_replaced_stops_before_it_saves_and_leaves_the_other_in_place(bucket):
    with (
        pytest.raises(UserError, match=r"taken over by process 7 on pod-3 .* another --workdir"),
        run_folder.owned(FOLDER),
    ):
        leave_owner(bucket)
        run_folder.check_owned(FOLDER)
    assert owner_of(bucket)["host"] == "pod-3"


def test_a_bucket_in_trouble_replaces_nobody(bucket):
    with run_folder.owned(FOLDER):
        bucket.fail(403, lambda _: True)
        run_folder.check_owned(FOLDER)
        bucket.recover()


HOLDS_THE_FOLDER = """
import sys, time
from topklm.checkpoint import run_folder
from topklm.storage import files

with run_folder.owned(files.as_path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_process_that_lives_on_this_machine_is_named_and_a_killed_one_replaced(bucket):
    command = [sys.executable, "-c", HOLDS_THE_FOLDER, str(FOLDER)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"in use by process {owner.pid}: .*--workdir"),
            run_folder.owned(FOLDER),
        ):
            pass
        owner.kill()
        owner.wait()
    warnings = []
    with run_folder.owned(FOLDER, warnings.append):
        pass
    assert f"process {owner.pid} on" in warnings[0]


def test_a_container_that_begins_anew_with_the_same_process_id_is_not_its_own_predecessor(bucket):
    leave_owner(bucket, host=socket.gethostname(), process=os.getpid(), birth=1)
    warnings = []
    with run_folder.owned(FOLDER, warnings.append):
        assert len(warnings) == 1


# Whether all hosts see it.


def test_a_marker_is_seen_by_those_who_share_the_bucket_and_leaves_nothing(bucket):
    token = run_folder.write_marker(FOLDER)
    run_folder.check_marker(FOLDER, token)
    with pytest.raises(UserError, match="does not see what the first process writes"):
        run_folder.check_marker(FOLDER, "another", patience_seconds=0.0)
    run_folder.remove_marker(FOLDER, token)
    assert bucket.objects == {}
