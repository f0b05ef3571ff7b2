"""Times things against each other in one run: they take turns, so that a busy moment hits all of them.

Knows nothing of JAX or PyTorch: a subject blocks until its own work is done.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import statistics
import sys
import time
from typing import Any, TypeAlias

import numpy as np
import rich.console
import rich.progress

# Calls what is measured so many times and returns the seconds of all calls together.
Subject: TypeAlias = Callable[[int], float]

_DRAWS = 2000
_TAILS = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Seconds of one call, one sample a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """Seconds."""
        return min(self.seconds)

    def rates(self, amount: float) -> tuple[float, ...]:
        """Computes the amounts a second, where a call does `amount`."""
        return tuple(amount / s for s in self.seconds)

    def speedup_over(self, other: "Samples") -> tuple[float, ...]:
        """Computes how many times faster it is than another of the same rounds, one figure a round."""
        return tuple(theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Computes first and third quartile, interpolated between the values; of one value, itself."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Computes the 95 % interval of the median, by bootstrap with a fixed seed; of one value, itself."""
    low, high = np.quantile(_medians_of_draws(values, 0), _TAILS)
    return float(low), float(high)


def ratio_interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Computes that of the ratio of two medians of different runs."""
    low, high = np.quantile(_medians_of_draws(values, 0) / _medians_of_draws(others, 1), _TAILS)
    return float(low), float(high)


def _medians_of_draws(values: Sequence[float], seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).choice(np.asarray(values, np.float64), (_DRAWS, len(values)))
    return np.median(drawn, axis=1)


def timed(function: Callable[[], Any]) -> Subject:
    """Makes a subject of a function, which returns when its work is done."""

    def subject(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            function()
        return time.perf_counter() - began

    return subject


def alternate(
    subjects: Mapping[str, Subject],
    repeats: int,
    *,
    warmup: int = 2,
    at_least: float = 0.0,
    label: str = "",
) -> dict[str, Samples]:
    """Measures the subjects in turns: A B C, then C B A, and so on.

    Args:
        subjects: By name.
        repeats: Rounds, which is samples of each subject.
        warmup: Calls of each subject beforehand that are not counted, 1 or more.
        at_least: Seconds that a sample should take; subjects that are faster are called more often in one.
        label: Of the progress line on a terminal.

    Returns:
        The samples of each subject, seconds a call. Sample i of all subjects is from the same round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.completed}/{task.total}"),
        rich.progress.TimeRemainingColumn(),
    )
    live = sys.stderr.isatty()
    with rich.progress.Progress(*columns, console=console, transient=True, disable=not live) as progress:
        task = progress.add_task(label, total=(repeats + 1) * len(subjects))
        calls = {}
        for name, subject in subjects.items():
            calls[name] = _calls_for(subject, warmup, at_least)
            progress.advance(task)
        for turn in range(repeats):
            for name in list(subjects) if turn % 2 == 0 else reversed(list(subjects)):
                seconds[name].append(subjects[name](calls[name]) / calls[name])
                progress.advance(task)
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def _calls_for(subject: Subject, warmup: int, at_least: float) -> int:
    """Warms a subject up and finds how many calls a sample takes; the last call is typical."""
    for _ in range(warmup - 1):
        subject(1)
    once = subject(1)
    return max(1, math.ceil(at_least / max(once, 1e-7)))
