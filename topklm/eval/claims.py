"""The claims of "TopK Language Models" (arXiv 2506.21468), each with what runs say of it, and a verdict.

Measured are TopK LMs, Base LMs of the same config and seeds, and sparse autoencoders (SAEs) of these Base
LMs; the figures come from the JSON of other verbs (`topklm.commands.study`). The seeds are what is sampled:
a figure of a run is one number, differences are taken seed by seed, and their interval is Student's t over
the seeds. Where verbs give an interval over seeds and items, it is taken.

A figure is *better* if its whole interval is, *no worse* if the interval ends within a margin, *worse* if
all of it lies beyond the margin, else *open*. A claim *holds* if each of its figures is better or no worse;
it is *mixed* if some are better and some worse; it *fails* if some are worse; else it is *open*. Without
runs that could say, it is *unmeasured*. Where several baselines have a figure, the best of them is
compared.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np
import scipy.stats

from topklm.eval.tasks import LEVEL
from topklm.eval.tasks import MEASURES as EVAL_MEASURES

Measured = Mapping[str, Sequence[Any]]  # the JSON of verbs, one or one for each seed, by name
Values = tuple[float, ...]  # one for each seed

_FORMATION_SHARE = 1 / 8  # of the training, at which neurons are compared with their last selves
_READ = ("token_entropy", "semantic_entropy")
_NEAREST, _OF_BASE = "the nearest other neuron", "Base LM, {}"
_PLAIN = ("own", "coordinates", "random", "random_cut", "pca")  # bases that are no SAEs


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of TopK LMs and of baselines."""

    name: str
    unit: str
    is_better_up: bool
    margin: float
    ours: Values
    others: Mapping[str, Values]  # baselines and controls
    rivals: tuple[str, ...]  # names of the baselines that are compared
    given: tuple[float, float] | None = None  # an interval of the difference that is known already

    @property
    def rival(self) -> str:
        """Names the best baseline that is compared."""
        sign = 1 if self.is_better_up else -1
        return max(self.rivals, key=lambda name: sign * float(np.mean(self.others[name])))

    @property
    def differences(self) -> Values:
        """Returns ours less the rival's, seed by seed."""
        return tuple(a - b for a, b in zip(self.ours, self.others[self.rival], strict=True))

    @property
    def interval(self) -> tuple[float, float]:
        """Returns the 95 % interval of the mean difference; NaN with one seed."""
        return self.given or over_seeds(self.differences)

    @property
    def verdict(self) -> str:
        """Says "better", "no worse", "worse" or "open"."""
        sign = 1 if self.is_better_up else -1
        worst, best = sorted(sign * end for end in self.interval)
        if worst > 0:
            return "better"
        return "no worse" if worst > -self.margin else "worse" if best < -self.margin else "open"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim, and how its figures are found."""

    name: str
    text: str
    figures: Callable[[Measured], Iterator[Figure]]
    meaning: str  # of its figures
    needs: tuple[str, ...]  # measurements without which there is none


def over_seeds(differences: Sequence[float]) -> tuple[float, float]:
    """Returns Student's 95 % interval of the mean; NaN for less than two."""
    n = len(differences)
    if n < 2:
        return math.nan, math.nan
    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) / math.sqrt(n)
    reach = float(scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    return mean - reach, mean + reach


def verdict(figures: Sequence[Figure]) -> str:
    """Returns the word for a claim."""
    found = {figure.verdict for figure in figures}
    if not found:
        return "unmeasured"
    if "worse" in found:
        return "mixed" if "better" in found else "fails"
    return "open" if "open" in found else "holds"


def _capabilities(measured: Measured) -> Iterator[Figure]:
    for entry in measured["capabilities"][0]["figures"]:
        measure = EVAL_MEASURES[entry["measure"]]
        if entry["part"] or (entry["task"] == "blimp" and entry["measure"] != "acc"):
            continue
        yield Figure(
            f"{entry['task']}, {measure.title}",
            "",
            measure.is_better_up,
            entry["difference"]["margin"],
            tuple(one["value"] for one in entry["runs"]),
            {"Base LM": tuple(one["value"] for one in entry["against"])},
            ("Base LM",),
            None
            if entry["difference"]["low"] is None
            else (entry["difference"]["low"], entry["difference"]["high"]),
        )


def _of_card(measured: Measured, kind: str) -> list[Any]:
    return [run for run in measured["card"][0]["runs"] if run["kind"] == kind]


def _bases(measured: Measured, get: Callable[[Any], float | None]) -> tuple[Values, dict[str, Values]]:
    """Returns a figure of the TopK LMs' own neurons, and of each basis of the Base LMs, where all have it."""
    ours = [get(run["bases"][0]) for run in _of_card(measured, "topk")]
    found: dict[str, list[float | None]] = {}
    for run in _of_card(measured, "base"):
        for basis in run["bases"]:
            found.setdefault(basis["name"], []).append(get(basis))
    known = {name: _known(values) for name, values in found.items() if None not in values}
    return ((), {}) if None in ours else (_known(ours), known)


def _known(values: Sequence[float | None]) -> Values:
    return tuple(float(value) for value in values if value is not None)


def _layers(measured: Measured) -> int:
    return len(_of_card(measured, "topk")[0]["bases"][0]["layers"])


def _readable(measured: Measured) -> Iterator[Figure]:
    n_layers = _layers(measured)

    def mean(get: Callable[[Any], Any]) -> Callable[[Any], float | None]:
        def of(basis: Any) -> float | None:
            values = [get(layer) for layer in basis["layers"][:n_layers]]
            return None if None in values or not values else float(np.mean(values))

        return of

    def figure(
        name: str, unit: str, up: bool, margin: float, get: Callable[[Any], float | None]
    ) -> Iterator[Figure]:
        ours, others = _bases(measured, get)
        rivals = tuple(basis for basis in others if basis not in _PLAIN)
        if ours and rivals:
            yield Figure(name, unit, up, margin, ours, others, rivals)

    for name in _READ:

        def entropy(layer: Any, name: str = name) -> Any:
            return layer.get(name, {}).get("value")

        yield from figure(name.replace("_", " "), "nats", False, 0.1, mean(entropy))
    yield from figure(
        "neurons of 40 that a rule finds",
        "",
        True,
        2,
        lambda basis: basis.get("detectors", {}).get("n_fair"),
    )
    for given in measured["card"][0]["probing"]["sets"]:

        def auc(layer: Any, name: str = given["name"]) -> Any:
            return layer.get("probing", {}).get(name, {}).get("auc", {}).get("1", {}).get("value")

        yield from figure(f"{given['name']}, AUC of the best neuron", "", True, 0.01, mean(auc))


def _trade(measured: Measured) -> Iterator[Figure]:
    topk, base = _of_card(measured, "topk"), _of_card(measured, "base")
    spliced: dict[str, list[float]] = {}
    dictionaries = measured.get("dictionaries", ())
    # Of fewer it is not known which Base LMs they are of.
    for run, found in zip(base, dictionaries, strict=True) if len(dictionaries) == len(base) else ():
        for entry in found["autoencoders"]:
            together = entry["together"]
            factor = together["loss_reconstructed"] / together["loss"]
            spliced.setdefault(entry["kind"], []).append(run["bits_per_byte"] * factor)
    costs: dict[str, list[float]] = {}
    for run in base:
        for basis in run["bases"]:
            if basis["name"] not in _PLAIN:
                flops = run["training_flops"] + basis["dictionary"]["training_flops"]
                costs.setdefault(basis["name"], []).append(flops / 1e12)
    for name, unit, margin, found, get in (
        ("bits per byte, codes in place of states", "", 0.01, spliced, _bits),
        ("training, SAE included", "TFLOP", 0.0, costs, _teraflops),
    ):
        saes = {kind: tuple(values) for kind, values in found.items() if len(values) == len(base)}
        if saes:
            others = {"Base LM": tuple(map(get, base)), **saes}
            yield Figure(name, unit, False, margin, tuple(map(get, topk)), others, tuple(saes))


def _bits(run: Any) -> float:
    return float(run["bits_per_byte"])


def _teraflops(run: Any) -> float:
    return float(run["training_flops"]) / 1e12


def _steering(measured: Measured) -> Iterator[Figure]:
    for kind, title in (("next", "what follows"), ("input", "their input")):
        shares: tuple[list[float], list[float]] = ([], [])
        for pair in measured["steering"]:
            by_layer = [[x for x in one["layers"] if x["layer"] != "all"] for one in pair["surveys"]]
            for side, layers in zip(shares, by_layer, strict=True):
                of_both = layers[: len(by_layer[0])]
                side.append(float(np.mean([x["concepts"][kind]["specific"]["share"] for x in of_both])))
        others = {"Base LM's coordinates": tuple(shares[1])}
        name = f"neurons that raise {title}"
        yield Figure(name, "share", True, 0.0, tuple(shares[0]), others, tuple(others))


def _formation(measured: Measured) -> Iterator[Figure]:
    ours, others = list[float](), dict[str, list[float]]()
    for report in measured["formation"]:
        own, *beside = report["beside"]
        at = _early(own)
        ours.append(own["same_index"][at])
        others.setdefault(_NEAREST, []).append(own["other_index"][at])
        for trace in beside:
            others.setdefault(_OF_BASE.format(trace["dictionary"]), []).append(
                trace["same_index"][_early(trace)]
            )
    known = {name: tuple(values) for name, values in others.items() if len(values) == len(ours)}
    rivals = tuple(name for name in known if name != _NEAREST)
    if rivals:
        name = "r of a neuron and its last self"
        yield Figure(name, "", True, 0.0, tuple(ours), known, rivals)


def _early(trace: Mapping[str, Any]) -> int:
    """Returns the place of the traced step that is nearest to an eighth of the training."""
    return trace["steps"].index(_nearest(trace["steps"], trace["reference"] * _FORMATION_SHARE))


def _nearest(steps: Sequence[int], wanted: float) -> int:
    """Returns the step that is nearest as a ratio."""
    return min(steps, key=lambda step: abs(math.log(max(step, 1)) - math.log(max(wanted, 1))))


def late_steps(steps: Sequence[int]) -> list[int]:
    """Returns the steps of a chain of SAEs, from an eighth of the training on, each about twice the last.

    The last is that of the training's end. Each link is trained, so a chain over all steps takes hours.
    """
    return sorted({_nearest(steps, steps[-1] * _FORMATION_SHARE * 2**n) for n in range(4)})


def _stability(measured: Measured) -> Iterator[Figure]:
    ours, shifted, others = list[float](), list[float](), dict[str, list[float]]()
    for report in measured["stability"]:
        name, reference = report["settings"]["dictionary"], report["settings"]["reference"]
        for match in report["matched"]:
            last = [row for row in match["rows"] if row["step"] == reference]
            if match["dictionary"] != name or not last:
                continue
            value = float(np.mean([row["matched"] for row in last]))
            if name:
                others.setdefault(_OF_BASE.format(name), []).append(value)
            else:
                ours.append(value)
                shifted.append(float(np.mean([row["matched_shifted"] for row in last])))
    known = {name: tuple(values) for name, values in others.items() if len(values) == len(ours)}
    if known:
        control = {"text shifted": tuple(shifted)}
        name = "r of a neuron and its match in another seed"
        yield Figure(name, "", True, 0.0, tuple(ours), known | control, tuple(known))


CLAIMS = (
    Claim(
        "capabilities",
        "TopK LMs keep the capabilities of their dense twins.",
        _capabilities,
        "Bits per byte of held-out text and of other texts, accuracy on BLiMP, TopK less Base.",
        ("capabilities",),
    ),
    Claim(
        "interpretability",
        "Their neurons are as interpretable as the features of sparse autoencoders trained afterwards.",
        _readable,
        "Medians over neurons, means over the TopK layers; how many of the first 40 neurons a rule "
        "finds with an F1 of 0.5 or more; AUC of the best neuron for topics and parts of speech. Of the "
        "SAEs the best at each figure.",
        ("card",),
    ),
    Claim(
        "trade-off",
        "They offer a good trade-off of model size, compute and interpretability.",
        _trade,
        "Bits per byte of held-out text where every TopK layer hands on codes alone: of the TopK LM as "
        "it is, of the Base LM with an SAE's reconstructions in place of these hidden states (the Base "
        "LM's bits, times the ratio of its losses with and without them); FLOPs of the training, SAEs of "
        "all layers.",
        ("card", "dictionaries"),
    ),
    Claim(
        "steering",
        "Targeted neurons steer the text.",
        _steering,
        "`topklm steer --survey`: share of neurons whose concept rises more than with as long random "
        "directions, and more than with 95 % of the layer's other neurons.",
        ("steering",),
    ),
    Claim(
        "formation",
        "Neurons can be followed over checkpoints and layers.",
        _formation,
        "`topklm trace`: r of activations on the same tokens, at an eighth of the training and at its "
        "end, of one index; median over neurons.",
        ("formation",),
    ),
    Claim(
        "stability",
        "They are a stable tool: another seed finds the same neurons.",
        _stability,
        "r of activations on the same tokens, neurons paired one to one; median over neurons, mean over "
        "layers.",
        ("stability", "formation"),
    ),
)


def judge(measured: Measured, missing: Mapping[str, str]) -> list[dict[str, Any]]:
    """Judges every claim; returns JSON objects. `missing` says why a measurement could not be made."""
    found = []
    for claim in CLAIMS:
        figures = list(claim.figures(measured)) if claim.needs[0] in measured else []
        found.append(
            {
                "claim": claim.name,
                "text": claim.text,
                "verdict": verdict(figures),
                "why": next(
                    (missing[n] for n in claim.needs if n in missing), "" if figures else "no figures"
                ),
                "figures": [_as_json(figure) for figure in figures],
            }
        )
    return found


def _as_json(figure: Figure) -> dict[str, Any]:
    low, high = figure.interval
    return {
        **dataclasses.asdict(figure),
        "rival": figure.rival,
        "difference": float(np.mean(figure.differences)),
        "differences": figure.differences,
        "low": low,
        "high": high,
        "verdict": figure.verdict,
    }


_HEAD = """# Claims and evidence

The claims of the abstract of [TopK Language Models](https://arxiv.org/abs/2506.21468), each measured. The
page is written by `topklm study`, figures and verdicts included; docs/evaluation.md says how.

{verdicts}

{runs}

A figure is *better* if its whole 95 % interval is, *no worse* if the interval ends within the margin,
*worse* if all of it lies beyond the margin, else *open*. A claim *holds* if each of its figures is better or
no worse, is *mixed* if some are better and some worse, *fails* if some are worse, else it is *open*.
Differences are taken seed by seed, intervals are Student's t over seeds (over seeds and items for
capabilities). Of several baselines the one in bold, the best, is compared.
"""


def page(studies: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Writes the page of several studies, by name, as `topklm study` has made them; `titles` name bases."""
    rows = [
        [claim.text, *(f"**{study['claims'][number]['verdict']}**" for study in studies.values())]
        for number, claim in enumerate(CLAIMS)
    ]
    runs = "\n".join(f"- {name}: {_described(study)}" for name, study in studies.items())
    parts = [_HEAD.format(verdicts=_markdown(["claim", *studies], rows), runs=runs)]
    for number, claim in enumerate(CLAIMS):
        parts.append(f"## {claim.text}\n\n{claim.meaning}\n")
        for name, study in studies.items():
            found = study["claims"][number]
            parts.append(f"**{name}: {found['verdict']}**{': ' + found['why'] if found['why'] else ''}\n")
            if found["figures"]:
                heads = ["figure", "TopK LM", "beside", "difference", "by seed", "margin", ""]
                parts.append(f"{_markdown(heads, [_row(one, titles) for one in found['figures']])}\n")
    parts += [
        f"![All figures of {name}, a dot for each seed](images/claims-{name}.svg)\n" for name in studies
    ]
    return "\n".join(parts)


def _described(study: Mapping[str, Any]) -> str:
    n, steps = len(study["topk"]), ", ".join(f"{step:,}" for step in study["steps"])
    flags = " ".join(f"--{name.replace('_', '-')} {x}" for name, x in study["settings"].items())
    runs = f"{n} TopK LM{'s' * (n > 1)} and as many Base LMs, one for each seed, after {steps} steps"
    return f"{runs}; `{flags}`"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def _row(figure: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    digits = 3 if abs(float(np.mean(figure["ours"]))) < 10 else 1
    beside = []
    for name, values in figure["others"].items():
        bold = "**" if name == figure["rival"] else ""
        beside.append(f"{bold}{titles.get(name, name)} {np.mean(values):.{digits}f}{bold}")
    low, high = figure["low"], figure["high"]
    reach = "" if low is None else f" ({low:+.{digits}f} to {high:+.{digits}f})"
    return [
        ", ".join(filter(None, (figure["name"], figure["unit"]))),
        f"{np.mean(figure['ours']):.{digits}f}",
        "; ".join(beside),
        f"{figure['difference']:+.{digits}f}{reach}",
        ", ".join(f"{one:+.{digits}f}" for one in figure["differences"]),
        f"{figure['margin']:g}",
        figure["verdict"],
    ]
