"""What a run meets around itself: an output that nobody reads, a full disk, odd names, a closing terminal."""

import contextlib
import errno
import importlib.metadata
import io
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

from helpers import (
    STEPS,
    Process,
    assert_one_line_error,
    assert_same_bits,
    checkpoint_steps,
    final_arrays,
    metrics,
)
import jax
import pytest

from topklm import cli, config, errors, imports
from topklm.layout import one_device
from topklm.storage import files
from topklm.training import setup
from topklm.training.step import abstract_state, make_optimizer

# What a shell starts: `SCRIPT` reads the arguments of a Python program from "$@".
NOBODY_READS = 'set -o pipefail; "$@" | head -n 1'
FULL_DISK = '"$@" > /dev/full'

# Gets what a process gets whose terminal closes, right after a step's figures are shown: `SCRIPT FLAGS...`.
TERMINAL_CLOSES = """
import signal, sys, time
from topklm import main
from topklm.training.metrics import Console

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # libtpu has it ignored, in processes that tests start too
report = Console.report

def report_and_close(self, step, **figures):
    report(self, step, **figures)
    if step == 7:
        for _ in range(2):  # by the shell, and by the kernel
            signal.raise_signal(signal.SIGHUP)
            time.sleep(0.5)  # a thread hears it

Console.report = report_and_close
sys.exit(main.run())
"""


def in_a_shell(script, trainer, run, settings, environment):
    arguments = trainer.arguments(run, settings)
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    variables |= {"XDG_CACHE_HOME": str(trainer.compilation_cache), **environment}
    command = ["bash", "-c", script, "bash", sys.executable, "-m", "topklm.main", *map(str, arguments)]
    process = Process(command, env=variables)
    process.finish()
    return process


@pytest.mark.parametrize(
    ("script", "environment", "said"),
    [
        (NOBODY_READS, {"PYTHONIOENCODING": "latin-1"}, ""),
        pytest.param(
            FULL_DISK,
            {"PYTHONIOENCODING": "ascii"},
            "some of the output could not be written: No space left",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_does_not_end_because_nobody_can_read_its_output(
    trainer, finished_run, tmp_path, script, environment, said
):
    run = tmp_path / "C# 50%" / "run?|[é]"  # no URL, no pattern
    datasets = {"data.dir": finished_run.parent / "datasets"}
    process = in_a_shell(script, trainer, run, datasets, environment)
    assert process.exit_code == 0, process.errors
    assert process.errors.startswith(said)
    assert "Traceback" not in process.errors
    assert metrics(run) == metrics(finished_run)
    assert_same_bits(final_arrays(run), final_arrays(finished_run))
    # What was saved under such a name is found there again.
    again = trainer.train(run, {**datasets, "train.steps": STEPS + 2})
    assert again.exit_code == 0, again.errors
    assert "continuing" in again.output
    assert max(checkpoint_steps(run)) == STEPS + 2


@pytest.mark.slow
def test_a_terminal_that_closes_stops_a_run_which_saves(trainer, finished_run, tmp_path):
    run, settings = tmp_path / "run", {"data.dir": finished_run.parent / "datasets"}
    process = trainer.start_python("-c", TERMINAL_CLOSES, *trainer.arguments(run, settings))
    assert process.finish() == 0, process.errors
    assert "SIGHUP: stopped after step" in process.output
    assert trainer.train(run, settings).exit_code == 0
    assert_same_bits(final_arrays(run), final_arrays(finished_run))


class Failing(io.StringIO):
    """A stream whose writes fail as asked."""

    def __init__(self, code):
        super().__init__()
        self.code = code

    def write(self, text):
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EBADF, errno.EDQUOT])
def test_printing_never_ends_what_goes_on(monkeypatch, code):
    monkeypatch.setattr(sys, "stdout", Failing(code))
    monkeypatch.setattr(sys, "stderr", Failing(code))
    done = []
    with errors.output_never_ends_it(goes_on=True):
        print("lost")
        print("lost", file=sys.stderr)
        sys.stdout.writelines(["lost"])
        done.append(1)
    assert done
    assert isinstance(sys.stdout, Failing)


def test_a_command_that_only_prints_ends_quietly_when_nobody_reads(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Failing(errno.EPIPE))
    with errors.output_never_ends_it(goes_on=False):
        assert errors.guarded(lambda: print("read by nobody")) == errors.EXIT_BROKEN_PIPE
    assert capsys.readouterr().err == ""


def test_a_command_that_only_prints_says_that_the_disk_is_full(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Failing(errno.ENOSPC))
    with errors.output_never_ends_it(goes_on=False):
        assert errors.guarded(lambda: print("lost")) == 2
    assert "no space left on the disk" in assert_one_line_error(capsys.readouterr().err)


def test_characters_that_the_output_lacks_are_escaped():
    program = "from topklm import errors\nwith errors.output_never_ends_it(False): print('\\ufffd é 日')"
    for encoding in ("ascii", "latin-1", "cp1252"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        shown = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, check=True
        )
        assert shown.stdout.decode(encoding).startswith("\\ufffd ")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "name is too long"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), "a: symbolic links that lead in a"),
        (OSError(errno.ENOTEMPTY, "Directory not empty", "a"), "a: a folder that is not empty is in the way"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"),
            "a/b: no such file or directory",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", b"a"),
            "a: permission denied: mend its perm",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "too many open files: raise the limit"),
        (OSError(errno.EREMOTEIO, "Remote I/O error", "a"), "a: remote I/O error"),
        (OSError(errno.ESTALE, "Stale file handle", "a"), "a: the network file system has lost the file"),
        (MemoryError(), "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."), "out of memory"),
    ],
)
def test_an_error_of_the_system_is_one_line(capsys, error, line):
    def fail():
        raise error

    assert errors.guarded(fail) == 2
    assert line in assert_one_line_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("code", "expected"),
    [(errno.EIO, 75), (errno.ESTALE, 75), (errno.EBUSY, 75), (errno.EACCES, 2), (errno.ENOSPC, 2)],
)
def test_a_trainer_whose_storage_fails_for_a_while_is_to_be_started_again(
    capsys, monkeypatch, code, expected
):
    def fail(arguments):
        with errors.disk_errors_are_user_errors("reading the data"):
            raise OSError(code, os.strerror(code), "a")

    monkeypatch.setattr(cli, "_start", fail)
    assert cli.run(["train"]) == expected
    assert_one_line_error(capsys.readouterr().err)
    assert cli.run(["generate"]) == 2


