"""Ratios to peers that are committed still hold on the machine that they were measured on; nightly."""

import json

import pytest

from benchmarks import command
from benchmarks.harness import report, results
from benchmarks.performance_table import COMMANDS

# A subset of what made each file.
CASES = {
    "bench_topk_few.json": ["topk", "--only=auto", "--sizes=1024:8,2048:64", "--dtype=float32"],
    "bench_step.json": ["step", "--shape=s1", "--dtype=float32"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_ratio_has_fallen_by_more_than_its_interval(name, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("XLA_FLAGS", "")  # tests are compiled with less optimization
    assert name in COMMANDS
    before = results.read(results.FOLDER / name)
    here = results.describe_machine()
    for fact in ("processor", "instructions", "cores"):
        if before["machine"].get(fact) != here[fact]:
            pytest.skip(f"{name} is of {before['machine'].get(fact)}, this is {here[fact]}")
    command.run([*CASES[name], "--peer=torch", f"--json={tmp_path / name}"])
    after = json.loads((tmp_path / name).read_text())
    ratios = [
        change
        for change in report.changes({**before, "results": []}, {**after, "results": []})
        if "faster than" in change.name or "tokens/s" in change.name
    ]
    assert ratios
    assert not [change for change in ratios if change.is_real and change.after < change.before]
