"""What a benchmark ran on, for the JSON beside its numbers."""

import os
import pathlib
import platform
from typing import Any

import jax


def describe() -> dict[str, Any]:
    """Processor, cores granted to this process, memory, devices and versions.

    Looks for accelerators, which takes them: to be called when nothing is measured any more.
    """
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "devices": [device.device_kind for device in jax.devices()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    name = facts.get("model name", platform.processor())
    return f"{name} (family {facts['cpu family']})" if "cpu family" in facts else name
