"""docs/performance.md says what the JSON of the benchmarks holds, and nothing about what has none."""

import json

import pytest

from benchmarks import performance_table
from benchmarks.harness.report import Comparison, Report, Result
from benchmarks.harness.results import FOLDER
from benchmarks.performance_targets import TARGETS

DOCUMENT = "<!-- targets -->\nold\n<!-- end -->\n"


def step_report(s1_ratio):
    facts = {"side": "TopK", "mfu": 0.42}
    report = Report(
        "step",
        {"cases": {"s1 float32": {"allocator": "libtcmalloc.so (TOPKLM_ALLOCATOR=system turns it off)"}}},
        [Result("s1 float32: step, TopK", "s", (1.0, 1.1, 1.3), floor=0.55, facts=facts, note="fast")],
        [
            Comparison("s1 float32: tokens/s, TopK / torch eager", (s1_ratio,) * 3, at_least=1.25),
            Comparison("s1 float32: step, TopK / Base", (1.0, 1.02, 1.04), at_most=1.04),
            Comparison("s2 float32: step, TopK / Base", (1.06, 1.06, 1.06), at_most=1.04),
            Comparison("s1 float32: peak memory, TopK / torch eager", (0.9,), at_most=1.0),
        ],
    )
    return json.loads(json.dumps(report.to_dict(["topklm", "bench", "step"])))


def rows_of(document, beginning):
    return [line for line in document.splitlines() if line.startswith(f"| {beginning}")]


def test_the_document_is_rendered_from_the_results():
    document = performance_table.DOCUMENT.read_text(encoding="utf-8")
    results = performance_table.read(FOLDER)
    assert performance_table.render(document, results) == document


def test_the_tables_beside_the_results_are_rendered_from_them():
    tables = performance_table.tables(performance_table.read(FOLDER))
    assert {name: (FOLDER / name).read_text(encoding="utf-8") for name in tables} == tables
    written = {path.name for path in FOLDER.glob("*.md")}
    assert written == {*tables, "scaling.md"}  # nothing is left of results that are gone


def test_a_target_is_reached_missed_or_not_measured():
    document = performance_table.render(DOCUMENT, {"bench_step.json": step_report(1.72)})
    (s1,) = [row for row in rows_of(document, "2 CPU cores") if "S1 float32" in row]
    assert s1.endswith("| >= 1.7 | 1.47 | s1 float32: 1.72 (1.72 to 1.72) | reached |")
    (base,) = [row for row in rows_of(document, "2 CPU cores") if "TopK step / Base" in row]
    assert base.endswith(
        "| s1 float32: 1.02 (1.00 to 1.04); s2 float32: 1.06 (1.06 to 1.06) | **missed** by s2 float32 |"
    )
    (memory,) = [row for row in rows_of(document, "2 CPU cores") if "peak memory" in row]
    assert memory.endswith("| < 1 | 1.16, 1.09; 1.54, 1.39 | s1 float32: 0.90 | reached |")
    assert len(rows_of(document, "H200")) == len([t for t in TARGETS if t.place == "H200"])
    assert all(row.endswith("| not measured | no such machine here |") for row in rows_of(document, "H200"))


def test_a_target_that_all_cases_miss_says_so():
    document = performance_table.render(DOCUMENT, {"bench_step.json": step_report(1.1)})
    (s1,) = [row for row in rows_of(document, "2 CPU cores") if "S1 float32" in row]
    assert s1.endswith("| **missed** |")


def test_figures_have_their_floor_and_files_their_circumstances():
    tables = performance_table.tables({"bench_step.json": step_report(1.3)})
    (figure,) = rows_of(tables["bench_step.md"], "s1 float32: step, TopK |")
    assert figure == "| s1 float32: step, TopK | 1.10 s | 1.00 s to 1.30 s | 550 ms | 2.00 x | fast |"
    assert "allocator libtcmalloc.so," in tables["bench_step.md"]
    assert tables.keys() == {"README.md", "bench_step.md"}
    (command,) = rows_of(tables["README.md"], "`topklm bench step --peer=torch`")
    assert "allocator libtcmalloc.so," in command
    (missing,) = rows_of(tables["README.md"], "`topklm bench checkpoint`")
    assert missing.endswith("| not measured |")
    assert "old" not in performance_table.render(DOCUMENT, {"bench_step.json": step_report(1.3)})


def test_every_target_looks_into_a_file_whose_command_is_known():
    assert {target.file for target in TARGETS} <= set(performance_table.COMMANDS)


def test_what_topk_adds_on_a_tpu_is_that_of_the_compiled_twins():
    content = json.loads((FOLDER / "scaling.json").read_text(encoding="utf-8"))
    added = [target for target in TARGETS if target.place.startswith("TPU")]
    assert len(added) == 3
    for target in added:
        assert [found.what for found in target.find(content)] == ["130m", "400m", "1.4b"]
    reports = content["checks"]
    share = reports["130m on v5e:4x4"]["report"]["hbm_traffic"]
    share /= reports["130m-base on v5e:4x4"]["report"]["hbm_traffic"]
    assert next(iter(added[0].find(content))).value == f"{share - 1:+.1%}"


def test_the_cost_model_and_its_points_are_printed():
    point = {
        "axes": ["d_model", "batch_size"],
        "config": dict.fromkeys(
            ("d_model", "n_layers", "context_length", "vocab_size", "topk_k", "batch_size"), 1024
        ),
        "seconds": 0.5,
        "fitted_seconds": 0.4,
        "tokens_per_second": 2048.0,
        "peak_bytes": 2**30,
        "fitted_peak_bytes": 2**30,
    }
    fit = {"constant": 0.01, "worst_residual": 0.25}
    rates = {"matmul_flops": 1e-11, "activation_bytes": 0.0, "parameter_bytes": 1e-10}
    growth = {
        "machine": step_report(1.3)["machine"],
        "points": [point],
        "centre_again_seconds": 0.55,
        "fits": {"seconds": {**fit, "rates": rates}, "peak_bytes": {**fit, "rates": rates}},
    }
    document = performance_table.tables({"growth.json": growth})["growth.md"]
    assert "matrix products at 100.0 GFLOP/s, activations free, parameters at 10.0 GB/s" in document
    assert "its time moved by +10.0%" in document
    (row,) = rows_of(document, "1,024 |")
    assert row.endswith("| 500 ms | 400 ms | +25% | 2,048 | 1.00 GiB | 1.00 GiB | +0% |")


def test_a_document_without_markers_is_refused():
    with pytest.raises(ValueError, match="no markers for targets"):
        performance_table.render("# Performance", {})
