"""`topklm compile-check` as a process: real compilers, no TPU."""

import json
import os
import subprocess
import sys

from helpers import CONFIG_FILE, ROOT, assert_one_line_error
import pytest

from topklm import cli
from topklm.errors import UserError

TINY = {
    "model.d_model": 128,
    "model.n_layers": 3,
    "model.n_heads": 2,
    "model.n_kv_heads": 2,
    "model.d_mlp": 256,
    "model.context_length": 128,
    "model.dtype": "bfloat16",
    "data.vocab_size": 1024,
    "train.batch_size": 16,
    "mesh.data": 2,
    "mesh.fsdp": 4,
}
needs_libtpu = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import libtpu"], capture_output=True, check=False).returncode != 0,
    reason="needs libtpu: pip install 'topklm[tpu-compile]'",
)


def run(*arguments, **settings):
    fields = {**TINY, **{name.replace("__", "."): value for name, value in settings.items()}}
    command = [sys.executable, "-m", "topklm", "compile-check", f"--config={CONFIG_FILE}", *arguments]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )


def bytes_by_kind(report, axis):
    return {row["kind"]: row["bytes"] for row in report["traffic"] if row["axes"] == [axis]}


@needs_libtpu
@pytest.mark.slow
def test_a_step_is_compiled_for_a_tpu_slice_without_one():
    # Splash attention would compute the scores once more for each of its two gradients.
    done = run("--topology=v5e:2x4", "--json", model__attention="blocked")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["fits"] and report["memory_available"] == int(15.75 * 2**30)
    # Each device has a fourth of three float32 copies, and of a batch split over all.
    state = 3 * 4 * report["parameters"] / 4
    assert state < report["memory"]["arguments"] < 1.1 * state
    # Nothing is recomputed, and with few tokens attention computes its masked half too.
    assert report["compiled_flops"] == report["model_flops"]
    vocabulary, blocks = 2 * 1024 * 128, 3 * (4 * 128 * 128 + 3 * 128 * 256)
    along_fsdp = bytes_by_kind(report, "fsdp")
    # Gradients are summed in float32; which of the two ways is the compiler's choice. Parameters are gathered
    # in bfloat16, those of a block again for the backward pass unless it unrolls so short a loop.
    summed = along_fsdp["reduce-scatter"] + along_fsdp.get("all-reduce", 0)
    assert summed == pytest.approx(4 * (vocabulary + blocks), rel=0.01)
    assert 2 * (vocabulary + blocks) <= along_fsdp["all-gather"] <= 2 * (vocabulary + 2 * blocks)
    assert bytes_by_kind(report, "data")["all-reduce"] == (vocabulary + blocks) * 4 / 4
    assert report["communication_seconds"] > 0 and report["hbm_seconds"] > 0


@needs_libtpu
def test_a_step_that_cannot_fit_ends_in_one_line():
    huge = {"model__d_model": 8192, "model__d_mlp": 65_536, "model__n_layers": 1, "model__n_heads": 64}
    done = run("--topology=v5e:1x1", **huge, mesh__data=1, mesh__fsdp=1, train__batch_size=1)
    assert done.returncode == 2
    line = assert_one_line_error(done.stderr)
    assert "GiB per device, a v5e has 15.75: more mesh.fsdp, model.remat=full" in line


def test_virtual_devices_check_a_mesh_without_libtpu():
    done = run("--topology=cpu:8", model__n_layers=2, model__n_nontopk=2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "on cpu:8, mesh data=2 fsdp=4: " in done.stdout
    assert "reduce-scatter" in done.stdout


def test_what_training_would_refuse_is_refused():
    done = run("--topology=cpu:8", mesh__fsdp=3)
    assert done.returncode == 2
    assert "must multiply to the 8 devices" in assert_one_line_error(done.stderr)


def test_a_missing_topology_is_asked_for():
    with pytest.raises(UserError, match="--topology; see topklm compile-check --help"):
        cli.dispatch(["compile-check", f"--config={CONFIG_FILE}"])
