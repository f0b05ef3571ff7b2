"""TopK costs no communication: the compiled train step has the same collectives with it as without it.

Run as a program with a platform, this file compiles both and prints what it found.
"""

from collections import Counter
import dataclasses
import functools
import json
import os
from pathlib import Path
import subprocess
import sys

from helpers import devices
import jax
from jax.experimental import topologies
import pytest

import topklm
from topklm.compile_check import cost
from topklm.config import Config, MeshConfig, ModelConfig, TrainConfig
from topklm.layout import make_layout
from topklm.training.step import abstract_batch, abstract_state, make_optimizer, make_train_step

TOPK = Config(
    model=ModelConfig(
        d_model=256,
        n_layers=3,
        n_heads=4,
        n_kv_heads=4,
        d_mlp=512,
        vocab_size=512,
        context_length=256,
        topk_k=16,
        dtype="bfloat16",
    ),
    train=TrainConfig(batch_size=8),
)
MESHES = {
    "fsdp": MeshConfig(data=1, fsdp=8),
    "data, fsdp and tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp, context and tensor": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
}
PLATFORMS = {
    "cpu": devices(8),
    # Without these libtpu looks for a TPU's metadata server, for minutes.
    "tpu": {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LIBRARY_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another test may be compiling
    },
}


@functools.cache
def found(platform, *meshes):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **PLATFORMS[platform]}
    environment["PYTHONPATH"] = str(Path(topklm.__file__).parents[1])
    command = [sys.executable, __file__, platform, *meshes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("platform", ["cpu", pytest.param("tpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("fsdp", marks=pytest.mark.slow),
        pytest.param("data, fsdp and tensor", marks=pytest.mark.slow),
        "fsdp, context and tensor",
    ],
)
def test_topk_adds_no_collective_to_the_train_step(mesh, platform):
    if platform == "tpu":
        pytest.importorskip("libtpu")
    figures = found(platform, mesh)
    base, topk = (figures[f"{mesh} {model}"] for model in ("base", "topk"))
    assert base, "a train step over eight devices communicates"
    assert topk == base


def compile_all(platform, meshes):
    if platform == "tpu":
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    else:
        devices = jax.devices()
    report = {}
    for name in meshes:
        for model, n_nontopk in (("base", 3), ("topk", 1)):
            # Each as it is usually trained there.
            shape = dataclasses.replace(TOPK.model, n_nontopk=n_nontopk)
            config = dataclasses.replace(TOPK, model=shape)
            text = compiled_step(config, make_layout(MESHES[name], devices)).as_text()
            report[f"{name} {model}"] = communication(text)
    return report


def compiled_step(config, layout):
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = abstract_state(config, optimizer)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        layout.shardings(state),
    )
    return make_train_step(config, optimizer, layout).lower(state, abstract_batch(config, layout)).compile()


def communication(text):
    """Runs and bytes of every kind of collective, by the devices that take part."""
    runs, n_bytes = Counter(), Counter()
    for collective in cost.collectives(cost.parse(text)):
        key = f"{collective.kind} over {collective.groups}"
        runs[key] += collective.count
        n_bytes[key] += collective.count * collective.bytes
    return {key: [runs[key], n_bytes[key]] for key in sorted(runs)}


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1], sys.argv[2:])))
