"""The cache of compiled programs: real processes that compile, and files damaged in all ways."""

import os
from pathlib import Path
import sys

from helpers import ROOT, Process
import jax
import pytest

from topklm.errors import UserError
from topklm.runtime import compilation_cache
from topklm.runtime.compilation_cache import Programs

# Prints how many programs were found and how many were written, and the bits of a result.
COMPILES = """
import collections, os, resource
import jax
import jax.numpy as jnp
from topklm.runtime import compilation_cache

counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rsplit("/")[-1]]))
compilation_cache.enable()
if limit := int(os.environ.get("LIMIT", 0)):  # as on a full disk: the rest of a file is not written
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
x = jnp.linspace(0, 1, 300)
bits = jax.jit(lambda x: jnp.tanh(x[:, None] * jnp.sin(x)).sum(0) @ jnp.exp(x))(x).tobytes().hex()
print(counts["cache_hits"], counts["cache_misses"], bits)
"""


def compile_in(home: Path, **variables) -> tuple[int, int, str]:
    """Programs found, programs kept, and the bits that they compute, in a new process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_", "TOPKLM_"))}
    environment = {**kept, "HOME": str(home), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables}
    process = Process([sys.executable, "-c", COMPILES], env=environment)
    assert process.finish() == 0, process.errors
    assert process.errors == ""
    hits, misses, bits = process.output.split()
    return int(hits), int(misses), bits


def programs_of(home: Path) -> list[Path]:
    return [path for path in home.glob(".cache/topklm/xla/*/*") if path.is_file()]


def test_a_second_process_finds_every_program_whole_and_computes_the_same_bits(tmp_path):
    hits, kept, bits = compile_in(tmp_path)
    assert hits == 0
    assert kept == len(programs_of(tmp_path)) > 1
    assert [folder.stat().st_mode & 0o777 for folder in tmp_path.glob(".cache/topklm/xla/*")] == [0o700]
    assert compile_in(tmp_path) == (kept, 0, bits)
    for i, path in enumerate(sorted(programs_of(tmp_path))):
        content = path.read_bytes()
        path.write_bytes([b"", content[: len(content) // 2], content[:-1] + b"?"][i % 3])
    assert compile_in(tmp_path) == (0, kept, bits)  # damaged, so compiled again
    assert compile_in(tmp_path) == (kept, 0, bits)  # and mended


def test_a_full_disk_costs_only_the_programs(tmp_path):
    compile_in(tmp_path, LIMIT="100")
    assert programs_of(tmp_path) == []
    (tmp_path / "file").touch()
    assert compile_in(tmp_path / "file")[0] == 0  # a home that cannot be written
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize(
    ("place", "mode"),
    [("jax-x", 0o777), ("jax-x", 0o770), ("jax-x", 0o1777), ("jax-x/..", 0o777), ("jax-x/../..", 0o707)],
)
def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, place, mode):
    folder = tmp_path / "topklm" / "xla" / "jax-x"
    folder.mkdir(parents=True)
    (folder / place.removeprefix("jax-x").lstrip("/")).resolve().chmod(mode)
    before = dict(jax.config.values)
    with pytest.raises(UserError, match=r"others can write to it: programs are compiled anew"):
        compilation_cache.use(folder)
    assert dict(jax.config.values) == before


def test_a_folder_of_another_user_is_not_used_and_the_start_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compilation_cache.SWITCH, raising=False)
    chosen_before = jax.config.values[compilation_cache._FOLDER]  # by a run that was trained in this process
    jax.config.update(compilation_cache._FOLDER, None)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    before = dict(jax.config.values)
    compilation_cache.enable()
    assert dict(jax.config.values) == before
    jax.config.update(compilation_cache._FOLDER, chosen_before)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'topklm'}") and "belongs to another user" in line


def test_the_user_can_switch_it_off_or_choose_another_folder(tmp_path, monkeypatch):
    assert compile_in(tmp_path, TOPKLM_COMPILATION_CACHE="off")[:2] == (0, 0)
    mine = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    compile_in(tmp_path, **mine, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert any((tmp_path / "mine").iterdir())
    assert not (tmp_path / ".cache").exists()
    for named, root in ((str(tmp_path), tmp_path), ("relative", Path.home() / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert compilation_cache._root() == root / "topklm" / "xla"


def test_several_processes_share_nothing_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compilation_cache.SWITCH, raising=False)
    before = dict(jax.config.values)
    compilation_cache.enable()
    assert dict(jax.config.values) == before
    assert list(tmp_path.iterdir()) == []


def test_each_kind_of_cpu_has_a_folder_of_its_own(tmp_path, monkeypatch):
    def folder_with(cpuinfo):
        path = tmp_path / "cpuinfo"
        path.write_text(cpuinfo)
        monkeypatch.setattr(compilation_cache, "_CPU_FACTS", path)
        return compilation_cache._machine()

    x86 = "model\t\t: 85\ncpu MHz\t\t: {}\nflags\t\t: fpu avx2{}\n\nmodel\t\t: 85\nflags\t\t: x\n"
    arm = "BogoMIPS\t: 50.0\nFeatures\t: fp asimd{}\nCPU part\t: 0xd0c\n\n"
    kinds = [x86.format(2596.1, ""), x86.format(2596.1, " avx512f"), arm.format(""), arm.format(" sve")]
    folders = [folder_with(kind) for kind in kinds]
    assert len(set(folders)) == len(kinds)
    assert folder_with(x86.format(3100.7, "")) == folders[0]
    monkeypatch.setattr(compilation_cache, "_CPU_FACTS", tmp_path / "missing")
    assert compilation_cache._machine() not in folders


def test_programs_unused_for_longest_are_forgotten_first(tmp_path):
    old, new = (tmp_path / name for name in ("jax-old", "jax-new"))
    for folder in (old, new):
        folder.mkdir()
    size = 1000
    programs = Programs(new, most_bytes=3 * (size + 32))
    Programs(old).put("of the JAX before", bytes(size))
    for i in range(2):
        programs.put(f"program {i}", bytes([i]) * size)
    for age, path in enumerate((new / "program 1", new / "program 0", old / "of the JAX before")):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert programs.get("program 0") == bytes(size)  # used just now
    programs.put("program 2", bytes(size))
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["program 0", "program 1", "program 2"]
    programs.put("program 3", bytes(size))
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["program 0", "program 2", "program 3"]
    assert programs.get("program 1") is None
