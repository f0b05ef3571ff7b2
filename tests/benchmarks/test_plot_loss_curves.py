"""The figure is drawn from metrics.jsonl, the same bytes each time."""

import json

import pytest

pytest.importorskip("matplotlib")

from benchmarks.plot_loss_curves import draw


def test_a_run_is_drawn_with_its_name_and_last_value(tmp_path):
    run = tmp_path / "small"
    run.mkdir()
    trained = [{"step": s, "tokens_seen": s * 1000, "train/loss": 9 / s} for s in range(1, 30)]
    evaluated = {"step": 29, "tokens_seen": 29000, "eval/loss": 3.0, "eval/bits_per_byte": 1.625}
    lines = [json.dumps(line) for line in (*trained, evaluated)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    for name in ("a.svg", "b.svg"):
        draw([run], tmp_path / name, {"xz -9e": 2.0})
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").stat().st_size > 5000
