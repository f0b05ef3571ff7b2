"""`topklm doctor`: checks, before time or a pod is paid for, that a machine and a run folder can train."""

import argparse
from collections.abc import Callable
import contextlib
import os
from pathlib import Path
import platform
import shutil
import time
from typing import Any
import uuid

import numpy as np

from topklm.commands import shared
from topklm.commands.shared import Output
from topklm.config import MeshConfig
from topklm.errors import UserError, explain, one_line, visible
from topklm.imports import versions, when_used
from topklm.storage.files import (
    AnyPath,
    absolute,
    as_path,
    is_bucket,
    storage_errors_are_user_errors,
    write_atomically,
)
from topklm.storage.remote import check_usable

with when_used():
    from topklm import layout
    from topklm.runtime import compilation_cache
    from topklm.training import setup

DESCRIPTION = (
    "Checks versions, devices, a matrix product, an all-reduce, the folder of compiled programs, disk and "
    "memory, and with --workdir that a run can be kept there: a line each, with what to do. Exit code 2 if "
    "something is broken. In a launcher's environment all hosts take part."
)
EXAMPLE = "topklm doctor --workdir=gs://my-bucket/runs/first"

_LEAST_FREE = 2**30  # bytes, of the disk and of memory: a small run takes some 100 MB
_MOST_SKEW_S = 60.0  # Google refuses credentials from five minutes on
_SIDE = 256  # of the matrices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "json")
    add("--workdir FOLDER", "where a run shall be kept, local or gs://...; default runs", default="runs")


def run(arguments: argparse.Namespace) -> None:
    output = Output(arguments.json)
    folder = as_path(arguments.workdir, "--workdir")
    found: list[dict[str, Any]] = []

    def check(name: str, look: Callable[[], str]) -> bool:
        """Shows one line; tells whether all is well."""
        try:
            ok, text = True, look()
        except Exception as e:  # whatever a broken installation raises
            ok, text = False, one_line(explain(e) or f"{type(e).__name__}: {e}")
        found.append({"name": name, "ok": ok, "text": text})
        output.console.out(visible(f"{host}{'ok   ' if ok else 'WRONG'} {name}: {text}"), highlight=False)
        return ok

    host = ""
    session: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    has_jax = check("versions", _versions)
    if has_jax:
        from topklm import distributed  # noqa: PLC0415 - imports JAX
        from topklm.distributed import coordination  # noqa: PLC0415

        process = coordination.find_process()
        host = "" if process is None else f"process {process.index}: "
        session = distributed.session()
    with session:
        if has_jax and check("devices", _devices):
            check("matrix product", _matrix_product)
            check("all-reduce", _all_reduce)
            check("compiled programs", _compiled_programs)
            check("memory", _memory)
        if not is_bucket(folder):
            check("disk", lambda: _disk(Path(folder)))
        check("run folder", lambda: _run_folder(folder))
        wrong = [one["name"] for one in found if not one["ok"]]
        output.give({"checks": found}, lambda: None)
        if wrong:
            raise UserError(f"{host}not in order: {', '.join(wrong)}; the lines above say what to do")


def _versions() -> str:
    here = versions("topklm", "jax", "jaxlib", "flax")
    text = ", ".join([f"Python {platform.python_version()}", *(f"{name} {v}" for name, v in here.items())])
    shared.import_jax()
    return text


def _devices() -> str:
    import jax  # noqa: PLC0415 - slow, and --help does without

    return layout.make_layout(MeshConfig(), jax.devices()).describe_devices()


def _matrix_product() -> str:
    import jax  # noqa: PLC0415 - slow, and --help does without
    import jax.numpy as jnp  # noqa: PLC0415

    ones = np.ones((_SIDE, _SIDE), np.float32)
    product = jax.jit(jnp.matmul)
    for device in jax.local_devices():
        found = np.asarray(product(*jax.device_put((ones, ones), device)))
        if not (found == _SIDE).all():
            text = f"{device} gives {found.min():g} to {found.max():g} where all is {_SIDE}"
            raise UserError(f"{text}: leave this device out, or replace it")
    return f"right on {len(jax.local_devices())} device(s)"


