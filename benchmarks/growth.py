"""How a train step's time and memory grow, one size at a time around shape s1, and a cost model of them.

    python -m benchmarks.growth

The work of a step follows from its sizes (`work`); the time of a machine for it is fitted (`fit`):
seconds = a + b * FLOPs of matrix products + c * bytes of activations + d * bytes of parameters.

Writes benchmarks/results/growth.json, from which `python -m benchmarks.plot_performance` draws. Each point is
a process of its own; the centre is measured first and once more at the end, which shows by how much the
machine's speed has moved in between.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import datetime
import itertools
import pathlib
from typing import Any

import jax
import numpy as np
import scipy.optimize

from benchmarks.harness import results, roofline
from benchmarks.harness.shapes import SHAPES, with_model
from benchmarks.harness.timing import alternate
from benchmarks.harness.worker import Worker, threads
from topklm.config import Config
from topklm.model import transformer
from topklm.runtime import process
from topklm.training import throughput

RESULT = results.FOLDER / "growth.json"
# The sizes along each axis; the third is that of the centre, shape s1.
AXES: Mapping[str, Sequence[int]] = {
    "d_model": (128, 192, 256, 384, 512),
    "n_layers": (2, 4, 6, 8, 12),
    "context_length": (64, 128, 256, 512, 1024),
    "vocab_size": (1024, 2048, 4096, 8192, 16384),
    "topk_k": (8, 16, 32, 64, 128),
    "batch_size": (4, 8, 16, 24, 32),
}
HEAD_DIM = 64
MLP_PER_WIDTH = 688 / 256

# The terms of time and memory, as fields of `Work`.
TIME_FEATURES = ("matmul_flops", "activation_bytes", "parameter_bytes")
MEMORY_FEATURES = ("activation_bytes", "parameter_bytes")

_FLOAT_BYTES = 4
# Arrays that a layer's forward pass writes, by their width: D (norms, queries, keys, values, rotations,
# attention, sums, TopK), the MLP's (gate, up, product), half of T for each head (scores, probabilities).
_WIDTH_ARRAYS, _MLP_ARRAYS, _SCORE_ARRAYS = 12, 3, 2
# Each is written and read; so is its gradient, and then it is read once more.
_PASSES = 5
# Logits, probabilities and their gradient, each written and read; there is no pass back.
_LOGIT_PASSES = 6
# Parameter, gradient and two moments are read, all but the gradient written again; the gradient is also
# written, and read for its norm.
_PARAMETER_PASSES = 9


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one train step, from its sizes alone."""

    matmul_flops: float
    activation_bytes: float  # written or read, as if nothing stayed in a cache
    parameter_bytes: float  # the same of parameters, gradients and moments


@dataclasses.dataclass(frozen=True)
class Fit:
    """A cost model: `constant` and a rate for each feature."""

    constant: float
    rates: Mapping[str, float]
    fitted: Sequence[float]  # of each point
    residuals: Sequence[float]  # measured over fitted, less 1

    @property
    def worst(self) -> float:
        """The largest residual, either way."""
        return max(map(abs, self.residuals), default=0.0)


def main() -> None:
    """Measures all points, fits the cost model and writes the JSON."""
    parser = results.parser(__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=RESULT)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps a point; default %(default)s")
    arguments = parser.parse_args()
    process.restart_with_tcmalloc()
    result = run(SHAPES["s1"], AXES, arguments.repeats)
    results.write(arguments.out, result)


def run(centre: Config, axes: Mapping[str, Sequence[int]], repeats: int) -> dict[str, Any]:
    """Makes the content of the JSON; prints a line for each point.

    Args:
        centre: Is varied along each axis.
        axes: See `configs`; the centre must be a point of each.
        repeats: Timed steps of each point.
    """
    points = configs(centre, axes)
    first = {centre: points.pop(centre)}
    measured: list[dict[str, Any]] = []
    for point in itertools.chain(*(measure(some, repeats) for some in (first, points, first))):
        measured.append(point)
        what = ", ".join(f"{name} {value}" for name, value in point["config"].items())
        print(f"{what}: {point['seconds']:.3f} s a step, {point['peak_bytes'] / 2**30:.2f} GiB", flush=True)
    again = measured.pop()
    fits = {
        "seconds": _fit_points(measured, TIME_FEATURES, "seconds"),
        "peak_bytes": _fit_points(measured, MEMORY_FEATURES, "peak_bytes"),
    }
    for name, found in fits.items():
        for point, value in zip(measured, found["fitted"], strict=True):
            point[f"fitted_{name}"] = value
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": threads(),
        "centre_again_seconds": again["seconds"],
        "points": measured,
        "fits": fits,
    }


