"""`topklm doctor` finds what is in order and what is broken, each in a line."""

import json
import shutil
import time
from typing import NamedTuple

from helpers import Process, assert_one_line_error, coordinator_port, in_this_process
import jax
import numpy as np
import pytest

from topklm import errors
from topklm.commands import doctor
from topklm.runtime import compilation_cache

NAMES = [
    "versions",
    "devices",
    "matrix product",
    "all-reduce",
    "compiled programs",
    "memory",
    "disk",
    "run folder",
]


class Usage(NamedTuple):
    free: int


def lines(process):
    """Whether each check is in order, by name, and its line."""
    said = [line.split(" ", 1) for line in process.output.splitlines()]
    return {line.strip().partition(":")[0]: (word == "ok", line) for word, line in said}


def test_a_machine_in_order_has_a_line_for_each_check(tmp_path):
    process = in_this_process("doctor", "--workdir", tmp_path / "runs/first")
    assert process.exit_code == 0, process.output + process.errors
    found = lines(process)
    assert list(found) == NAMES
    assert all(ok for ok, _ in found.values())
    assert f"jax {jax.__version__}" in found["versions"][1]
    assert list(tmp_path.iterdir()) == []  # nothing is left, and no folder made


def test_json_has_all_of_it(tmp_path):
    process = in_this_process("doctor", "--workdir", tmp_path, "--json")
    checks = json.loads(process.output)["checks"]
    assert [one["name"] for one in checks] == NAMES
    assert all(one["ok"] for one in checks)


@pytest.mark.parametrize(
    ("broken", "name", "words"),
    [
        ("disk", "disk", "0.0 GiB free in"),
        ("memory", "memory", "end other programs"),
        ("device", "matrix product", "leave this device out, or replace it"),
        ("folder", "run folder", "permission denied"),
        ("cache", "compiled programs", "set XDG_CACHE_HOME"),
        ("clock", "run folder", "s after this machine's: set the clock"),
        ("later", "run folder", "s ahead of this machine's: set the clock"),
    ],
)
def test_what_is_broken_is_told_and_the_rest_is_checked(monkeypatch, tmp_path, broken, name, words):
    if broken == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6))
    elif broken == "memory":
        monkeypatch.setattr(doctor.setup, "free_memory", lambda: 10**6)
    elif broken == "device":
        monkeypatch.setattr(jax.numpy, "matmul", lambda a, b: a * np.float32(255.0))
    elif broken == "folder":
        refused = PermissionError(13, "Permission denied", str(tmp_path))
        monkeypatch.setattr(doctor, "_write_and_read", lambda folder: (_ for _ in ()).throw(refused))
        monkeypatch.setattr(doctor, "_compiled_programs", lambda: "kept")
    elif broken == "cache":
        monkeypatch.setattr(compilation_cache, "enable", lambda: False)
        monkeypatch.delenv(compilation_cache.SWITCH, raising=False)
    else:
        shift = {"clock": 120.0, "later": -120.0}[broken]
        now = time.time
        monkeypatch.setattr(doctor.time, "time", lambda: now() + shift)
    process = in_this_process("doctor", "--workdir", tmp_path)
    assert process.exit_code == errors.EXIT_USER_ERROR
    assert f"not in order: {name};" in assert_one_line_error(process.errors)
    found = lines(process)
    assert list(found) == NAMES
    assert [other for other in NAMES if not found[other][0]] == [name]
    assert words in found[name][1]


def test_without_jax_the_rest_is_checked(trainer, tmp_path):
    code = "import sys; sys.modules['jax'] = None; from topklm import cli; sys.exit(cli.run())"
    process = trainer.start_python("-c", code, "doctor", "--workdir", str(tmp_path))
    assert process.finish() == errors.EXIT_USER_ERROR
    assert "not in order: versions;" in assert_one_line_error(process.errors)
    assert list(lines(process)) == ["versions", "disk", "run folder"]


def test_all_processes_of_a_run_take_part(trainer, tmp_path):
    port = coordinator_port()
    processes: list[Process] = []
    for index in range(2):
        variables = {"TOPKLM_COORDINATOR": f"localhost:{port}", "TOPKLM_PROCESS_COUNT": "2"}
        variables |= {"TOPKLM_PROCESS_ID": str(index)}
        arguments = ("-m", "topklm", "doctor", "--workdir", str(tmp_path))
        processes.append(trainer.start_python(*arguments, environment=variables))
    for index, process in enumerate(processes):
        assert process.finish() == 0, process.output + process.errors
        assert f"process {index}: ok    all-reduce: right over 2 device(s)" in process.output