@pytest.mark.parametrize(
    ("arguments", "ends"),
    [
        (["train", "--config=x"], False),
        (["neurons", "harvest", "runs/a"], False),
        (["neurons", "find", "runs/a", "text"], True),
        (["data", "show"], True),
        (["generate"], True),
        (["trains"], True),
    ],
)
def test_only_a_command_with_other_work_than_printing_goes_on_unread(monkeypatch, arguments, ends):
    monkeypatch.setattr(sys, "stdout", Failing(errno.EPIPE))
    monkeypatch.setattr(cli, "_start", lambda arguments: print("read by nobody"))
    assert cli.run(arguments) == (errors.EXIT_BROKEN_PIPE if ends else 0)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("no number"), ConnectionError("who?")])
def test_a_bug_keeps_its_traceback(error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        errors.guarded(fail)


@pytest.mark.parametrize("value", ["x" * 100_000, "x y" * 50_000, "a\0b\x1b[31mc\u2028d\n\te", "'" * 9000])
def test_a_line_shows_little_of_a_long_value_and_no_control_character(value):
    line = str(errors.UserError(f"field = {value!r}: must be something else; do this. {value}"))
    assert len(line) < 5000
    assert line.isprintable()
    assert line.startswith("field = ")


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "1", "true", '"x"', "[" * 100_000, '{"a": ' * 100_000, "", "{", '{"a": NaN'],
)
def test_json_of_another_shape_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(errors.UserError, match=r"a\.json is damaged \(.*\): make it again$"):
        files.read_json(path, "make it again")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{\x00}\x00", b"{\xa0}", b'{"a": "\xff"}', b"\0" * 99, b"\xef\xbb\xbf{}"]
)
def test_json_in_another_encoding_is_one_line_or_read(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with contextlib.suppress(errors.UserError):
        assert files.read_json(path, "make it again") == {}


def test_every_changed_bit_of_sealed_json_is_noticed(tmp_path):
    path, value = tmp_path / "a.json", {"documents": 12, "é": [0.1, None, "x"], "nested": {"b": True}}
    whole = files.sealed_json(value)
    path.write_bytes(whole)
    assert files.read_json(path, "make it again", sealed=True) == value
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                assert files.read_json(path, "make it again", sealed=True) == value
            except errors.UserError as e:
                assert "is damaged" in str(e)


@pytest.mark.parametrize("mistake", ["a\0b", "a\udcffb", ""])
def test_a_path_that_libraries_refuse_late_is_refused_at_once(mistake):
    with pytest.raises(errors.UserError, match=r"^--workdir = "):
        files.as_path(mistake, "--workdir")


def test_a_tilde_is_expanded_where_no_shell_has(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.as_path("~/runs/x") == tmp_path / "runs" / "x"
    assert files.as_path("runs/~x") == Path("runs/~x")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EBADF, errno.ENOTSUP])
