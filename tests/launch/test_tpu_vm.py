"""Training on TPU VMs, from the request to the end; the stand-in for gcloud runs what ssh would."""

import shlex
import shutil
import subprocess
import threading

from helpers import Process
import pytest
from stand_ins import GCLOUD_FLAGS, GCLOUD_WIDE_FLAGS, wait_for

CREATE = ("--type=v5litepod-16", "--zone=us-west4-a")
FLAGS = ("--config=configs/small.py", "--workdir=gs://bucket/run")
STOPPED = "SIGTERM: stopped after step 3 of 9; saved in run. Resume with the same command"
ALL_VERBS = ("create", "setup", "run", "babysit", "logs", "status", "ssh", "stop", "delete")


class Launcher:
    """Runs launch/tpu_vm.sh in a working tree, on a stage."""

    def __init__(self, tree, stage):
        self._tree, self._stage = tree, stage

    def start(self, *arguments: str) -> Process:
        script = str(self._tree / "launch" / "tpu_vm.sh")
        return Process([script, *arguments], env=self._stage.environment, stdin=subprocess.DEVNULL)

    def __call__(self, *arguments: str) -> Process:
        process = self.start(*arguments)
        process.finish()
        return process

    def good(self, *arguments: str) -> str:
        process = self(*arguments)
        assert process.exit_code == 0, process.output + process.errors
        return process.output

    def prepare(self) -> None:
        """Provides a TPU that is set up."""
        self.good("create", "pod", *CREATE)
        self.good("setup", "pod")


@pytest.fixture
def tpu_vm(tree, stage):
    return Launcher(tree, stage)


def ended(stage):
    return all((home / "topklm-run/exit").exists() for home in stage.workers())


# --- create ---


