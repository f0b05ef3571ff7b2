"""The pictures are drawn from the results, the same bytes each time."""

import pytest

pytest.importorskip("matplotlib")

from benchmarks.plot_performance import SIZES, draw

CENTRE = {
    "d_model": 256,
    "n_layers": 6,
    "context_length": 256,
    "vocab_size": 4096,
    "topk_k": 32,
    "batch_size": 16,
}


def point(axes, **sizes):
    measured = {"seconds": 1.0, "fitted_seconds": 1.1, "peak_bytes": 2**30, "fitted_peak_bytes": 2**29}
    return {"axes": axes, "config": {**CENTRE, **sizes}, **measured}


def topk_result(operation, k):
    facts = {"operation": operation, "k": k, "d": 2048, "rows": 4096, "dtype": "float32", "backward": False}
    return {"facts": facts, "median": 1e-3 * k, "floor": 1e-4}


def test_growth_and_topk_are_drawn(tmp_path):
    points = [point(list(SIZES)), *(point([name], **{name: 2 * size}) for name, size in CENTRE.items())]
    topk = [topk_result(name, k) for name in ("auto", "lax.top_k + scatter") for k in (1, 32)]
    for folder in ("a", "b"):
        draw({"points": points}, {"results": topk}, tmp_path / folder)
    for name in ("time", "memory", "topk"):
        first, second = (tmp_path / folder / f"performance-{name}.svg" for folder in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()
        assert first.stat().st_size > 5000