def _all_reduce() -> str:
    import jax  # noqa: PLC0415 - slow, and --help does without

    mesh = layout.make_layout(MeshConfig(), jax.devices()).mesh
    numbers = np.arange(1, mesh.size + 1, dtype=np.float32)
    every = jax.sharding.PartitionSpec(mesh.axis_names)
    sharding = jax.sharding.NamedSharding(mesh, every)
    placed = jax.make_array_from_callback(numbers.shape, sharding, lambda index: numbers[index])
    add = jax.shard_map(
        lambda part: jax.lax.psum(part, mesh.axis_names),
        mesh=mesh,
        in_specs=every,
        out_specs=jax.sharding.PartitionSpec(),
    )
    found, expected = float(jax.jit(add)(placed)[0]), float(numbers.sum())
    if found != expected:
        raise UserError(
            f"{mesh.size} devices add up to {found:g}, not {expected:g}: check how they are joined"
        )
    return f"right over {mesh.size} device(s)"


def _compiled_programs() -> str:
    import jax  # noqa: PLC0415 - slow, and --help does without

    if not compilation_cache.enable():
        switch = compilation_cache.SWITCH
        if os.environ.get(switch) == "off":
            return f"not kept ({switch}=off)"
        if jax.process_count() > 1:
            return "not kept: of several processes only in JAX_COMPILATION_CACHE_DIR, which all of them see"
        raise UserError("are not kept, every start compiles: set XDG_CACHE_HOME to a folder of your own")
    folder = Path(jax.config.values["jax_compilation_cache_dir"])
    _write_and_read(folder)
    return f"kept in {folder}"


def _memory() -> str:
    limit, whose = min(setup.host_limits())
    free = setup.free_memory()
    text = f"{_gib(free)} free; {whose} is {_gib(limit)}"
    if 0 < free < _LEAST_FREE:  # 0: nobody tells
        raise UserError(f"{text}: end other programs, or take a larger machine")
    return text


def _disk(folder: Path) -> str:
    there = _existing(folder)
    free = shutil.disk_usage(there).free
    if free < _LEAST_FREE:
        raise UserError(f"{_gib(free)} free in {there}: free some, or choose another --workdir")
    return f"{_gib(free)} free in {there}"


def _run_folder(folder: AnyPath) -> str:
    """Writes, reads and deletes a file, and compares the clocks; makes no folder."""
    check_usable(folder, "--workdir", write=True)
    there = folder if is_bucket(folder) else _existing(Path(folder))
    with storage_errors_are_user_errors(f"--workdir = {folder}", folder):
        skew = _write_and_read(there)
    if abs(skew) > _MOST_SKEW_S:
        text = (
            f"the clock of {there} is {abs(skew):,.0f} s {'ahead of' if skew > 0 else 'after'} this machine's"
        )
        raise UserError(f"{text}: set the clock (NTP, e.g. timedatectl set-ntp true)")
    return f"{there} can be written, read and deleted from; clocks agree within {abs(skew):.0f} s"


def _write_and_read(folder: AnyPath) -> float:
    """Returns how far the clock of a folder's storage is ahead, seconds."""
    path, content = folder / f".doctor-{uuid.uuid4().hex}", uuid.uuid4().bytes
    write_atomically(path, content)
    try:
        skew = absolute(path).stat().mtime - time.time()
        if path.read_bytes() != content:
            raise UserError(f"{folder} does not give back what was written: choose another folder")
    finally:
        path.unlink()
    if path.exists():
        raise UserError(f"{path} cannot be deleted: grant that, or choose another folder")
    return skew


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"


def _existing(folder: Path) -> Path:
    """Returns the folder, or the nearest around it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
