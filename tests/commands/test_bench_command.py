"""`topklm bench` on tiny shapes, in real processes."""

import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys

from helpers import CONFIG_FILE, TINY
import pytest

from benchmarks.command import BENCHMARKS
from benchmarks.harness import results, roofline
from topklm import cli
from topklm.commands import train
from topklm.errors import UserError
from topklm.model import backends

CONFIG = [f"--config={CONFIG_FILE}", *(f"--config.{name}={value}" for name, value in TINY.items())]
HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def measured(tmp_path, *flags):
    path = tmp_path / "found.json"
    cli.dispatch(["bench", *flags, "--repeats=2", f"--json={path}"])
    return json.loads(path.read_text())


def by_name(rows):
    return {row["name"]: row for row in rows}


@pytest.mark.slow
def test_step_measures_topk_and_base(tmp_path, capsys):
    found = measured(tmp_path, "step", *CONFIG)
    by_side = by_name(found["results"])
    assert set(by_side) == {
        f"config float32: {figure}, {side}" for figure in ("step", "peak memory") for side in ("TopK", "Base")
    }
    step = by_side["config float32: step, TopK"]
    assert len(step["samples"]) == 2 and 0 < step["floor"] < step["median"]
    assert step["facts"]["tokens_per_second"] == pytest.approx(4 * 32 / step["median"])
    assert 0 < step["facts"]["mfu"] < 1
    assert by_side["config float32: peak memory, TopK"]["median"] > 2**26
    (comparison,) = found["comparisons"]
    assert (comparison["name"], comparison["at_most"]) == ("config float32: step, TopK / Base", 1.03)
    assert found["settings"]["cases"]["config float32"]["allocator"]
    assert "loss of the first step" in capsys.readouterr().out


@pytest.mark.slow
def test_step_explains_where_its_time_goes(tmp_path, capsys):
    found = measured(tmp_path, "step", "--explain", *CONFIG)
    parts = {row["facts"]["part"]: row for row in found["results"]}
    names = [part.name for part in roofline.parts_of_step(train.parse(CONFIG)[0])]
    assert list(parts) == [*names, "sum", "whole"]
    for i in range(2):
        assert parts["sum"]["samples"][i] == pytest.approx(sum(parts[name]["samples"][i] for name in names))
    assert parts["host"]["floor"] is None
    assert all(parts[name]["floor"] > 0 for name in names if name != "host")
    assert "% of it █" in capsys.readouterr().out


@pytest.mark.slow
def test_topk_measures_every_backend_beside_a_copy(tmp_path):
    found = measured(tmp_path, "topk", "--sizes=16:4", "--rows=256", "--dtype=float32")
    operations = {row["facts"]["operation"] for row in found["results"]}
    assert operations == {*backends.TOPK.names, "lax.top_k + scatter"} - {"pallas_gpu", "pallas_tpu"}
    assert {row["facts"]["backward"] for row in found["results"]} == {False, True}
    assert all(row["floor"] > 0 for row in found["results"])
    (forward,) = (row for row in found["comparisons"] if row["at_least"])
    assert forward["name"] == "256 x 16, k 4, float32, forward: faster than lax.top_k + scatter"


@pytest.mark.slow
def test_sides_are_kept_from_wider_instructions_when_asked(tmp_path, monkeypatch):
    for variable in results.AVX2_ONLY:
        monkeypatch.setenv(variable, "")  # so that what the command sets ends with the test
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    found = measured(
        tmp_path, "topk", "--sizes=16:4", "--rows=64", "--dtype=float32", "--only=auto", "--isa=avx2"
    )
    assert found["environment"]["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false --xla_cpu_max_isa=AVX2"
    assert found["environment"]["ATEN_CPU_CAPABILITY"] == "avx2"
    assert found["machine"]["instructions"] in ("AVX-512 limited to AVX2", "AVX2", "AVX", "NEON")
    assert {row["facts"]["operation"] for row in found["results"]} == {"auto"}


@pytest.mark.slow
def test_topk_measures_growth_with_k(tmp_path):
    found = measured(tmp_path, "topk", "--sizes=16:4", "--rows=64", "--dtype=bfloat16", "--against=k")
    auto = [row["facts"]["k"] for row in found["results"] if row["facts"]["operation"] == "auto"]
    assert auto == [1, 1, 2, 2, 4, 4, 8, 8]
    assert found["comparisons"][-1]["name"] == "64 x 16, bfloat16: time at k 8 over time at k 1"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCH, reason="needs PyTorch: pip install 'topklm[peers]'")
def test_torch_runs_beside_ours_from_the_same_weights(tmp_path, capsys):
    found = measured(tmp_path, "step", "--peer=torch", *CONFIG)
    sides = {row["facts"]["side"] for row in found["results"]}
    assert {"TopK", "Base", "torch eager"} <= sides
    names = [row["name"].rpartition(" / ")[0] for row in found["comparisons"]]
    assert names == [
        f"config float32: {name}" for name in ("step, TopK", "tokens/s, TopK", "peak memory, TopK")
    ]
    losses = capsys.readouterr().out.split("nats per token: ")[1].split("\n")[0]
    losses = dict(text.rsplit(" ", maxsplit=1) for text in losses.split(", "))
    assert float(losses["torch eager"]) == pytest.approx(float(losses["TopK"]), rel=1e-4)
    found = measured(tmp_path, "topk", "--peer=torch", "--sizes=16:4", "--rows=256", "--dtype=bfloat16")
    assert "torch.topk + scatter" in {row["facts"]["operation"] for row in found["results"]}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "BENCHMARK"),
        (["stpe"], "'stpe'"),
        (["step", "--shape=s9"], "--shape = s9: must be among s1, s2"),
        (["step", "--dtype=int8"], "--dtype"),
        (["step", "--repeats=0"], "--repeats = 0: must be 1 or more"),
        (["step", "--peer=tensorflow"], "--peer"),
        (["step", "--peer=torch", "--explain"], "--explain"),
        (["step", "--shape=s1", *CONFIG], "not both"),
        (["step", "--frobnicate"], "frobnicate"),
        (["step", f"--config={CONFIG_FILE}", "--config.model.d_modl=3"], "d_model"),
        (["step", *CONFIG, "--config.mesh.data=3"], "must multiply to"),
        (["topk", "--sizes=16"], "--sizes = '16': must be D:K"),
        (["topk", "--sizes=16:17"], "--sizes = '16:17': must be D:K"),
        (["topk", "--rows=0"], "--rows = 0: must be 1 or more"),
        (["topk", "--only=best"], "--only = best: must be of auto, lax"),
        (["topk", "--only=lax"], "--only = lax: must have auto"),
        (["topk", "--isa=sse"], "--isa"),
        (["topk", *CONFIG], "--config: `bench topk` has no model"),
    ],
)
def test_mistakes_end_in_one_line(flags, words):
    with pytest.raises(UserError) as e:
        cli.dispatch(["bench", *flags])
    assert words in str(e.value)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_explains_itself_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.dispatch(["bench", name, "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"topklm bench {name}" in text.partition("Example: ")[2]
    assert ("--repeats" in text) == (name != "compare")


def test_an_installed_package_says_where_the_benchmarks_are(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "topklm" / "cli.py"))
    with pytest.raises(UserError, match="not installed with the package; clone the repository and run"):
        cli.dispatch(["bench", "step"])


def test_the_benchmarks_are_found_from_any_folder(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise ImportError('of somebody else')")
    command = [sys.executable, "-m", "topklm", "bench", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "the TopK operation, every backend" in done.stdout