def _fit_points(points: Sequence[Mapping[str, Any]], names: Sequence[str], quantity: str) -> dict[str, Any]:
    features = {name: [point["work"][name] for point in points] for name in names}
    found = fit(features, [point[quantity] for point in points])
    return {**dataclasses.asdict(found), "worst_residual": found.worst}


def measure(points: Mapping[Config, Sequence[str]], repeats: int) -> Iterator[dict[str, Any]]:
    """Runs train steps of every config, each in a process of its own, one after another.

    Args:
        points: From `configs`.
        repeats: Steps that are timed, after two that are not.

    Yields:
        For JSON, of each config: `axes`, its sizes under `config`, `seconds` a step, `tokens_per_second`,
        `peak_bytes` of the process, `compile_seconds`, and its `work`.
    """
    for config, axes in points.items():
        with Worker("benchmarks.subjects.train_step", {"config": config.to_dict()}) as worker:
            (samples,) = alternate(worker.subjects(), repeats, warmup=1).values()
            peak_bytes, facts = worker.peak_bytes(), worker.facts
        yield {
            "axes": list(axes),
            "config": _sizes(config),
            "seconds": samples.median,
            "seconds_range": [min(samples.seconds), max(samples.seconds)],
            "tokens_per_second": config.train.batch_size * config.model.context_length / samples.median,
            "peak_bytes": peak_bytes,
            "compile_seconds": facts["compile_seconds"],
            "allocator": facts["allocator"],
            "work": dataclasses.asdict(work(config)),
        }


def configs(centre: Config, axes: Mapping[str, Sequence[int]] = AXES) -> dict[Config, tuple[str, ...]]:
    """Lists the configs to measure, each once, with the axes of which it is a point (the centre: all).

    Along `d_model` the heads (of 64) and the MLP grow with the width; k stays.

    Args:
        centre: Is varied in one size at a time.
        axes: Size -> its values.
    """
    found: dict[Config, tuple[str, ...]] = {}
    for axis, values in axes.items():
        for value in values:
            config = _varied(centre, axis, value)
            found[config] = (*found.get(config, ()), axis)
    return found


def work(config: Config) -> Work:
    """Counts a train step's work in float32."""
    m = config.model
    tokens = config.train.batch_size * m.context_length
    scores = _SCORE_ARRAYS * m.n_heads * m.context_length / 2
    arrays = _WIDTH_ARRAYS * m.d_model + _MLP_ARRAYS * m.d_mlp + scores
    elements = _PASSES * m.n_layers * arrays + _LOGIT_PASSES * m.padded_vocab_size
    n_parameters = throughput.parameter_count(jax.eval_shape(lambda: transformer.create(m, 0)))
    return Work(
        matmul_flops=sum(part.flops for part in roofline.parts_of_step(config)),
        activation_bytes=_FLOAT_BYTES * tokens * elements,
        parameter_bytes=float(_FLOAT_BYTES * _PARAMETER_PASSES * n_parameters),
    )


def fit(features: Mapping[str, Sequence[float]], measured: Sequence[float]) -> Fit:
    """Fits by least squares of the relative error, no coefficient below 0 (Lawson and Hanson's NNLS).

    Args:
        features: Name -> its value at each point.
        measured: Seconds or bytes at each point, above 0.

    Returns:
        The model; a rate is in units of what was measured per unit of its feature.
    """
    wanted = np.asarray(measured, np.float64)
    columns = np.column_stack([np.ones(len(wanted)), *features.values()]).astype(np.float64)
    scale = columns.max(axis=0)  # FLOPs and seconds are ten powers of ten apart
    solution, _ = scipy.optimize.nnls(columns / scale / wanted[:, None], np.ones(len(wanted)))
    coefficients = solution / scale
    fitted = columns @ coefficients
    return Fit(
        constant=float(coefficients[0]),
        rates=dict(zip(features, coefficients[1:].tolist(), strict=True)),
        fitted=fitted.tolist(),
        residuals=(wanted / fitted - 1).tolist(),
    )


def _sizes(config: Config) -> dict[str, int]:
    names = ("d_model", "n_layers", "n_heads", "d_mlp", "context_length", "vocab_size", "topk_k", "n_nontopk")
    sizes = {name: getattr(config.model, name) for name in names}
    return {**sizes, "batch_size": config.train.batch_size}


def _varied(centre: Config, axis: str, value: int) -> Config:
    if axis == "batch_size":
        return dataclasses.replace(centre, train=dataclasses.replace(centre.train, batch_size=value))
    if axis == "d_model":
        heads = max(1, value // HEAD_DIM)
        d_mlp = round(MLP_PER_WIDTH * value)
        return with_model(centre, d_model=value, n_heads=heads, n_kv_heads=heads, d_mlp=d_mlp)
    return with_model(centre, **{axis: value})


if __name__ == "__main__":
    main()
