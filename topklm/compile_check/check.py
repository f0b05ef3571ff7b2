"""Compiles the full train step for a topology, with nothing allocated, and reads off what it needs.

The step, its shardings and its refusals are those of training; only the devices are described, not there.
"""

import collections
import dataclasses
import importlib.metadata
import importlib.util
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from topklm.compile_check import cost, hlo
from topklm.compile_check.report import Memory, Report, Traffic
from topklm.compile_check.topology import GIB, Topology
from topklm.config import Config
from topklm.errors import UserError
from topklm.layout import make_layout
from topklm.training import throughput
from topklm.training.step import abstract_batch, abstract_state, make_optimizer, make_train_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_check(config: Config, topology: Topology, name: str) -> Report:
    """Compiles the train step of a config, which has a name, for a topology.

    A `model.vocab_size` of 0 stands for the tokenizer's, which is not here: it is taken to have
    `data.vocab_size` tokens. UserError if the mesh cannot split the model or the batch, the compiler gives up
    for lack of memory (where it does not, the report says whether it fits), or this jax cannot read the
    program.
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
    stats: Any = compiled.memory_analysis()
    unread = {what: collections.Counter[str]() for what in ("arithmetic", "memory traffic", "traffic")}
    tokens = config.train.batch_size * config.model.context_length
    return Report(
        config=name,
        topology=topology.name,
        n_slices=topology.n_slices,
        mesh=dict(layout.mesh.shape),
        parameters=throughput.parameter_count(state.params),
        tokens_per_device=tokens / layout.size,
        memory=Memory(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            program=stats.generated_code_size_in_bytes,
        ),
        model_flops=throughput.flops_per_token(config.model) * tokens / layout.size,
        compiled_flops=float(cost.matmul_flops(parsed, unread["arithmetic"])),
        hbm_traffic=float(cost.main_memory_bytes(parsed, unread["memory traffic"])),
        traffic=_traffic(parsed, layout.mesh, topology, unread["traffic"]),
        compile_seconds=seconds,
        unread={f"{what} of {name}": n for what, missed in unread.items() for name, n in missed.items()},
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


def _traffic(program: hlo.Program, mesh: Mesh, topology: Topology, unread: hlo.Unread) -> tuple[Traffic, ...]:
    """Sums over the collectives of one kind along the same axes."""
    rows: dict[tuple[str, tuple[str, ...], bool], Traffic] = {}
    for found in cost.collectives(program, unread):
        with hlo.reading(found.name, hlo.Runs(found.count, is_exact=True), unread):
            key = (found.kind, found.axes(mesh.shape), found.across_slices)
            before = rows.get(key, Traffic(*key, count=0, bytes=0, bytes_sent=0.0, seconds=0.0))
            rows[key] = Traffic(
                *key,
                count=before.count + found.count,
                bytes=before.bytes + found.count * found.bytes,
                bytes_sent=before.bytes_sent + found.count * found.bytes_sent,
                seconds=before.seconds + found.count * _seconds(found, mesh, topology),
            )
    return tuple(sorted(rows.values(), key=lambda row: -row.bytes_sent))


def _seconds(collective: cost.Collective, mesh: Mesh, topology: Topology) -> float:
    """Returns the time of one run at the data sheet's bandwidth, without latency; 0 for unknown devices."""
    if topology.chip is None:
        return 0.0
    # Of what goes to every other device of a ring, a piece travels a quarter of the way round on average.
    hops = collective.group_size / 4 if collective.kind == "all-to-all" else 1
    if collective.across_slices:
        bandwidth = topology.chip.dcn_bytes_per_second
    else:
        devices = mesh.devices.reshape(-1)[list(collective.groups[0])]  # all groups lie alike
        bandwidth = topology.link_bandwidth(tuple(devices))
    return collective.bytes_sent * max(hops, 1) / bandwidth
