"""Targets of the library's speed, and which figure of the results answers each.

A target is looked up in the JSON of one benchmark; `benchmarks.performance_table` makes a table of all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import re

from benchmarks.harness.results import Content
from benchmarks.harness.timing import interval

CPU, GPU, TPU = "2 CPU cores, AVX-512", "H200", "TPU v5e, ahead of time"
LIMITED = "the same, kept to AVX2"
_V5E_RECIPES = {"130m": "v5e:4x4", "400m": "v5e:8x8", "1.4b": "v5e:16x16"}

# (which of several, or ""; the figure; the figure as a person reads it)
Figure = tuple[str, float, str]
Finder = Callable[[Content], Iterable[Figure]]


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
    figures: Finder
    before: str = ""  # the figure when the target was set, where there was one

    def find(self, content: Content) -> list[Found]:
        """Looks the figures up in the content of the file, and compares them with the target."""
        return [Found(what, shown, self._meets(value)) for what, value, shown in self.figures(content)]

    def _meets(self, value: float) -> bool:
        limit = float(re.sub(r"[^\d.]", "", self.wanted)) * (0.01 if "%" in self.wanted else 1)
        return value >= limit if self.wanted.startswith(">=") else value <= limit


def ratios(pattern: str) -> Finder:
    """Finds comparisons of a `topklm bench` report.

    Args:
        pattern: Regular expression for the whole name; its group 1 tells several apart.
    """

    def find(content: Content) -> Iterator[Figure]:
        for comparison in content["comparisons"]:
            if match := re.fullmatch(pattern, comparison["name"]):
                middle, (low, high) = comparison["median"], interval(comparison["samples"])
                spread = f" ({low:.2f} to {high:.2f})" if len(comparison["samples"]) > 1 else ""
                yield match[1], middle, f"{middle:.2f}{spread}"

    return find


def floors(pattern: str) -> Finder:
    """Finds how often a figure of a report is its floor; the pattern as in `ratios`."""

    def find(content: Content) -> Iterator[Figure]:
        for result in content["results"]:
            if (match := re.fullmatch(pattern, result["name"])) and result["floor"]:
                times = result["median"] / result["floor"]
                yield match[1], times, f"{times:.2f}"

    return find


def mfu(content: Content) -> Iterator[Figure]:
    """Finds the model FLOPs utilisation of our subjects in a `topklm bench step` report."""
    for facts in (result["facts"] for result in content["results"]):
        if "mfu" in facts and facts["side"] in ("TopK", "Base"):
            yield facts["side"], facts["mfu"], f"{facts['mfu']:.1%}"


def start(kind: str) -> Finder:
    """Finds the median seconds of a kind of start, with its quartiles, of `benchmarks.startup`."""

    def find(content: Content) -> Iterator[Figure]:
        seconds, (low, high) = content["seconds"][kind], content["quartiles"][kind]
        yield "", seconds, f"{seconds:.2f} s ({low:.2f} to {high:.2f})"

    return find


def dropped(content: Content) -> Iterator[Figure]:
    """Counts the clients that a server dropped, all rounds together, of `benchmarks.bench_serve`."""
    n = sum(each["dropped"] for each in content["together"])
    yield "", n, str(n)


def added_share(quantity: Callable[[Content], float]) -> Finder:
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


_PEER = "PyTorch (better of eager and compiled)"
_LAX, _TORCH = "speed over `lax.top_k` + scatter", "speed over `torch.topk` + scatter"
_COPY = "TopK kernel, 65,536 x 2048 bfloat16, k 128: share of the copy bandwidth"
_AT_65536 = "65536 x (2048, k 128), bfloat16"
_FASTER = r"\d+ x (.*), float32, forward: faster than "
_BASE, _RATE = ratios("(.*): step, TopK / Base"), ratios("(.*): tokens/s, TopK / .*")
_STEERED = ratios("time of (batch [0-9]+), steered / batch [0-9]+")


def _gpu_step(size: str, share: str) -> list[tuple[str, str, Finder]]:
    return [
        (f"MFU of the {size} recipe, T 2048, bfloat16", f">= {share}", mfu),
        (f"TopK step / Base step, {size}", "< 1.02", _BASE),
        (f"tokens/s over {_PEER}, {size}", ">= 1.15", _RATE),
    ]


_MEMORY = ratios("(.*): peak memory, TopK / .*")
_OF_FLOOR = floors("(.*): step, TopK")


def _rate(case: str) -> Finder:
    return ratios(f"({case}): tokens/s, TopK / .*")


def _few(dtype: str) -> list[tuple[str, Finder]]:
    name = f"TopK operation, {_TORCH}, {dtype}"
    at = rf"\d+ x (.*), {dtype}, forward"
    backward = ratios(f"{at} and backward: faster than torch.*")
    return [(f"{name}, forward", ratios(f"{at}: faster than torch.*")), ("the same, and backward", backward)]


# By machine and file of results: (figure, target, how it is found, the figure before if the target is newer).
_ASKED: dict[tuple[str, str], Sequence[tuple[str, str, Finder] | tuple[str, str, Finder, str]]] = {
    (CPU, "bench_step.json"): [
        (f"training tokens/s over {_PEER}, S1 float32", ">= 1.7", _rate("s1 float32"), "1.47"),
        ("the same, S2 float32", ">= 1.8", _rate("s2 float32"), "1.67"),
        ("the same, bfloat16", ">= 1.15", _rate("s[12] bfloat16"), "0.92 to 1.22; 1.02"),
        ("step / its plain products' floor", "< 1.6", _OF_FLOOR, "1.98, 1.23; 1.63, 0.96"),
        ("TopK step / Base step", "< 1.03", _BASE, "1.06, 1.07; 0.99, 1.02"),
        ("peak memory of the train process / the peer's", "< 1", _MEMORY, "1.16, 1.09; 1.54, 1.39"),
    ],
    (CPU, "bench_topk.json"): [
        (f"TopK operation, {_LAX}", ">= 3", ratios(f"{_FASTER}lax.*")),
    ],
    (CPU, "bench_topk_few.json"): [
        *((name, ">= 1.5", figures, "0.6 to 4.7") for name, figures in _few("float32")),
        *((name, ">= 1.5", figures, "0.99 to 3.3") for name, figures in _few("bfloat16")),
    ],
    (LIMITED, "bench_step_avx2.json"): [
        (f"training tokens/s over {_PEER}, float32", ">= 1.15", _rate("s[12] float32")),
        ("step / its plain products' floor", "< 1.3", _OF_FLOOR),
    ],
    (LIMITED, "bench_topk_few_avx2.json"): [
        *((name, ">= 1.5", figures) for name, figures in _few("float32")),
    ],
    (CPU, "bench_decode.json"): [
        (
            "generation, tokens/s over Hugging Face `generate`",
            ">= 2",
            ratios("(batch [0-9]+) / torch, batch .*"),
        ),
        ("time of a steered step / a plain one", "< 1.02", _STEERED),
    ],
    (CPU, "serve.json"): [("streaming clients dropped, of 64", "0", dropped)],
    (CPU, "startup.json"): [
        ("start to first step of `small`, warm cache", "< 2.5 s", start("train warm"), "4.5 s"),
        ("CPU time of the imports in it", "< 1.5 s", start("import"), "3.1 to 3.6 s"),
        (
            "start of `topklm serve` to a client's first token, nothing compiled",
            "< 15 s",
            start("serve cold"),
            "77 s",
        ),
        ("the same, warm cache", "< 3 s", start("serve warm")),
    ],
    (GPU, "bench_topk_h200.json"): [
        (_COPY, ">= 0.7", ratios(f"{_AT_65536}: share of the copy bandwidth")),
        (f"the same, {_LAX}", ">= 10", ratios(f"{_AT_65536}, forward: faster than lax.*")),
        (f"the same, {_TORCH}", ">= 5", ratios(f"{_AT_65536}, forward: faster than torch.*")),
    ],
    (GPU, "bench_step_h200_130m.json"): _gpu_step("130M", "40%"),
    (GPU, "bench_step_h200_1.4b.json"): _gpu_step("1.4B", "55%"),
    (TPU, "scaling.json"): [
        ("bytes accessed that TopK adds", "< 3 %", added_share(lambda report: report["hbm_traffic"])),
        ("collectives that TopK adds", "0", added_collectives),
        (
            "temporary memory that TopK adds",
            "< 2 %",
            added_share(lambda report: report["memory"]["temporaries"]),
        ),
    ],
}
TARGETS = [
    Target(place, figure, wanted, file, figures, *before)
    for (place, file), rows in _ASKED.items()
    for figure, wanted, figures, *before in rows
]
