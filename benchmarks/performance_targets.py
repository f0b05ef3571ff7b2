"""Targets of the library's speed, and which figure of the results answers each.

A target is looked up in the JSON of one benchmark; `benchmarks.performance_table` makes a table of all.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import re

from benchmarks.harness.results import Content

CPU, GPU, TPU = "2 CPU cores", "H200", "TPU v5e, ahead of time"
_V5E_RECIPES = {"130m": "v5e:4x4", "400m": "v5e:8x8", "1.4b": "v5e:16x16"}

# (which of several, or ""; the figure; the figure as a person reads it)
Figure = tuple[str, float, str]


@dataclasses.dataclass(frozen=True)
class Found:
    """One figure that a target is about."""

    what: str  # which of several; may be empty
    value: str  # as a person reads it
    reached: bool


@dataclasses.dataclass(frozen=True)
class Target:
    """One line of the table."""

    place: str  # the machine
    figure: str
    wanted: str  # ">= 1.25", "< 2 %", "0"
    file: str  # of benchmarks/results
    figures: Callable[[Content], Iterable[Figure]]

    def find(self, content: Content) -> list[Found]:
        """Looks the figures up in the content of the file, and compares them with the target."""
        return [Found(what, shown, self._meets(value)) for what, value, shown in self.figures(content)]

    def _meets(self, value: float) -> bool:
        limit = float(re.sub(r"[^\d.]", "", self.wanted)) * (0.01 if "%" in self.wanted else 1)
        return value >= limit if self.wanted.startswith(">=") else value <= limit


def ratios(pattern: str) -> Callable[[Content], Iterator[Figure]]:
    """Finds comparisons of a `topklm bench` report.

    Args:
        pattern: Regular expression for the whole name; its group 1 tells several apart.
    """

    def find(content: Content) -> Iterator[Figure]:
        for comparison in content["comparisons"]:
            if match := re.fullmatch(pattern, comparison["name"]):
                middle, (low, high) = comparison["median"], comparison["quartiles"]
                spread = f" ({low:.2f} to {high:.2f})" if len(comparison["samples"]) > 1 else ""
                yield match[1], middle, f"{middle:.2f}{spread}"

    return find


def mfu(content: Content) -> Iterator[Figure]:
    """Finds the model FLOPs utilisation of our subjects in a `topklm bench step` report."""
    for facts in (result["facts"] for result in content["results"]):
        if "mfu" in facts and facts["side"] in ("TopK", "Base"):
            yield facts["side"], facts["mfu"], f"{facts['mfu']:.1%}"


def warm_start(content: Content) -> Iterator[Figure]:
    """Finds the seconds from the start of a process to its first step, of `benchmarks.startup`."""
    seconds = content["seconds_to_first_step"]["warm"]
    yield "", seconds, f"{seconds:.1f} s"


def dropped(content: Content) -> Iterator[Figure]:
    """Counts the clients that a server dropped, all rounds together, of `benchmarks.bench_serve`."""
    n = sum(each["dropped"] for each in content["together"])
    yield "", n, str(n)


def added_share(quantity: Callable[[Content], float]) -> Callable[[Content], Iterator[Figure]]:
    """Finds by how much TopK's compiled step exceeds its Base twin's, in results of `benchmarks.scaling`."""

    def find(content: Content) -> Iterator[Figure]:
        for recipe, ours, base in _twins(content):
            added = quantity(ours) / quantity(base) - 1
            yield recipe, added, f"{added:+.1%}"

    return find


def added_collectives(content: Content) -> Iterator[Figure]:
    """Counts the collectives that TopK's compiled step has and its Base twin's has not."""
    for recipe, ours, base in _twins(content):
        added = sum(row["count"] for row in ours["traffic"]) - sum(row["count"] for row in base["traffic"])
        yield recipe, added, f"{added:+d}"


def _twins(content: Content) -> Iterator[tuple[str, Content, Content]]:
    checks = content["checks"]
    for recipe, topology in _V5E_RECIPES.items():
        yield recipe, *(checks[f"{recipe}{twin} on {topology}"]["report"] for twin in ("", "-base"))


_STEP, _TOPK, _DECODE = "bench_step.json", "bench_topk.json", "bench_decode.json"
_KERNEL = "bench_topk_h200.json"
_130M, _1B = "bench_step_h200_130m.json", "bench_step_h200_1.4b.json"
_PEER = "PyTorch (better of eager and compiled)"
_LAX, _TORCH = "speed over `lax.top_k` + scatter", "speed over `torch.topk` + scatter"
_HF = "generation, tokens/s over Hugging Face `generate`"
_COPY = "TopK kernel, 65,536 x 2048 bfloat16, k 128: share of the copy bandwidth"
_AT_65536 = "65536 x (2048, k 128), bfloat16"
_BASE, _RATE = ratios("(.*): step, TopK / Base"), ratios("(.*): tokens/s, TopK / .*")
_FASTER = r"\d+ x (.*), float32, forward: faster than "

TARGETS = (
    Target(
        CPU,
        f"training tokens/s over {_PEER}, S1 float32",
        ">= 1.25",
        _STEP,
        ratios("s1 float32: tokens/s, TopK / (.*)"),
    ),
    Target(CPU, "the same, S2 float32", ">= 1.15", _STEP, ratios("s2 float32: tokens/s, TopK / (.*)")),
    Target(CPU, "the same, bfloat16", ">= 1.05", _STEP, ratios("(s[12]) bfloat16: tokens/s, TopK / .*")),
    Target(CPU, "TopK step / Base step", "< 1.04", _STEP, _BASE),
    Target(
        CPU,
        "peak memory of the train process / the peer's",
        "< 1",
        _STEP,
        ratios("(.*): peak memory, TopK / .*"),
    ),
    Target(CPU, f"TopK operation, {_TORCH}", ">= 2", _TOPK, ratios(f"{_FASTER}torch.*")),
    Target(CPU, f"TopK operation, {_LAX}", ">= 3", _TOPK, ratios(f"{_FASTER}lax.*")),
    Target(CPU, _HF, ">= 2", _DECODE, ratios("(batch [0-9]+) / torch, batch [0-9]+")),
    Target(
        CPU,
        "time of a steered step / a plain one",
        "< 1.02",
        _DECODE,
        ratios("time of (batch [0-9]+), steered / batch [0-9]+"),
    ),
    Target(CPU, "streaming clients dropped, of 64", "0", "serve.json", dropped),
    Target(CPU, "start to first step of `small`, warm cache", "< 8 s", "startup.json", warm_start),
    Target(GPU, _COPY, ">= 0.7", _KERNEL, ratios(f"{_AT_65536}: share of the copy bandwidth")),
    Target(GPU, f"the same, {_LAX}", ">= 10", _KERNEL, ratios(f"{_AT_65536}, forward: faster than lax.*")),
    Target(GPU, f"the same, {_TORCH}", ">= 5", _KERNEL, ratios(f"{_AT_65536}, forward: faster than torch.*")),
    Target(GPU, "MFU of the 130M recipe, T 2048, bfloat16", ">= 40%", _130M, mfu),
    Target(GPU, "MFU of the 1.4B recipe, T 2048, bfloat16", ">= 55%", _1B, mfu),
    Target(GPU, "TopK step / Base step, 130M", "< 1.02", _130M, _BASE),
    Target(GPU, "TopK step / Base step, 1.4B", "< 1.02", _1B, _BASE),
    Target(GPU, f"tokens/s over {_PEER}, 130M", ">= 1.15", _130M, _RATE),
    Target(GPU, f"tokens/s over {_PEER}, 1.4B", ">= 1.15", _1B, _RATE),
    Target(
        TPU,
        "bytes accessed that TopK adds",
        "< 3 %",
        "scaling.json",
        added_share(lambda report: report["hbm_traffic"]),
    ),
    Target(TPU, "collectives that TopK adds", "0", "scaling.json", added_collectives),
    Target(
        TPU,
        "temporary memory that TopK adds",
        "< 2 %",
        "scaling.json",
        added_share(lambda report: report["memory"]["temporaries"]),
    ),
)
