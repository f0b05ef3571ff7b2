"""Counts what the tests of hostile input tried, and what of it failed: `python -m benchmarks.hostile_input`.

Runs those tests as they run every night (an hour and more), with their slow parts, and writes
results/hostile_input.json: for each area how many inputs, damages, kills or requests were tried, and how many
of its tests failed. A test that tries many says so (`conftest.pytest_runtest_teardown`); others try one.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from xml.etree import ElementTree

from benchmarks.machine import describe
from topklm.files import write_atomically

ROOT = pathlib.Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "hostile_input.json"
AREAS = {
    "config: values, saved text, command lines, config files": ["tests/test_hostile_config.py"],
    "arguments of every verb": ["tests/test_hostile_arguments.py", "tests/test_bad_input.py"],
    "output, locale, names, locks, memory": ["tests/test_surroundings.py"],
    "runs, damaged or unreadable": [
        "tests/test_damaged_runs.py",
        "tests/training/test_damaged_checkpoints.py",
    ],
    "storage that fails": ["tests/training/test_failing_saves.py"],
    "metrics": ["tests/training/test_metrics.py"],
    "neuron store, table and index, damaged or unreadable": [
        "tests/neurons/test_damaged_store.py",
        "tests/explorer/test_damaged_files.py",
    ],
    "datasets and unfinished work, damaged or unreadable": [
        "tests/data/test_damaged_dataset.py",
        "tests/data/building/test_unfinished_work.py",
    ],
    "kills": ["tests/test_kill_and_resume.py", "tests/commands/test_prepare_command.py"],
    "requests to both servers": ["tests/server/test_any_request.py", "tests/server/test_bad_requests.py"],
    "strangers at the explorer": ["tests/explorer/test_strangers.py", "tests/explorer/test_security.py"],
    "launch scripts": ["tests/launch"],
}


def main() -> None:
    """Runs all areas one after another, and writes after each."""
    rows = []
    for area, files in AREAS.items():
        rows.append({"area": area, **count(files)})
        print(f"{area}: {rows[-1]}", flush=True)
        content = {"areas": rows, "machine": describe()}
        write_atomically(OUT, (json.dumps(content, indent=2) + "\n").encode())


def count(files: list[str]) -> dict[str, int]:
    """Runs test files; returns how many cases were tried in how many tests, and how many tests failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "slow or not slow"]
        subprocess.run([*command, f"--junitxml={report}", *files], cwd=ROOT, check=False)
        tests = list(ElementTree.parse(report).getroot().iter("testcase"))
    tried = failed = 0
    for test in tests:
        said = {p.get("name"): p.get("value") for p in test.iter("property")}
        tried += int(said.get("tried") or 1)
        failed += any(test.find(kind) is not None for kind in ("failure", "error"))
    return {"tried": tried, "tests": len(tests), "failed": failed}


if __name__ == "__main__":
    main()