def test_create_waits_until_the_tpu_is_there(tpu_vm, stage):
    stage.set(creates=[["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    output = tpu_vm.good("create", "pod", *CREATE, "--spot")
    assert [line.split()[1] for line in output.splitlines()] == [
        "ACCEPTED,",
        "WAITING_FOR_RESOURCES,",
        "PROVISIONING,",
        "ACTIVE,",
    ]
    assert "ACTIVE, waited 0 min" in output.splitlines()[-1]
    (created,) = stage.gcloud_calls("queued-resources create")
    assert set(created) == {
        "pod",
        "--node-id=pod",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
        "--zone=us-west4-a",
        "--quiet",
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--type", "v5p-128", "--reserved"], {"--reserved", "--runtime-version=v2-alpha-tpuv5"}),
        (["--type", "v6e-64", "--slices", "2"], {"--node-count=2", "--node-prefix=pod"}),
        (["--type", "v9-8", "--runtime", "v9"], {"--runtime-version=v9", "--accelerator-type=v9-8"}),
        (["--type", "v6e-8", "--create-flag=--service-account=a b"], {"--service-account=a b"}),
        (["--type", "v6e-8", "--internal-ips", "--project=p"], {"--internal-ips", "--project=p"}),
    ],
)
def test_create_asks_for_what_the_options_say(tpu_vm, stage, options, expected):
    tpu_vm.good("create", "pod", *options)
    (created,) = stage.gcloud_calls("queued-resources create")
    assert expected <= set(created)


def test_a_request_that_is_refused_shows_why(tpu_vm, stage):
    stage.set(creates=["RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepod' has been exceeded"])
    process = tpu_vm("create", "pod", *CREATE)
    assert process.exit_code == 1
    assert "Quota limit 'TPUV5sLitepod'" in process.errors


@pytest.mark.parametrize(("state", "said"), [("FAILED", "no v5e in this zone"), ("SUSPENDED", "taken back")])
def test_a_request_that_fails_later_is_explained(tpu_vm, stage, state, said):
    stage.set(creates=[["CREATING", state]], failure="no v5e in this zone")
    process = tpu_vm("create", "pod", *CREATE)
    assert process.exit_code == 1
    assert f"{state} means" in process.output
    assert said in process.output


# --- setup ---


def test_setup_copies_the_working_tree_to_all_workers_and_installs_it(tpu_vm, tree, stage):
    tpu_vm.good("create", "pod", *CREATE, "--slices=2")
    tpu_vm.good("setup", "pod", "--extras=tpu,gcs,hf", "--then", "echo \"it's $PWD\" > datasets/'a b'")
    homes = stage.workers()
    assert [f"{home.parent.name} {home.name}" for home in homes] == [
        "pod-0 0",
        "pod-0 1",
        "pod-1 0",
        "pod-1 1",
    ]
    for home in homes:
        copy = home / "topklm"
        assert (copy / "configs/with space.py").read_text() == "# a config\n"
        assert (copy / "new.py").exists()
        assert not (copy / "deleted.py").exists()
        assert not (copy / "datasets/huge").exists()
        assert (home / "datasets/a b").read_text() == f"it's {copy}\n"
    installs = [call["argv"] for call in stage.calls("uv") if call["argv"][0] == "pip"]
    assert sorted(install[-1] for install in installs) == [f"{home}/topklm[tpu,gcs,hf]" for home in homes]


@pytest.mark.slow
def test_setup_again_replaces_the_code_and_leaves_the_data(tpu_vm, tree, stage):
    tpu_vm.prepare()
    (stage.workers()[0] / "topklm/datasets/web").write_text("tokens")
    (tree / "new.py").unlink()
    tpu_vm.good("setup", "pod")
    home = stage.workers()[0]
    assert not (home / "topklm/new.py").exists()
    assert (home / "topklm/datasets/web").read_text() == "tokens"


@pytest.mark.slow
def test_setup_can_clone_a_commit(tpu_vm, tree, stage):
    head = subprocess.check_output(["git", "-C", tree, "rev-parse", "HEAD"], text=True)
    tpu_vm.good("create", "pod", *CREATE)
    tpu_vm.good("setup", "pod", "--clone", str(tree))
    copy = stage.workers()[0] / "topklm"
    assert (copy / "REVISION").read_text() == head
    assert (copy / "deleted.py").exists()
    assert not (copy / "new.py").exists()


def test_a_connection_that_fails_for_once_is_tried_again(tpu_vm, stage):
    stage.set(ssh=[255, 0, 255, 0, 255])
    tpu_vm.good("create", "pod", *CREATE)
    assert tpu_vm.good("setup", "pod").count("trying again") == 3


def test_a_connection_that_keeps_failing_ends_setup(tpu_vm, stage):
    stage.set(ssh=[255] * 10)
    tpu_vm.good("create", "pod", *CREATE)
    assert tpu_vm("setup", "pod").exit_code == 1


# --- run, logs, status, ssh, stop, delete ---


def test_the_command_reaches_every_worker_unharmed(tpu_vm, stage):
    tpu_vm.prepare()
    stage.set(variables=["NOTE", "LIBTPU_INIT_ARGS"])
    odd = [
        "--config=configs/with space.py",
        '--config.data.source=it\'s "$HOME" `id` \\ * ; & | ~',
        "--x=",
        "",
    ]
    note, arguments = "a  'b' $c\nd", "--xla_a=1 --xla_b=2"
    tpu_vm.good("run", "pod", "--env", f"NOTE={note}", f"--env=LIBTPU_INIT_ARGS={arguments}", "--", *odd)
    wait_for(lambda: ended(stage))
    starts = stage.calls("trainer")
    assert len(starts) == 2
    for start in starts:
        assert start["argv"] == ["-u", "-m", "topklm.main", *odd]
        assert start["variables"] == {"NOTE": note, "LIBTPU_INIT_ARGS": arguments}
        assert start["cwd"].endswith("/topklm")
    assert [(home / "topklm-run/exit").read_text() for home in stage.workers()] == ["0\n", "0\n"]


def test_run_is_refused_while_some_training_runs(tpu_vm, stage):
    tpu_vm.prepare()
    stage.set(trainer=["train"])
    tpu_vm.good("run", "pod", "--", *FLAGS)
    for verb in (("run", "pod", "--", *FLAGS), ("setup", "pod")):
        process = tpu_vm(*verb)
        assert process.exit_code == 2
        assert "training runs" in process.errors
    assert len(stage.calls("trainer")) == 2


def test_run_says_when_workers_are_not_set_up(tpu_vm):
    tpu_vm.good("create", "pod", *CREATE)
    process = tpu_vm("run", "pod", "--", *FLAGS)
    assert process.exit_code == 2
    assert "pod is not set up: launch/tpu_vm.sh setup pod" in process.errors


def test_logs_have_the_worker_before_each_line(tpu_vm, stage):
    tpu_vm.prepare()
    stage.set(trainer=[{"0": "step 1 ;; say ready", "others": "say ready too"}])
    tpu_vm.good("run", "pod", "--", *FLAGS)
    wait_for(lambda: ended(stage))
    lines = tpu_vm.good("logs", "pod", "--once").splitlines()
    assert {"[worker 0] ready", "[worker 1] ready too"} < set(lines)
    assert tpu_vm.good("logs", "pod", "--once", "--worker=1", "--lines=1") == "[worker 1] ready too\n"


@pytest.mark.slow
def test_logs_are_followed_over_all_slices(tpu_vm, stage):
    tpu_vm.good("create", "pod", *CREATE, "--slices=2")
    tpu_vm.good("setup", "pod")
    stage.set(trainer=["train"])
    tpu_vm.good("run", "pod", "--", *FLAGS)
    logs = tpu_vm.start("logs", "pod")
    seen = {logs.wait_for_line("training") for _ in range(4)}
    assert seen == {f"[slice {s} worker {w}] training\n" for s in (0, 1) for w in (0, 1)}
    logs.signal(15)
    assert logs.finish() == 130


@pytest.mark.slow
def test_status_shows_the_tpu_and_every_worker(tpu_vm, stage):
    tpu_vm.prepare()
    stage.set(trainer=[{"0": "step 1200 ;; exit 75", "others": "exit 2"}])
    tpu_vm.good("run", "pod", "--", *FLAGS)
    wait_for(lambda: ended(stage))
    assert tpu_vm.good("status", "pod").splitlines() == [
        "pod: ACTIVE",
        "pod: READY HEALTHY",
        "t1v-n-pod-w-0: ended with exit code 75, step 1200",
        "t1v-n-pod-w-1: ended with exit code 2, step 0",
    ]


def test_status_of_a_tpu_that_is_not_there(tpu_vm):
    assert tpu_vm.good("status", "pod").startswith("pod: MISSING\n")


def test_ssh_runs_a_command_on_the_workers_asked_for(tpu_vm):
    tpu_vm.good("create", "pod", *CREATE)
    assert tpu_vm.good("ssh", "pod", "--worker=1", "--", "echo $HOST; echo done").splitlines() == [
        "t1v-n-pod-w-1",
        "done",
    ]
    assert tpu_vm.good("ssh", "pod", "--worker", "all", "--", "echo", "a  b", "$HOST") == "a  b $HOST\n" * 2


def test_stop_lets_training_save_and_waits_for_it(tpu_vm, stage):
    tpu_vm.prepare()
    stage.set(trainer=["train"])
    tpu_vm.good("run", "pod", "--", *FLAGS)
    wait_for(lambda: all("training\n" in (h / "topklm-run/log").read_text() for h in stage.workers()))
    others = [threading.Thread(target=tpu_vm, args=("stop", "pod")) for _ in range(2)]
    for other in others:  # asking several times is not a second signal
        other.start()
    assert tpu_vm.good("stop", "pod").endswith("pod: no training runs\n")
    for other in others:
        other.join()
    # The trainer said 0 everywhere; its first process also that it is not finished.
    assert [(home / "topklm-run/exit").read_text() for home in stage.workers()] == ["75\n", "0\n"]


@pytest.mark.slow
def test_stop_can_kill(tpu_vm, stage):
    tpu_vm.prepare()
    stage.set(trainer=["train"])
    tpu_vm.good("run", "pod", "--", *FLAGS)
    tpu_vm.good("stop", "pod", "--kill")
    assert [(home / "topklm-run/exit").read_text() for home in stage.workers()] == ["137\n", "137\n"]


@pytest.mark.slow
def test_a_second_run_appends_to_the_log_and_is_judged_by_its_own_part(tpu_vm, stage):
    tpu_vm.prepare()
    stage.set(trainer=[f"say {STOPPED}", "finish"])
    for code in ("75\n", "0\n"):
        tpu_vm.good("run", "pod", "--", *FLAGS)
        wait_for(lambda: ended(stage))
        assert (stage.workers()[0] / "topklm-run/exit").read_text() == code
    log = (stage.workers()[0] / "topklm-run/log").read_text()
    assert log.count("--workdir=gs://bucket/run") == 2


def test_delete_asks_first(tpu_vm, stage):
    tpu_vm.good("create", "pod", *CREATE)
    assert tpu_vm("delete", "pod").exit_code == 1
    assert stage.workers()
    tpu_vm.good("delete", "pod", "--yes")
    assert not stage.workers()
    assert "--force" in stage.gcloud_calls("queued-resources delete")[0]


# --- babysit ---


def test_babysit_brings_training_through_preemptions_to_its_end(tpu_vm, stage):
    active = ["ACTIVE"] * 4
    stage.set(
        creates=[
            ["WAITING_FOR_RESOURCES", "PROVISIONING", *active, "SUSPENDING", "SUSPENDED"],
            ["PROVISIONING", *active, "FAILED"],
            ["ACTIVE"],
        ],
        trainer=["train", "train", "step 9000 ;; finish"],
    )
    output = tpu_vm.good("babysit", "pod", *CREATE, "--spot", "--", *FLAGS)
    assert output.count("asking for another TPU") == 2
    assert output.splitlines()[-1].startswith("pod: training is finished")
    creates = stage.gcloud_calls("queued-resources create")
    assert len(creates) == 3
    assert creates[0] == creates[1] == creates[2]
    assert {tuple(call["argv"]) for call in stage.calls("trainer")} == {("-u", "-m", "topklm.main", *FLAGS)}
    assert len([call for call in stage.calls("uv") if call["argv"][0] == "pip"]) == 6


def test_babysit_does_not_repeat_a_mistake(tpu_vm, stage):
    stage.set(trainer=[{"0": "say error: mesh.fsdp = 3: does not divide 16 ;; exit 2", "others": "exit 75"}])
    process = tpu_vm("babysit", "pod", *CREATE, "--", *FLAGS)
    assert process.exit_code == 2
    assert "[worker 0] error: mesh.fsdp = 3" in process.output
    assert len(stage.calls("trainer")) == 2


@pytest.mark.parametrize("first", ["exit 1", pytest.param(f"say {STOPPED}", marks=pytest.mark.slow)])
def test_babysit_starts_again_what_is_not_finished(tpu_vm, stage, first):
    stage.set(trainer=[first, "finish"])
    output = tpu_vm.good("babysit", "pod", *CREATE, "--", *FLAGS)
    assert "1 of 5 failures without progress" in output
    assert len(stage.calls("trainer")) == 4
    assert len(stage.gcloud_calls("queued-resources create")) == 1


@pytest.mark.slow
def test_babysit_gives_up_when_nothing_moves(tpu_vm, stage):
    stage.set(trainer=["step 5 ;; exit 75", "step 6 ;; exit 75", "step 6 ;; exit 75"])
    process = tpu_vm("babysit", "pod", *CREATE, "--max-failures=2", "--", *FLAGS)
    assert process.exit_code == 1
    # The first two starts reached a new step, two more were granted.
    assert len([call for call in stage.calls("trainer") if call["host"].endswith("0")]) == 4
    assert "given up after 3 failures in a row without a step beyond 6" in process.errors


@pytest.mark.slow
def test_babysit_ends_when_somebody_stops_training(tpu_vm, stage):
    stage.set(trainer=["train"])
    babysitter = tpu_vm.start("babysit", "pod", *CREATE, "--", *FLAGS)
    babysitter.wait_for_line("training has started")
    wait_for(lambda: all("training\n" in (h / "topklm-run/log").read_text() for h in stage.workers()))
    tpu_vm.good("stop", "pod")
    assert babysitter.finish() == 0
    assert "the same command goes on" in babysitter.output
    assert len(stage.calls("trainer")) == 2


@pytest.mark.slow
def test_babysit_takes_up_training_that_runs_and_leaves_other_training_alone(tpu_vm, stage):
    tpu_vm.prepare()
    stage.set(trainer=["train"])
    tpu_vm.good("run", "pod", "--env=A=1", "--", *FLAGS)
    other = tpu_vm("babysit", "pod", *CREATE, "--", *FLAGS, "--config.train.steps=7")
    assert other.exit_code == 2
    assert "other training runs on pod" in other.errors
    babysitter = tpu_vm.start("babysit", "pod", *CREATE, "--env=A=1", "--", *FLAGS)
    babysitter.wait_for_line("training runs already; watching it")
    tpu_vm.good("stop", "pod")
    assert babysitter.finish() == 0
    assert len(stage.calls("trainer")) == 2


@pytest.mark.slow
def test_babysit_survives_a_cloud_that_does_not_answer_for_a_while(tpu_vm, stage):
    stage.set(
        creates=[["ACTIVE", "ACTIVE", "UNREACHABLE", "UNREACHABLE", "ACTIVE"]],
        ssh=[0, 0, 0, 0, 0, 255, 255],
        trainer=["finish"],
    )
    output = tpu_vm.good("babysit", "pod", *CREATE, "--", *FLAGS)
    assert "training is finished" in output
    assert len(stage.gcloud_calls("queued-resources create")) == 1


@pytest.mark.slow
def test_babysit_ends_workers_that_outlive_the_others(tpu_vm, stage):
    stage.set(trainer=[{"0": "exit 1", "others": "train"}, "finish"])
    output = tpu_vm.good("babysit", "pod", *CREATE, "--", *FLAGS)
    assert "some workers ended and others did not" in output


@pytest.mark.slow
def test_babysit_says_when_the_first_request_is_refused_and_repeats_a_later_one(tpu_vm, stage):
    stage.set(creates=["PERMISSION_DENIED"])
    assert tpu_vm("babysit", "pod", *CREATE, "--", *FLAGS).exit_code == 1
    (stage.folder / "creates.count").unlink()
    stage.set(
        creates=[["ACTIVE", "ACTIVE", "SUSPENDED"], "RESOURCE_EXHAUSTED", ["ACTIVE"]],
        trainer=["train", "finish"],
    )
    output = tpu_vm.good("babysit", "pod", *CREATE, "--", *FLAGS)
    assert "the TPU could not be created; trying again" in output


# --- dry runs and mistakes ---


@pytest.mark.parametrize("verb", ALL_VERBS)
def test_a_dry_run_prints_gcloud_commands_and_runs_nothing(tpu_vm, stage, verb):
    options = {
        "create": [*CREATE],
        "run": ["--", *FLAGS],
        "babysit": [*CREATE, "--", *FLAGS, "--config.data.source=a b"],
        "ssh": ["--worker=0", "--", "ls -l"],
    }
    output = tpu_vm.good(verb, "pod", "--dry-run", *options.get(verb, []))
    assert not stage.calls("gcloud")
    commands = [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]
    assert commands
    for command in commands:
        assert command[:3] == ["gcloud", "compute", "tpus"]
        flags = {word.partition("=")[0] for word in command[5:] if word.startswith("--")}
        assert flags <= set(f"{GCLOUD_FLAGS[' '.join(command[3:5])]} {GCLOUD_WIDE_FLAGS}".split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no verb"),
        (["destroy", "pod"], "destroy"),
        (["create"], "name"),
        (["create", "Pod", *CREATE], "Pod"),
        (["create", "pod"], "--type: missing"),
        (["create", "pod", "--type=h100"], "h100"),
        (["create", "pod", *CREATE, "--spot", "--reserved"], "choose one"),
        (["create", "pod", *CREATE, "--spot=no"], "takes no value"),
        (["create", "pod", *CREATE, "--slices=0"], "--slices 0"),
        (["create", "pod", *CREATE, "--create-flag=labels"], "--create-flag labels"),
        (["create", "pod", *CREATE, "--", "x"], "create takes nothing"),
        (["setup", "pod", "--commit=abc"], "--clone"),
        (["setup", "pod", "--extras=tpu; rm -rf /"], "--extras"),
        (["run", "pod"], "trainer's flags"),
        (["run", "pod", "--config=configs/small.py"], "--config: no option of run"),
        (["run", "pod", "--env=1A=b", "--", "x"], "--env 1A=b"),
        (["run", "pod", "other", "--", "x"], "other"),
        (["logs", "pod", "--worker=first"], "--worker first"),
        (["logs", "pod", "--lines"], "--lines: needs a value"),
        (["babysit", "pod", *CREATE, "--max-failures=-1", "--", "x"], "--max-failures -1"),
        (["status", "pod", "--spot"], "--spot: no option of status"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(tpu_vm, stage, arguments, said):
    process = tpu_vm(*arguments)
    assert process.exit_code == 2
    (line,) = process.errors.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not stage.calls("gcloud")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
@pytest.mark.parametrize("command", GCLOUD_FLAGS)
def test_gcloud_itself_knows_the_flags(command):
    helped = subprocess.run(
        ["gcloud", "compute", "tpus", *command.split(), "--help"], capture_output=True, text=True, check=True
    )
    for flag in f"{GCLOUD_FLAGS[command]} {GCLOUD_WIDE_FLAGS}".split():
        assert flag in helped.stdout
