"""Tables and JSON of a benchmark."""

import io
import json

import numpy as np
import pytest
import rich.console

from benchmarks import command
from benchmarks.harness import report as report_lib
from benchmarks.harness import results
from benchmarks.harness.report import Comparison, Report, Result, formatted
from topklm.errors import UserError

REPORT = Report(
    "step",
    {"allocator": "glibc"},
    [
        Result("fast", "s", (0.003, 0.001, 0.002), floor=0.001, facts={"d": 256}),
        Result("memory", "bytes", (3.0 * 2**30,)),
    ],
    [
        Comparison("ours / theirs", (1.2, 1.3, 1.4), at_least=1.25),
        Comparison("TopK / Base", (1.05,), at_most=1.04),
        Comparison("without a target", (2.0,)),
    ],
    ["a note with [brackets]"],
)


def shown(report):
    console = rich.console.Console(file=io.StringIO(), width=120)
    report_lib.show(report, console)
    return console.file.getvalue()


def test_a_figure_stands_beside_its_floor_and_a_ratio_beside_its_target():
    names = [row.name for row in (*REPORT.results, *REPORT.comparisons)]
    lines = [line.strip() for line in shown(REPORT).splitlines()]
    rows = {name: line for name in names for line in lines if line.startswith(name)}
    assert "2.00 ms" in rows["fast"] and "1.00 ms" in rows["fast"] and rows["fast"].endswith("2.00")
    assert "1.00..3.00 ms" in rows["fast"]
    assert "3.00 GiB" in rows["memory"]
    assert ">= 1.25" in rows["ours / theirs"] and "yes" in rows["ours / theirs"]
    assert "<= 1.04" in rows["TopK / Base"] and "NO" in rows["TopK / Base"]
    assert "a note with [brackets]" in shown(REPORT)


def test_the_json_has_everything_that_a_figure_depends_on(tmp_path):
    path = tmp_path / "new" / "step.json"
    report_lib.write(REPORT, str(path), ["topklm", "bench", "step"])
    read = json.loads(path.read_text())
    assert read["command"] == ["topklm", "bench", "step"]
    assert read["settings"] == {"allocator": "glibc"}
    assert read["threads"] >= 1 and read["versions"]["jax"] and read["machine"]["processor"]
    fast = read["results"][0]
    assert (fast["median"], fast["quartiles"], fast["range"]) == (0.002, [0.0015, 0.0025], [0.001, 0.003])
    assert (fast["samples"], fast["floor"], fast["facts"]) == ([0.003, 0.001, 0.002], 0.001, {"d": 256})
    assert [row["reached"] for row in read["comparisons"]] == [True, False, None]
    assert [path.name for path in path.parent.iterdir()] == ["step.json"]


def test_the_json_can_be_printed(capsys):
    report_lib.write(REPORT, "-")
    assert json.loads(capsys.readouterr().out)["bench"] == "step"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="writing --json"):
        report_lib.write(REPORT, str(tmp_path / "file" / "step.json"))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.234, "s", "1.23 s"),
        (0.0123, "s", "12.3 ms"),
        (0.000_002_5, "s", "2.50 us"),
        (3e-8, "s", "0.03 us"),
        (1.5 * 2**30, "bytes", "1.50 GiB"),
        (2.0**20, "bytes", "1.00 MiB"),
        (123_456.7, "tokens/s", "123,457 tokens/s"),
        (0.4567, "share", "45.7%"),
        (2.0, "", "2.00"),
    ],
)
def test_figures_are_made_for_reading(value, unit, text):
    assert formatted(value, unit) == text


def report_of(seconds, memory=1.0, machine="one"):
    results = [Result("a: step", "s", tuple(seconds)), Result("a: memory", "bytes", (memory,))]
    content = Report("step", {}, results, [Comparison("a: ours / theirs", (1.2, 1.3, 1.4))]).to_dict()
    return {**content, "machine": {**content["machine"], "processor": machine}}


def test_of_two_reports_only_real_differences_are_shown(tmp_path, capsys):
    rng = np.random.default_rng(0)
    one = report_of(rng.gamma(400, size=30))
    for name, other in (
        ("same", report_of(rng.gamma(400, size=30))),
        ("slower", report_of(1.2 * rng.gamma(400, size=30), 2.0, "two")),
    ):
        (tmp_path / "one.json").write_text(json.dumps(one))
        (tmp_path / f"{name}.json").write_text(json.dumps(other))
        command.run(["compare", str(tmp_path / "one.json"), str(tmp_path / f"{name}.json")])
        shown = capsys.readouterr().out
        if name == "same":
            assert "0 of 3 figures differ" in shown and "note" not in shown
        else:
            assert "note: processor was one, and is two" in shown and "2 of 3 figures differ" in shown
            (row,) = (line.split() for line in shown.splitlines() if "a: step" in line)
            assert 1.15 < float(row[2]) < 1.25
            assert "2.000 x" in shown
    command.run(["compare", str(tmp_path / "one.json"), str(tmp_path / "slower.json"), "--json"])
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["changes"]] == [
        "a: step",
        "a: memory",
        "a: ours / theirs",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), ("{", "is no report"), ('{"results": [{}]}', "is no report")],
)
def test_what_is_no_report_is_named(tmp_path, content, said):
    path = tmp_path / "b.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"b.json: .*{said}"):
        command.run(["compare", str(path), str(path)])


def test_tables_are_readable_at_80_columns():
    wide = Report(
        "step",
        {},
        [
            Result(
                "s1 float32: step, TopK",
                "s",
                (0.79, 0.8),
                0.4,
                note="5,161 tokens/s, MFU 52.7%, compiled in 5.1 s",
            )
        ],
        [Comparison("s1 float32: tokens/s, TopK / torch.compile", (1.4, 1.5), at_least=1.25)],
    )
    console = rich.console.Console(file=io.StringIO(), width=80)
    report_lib.show(wide, console)
    lines = console.file.getvalue().splitlines()
    assert sum(line.strip().startswith("s1 float32") for line in lines) == 2  # the title of each table
    for begins in ("step, TopK ", "tokens/s, TopK / torch.compile ", "step, TopK: 5,161 tokens/s"):
        assert sum(line.strip().startswith(begins) for line in lines) == 1  # a row is one line


@pytest.mark.parametrize(
    ("flags", "limit", "said"),
    [
        ("fpu avx avx2 avx512f avx512bw", "", "AVX-512"),
        ("fpu avx avx2 avx512f", "--a=1 --xla_cpu_max_isa=AVX2", "AVX-512 limited to AVX2"),
        ("fpu avx avx2", "--xla_cpu_max_isa=AVX2", "AVX2"),
        ("fp asimd", "", "NEON"),
        ("", "", "unknown"),
    ],
)
def test_the_vector_instructions_are_named(monkeypatch, flags, limit, said):
    monkeypatch.setenv("XLA_FLAGS", limit)
    assert results.instructions(flags) == said
