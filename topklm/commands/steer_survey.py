"""`topklm steer --survey`: how many neurons of a model raise their concepts when they are steered."""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import math
from pathlib import Path
from typing import Any

import topklm
from topklm.commands import shared
from topklm.commands.shared import Output
from topklm.errors import UserError
from topklm.neurons.dictionary import check_coordinates
from topklm.neurons.paths import NeuronsFolder
from topklm.neurons.store import Store
from topklm.steering.concepts import KINDS
from topklm.steering.survey import SurveySettings, neuron_rows, summarise, survey

FLAGS = ("against", "layers", "neurons", "bound", "neutral_prompts", "directions")
_NOTHING = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what goes with --survey."""
    group = parser.add_argument_group("with --survey")
    group.add_argument("--against", metavar="RUN", help="survey this run too, a Base LM say")
    group.add_argument("--layers", metavar="0,1,...", help="default all that were harvested")
    group.add_argument("--neurons", type=int, metavar="N", help="of each layer, drawn; default all")
    group.add_argument(
        "--bound",
        type=float,
        metavar="NATS",
        help="a neuron counts at the largest value at which the steered next-token distribution is within "
        f"this KL divergence of the unsteered one; default {SurveySettings.bound}",
    )
    group.add_argument(
        "--neutral-prompts",
        type=int,
        metavar="N",
        help="pieces of harvested text, of documents that no concept is read from; default "
        f"{SurveySettings.prompts}",
    )
    group.add_argument(
        "--directions",
        type=int,
        metavar="N",
        help=f"random ones, of each layer; default {SurveySettings.random_directions}",
    )


def run(arguments: argparse.Namespace, output: Output) -> tuple[dict[str, Any], Callable[[], None]]:
    """Surveys one run or two; returns what was found, and what shows it to a person."""
    settings = _settings(arguments)
    runs = [arguments.run] + ([arguments.against] if arguments.against is not None else [])
    # Both are opened before the first is surveyed, which takes long.
    opened = [_open(run, arguments.step if run == arguments.run else None) for run in runs]
    found = []
    for model, store in opened:
        layers = survey(
            store,
            model.config.model,
            model.params,
            separator_id=model.tokenizer.separator_id,
            settings=settings,
            progress=output.progress,
        )
        facts = {
            "run": Path(model.run).resolve().name,
            "step": model.step,
            "kind": store.metadata.kind,
            "source": store.metadata.source,
            "n_tokens": store.n_tokens,
        }
        neurons = neuron_rows(layers, settings, model.tokenizer)
        found.append({**facts, **summarise(layers, settings), "neurons": neurons})
    return {"surveys": found}, lambda: _print(output, found, settings)


def _settings(arguments: argparse.Namespace) -> SurveySettings:
    given: dict[str, Any] = {"seed": arguments.seed}
    if arguments.values is not None:
        given["strengths"] = tuple(sorted(_numbers("values", arguments.values, float)))
        if not all(0 < value < math.inf for value in given["strengths"]):
            raise shared.wrong(arguments, "values", allowed="above 0 with --survey")
    if arguments.layers is not None:
        given["layers"] = tuple(sorted(set(_numbers("layers", arguments.layers, int))))
    shared.check_at_least(arguments, 1, "neurons", "neutral_prompts", "directions")
    if arguments.bound is not None and not 0 < arguments.bound < math.inf:
        raise shared.wrong(arguments, "bound", allowed="above 0, nats")
    names = {"neurons": "neurons", "prompts": "neutral_prompts", "random_directions": "directions"}
    given |= {name: getattr(arguments, flag) for name, flag in {**names, "bound": "bound"}.items()}
    return dataclasses.replace(
        SurveySettings(), **{k: value for k, value in given.items() if value is not None}
    )


def _numbers(flag: str, text: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as e:
        allowed = "numbers with commas between, e.g. 0,1,2"
        raise UserError(field=f"--{flag}", value=text, allowed=allowed) from e


def _open(run_folder: str, step: int | None) -> tuple[topklm.LanguageModel, Store]:
    shared.check_on_disk(run_folder)
    model = topklm.load(run_folder, step=step)
    folder = NeuronsFolder(Path(model.run), model.step)
    if not folder.store.exists():
        raise UserError(
            f"{run_folder} has no activations of step {model.step}, which concepts are read from: run topklm "
            f"neurons harvest {run_folder}"
        )
    store = Store(folder.store)
    if store.metadata.tokenizer_sha256 != model.tokenizer.sha256 or store.metadata.step != model.step:
        raise UserError(f"{folder.store} is of another model: delete it, and harvest again")
    check_coordinates(store.metadata.dictionary, "steer --survey")
    return model, store


def _print(output: Output, found: Sequence[dict[str, Any]], settings: SurveySettings) -> None:
    for kind in KINDS:
        heads = ("run", "layer", "neurons", "value", "KL", "gain", "random's", "steerable %", "mismatched %")
        table = shared.table_of((*heads, "specific %", "prompting's"), f"concept: {kind} tokens")
        for one in found:
            for layer in one["layers"]:
                table.add_row(one["run"], *_row(layer, kind))
        output.console.print(table)
    n = settings.prompts
    for line in (
        f"gain: median rise of ln P(the next token is of the concept) after {n} neutral prompts, nats, at "
        f"the largest value with a KL divergence of at most {settings.bound:g} nats from the unsteered model",
        "random's: median over concepts of the 95th percentile of as long random directions; steerable: "
        "above that; mismatched: the same share of neurons with another neuron's concept",
        "specific: steerable, and above the 95th percentile of the other neurons of the layer; in brackets "
        "95 %; prompting's: the gain with all tokens of the concept before the prompt",
        "concepts: input, the tokens that make up most of the neuron's activation; distinct, those that do "
        "so more than in the text as a whole; next, the tokens that follow it more than they do elsewhere",
    ):
        output.say(line)


def _row(layer: dict[str, Any], kind: str) -> list[str]:
    concept = layer["concepts"][kind]
    prompting = concept.get("prompting")
    return [
        layer["layer"],
        f"{layer['n_neurons']}",
        _number(layer["median_strength"]),
        _number(layer["median_divergence"]),
        _number(concept["median_gain"]),
        _number(concept["median_random"]),
        _share(concept["steerable"]),
        f"{100 * concept['mismatched']:.0f}",
        _share(concept["specific"]),
        _number(prompting["median_gain"]) if prompting else _NOTHING,
    ]


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2f}"


def _share(share: dict[str, float | None]) -> str:
    value, low, high = (f"{100 * (share[name] or 0):.0f}" for name in ("share", "low", "high"))
    return f"{value} [{low}, {high}]"
