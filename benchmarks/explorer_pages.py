"""How long the explorer takes to answer, and Chromium to paint.

    python -m benchmarks.explorer_pages RUN

RUN has been harvested and measured. Writes benchmarks/results/explorer_pages.json: milliseconds of whole
requests for neurons drawn at random, and first contentful paint of some pages, the very first loads left out.
"""

import pathlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any
import urllib.request

from playwright.sync_api import sync_playwright

from benchmarks.harness import results
from topklm.neurons import NeuronsFolder
from topklm.neurons.store import Store

RESULT = results.FOLDER / "explorer_pages.json"
TARGETS = {"neuron_page_ms": 50, "first_paint_ms": 200}
_REQUESTS, _LOADS = 60, 9


def main() -> None:
    """Starts an explorer, asks it, and writes the JSON."""
    parser = results.parser(__doc__)
    parser.add_argument("run", type=pathlib.Path, metavar="RUN")
    arguments = parser.parse_args()
    step = max(int(path.parent.name) for path in arguments.run.glob("neurons/*/neurons.parquet"))
    store = Store(NeuronsFolder(arguments.run, step).store)
    flags = ["--step", str(step), "--port", "0"]
    command = [sys.executable, "-m", "topklm", "explore", str(arguments.run), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = _address(process)
        neurons = random.Random(0).choices(
            [(layer, n) for layer in store.metadata.layers for n in range(store.metadata.d_model)],
            k=_REQUESTS,
        )
        requests = [_milliseconds(f"{address}neurons/{layer}/{n}") for layer, n in neurons]
        result = {
            "activations": store.n_events,
            "targets": TARGETS,
            "neuron_page_ms": {
                "median": statistics.median(requests),
                "p95": statistics.quantiles(requests, n=20)[-1],
            },
            "first_paint_ms": _paints(address, ["", *(f"neurons/{layer}/{n}" for layer, n in neurons[:2])]),
        }
    finally:
        process.terminate()
        process.wait()
    results.write(RESULT, result)


def _address(process: subprocess.Popen) -> str:
    for line in process.stdout or ():
        if found := re.search(r"open (http://\S+)", line):
            return found[1]
    raise RuntimeError("the explorer ended without an address")


def _milliseconds(address: str) -> float:
    began = time.perf_counter()
    with urllib.request.urlopen(address) as answer:
        answer.read()
    return 1e3 * (time.perf_counter() - began)


def _paints(address: str, pages: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        for name in pages:
            times = []
            for _ in range(_LOADS + 1):
                page.goto(address + name, wait_until="load")
                page.wait_for_timeout(150)
                times.append(
                    page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
                )
            found[f"/{name}"] = {"median": statistics.median(times[1:]), "loads": times[1:]}
        browser.close()
    return found


if __name__ == "__main__":
    main()
