"""Compiles the full train step for a topology, with nothing allocated, and reads off what it needs.

The step, its shardings and its refusals are those of training; only the devices are described, not there.
"""

import collections
from collections.abc import Sequence
import dataclasses
import importlib.metadata
import importlib.util
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from topklm.compile_check import collectives, cost, hlo
from topklm.compile_check.report import Memory, Report, Traffic
from topklm.compile_check.topology import GIB, Chip, Topology
from topklm.config import Config
from topklm.errors import UserError
from topklm.layout import make_layout
from topklm.training import throughput
from topklm.training.optimizer import make_optimizer
from topklm.training.step import abstract_batch, abstract_state, make_train_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_check(config: Config, topology: Topology, name: str) -> Report:
    """Compiles the train step.

    Args:
        config: The experiment. A `model.vocab_size` of 0 stands for the tokenizer's, which is not here: it is
            taken to have `data.vocab_size` tokens.
        topology: Where it is to run.
        name: Of the config, for the report.

    Raises:
        UserError: If the mesh cannot split the model or the batch, or the compiler gives up because the step
            needs more memory than a device has (where it does not give up, the report says whether it fits),
            or its program is of a version that this jax cannot read.
    """
    config = with_vocabulary(config)
    layout = make_layout(config.mesh, topology.devices)
    layout.check(config)
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = abstract_state(config, optimizer)
    layout.check_split(state.params)
    began = time.perf_counter()
    lowered = make_train_step(config, optimizer, layout).lower(
        layout.with_shardings(state), abstract_batch(config, layout)
    )
    compiled = _compile(lowered, topology)
    seconds = time.perf_counter() - began
    parsed = _parsed(compiled)
    arithmetic, memory, traffic = (collections.Counter[str]() for _ in range(3))
    tokens = config.train.batch_size * config.model.context_length
    return Report(
        config=name,
        topology=topology.name,
        n_slices=topology.n_slices,
        mesh=dict(layout.mesh.shape),
        parameters=throughput.parameter_count(state.params),
        tokens_per_device=tokens / layout.size,
        memory=_memory(compiled),
        model_flops=throughput.flops_per_token(config.model) * tokens / layout.size,
        compiled_flops=float(cost.matmul_flops(parsed, arithmetic)),
        hbm_traffic=float(cost.main_memory_bytes(parsed, memory)),
        traffic=_traffic(collectives.collectives(parsed, traffic), layout.mesh, topology, traffic),
        compile_seconds=seconds,
        unread={
            f"{what} of {name}": runs
            for what, unread in {
                "arithmetic": arithmetic,
                "memory traffic": memory,
                "traffic": traffic,
            }.items()
            for name, runs in unread.items()
        },
    )


def with_vocabulary(config: Config) -> Config:
    """Returns the config with `data.vocab_size` tokens, if `model.vocab_size` leaves that to a tokenizer."""
    size = config.model.vocab_size or config.data.vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def does_not_fit(needed: float, available: float, chip: str) -> UserError:
    """Returns the error for a step that needs more bytes than a device has, with advice."""
    return UserError(
        f"needs {needed / GIB:.1f} GiB per device, a {chip} has {available / GIB:.2f}: more mesh.fsdp, "
        "model.remat=full, a smaller train.batch_size or more train.grad_accumulation, or a larger topology"
    )


def _compile(lowered: jax.stages.Lowered, topology: Topology) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        limits = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", str(e))
        if "RESOURCE_EXHAUSTED" not in str(e) or limits is None:
            reason = str(e).partition("\n")[0]
            raise UserError(
                f"the compiler for {topology.name} cannot make a program of this step: {reason}"
            ) from e
        needed, available = (float(limits[i]) * _UNITS[limits[i + 1]] for i in (1, 3))
        raise does_not_fit(needed, available, topology.name.partition(":")[0]) from e


def _parsed(compiled: jax.stages.Compiled) -> hlo.Program:
    try:
        return hlo.parse(compiled.as_text() or "")
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        if importlib.util.find_spec("libtpu") is None:
            raise
        jax_version, libtpu = (importlib.metadata.version(name) for name in ("jax", "libtpu"))
        raise UserError(
            f"the program that libtpu {libtpu} has compiled cannot be read by jax {jax_version}: install the "
            'libtpu that belongs to it, pip install "jax[tpu]", or the newest jax'
        ) from e


def _memory(compiled: jax.stages.Compiled) -> Memory:
    stats: Any = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        program=stats.generated_code_size_in_bytes,
    )


def _traffic(
    found: Sequence[collectives.Collective], mesh: Mesh, topology: Topology, unread: hlo.Unread
) -> tuple[Traffic, ...]:
    """Sums over the collectives of one kind along the same axes."""
    rows: dict[tuple[str, tuple[str, ...], bool], Traffic] = {}
    for collective in found:
        with hlo.reading(collective.name, hlo.Runs(collective.count, is_exact=True), unread):
            key = (collective.kind, collective.axes(mesh.shape), collective.across_slices)
            before = rows.get(key, Traffic(*key, count=0, bytes=0, bytes_sent=0.0, seconds=0.0))
            rows[key] = Traffic(
                *key,
                count=before.count + collective.count,
                bytes=before.bytes + collective.count * collective.bytes,
                bytes_sent=before.bytes_sent + collective.count * collective.bytes_sent,
                seconds=before.seconds + collective.count * _seconds(collective, mesh, topology),
            )
    return tuple(sorted(rows.values(), key=lambda row: -row.bytes_sent))


def _seconds(collective: collectives.Collective, mesh: Mesh, topology: Topology) -> float:
    """Returns the time of one run at the data sheet's bandwidth, without latency; 0 for unknown devices."""
    if topology.chip is None:
        return 0.0
    # Of what goes to every other device of a ring, a piece travels a quarter of the way round on average.
    hops = collective.group_size / 4 if collective.kind == "all-to-all" else 1
    return collective.bytes_sent * max(hops, 1) / _bandwidth(collective, mesh, topology, topology.chip)


def _bandwidth(collective: collectives.Collective, mesh: Mesh, topology: Topology, chip: Chip) -> float:
    if collective.across_slices:
        return chip.dcn_bytes_per_second
    devices = mesh.devices.reshape(-1)
    # The groups of one collective lie alike.
    return topology.link_bandwidth(tuple(devices[place] for place in collective.groups[0]))
