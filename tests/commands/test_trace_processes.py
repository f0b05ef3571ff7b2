"""A trace by several real processes: the bytes of one, whatever the kills."""

import shutil
import signal

from helpers import Job, in_this_process
import pytest
from test_trace_command import base

from topklm.trace.tables import TraceFolder

FEW = "--tokens", "900", "--min-tokens", "5", "--keep-events"
# A process that is killed when it is about to write the row of its second step.
PROGRAM = """
import os, signal
from topklm.trace.tables import TraceFolder

write, rows = TraceFolder.write, []

def killed(self, table, step, of):
    rows.extend([step] * (table == "run"))
    if len(rows) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, table, step, of)

if "{index}" == os.environ["TOPKLM_PROCESS_ID"]:
    TraceFolder.write = killed
"""


def content(run):
    folder = run / "neurons"
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def alone(run, folder, *flags):
    """Traces a copy of a run by one process; returns the copy."""
    copy = shutil.copytree(run, folder / "alone" / run.name)
    ended = in_this_process("trace", "run", copy, *flags)
    assert ended.exit_code == 0, ended.errors
    return copy


def test_two_processes_write_the_bytes_of_one(finished_run, tmp_path):
    run, flags = shutil.copytree(finished_run, tmp_path / finished_run.name), (*FEW, "--no-language")
    job = Job(tmp_path, 2, ["trace", "run", run, *flags])
    assert job.codes == [0, 0], job.errors
    by_one = alone(finished_run, tmp_path, *flags)
    assert f"{len(TraceFolder(by_one).steps())} steps; topklm trace report" in job.processes[0].output
    assert job.processes[1].output == ""
    assert content(run) == content(by_one)


@pytest.mark.slow
def test_a_kill_ends_all_by_its_name_and_another_number_of_processes_goes_on(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / finished_run.name)
    job = Job(tmp_path, 2, ["trace", "run", run, *FEW], PROGRAM.format(index=1))
    assert job.codes == [75, -signal.SIGKILL]
    said = "process 1 is gone (no sign of life for 5 s): it was killed or its machine failed; start the same"
    assert said in job.errors[0].splitlines()[-1]
    done, by_one = TraceFolder(run).steps(), alone(finished_run, tmp_path, *FEW)
    assert done
    assert TraceFolder(by_one).steps()[-1] not in done
    job = Job(tmp_path, 3, ["trace", "run", run, *FEW])
    assert job.codes == [0, 0, 0], job.errors
    assert content(run) == content(by_one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sae-fresh", "sae-same-seed", "sae-chained"])
def test_processes_make_the_autoencoders_of_one(name, tmp_path):
    run = base(tmp_path)
    flags = (
        *FEW,
        "--no-language",
        "--dictionary",
        name,
        "--layers",
        "1",
        "--sae-tokens",
        "3000",
        "--topk-k",
        "4",
    )
    by_one = alone(run, tmp_path, *flags)
    job = Job(tmp_path, 2, ["trace", "run", run, *flags])
    assert job.codes == [0, 0], job.errors
    assert content(run) == content(by_one)
