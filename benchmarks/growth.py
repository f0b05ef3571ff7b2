"""How a train step's time and peak memory grow with D, L, T, V, k and batch, around shape s1.

    python -m benchmarks.growth

Writes benchmarks/results/growth.json, from which `python -m benchmarks.plot_performance` draws. Each point is
a process of its own; the centre is measured first and once more at the end, which shows by how much the
machine's speed has moved in between.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import itertools
import json
import pathlib
from typing import Any

from topklm.bench import growth, machine
from topklm.bench.processes import threads
from topklm.bench.shapes import SHAPES
from topklm.config import Config
from topklm.runtime import allocator
from topklm.storage.files import write_atomically

RESULT = pathlib.Path(__file__).parent / "results" / "growth.json"


def main() -> None:
    """Measures all points, fits the cost model and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=RESULT)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps a point; default %(default)s")
    arguments = parser.parse_args()
    allocator.restart_with_tcmalloc()
    result = run(SHAPES["s1"], growth.AXES, arguments.repeats)
    write_atomically(arguments.out, (json.dumps(result, indent=1) + "\n").encode())


def run(centre: Config, axes: Mapping[str, Sequence[int]], repeats: int) -> dict[str, Any]:
    """The content of the JSON; prints a line for each point.

    Args:
        centre: Is varied along each axis.
        axes: See `growth.configs`; the centre must be a point of each.
        repeats: Timed steps of each point.
    """
    points = growth.configs(centre, axes)
    first = {centre: points.pop(centre)}
    measured: list[dict[str, Any]] = []
    for point in itertools.chain(*(growth.measure(some, repeats) for some in (first, points, first))):
        measured.append(point)
        what = ", ".join(f"{name} {value}" for name, value in point["config"].items())
        print(f"{what}: {point['seconds']:.3f} s a step, {point['peak_bytes'] / 2**30:.2f} GiB", flush=True)
    again = measured.pop()
    fits = {
        "seconds": _fit(measured, growth.TIME_FEATURES, "seconds"),
        "peak_bytes": _fit(measured, growth.MEMORY_FEATURES, "peak_bytes"),
    }
    for name, found in fits.items():
        for point, value in zip(measured, found["fitted"], strict=True):
            point[f"fitted_{name}"] = value
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "threads": threads(),
        "centre_again_seconds": again["seconds"],
        "points": measured,
        "fits": fits,
    }


def _fit(points: Sequence[Mapping[str, Any]], names: Sequence[str], quantity: str) -> dict[str, Any]:
    features = {name: [point["work"][name] for point in points] for name in names}
    found = growth.fit(features, [point[quantity] for point in points])
    return {**dataclasses.asdict(found), "worst_residual": found.worst}


if __name__ == "__main__":
    main()
