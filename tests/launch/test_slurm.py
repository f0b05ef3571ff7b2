"""The batch script for Slurm, and what the job does at its end, against stand-ins for Slurm's commands."""

import os
import re
import shlex
import signal
import subprocess

from helpers import Process
import pytest
from stand_ins import wait_for

SIZE = ("--nodes=2", "--gpus-per-node=8")
FLAGS = ("--config=configs/small.py", "--workdir=/shared/run")


@pytest.fixture
def submit(tree, stage):
    (stage.bin / "python").write_text((stage.bin / "uv").read_text())
    (stage.bin / "python").chmod(0o755)

    def run(*arguments: str, flags=FLAGS) -> Process:
        command = [str(tree / "launch/slurm.sh"), *arguments, *(["--", *flags] if flags else [])]
        process = Process(command, env=stage.environment, cwd=tree, stdin=subprocess.DEVNULL)
        process.finish()
        return process

    return run


class Job:
    """A submitted job; each start appends to its log, as Slurm does it."""

    def __init__(self, stage, tree):
        self._stage = stage
        (script,) = stage.calls("script")
        self._script = stage.folder / "script"
        self._script.write_text(script["text"])
        self.log = tree / "slurm" / "topklm-77.log"

    def start(self) -> Process:
        self.log.parent.mkdir(exist_ok=True)
        environment = {**self._stage.environment, "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "6"}
        with self.log.open("a") as log:
            # The helper reads pipes; the log is what counts here.
            script = shlex.quote(str(self._script))
            return Process(
                ["bash", "-c", f"exec bash {script} >&{log.fileno()} 2>&1"],
                env=environment,
                pass_fds=[log.fileno()],
            )

    def run(self) -> int:
        return self.start().finish()

    def wait_for(self, text: str, times: int = 1) -> None:
        wait_for(lambda: self.log.read_text().count(text) >= times)


@pytest.fixture
def job(submit, stage, tree):
    """Submits, and returns the job."""

    def make(*arguments: str, flags=FLAGS, **scenario) -> Job:
        stage.set(**scenario)
        process = submit(*SIZE, *arguments, flags=flags)
        assert process.exit_code == 0, process.errors
        return Job(stage, tree)

    return make


def test_the_script_asks_slurm_for_a_task_for_each_gpu_a_warning_and_another_turn(submit, stage, tree):
    process = submit(*SIZE, "--time=24:00:00", "--sbatch-flag=--comment=two words", "--dry-run")
    assert process.exit_code == 0, process.errors
    flags = re.findall(r"^#SBATCH (.*)$", process.output, flags=re.MULTILINE)
    assert set(flags) == {
        "--job-name=topklm",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        f"--output={tree}/slurm/topklm-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=TERM@300",
        "--time=24:00:00",
        '--comment="two words"',
    }
    assert not stage.calls("sbatch")
    assert not (tree / "slurm").exists()


def test_a_submitted_job_is_the_script_of_the_dry_run(submit, stage):
    process = submit(*SIZE)
    assert "job 77" in process.output
    assert stage.calls("sbatch")[0]["argv"] == ["--parsable"]
    assert stage.calls("script")[0]["text"] == submit(*SIZE, "--dry-run").output


def test_what_sbatch_refuses_is_shown(submit, stage):
    stage.set(sbatch=1)
    process = submit(*SIZE)
    assert process.exit_code == 1
    assert "invalid partition" in process.errors


def test_the_command_reaches_every_task_unharmed(job, stage):
    odd = ["--config=a b.py", '--x=it\'s "$HOME" `id` \\ * ; &', "--y=", "--z=\t"]
    made = job("--prelude", "export NOTE='from here'; false", "--srun-flag=--mpi=none", flags=odd)
    stage.set(variables=["NOTE", "JAX_COORDINATOR_PORT", "SRUN_CPUS_PER_TASK"])
    assert made.run() == 0
    starts = stage.calls("trainer")
    assert [start["argv"] for start in starts] == [["-u", "-m", "topklm.main", *odd]] * 2
    for start in starts:
        assert start["variables"]["NOTE"] == "from here"
        assert start["variables"]["SRUN_CPUS_PER_TASK"] == "6"
        assert 1024 < int(start["variables"]["JAX_COORDINATOR_PORT"]) < 65536
    (srun,) = stage.calls("srun")
    assert {"--mpi=none", "--label", "--kill-on-bad-exit=0"} < set(srun["argv"])


def test_a_finished_job_ends(job, stage):
    made = job(trainer=["step 5 ;; finish"])
    assert made.run() == 0
    assert not stage.calls("scontrol")
    assert "training is finished" in made.log.read_text()


def test_a_mistake_is_never_queued_again(job, stage):
    assert job(trainer=["exit 2"]).run() == 2
    assert not stage.calls("scontrol")


def test_the_warning_before_the_time_limit_saves_and_queues_the_job_again(job, stage):
    made = job(trainer=["train", "step 9 ;; finish"])
    process = made.start()
    made.wait_for(": training", 2)
    os.kill(int((stage.folder / "srun.pid").read_text()), signal.SIGUSR2)  # Slurm's, to the tasks
    assert process.finish() == 0
    assert "0: SIGTERM: stopped after step 7" in made.log.read_text()
    assert [call["argv"] for call in stage.calls("scontrol")] == [["requeue", "77"]]
    assert made.run() == 0
    assert len(stage.calls("scontrol")) == 1


def test_failures_are_repeated_as_long_as_there_is_progress(job, stage):
    made = job("--max-failures=2", trainer=["step 5 ;; exit 75", "step 6 ;; exit 75", "step 6 ;; exit 75"])
    assert [made.run() for _ in range(4)] == [0, 0, 0, 75]
    assert len(stage.calls("scontrol")) == 3
    assert "given up after 3 starts in a row without a step beyond 6" in made.log.read_text()


def test_a_job_can_be_stopped_for_good(job, stage):
    made = job(trainer=["train"])
    process = made.start()
    made.wait_for(": training", 2)
    process.signal(signal.SIGUSR1)
    assert process.finish() == 0
    assert "SIGTERM: stopped after step 7" in made.log.read_text()
    assert [call["argv"] for call in stage.calls("scancel")] == [["--signal=TERM", "77"]]
    assert not stage.calls("scontrol")


def test_what_slurm_itself_ends_is_left_to_slurm(job, stage):
    made = job(trainer=["train"])
    process = made.start()
    made.wait_for(": training", 2)
    # A cancelled or preempted job: SIGTERM to the batch shell's group, and to the tasks.
    process.signal(signal.SIGTERM)
    os.kill(int((stage.folder / "srun.pid").read_text()), signal.SIGUSR2)
    assert process.finish() == 75
    assert "SIGTERM: stopped after step 7" in made.log.read_text()
    assert not stage.calls("scontrol")


def test_a_job_that_cannot_be_queued_again_says_so(job):
    made = job(trainer=["exit 75"], scontrol=1)
    assert made.run() == 75
    assert "submit it once more" in made.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--nodes missing"),
        (["--nodes=2"], "--gpus-per-node missing"),
        (["--nodes=two", "--gpus-per-node=8"], "--nodes two"),
        ([*SIZE, "--config=configs/small.py"], "--config: no such option"),
        ([*SIZE, "small.py"], "small.py"),
        ([*SIZE, "--job-name=a b"], "--job-name a b"),
        ([*SIZE, "--log-dir=a%b"], "--log-dir a%b"),
        ([*SIZE, "--sbatch-flag=exclusive"], "--sbatch-flag exclusive"),
        ([*SIZE, "--time"], "--time: needs a value"),
        ([*SIZE, '--account=a"b'], "quotes"),
        ([*SIZE, "--warn-seconds=0"], "--warn-seconds 0"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(submit, stage, arguments, said):
    process = submit(*arguments)
    assert process.exit_code == 2
    (line,) = process.errors.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not stage.calls("sbatch")


def test_flags_of_the_trainer_must_be_there(submit):
    assert "no trainer flags" in submit(*SIZE, flags=()).errors
