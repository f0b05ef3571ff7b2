"""Steering of a TopK model: six neurons at several values, beside a survey, for docs/steering.md.

    topklm steer runs/books --survey --against runs/books-base --json survey.json
    python -m benchmarks.steering runs/books --survey survey.json --out steering-books

The neurons are chosen by a rule and by nothing else: `topklm.neurons.statistics.table.readable_first`,
from the first on, those whose number and first input token no neuron before had. Writes
benchmarks/results/NAME.json, the survey without its list of neurons and what the model wrote, and draws
docs/images/NAME.svg.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
from typing import Any

import matplotlib.ticker
import rich.console

from benchmarks.harness import pictures, results
from benchmarks.harness.pictures import COLOURS
import topklm
from topklm.inference.language_model import LanguageModel
from topklm.neurons import NeuronsFolder
from topklm.neurons.statistics import table
from topklm.neurons.statistics.table import readable_first
from topklm.progress import TerminalProgress
from topklm.steering import Sampled, dose
from topklm.steering import concepts as concepts_lib
from topklm.steering.concepts import KINDS
from topklm.steering.survey import without_nan

SHOWN = 6
TIMES = (0.0, 0.25, 0.5, 1.0, 2.0)  # of a neuron's largest activation
KEPT = 2.0  # times the unsteered perplexity: up to it a text counts as fluent
TEXTS = 3  # of each value, that are kept
RATES = {"input": COLOURS[0], "next": COLOURS[1]}


def main() -> None:
    """Steers six neurons, writes the JSON and draws the picture."""
    parser = results.parser(__doc__)
    parser.add_argument("run", type=pathlib.Path, help="run folder, measured")
    parser.add_argument("--survey", type=pathlib.Path, help="what topklm steer --survey --json wrote")
    parser.add_argument("--out", required=True, help="name of the JSON and of the picture")
    parser.add_argument("--draw-only", action="store_true", help="keep the neurons of the JSON that is there")
    arguments = parser.parse_args()
    path = results.FOLDER / f"{arguments.out}.json"
    result = results.read(path) if path.exists() else {}
    if not arguments.draw_only:
        result |= _steer_six(arguments.run)
    if arguments.survey is not None:
        surveys = results.read(arguments.survey)["surveys"]
        result["surveys"] = [{k: v for k, v in one.items() if k != "neurons"} for one in surveys]
    for neuron in result["neurons"]:
        kinds = neuron["concepts"]
        neuron["responds_at"] = {kind: turned_at(neuron["responses"], kind, math.inf) for kind in kinds}
        neuron["turned_at"] = {kind: turned_at(neuron["responses"], kind, KEPT) for kind in kinds}
    results.save(path, result)
    draw(result, results.IMAGES / f"{arguments.out}.svg")


def _steer_six(run: pathlib.Path) -> dict[str, Any]:
    model = topklm.load(run)
    folder = NeuronsFolder(run, model.step)
    sampled = Sampled()
    progress = TerminalProgress(rich.console.Console())
    found = []
    for layer, neuron in chosen(folder):
        texts = (1 + len(TIMES)) * len(sampled.prompts) * sampled.samples
        with progress.phase(f"steering {layer}:{neuron}", texts) as report:
            found.append(_neuron(model, folder, layer, neuron, sampled, report))
    return {
        "rule": "topklm.neurons.statistics.table.readable_first, other numbers and first tokens each",
        "run": run.resolve().name,
        "step": model.step,
        "mode": "clamp",
        "sampled": dataclasses.asdict(sampled),
        "fluent_up_to": KEPT,
        "neurons": found,
    }


def chosen(folder: NeuronsFolder) -> list[tuple[int, int]]:
    """Chooses the first neurons of the ranking that have other numbers and other first input tokens."""
    rows, _ = table.read(folder.table)
    found: list[tuple[int, int]] = []
    numbers: set[int] = set()
    tokens: set[int] = set()
    for place in readable_first(rows):
        row = rows.slice(int(place), 1).to_pylist()[0]
        if row["n_active"] and row["neuron"] not in numbers and row["top_tokens"][0] not in tokens:
            found.append((row["layer"], row["neuron"]))
            numbers.add(row["neuron"])
            tokens.add(row["top_tokens"][0])
        if len(found) == SHOWN:
            break
    return found


def _neuron(
    model: LanguageModel, folder: NeuronsFolder, layer: int, neuron: int, sampled: Sampled, report: Any
) -> dict[str, Any]:
    facts = concepts_lib.read_facts(folder, layer, neuron)
    assert facts is not None and facts.max_activation is not None
    concepts = concepts_lib.own_concepts(model, folder, facts, layer, neuron)
    values = [times * facts.max_activation for times in TIMES]
    responses = dose.respond(
        model, (layer, neuron), values, concepts, sampled, report=lambda texts: report(texts, 0, 0)
    )
    shown = [
        {
            "times": times,
            **dataclasses.asdict(dataclasses.replace(response, texts=[])),
            "texts": [samples[0] for samples in response.texts[:TEXTS]],
        }
        for times, response in zip((None, *TIMES), responses, strict=True)
    ]
    return without_nan(
        {
            "layer": layer,
            "neuron": neuron,
            "density": facts.n_active / facts.n_tokens,
            "max_activation": facts.max_activation,
            "concepts": {
                concept.name: model.tokenizer.token_strings(concept.token_ids) for concept in concepts
            },
            "responses": shown,
        }
    )


def turned_at(responses: Sequence[Mapping[str, Any]], kind: str, kept: float) -> float | None:
    """Finds the smallest value, in times, at which the text turns to the concept and stays fluent.

    It does where the interval of the concept's rate lies above that of the unsteered text, and the perplexity
    is at most `kept` times the unsteered one.
    """
    unsteered, *steered = responses
    for response in steered:
        is_fluent = response["perplexity"]["value"] <= kept * unsteered["perplexity"]["value"]
        if is_fluent and response["rates"][kind]["low"] > unsteered["rates"][kind]["high"]:
            return response["times"]
    return None


def draw(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws for each neuron the rates of its concepts, and perplexity, over the value; then the survey."""
    surveys = result.get("surveys", [])
    figure, axes = pictures.panels(3 if surveys else 2, 3, font_size=9, figsize=(9, 8 if surveys else 5.4))
    for place, neuron in enumerate(result["neurons"]):
        _draw_neuron(axes[place // 3][place % 3], neuron, with_labels=place % 3 == 0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=len(labels), loc="upper center")
    if surveys:
        for panel, kind in zip(axes[2], KINDS, strict=True):
            _draw_survey(panel, surveys, kind)
        axes[2][0].set_ylabel("share of neurons")
        axes[2][1].legend(frameon=False, fontsize=7, loc="upper right")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    pictures.save(figure, path)


def _draw_neuron(panel: Any, neuron: Mapping[str, Any], *, with_labels: bool) -> None:
    unsteered, *steered = neuron["responses"]
    times = [response["times"] for response in steered]
    for kind, colour in RATES.items():
        if kind not in unsteered["rates"]:
            continue
        rates = [response["rates"][kind] for response in steered]
        values = [rate["value"] for rate in rates]
        panel.plot(times, values, color=colour, marker="o", markersize=3, label=f"{kind} tokens, rate")
        panel.fill_between(
            times, [rate["low"] for rate in rates], [rate["high"] for rate in rates], color=colour, alpha=0.2
        )
        panel.axhline(unsteered["rates"][kind]["value"], color=colour, linewidth=0.8, linestyle=":")
    panel.set_ylim(0, None)
    panel.set_xlabel("value / largest activation")
    first = " ".join(repr(token) for token in neuron["concepts"]["input"][:3]).replace("$", r"\$")
    panel.set_title(f"{neuron['layer']}:{neuron['neuron']}  {first}", fontsize=8)
    other = panel.twinx()
    other.spines["right"].set_visible(True)
    losses = [response["perplexity"]["value"] for response in steered]
    other.semilogy(times, losses, color="0.5", linestyle="--", linewidth=1)
    other.set_ylim(10, 3000)
    other.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    panel.plot([], [], color="0.5", linestyle="--", linewidth=1, label="perplexity (right)")
    panel.grid(alpha=0.25)
    if with_labels:
        panel.set_ylabel("hits a token")


def _draw_survey(panel: Any, surveys: Sequence[Mapping[str, Any]], kind: str) -> None:
    for one, colour, name in zip(surveys, COLOURS, ("TopK", "Base"), strict=False):
        layers = [layer for layer in one["layers"] if layer["layer"] != "all"]
        at = [int(layer["layer"]) for layer in layers]
        of_kind = [layer["concepts"][kind] for layer in layers]
        for figure, style in (("steerable", "-"), ("mismatched", ":"), ("specific", "--")):
            shares = [c[figure]["share"] if figure != "mismatched" else c[figure] for c in of_kind]
            panel.plot(at, shares, style, color=colour, marker="o", markersize=3, label=f"{name}, {figure}")
    panel.axhline(0.05, color="0.6", linewidth=0.8)
    panel.set_ylim(0, 1.02)
    panel.set_xlabel("layer")
    panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    panel.set_title(f"survey: {kind} tokens", fontsize=9)
    panel.grid(alpha=0.25)


if __name__ == "__main__":
    main()
