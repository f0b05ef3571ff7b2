"""The readability card for people: tables of all runs, and means over the seeds of one config."""

from collections.abc import Mapping, Sequence
import json
from typing import Any

import numpy as np

from topklm.commands import shared
from topklm.commands.shared import Output
from topklm.inference.language_model import LanguageModel
from topklm.neurons import card, probing
from topklm.neurons.bases import TITLES

_NOTHING = "-"

_Rows = list[Sequence[Any] | None]


def over_seeds(models: Sequence[LanguageModel], runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups runs with the same config but for the seed; a group has their names and their mean.

    The mean is a run as the others, of the same form. Of a figure with an interval it has the mean of the
    values, and these; lists of single neurons are left out.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for model, measured in zip(models, runs, strict=True):
        config = model.config.to_dict()
        config["train"] = {name: value for name, value in config["train"].items() if name != "seed"}
        key = json.dumps([model.step, config], sort_keys=True, default=str)
        groups.setdefault(key, []).append(measured)
    found = []
    for members in groups.values():
        if len(members) > 1:
            mean = {**_mean(members), "run": f"mean of {len(members)} seeds"}
            found.append({"runs": [one["run"] for one in members], "mean": mean})
    return found


def _mean(trees: Sequence[Any]) -> Any:
    """Returns the mean of JSON of one form; None of what some of them do not have."""
    first = trees[0]
    if any(tree is None for tree in trees) or isinstance(first, str | bool):
        return first if all(tree == first for tree in trees) else None
    if isinstance(first, int | float):
        return float(np.mean(trees))
    if isinstance(first, list):
        return [_mean(parts) for parts in zip(*trees, strict=True)]
    if {"value", "low", "high"} <= first.keys():
        values = [tree["value"] for tree in trees]
        return {"value": _mean(values), "values": values, "low": None, "high": None}
    names = [name for name in first if name != "neurons" and all(name in tree for tree in trees)]
    return {name: _mean([tree[name] for tree in trees]) for name in names}


def show(output: Output, facts: Mapping[str, Any]) -> None:
    """Prints tables of a card."""
    runs = [*facts["runs"], *(group["mean"] for group in facts["seeds"])]
    heads = ["run", "basis", "layer", *(measure.title for measure in card.MEASURES)]
    output.console.print(shared.table(heads, _rows(runs), left=["run", "basis"]))
    output.say(
        "medians over codes active at 30 tokens or more, entropies in nats; ±: half of a 95 % interval over "
        "documents"
    )
    for given in facts["probing"]["sets"]:
        rows, n_labels = _probing_rows(runs, given["name"])
        heads = ["run", "basis", "layer", *(f"AUC, k = {k}" for k in probing.KS), "less rotation, k = 1"]
        heads.append("less cut rotation, k = 1")
        heads.append("accuracy, k = 1")
        output.console.print(shared.table(heads, rows, title=given["name"], left=["run", "basis"]))
        output.say(f"{given['source']}; {n_labels}; {facts['probing']['selection']}")
    heads = [
        "run",
        "bits per byte",
        "without neurons",
        "parameters",
        "training FLOPs",
        "FLOPs a token",
        "detectors",
        "fluent",
    ]
    output.console.print(shared.table(heads, map(_run_row, runs), left=["run"]))
    output.say(
        "without neurons: bits per byte when the last TopK layer hands on 0; later layers then have only the "
        "text that they read by themselves; "
        f"detectors: of the first {card.READABLE} neurons, those that a rule on the text finds with F1 of "
        f"{card.FAIR_F1} or more, and the median; fluent: of the same, those that raise a concept of their "
        "own (in parentheses: their input tokens) while perplexity is at most doubled"
    )
    for run in facts["runs"]:
        for basis in run["bases"]:
            if "ablation" in basis:
                output.say(_ablation_line(run["run"], basis["ablation"]))
    clusters = facts["clusters"]
    without = clusters["tokens_without"]
    left_out = f"; {without:.1%} of the text's tokens are in none" if without else ""
    output.say(f"clusters: {clusters['n_clusters']:,}, {clusters['resource']}{left_out}")
    for group in facts["seeds"]:
        output.say(f"{group['mean']['run']}: {', '.join(group['runs'])}")
    for line in facts["notes"]:
        output.say(f"note: {line}")


def _rows(runs: Sequence[Mapping[str, Any]]) -> _Rows:
    rows: _Rows = []
    for run in runs:
        for basis in run["bases"]:
            for layer in basis["layers"]:
                cells = [cell(layer.get(m.name), m.text) for m in card.MEASURES]
                rows.append([run["run"], TITLES[basis["name"]], str(layer["layer"]), *cells])
            rows.append(None)
    return rows


def cell(figure: Mapping[str, Any] | None, text: str) -> str:
    """Returns a figure with half the width of its interval."""
    if figure is None or figure["value"] is None:
        return _NOTHING
    value = text.format(figure["value"])
    if figure["low"] is None:
        return value
    return f"{value} ± {text.replace('+', '').format((figure['high'] - figure['low']) / 2)}"


def _probing_rows(runs: Sequence[Mapping[str, Any]], name: str) -> tuple[_Rows, str]:
    rows: _Rows = []
    said = ""
    for run in runs:
        for basis in run["bases"]:
            for layer in basis["layers"]:
                found = layer["probing"][name]
                said = f"{found['n_labels']} labels, {found['left_out']} with too few examples left out"
                auc = [cell(found.get("auc", {}).get(str(k)), "{:.3f}") for k in probing.KS]
                gaps = [
                    cell(found.get(f"less_{control}", {}).get("auc", {}).get("1"), "{:+.3f}")
                    for control in ("random", "random_cut")
                ]
                accuracy = cell(found.get("balanced_accuracy", {}).get("1"), "{:.3f}")
                rows.append([run["run"], TITLES[basis["name"]], str(layer["layer"]), *auc, *gaps, accuracy])
            rows.append(None)
    return rows, said


def _run_row(run: Mapping[str, Any]) -> Sequence[str]:
    detectors, fluent, flops = [], _NOTHING, f"{run['training_flops']:.3g}"
    for basis in run["bases"]:
        if found := basis.get("dictionary"):
            flops += f"\n+ SAE {found['training_flops']:.3g}"
        if found := basis.get("detectors"):
            median = _NOTHING if found["median_f1"] is None else f"{found['median_f1']:.2f}"
            detectors.append(f"{basis['name']}: {found['n_fair']:g} of {found['n']:g}, F1 {median}")
        if found := basis.get("steering"):
            fluent = f"{found['n_fluent']:g} of {found['n']:g} ({found['n_by_concept']['input']:g})"
    return [
        run["run"],
        f"{run['bits_per_byte']:.4f}",
        _NOTHING if (without := run["bits_per_byte_without_neurons"]) is None else f"{without:.4f}",
        f"{run['parameters']:,.0f}",
        flops,
        f"{run['flops_per_generated_token']:.3g}",
        "\n".join(detectors) or _NOTHING,
        fluent,
    ]


def _ablation_line(name: str, found: Mapping[str, Any]) -> str:
    parts = []
    for where in ("own", "elsewhere"):
        one = found[where]
        if one["effect"] is not None:
            error = f" ± {one['standard_error']:.4f}" if one["standard_error"] is not None else ""
            parts.append(f"{one['effect']:+.4f}{error} nats {where} ({one['samples']:,} tokens)")
    return f"{name}: loss without a neuron, at its own targets and elsewhere: {', '.join(parts)}"
