"""Files of results: JSON with the machine that it was measured on, and Markdown tables made from it."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
import json
import os
from pathlib import Path
import platform
import re
from typing import Any

import jax

from topklm.storage.files import write_atomically

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"

_NUMBERS = re.compile(r"\[\n\s*(?:(?:-?\d[\d.e+-]*|null),?\n\s*)+\]")

# Variables that keep a processor with AVX-512 from using it: ours, and of PyTorch's libraries. It remains
# that processor otherwise, so such a figure is not one of a machine with AVX2 only.
AVX2_ONLY = {
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
_INSTRUCTIONS = {"AVX-512": "avx512f", "AVX2": "avx2", "AVX": "avx", "NEON": "asimd"}  # the widest first

Content = Mapping[str, Any]  # of a JSON file


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Makes the parser of a script, whose help is the text of its module."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def write(path: Path, content: Content, *, shown: Content | None = None) -> None:
    """Writes a result, with the machine that it was measured on, and prints it.

    To be called when nothing is measured any more: looking for accelerators takes them.

    Args:
        path: The JSON file.
        content: Of it.
        shown: Printed in place of all of it; an empty one is not.
    """
    content = {"machine": describe_machine(), **content}
    save(path, content)
    if shown != {}:
        print(json.dumps(shown or content, indent=1))


def save(path: Path, content: Content) -> None:
    """Writes JSON, whole or not at all; a list of numbers stands on one line."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    text = _NUMBERS.sub(lambda found: " ".join(found[0].split()), text)
    write_atomically(path, text.encode())


def read(path: Path) -> Any:
    """Reads JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def describe_machine() -> dict[str, Any]:
    """Returns processor, cores granted to this process, memory, devices and versions, for JSON.

    Looks for accelerators, which takes them.
    """
    facts = _cpuinfo()
    name = facts.get("model name", platform.processor())
    return {
        "processor": f"{name} (family {facts['cpu family']})" if "cpu family" in facts else name,
        "instructions": instructions(facts.get("flags", facts.get("Features", ""))),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "devices": [device.device_kind for device in jax.devices()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def fill(document: str, parts: Mapping[str, str], name: str) -> str:
    """Puts each part between its markers, `<!-- PART -->` and `<!-- end -->`, in place of what is there.

    Raises:
        ValueError: If a part has no markers in the document of that name.
    """
    for part, text in parts.items():
        before, start, rest = document.partition(f"<!-- {part} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"{name}: no markers for {part}")
        document = f"{before}{start}{text}\n{end}{after}"
    return document


def instructions(flags: str) -> str:
    """Names the widest vector instructions among a processor's flags, and the limit if one is set."""
    found = next((name for name, flag in _INSTRUCTIONS.items() if flag in flags.split()), "unknown")
    limited = found == "AVX-512" and AVX2_ONLY["XLA_FLAGS"] in os.environ.get("XLA_FLAGS", "")
    return f"{found} limited to AVX2" if limited else found


def _cpuinfo() -> dict[str, str]:
    """Returns the facts of the first processor."""
    cpuinfo = Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    return facts