def test_a_file_system_without_locks_is_warned_of_and_used(monkeypatch, tmp_path, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("topklm.storage.files.fcntl.flock", refuse)
    said = []
    with files.folder_lock(tmp_path, pytest.fail, said.append):
        assert not files.is_locked(tmp_path)
    assert len(said) == 1
    assert "without locks" in said[0]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_folders_is_used(monkeypatch, tmp_path, code):
    flush = os.fsync

    def no_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    files.write_atomically(tmp_path / "x", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_disk_that_cannot_flush_a_file_is_no_such_file_system(monkeypatch, tmp_path):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Invalid"):
        files.write_atomically(tmp_path / "x", b"1")


def test_a_clone_that_is_no_installed_package_knows_its_version(monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_found)
    found = imports.versions("topklm", "jax")
    assert found["jax"] == "unknown"
    assert found["topklm"].count(".") == 2


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(monkeypatch, tmp_path, trainer, capsys):
    monkeypatch.setenv("TOPKLM_ALLOCATOR", "system")
    monkeypatch.setattr(setup, "host_limits", lambda: [(2**20, "the machine's memory")])
    monkeypatch.setattr("topklm.training.loop.init_state", lambda *_: pytest.fail("was made"))
    arguments = ["train", *map(str, trainer.arguments(tmp_path / "run", {"model.d_mlp": 8192}))]
    assert errors.guarded(lambda: cli.dispatch(arguments)) == 2
    line = assert_one_line_error(capsys.readouterr().err)
    assert "more than the machine's memory, 0.0 GiB: make the model smaller" in line


def test_the_memory_of_a_state_is_that_of_its_arrays_and_of_the_gradients(monkeypatch):
    model = {"vocab_size": 256, "d_model": 32, "d_mlp": 64, "n_heads": 2, "n_kv_heads": 2, "topk_k": 4}
    small = config.resolve({"model": model})
    state = abstract_state(small, make_optimizer(small.optim, 10))
    layout = one_device()
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, state.params)))
    for limit, fits in ((n_bytes, True), (n_bytes - 1, False)):
        monkeypatch.setattr(setup, "host_limits", lambda limit=limit: [(limit, "it"), (10**18, "the rest")])
        with contextlib.nullcontext() if fits else pytest.raises(errors.UserError, match="more than it"):
            setup.check_memory(state, layout)


def test_the_limit_of_the_process_counts(tmp_path):
    program = (
        "import resource; from topklm.training import setup\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))\n"
        "print(min(setup.host_limits() + [(2**62, '')], key=lambda x: 'ulimit' not in x[1]))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    limit, whose = eval(shown.stdout)
    assert 2**33 < limit < 2**35
    assert "ulimit" in whose


# A finished run whose newest checkpoint is damaged, and runs without their config.


def damage_manifest(checkpoint):
    (checkpoint / "params" / "manifest.ocdbt").unlink()


def damage_optimizer(checkpoint):
    shutil.rmtree(checkpoint / "optimizer" / "d")


def damage_facts(checkpoint):
    path = checkpoint / "facts" / "metadata"
    path.write_text(path.read_text().replace("relu", "relv"))


@pytest.mark.parametrize(
    "damage",
    [
        damage_manifest,
        pytest.param(damage_optimizer, marks=pytest.mark.slow),
        pytest.param(damage_facts, marks=pytest.mark.slow),
    ],
)
def test_a_finished_run_whose_last_checkpoint_is_damaged_is_not_finished(
    trainer, finished_run, run_copy, damage
):
    damage(run_copy / "checkpoints" / str(STEPS))
    process = trainer.train(run_copy, {"data.dir": finished_run.parent / "datasets"})
    assert process.exit_code == 0, process.errors
    assert f"checkpoint {STEPS} of" in process.output
    assert "continuing" in process.output
    assert "is finished" not in process.output
    assert_same_bits(final_arrays(run_copy), final_arrays(finished_run))


@pytest.mark.parametrize(
    "setting", [("train.seed", 7), ("optim.learning_rate", 1e-3), ("train.batch_size", 8)]
)
def test_a_run_without_its_config_takes_no_other(
    trainer, finished_run, run_copy, capsys, monkeypatch, setting
):
    monkeypatch.setenv("TOPKLM_ALLOCATOR", "system")
    (run_copy / "config.json").unlink()
    place = {"data.dir": finished_run.parent / "datasets", "train.steps": 30}
    arguments = trainer.arguments(run_copy, {**place, setting[0]: setting[1]})
    assert errors.guarded(lambda: cli.dispatch(["train", *map(str, arguments)])) == 2
    assert f"{setting[0]} was" in assert_one_line_error(capsys.readouterr().err)
    assert not (run_copy / "config.json").exists()


def test_a_run_without_its_config_gets_it_back(trainer, finished_run, run_copy):
    (run_copy / "config.json").unlink()
    process = trainer.train(run_copy, {"data.dir": finished_run.parent / "datasets"})
    assert process.exit_code == 0, process.errors
    assert "is finished" in process.output
    assert json.loads((run_copy / "config.json").read_text()) == json.loads(
        (finished_run / "config.json").read_text()
    )
