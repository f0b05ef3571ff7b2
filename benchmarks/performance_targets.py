"""What is asked of the library's speed, and where in the results the answer stands.

A target is looked up in the JSON of one benchmark; `benchmarks.performance_table` makes a table of all.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import re
from typing import Any

Content = Mapping[str, Any]  # of a JSON file


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
    wanted: str
    file: str  # of benchmarks/results
    find: Callable[[Content], Iterable[Found]]


CPU, GPU, TPU = "2 CPU cores", "H200", "TPU v5e, ahead of time"
_V5E_RECIPES = {"130m": "v5e:4x4", "400m": "v5e:8x8", "1.4b": "v5e:16x16"}


def ratios(pattern: str, *, at_least: float = 0.0, at_most: float = float("inf")) -> Callable:
    """Finds comparisons of a `topklm bench` report.

    Args:
        pattern: Regular expression for the whole name; what its group 1 matches tells several apart.
        at_least: The target, where more is better.
        at_most: The target, where less is better.
    """

    def find(content: Content) -> Iterable[Found]:
        for comparison in content["comparisons"]:
            if match := re.fullmatch(pattern, comparison["name"]):
                middle, (low, high) = comparison["median"], comparison["quartiles"]
                spread = f" ({low:.2f} to {high:.2f})" if len(comparison["samples"]) > 1 else ""
                yield Found(match[1], f"{middle:.2f}{spread}", at_least <= middle <= at_most)

    return find


def mfu(at_least: float) -> Callable:
    """Finds the model FLOPs utilisation of our sides in a `topklm bench step` report."""

    def find(content: Content) -> Iterable[Found]:
        for result in content["results"]:
            facts = result["facts"]
            if "mfu" in facts and facts["side"] in ("TopK", "Base"):
                yield Found(facts["side"], f"{facts['mfu']:.1%}", facts["mfu"] >= at_least)

    return find


def warm_start(content: Content) -> Iterable[Found]:
    """Seconds from the start of a process to its first step, of `benchmarks.startup`."""
    seconds = content["seconds_to_first_step"]["warm"]
    yield Found("", f"{seconds:.1f} s", seconds < 8)


def dropped(content: Content) -> Iterable[Found]:
    """Clients that a server dropped, all rounds together, of `benchmarks.bench_serve`."""
    n = sum(each["dropped"] for each in content["together"])
    yield Found("", str(n), n == 0)


def added_share(quantity: Callable[[Content], float], below: float) -> Callable:
    """Finds by how much TopK's compiled step exceeds its Base twin's, in what `benchmarks.scaling` wrote."""

    def find(content: Content) -> Iterable[Found]:
        for recipe, ours, base in _twins(content):
            added = quantity(ours) / quantity(base) - 1
            yield Found(recipe, f"{added:+.1%}", added < below)

    return find


def added_collectives(content: Content) -> Iterable[Found]:
    """How many collectives TopK's compiled step has more than its Base twin's."""
    for recipe, ours, base in _twins(content):
        added = sum(row["count"] for row in ours["traffic"]) - sum(row["count"] for row in base["traffic"])
        yield Found(recipe, f"{added:+d}", added <= 0)


def _twins(content: Content) -> Iterable[tuple[str, Content, Content]]:
    checks = content["checks"]
    for recipe, topology in _V5E_RECIPES.items():
        yield recipe, *(checks[f"{recipe}{twin} on {topology}"]["report"] for twin in ("", "-base"))


_STEP, _TOPK = "bench_step.json", "bench_topk.json"
_GPU_STEPS = {"130M": ("bench_step_h200_130m.json", 0.40), "1.4B": ("bench_step_h200_1.4b.json", 0.55)}
_PEER = "PyTorch (better of eager and compiled)"

TARGETS = (
    Target(
        CPU,
        f"training tokens/s over {_PEER}, S1 float32",
        ">= 1.25",
        _STEP,
        ratios("s1 float32: tokens/s, TopK / (.*)", at_least=1.25),
    ),
    Target(
        CPU,
        "the same, S2 float32",
        ">= 1.15",
        _STEP,
        ratios("s2 float32: tokens/s, TopK / (.*)", at_least=1.15),
    ),
    Target(
        CPU,
        "the same, bfloat16",
        ">= 1.05",
        _STEP,
        ratios("(s[12]) bfloat16: tokens/s, TopK / .*", at_least=1.05),
    ),
    Target(CPU, "TopK step / Base step", "< 1.04", _STEP, ratios("(.*): step, TopK / Base", at_most=1.04)),
    Target(
        CPU,
        "peak memory of the train process / the peer's",
        "< 1",
        _STEP,
        ratios("(.*): peak memory, TopK / .*", at_most=1.0),
    ),
    Target(
        CPU,
        "TopK operation, speed over `torch.topk` + scatter",
        ">= 2",
        _TOPK,
        ratios(r"\d+ x (.*), float32, forward: faster than torch.*", at_least=2.0),
    ),
    Target(
        CPU,
        "TopK operation, speed over `lax.top_k` + scatter",
        ">= 3",
        _TOPK,
        ratios(r"\d+ x (.*), float32, forward: faster than lax.*", at_least=3.0),
    ),
    Target(
        CPU,
        "generation, tokens/s over Hugging Face `generate`",
        ">= 2",
        "bench_decode.json",
        ratios("(batch [0-9]+) / torch, batch [0-9]+", at_least=2.0),
    ),
    Target(
        CPU,
        "time of a steered step / a plain one",
        "< 1.02",
        "bench_decode.json",
        ratios("time of (batch [0-9]+), steered / batch [0-9]+", at_most=1.02),
    ),
    Target(CPU, "streaming clients dropped, of 64", "0", "serve.json", dropped),
    Target(CPU, "start to first step of `small`, warm cache", "< 8 s", "startup.json", warm_start),
    Target(
        GPU,
        "TopK kernel, 65,536 x 2048 bfloat16, k 128: share of the copy bandwidth",
        ">= 0.7",
        "bench_topk_h200.json",
        ratios(r"65536 x (2048, k 128), bfloat16: share of the copy bandwidth", at_least=0.7),
    ),
    Target(
        GPU,
        "the same, speed over `lax.top_k` + scatter",
        ">= 10",
        "bench_topk_h200.json",
        ratios(r"65536 x (2048, k 128), bfloat16, forward: faster than lax.*", at_least=10.0),
    ),
    Target(
        GPU,
        "the same, speed over `torch.topk` + scatter",
        ">= 5",
        "bench_topk_h200.json",
        ratios(r"65536 x (2048, k 128), bfloat16, forward: faster than torch.*", at_least=5.0),
    ),
    *(
        Target(GPU, f"MFU of the {size} recipe, T 2048, bfloat16", f">= {share:.0%}", file, mfu(share))
        for size, (file, share) in _GPU_STEPS.items()
    ),
    *(
        Target(
            GPU,
            f"TopK step / Base step, {size}",
            "< 1.02",
            file,
            ratios("(.*): step, TopK / Base", at_most=1.02),
        )
        for size, (file, _) in _GPU_STEPS.items()
    ),
    *(
        Target(
            GPU,
            f"tokens/s over {_PEER}, {size}",
            ">= 1.15",
            file,
            ratios("(.*): tokens/s, TopK / .*", at_least=1.15),
        )
        for size, (file, _) in _GPU_STEPS.items()
    ),
    Target(
        TPU,
        "bytes accessed that TopK adds",
        "< 3 %",
        "scaling.json",
        added_share(lambda report: report["hbm_traffic"], 0.03),
    ),
    Target(TPU, "collectives that TopK adds", "0", "scaling.json", added_collectives),
    Target(
        TPU,
        "temporary memory that TopK adds",
        "< 2 %",
        "scaling.json",
        added_share(lambda report: report["memory"]["temporaries"], 0.02),
    ),
)
