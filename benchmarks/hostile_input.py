"""Counts what the tests of hostile input tried, and what of it failed: `python -m benchmarks.hostile_input`.

Runs those tests as they run every night, with their slow parts (all areas: some hours; `--areas 0 3` some of
them), and writes results/hostile_input.json: for each area how many inputs, damages, kills or requests were
tried, and how many of its tests failed. A test that tries many says so (`conftest.pytest_runtest_teardown`).
"""

import pathlib
import subprocess
import sys
import tempfile
from xml.etree import ElementTree

from benchmarks.harness import results

OUT = results.FOLDER / "hostile_input.json"
AREAS = {
    "config: values, saved text, command lines, config files": ["tests/test_hostile_config.py"],
    "arguments of every verb": ["tests/test_hostile_arguments.py", "tests/test_bad_input.py"],
    "output, locale, names, locks, memory": ["tests/test_surroundings.py"],
    "runs, damaged or unreadable": [
        "tests/test_damaged_runs.py",
        "tests/checkpoint/test_damaged_checkpoints.py",
    ],
    "storage that fails": ["tests/checkpoint/test_failing_saves.py"],
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
    "strangers at the explorer": [
        "tests/explorer/test_any_question.py",
        "tests/explorer/test_strangers.py",
        "tests/explorer/test_security.py",
    ],
    "launch scripts": ["tests/launch"],
}


def main() -> None:
    """Runs areas one after another, and writes after each."""
    parser = results.parser(__doc__)
    parser.add_argument(
        "--areas", type=int, nargs="+", default=range(len(AREAS)), help="numbers, from 0; all"
    )
    parser.add_argument("--by-day", action="store_true", help="leave out what tests mark as slow")
    options = parser.parse_args()
    content = results.read(OUT) if OUT.exists() else {"areas": {}}
    for number in options.areas:
        area, files = list(AREAS.items())[number]
        content["areas"][area] = {**count(files, options.by_day), "by_day": options.by_day}
        print(f"{area}: {content['areas'][area]}", flush=True)
        results.save(OUT, {**content, "machine": results.describe_machine()})


def count(files: list[str], by_day: bool) -> dict[str, int]:
    """Runs test files; returns how many cases were tried in how many tests, and how many tests failed."""
    marks = "not slow" if by_day else "slow or not slow"
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", marks]
        subprocess.run([*command, f"--junitxml={report}", *files], cwd=results.ROOT, check=False)
        tests = list(ElementTree.parse(report).getroot().iter("testcase"))
    tried = failed = 0
    for test in tests:
        said = {p.get("name"): p.get("value") for p in test.iter("property")}
        tried += int(said.get("tried") or 1)
        failed += any(test.find(kind) is not None for kind in ("failure", "error"))
    return {"tried": tried, "tests": len(tests), "failed": failed}


if __name__ == "__main__":
    main()
