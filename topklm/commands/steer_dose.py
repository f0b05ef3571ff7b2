"""`topklm steer --neuron`: measures the text that one neuron makes at one value after another."""

import argparse
from collections.abc import Callable
import contextlib
import dataclasses
from pathlib import Path
import re
from typing import Any

import numpy as np
import rich.table
import rich.text

import topklm
from topklm.commands import shared, steer_args
from topklm.commands.shared import Output
from topklm.errors import UserError
from topklm.inference.interventions import DEFAULT_MODE, MODES, POSITIONS, needs_value
from topklm.neurons.display import visible
from topklm.neurons.paths import NeuronsFolder
from topklm.steering import concepts as concept_lib
from topklm.steering import dose
from topklm.steering.concepts import Concept, NeuronFacts
from topklm.steering.dose import Estimate, Response, Sampled
from topklm.steering.survey import without_nan
from topklm.storage.files import is_bucket, local_path

FLAGS = ("prompt", "prompts", "concept_regex", "concept_words")
DEFAULT_TIMES, DEFAULT_VALUES = "0,0.5x,1x,2x", "0,1,2,4,8"

_TIMES = re.compile(r"([+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)x")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what goes with --neuron."""
    group = parser.add_argument_group("with --neuron")
    group.add_argument(
        "--mode",
        choices=MODES,
        default=DEFAULT_MODE,
        help=f"{steer_args.modes_help()}; default %(default)s",
    )
    group.add_argument("--positions", choices=POSITIONS, default="all", help="default %(default)s")
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given several times; default eight of ours"
    )
    group.add_argument("--prompts", metavar="FILE", help="a prompt on each line")
    group.add_argument(
        "--samples",
        type=int,
        default=Sampled.samples,
        metavar="N",
        help="of each prompt; default %(default)s",
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=Sampled.max_new_tokens, metavar="N", help="default %(default)s"
    )
    group.add_argument(
        "--temperature", type=float, default=Sampled.temperature, help="0 is greedy; default %(default)s"
    )
    group.add_argument("--concept-regex", metavar="R", help="count what matches, in any case")
    group.add_argument(
        "--concept-words",
        metavar="WORDS",
        help="count whole words: a,b,c; or a file with a word on each line",
    )
    group.add_argument(
        "--show", type=int, default=2, metavar="N", help="prompts whose texts are shown; default %(default)s"
    )


def run(arguments: argparse.Namespace, output: Output) -> tuple[dict[str, Any], Callable[[], None]]:
    """Writes and measures texts; returns all of it, and what shows it to a person."""
    layer, neuron = steer_args.neuron(arguments.neuron)
    sampled, asked = _sampled(arguments), _asked(arguments)
    model = topklm.load(arguments.run, step=arguments.step)
    steer_args.intervention(
        layer, neuron, DEFAULT_MODE, 0.0, "--neuron", arguments.neuron, config=model.config.model
    )
    folder = None if is_bucket(arguments.run) else NeuronsFolder(Path(model.run), model.step)
    facts = None if folder is None else concept_lib.read_facts(folder, layer, neuron)
    values = _values(arguments, facts)
    concepts = asked or concept_lib.own_concepts(model, folder, facts, layer, neuron)
    total = (1 + len(values)) * len(sampled.prompts) * sampled.samples
    with (
        shared.arguments_are_flags(arguments),
        output.progress.phase("writing texts", total) as report,
    ):
        found = dose.respond(
            model,
            (layer, neuron),
            values,
            concepts,
            sampled,
            mode=arguments.mode,
            positions=arguments.positions,
            report=lambda texts: report(texts, 0, 0),
        )
    content = without_nan(
        {
            "run": model.run,
            "step": model.step,
            "layer": layer,
            "neuron": neuron,
            "mode": arguments.mode,
            "positions": arguments.positions,
            "known": None if facts is None else dataclasses.asdict(facts),
            "sampled": dataclasses.asdict(sampled),
            "concepts": {one.name: one.description for one in concepts},
            "responses": [dataclasses.asdict(response) for response in found],
        }
    )
    return content, lambda: _print(output, arguments, found, concepts, sampled, facts)


def _sampled(arguments: argparse.Namespace) -> Sampled:
    shared.check_at_least(arguments, 1, "samples", "max_new_tokens")
    shared.check_at_least(arguments, 0, "temperature")
    if arguments.prompt and arguments.prompts:
        raise UserError("--prompt with --prompts: leave one of the two out")
    prompts = tuple(arguments.prompt or dose.PROMPTS)
    if arguments.prompts:
        prompts = tuple(_lines(arguments.prompts, "--prompts"))
    settings = arguments.samples, arguments.max_new_tokens, arguments.temperature, arguments.seed
    return Sampled(prompts, *settings)


def _values(arguments: argparse.Namespace, facts: NeuronFacts | None) -> list[float]:
    """Reads --values, in units of the neuron's activation."""
    if not needs_value(arguments.mode):
        if arguments.values is not None:
            raise shared.wrong(arguments, "values", f"mode {arguments.mode} has no use for values")
        return [0.0]
    largest = facts.max_activation if facts else None
    default = DEFAULT_TIMES if largest is not None and arguments.mode != "scale" else DEFAULT_VALUES
    text = arguments.values or default
    values = []
    for part in (part.strip() for part in text.split(",")):
        times = _TIMES.fullmatch(part)
        if times and arguments.mode == "scale":
            raise UserError(f"--values = {text}: mode scale multiplies already; leave the x out")
        if times and largest is None:
            raise UserError(
                f"--values = {text}: the largest activation of {arguments.neuron} is not known: run topklm "
                f"neurons harvest and measure {arguments.run}, or give values without x"
            )
        try:
            value = float(times[1]) * largest if times and largest is not None else float(part)
        except ValueError as e:
            raise UserError(f"--values = {text}: {part!r} is no number; give e.g. 0,1,2 or 1x,2x") from e
        layer, neuron = steer_args.neuron(arguments.neuron)
        steer_args.intervention(layer, neuron, arguments.mode, value, "--values", text)
        values.append(value)
    return values


def _asked(arguments: argparse.Namespace) -> list[Concept]:
    asked = []
    if arguments.concept_regex is not None:
        asked.append(concept_lib.of_regex(arguments.concept_regex))
    if arguments.concept_words is not None:
        is_file = False
        with contextlib.suppress(OSError, ValueError):  # words may be longer than a file's name
            is_file = Path(arguments.concept_words).expanduser().is_file()
        words = _lines(arguments.concept_words, "--concept-words") if is_file else None
        asked.append(concept_lib.of_words(words or arguments.concept_words.split(",")))
    return asked


def _lines(path: str, flag: str) -> list[str]:
    try:
        lines = [
            line for line in local_path(path, flag).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{flag} = {path}: cannot be read ({e}); give a text file in UTF-8") from e
    if not lines:
        raise UserError(f"{flag} = {path}: is empty; give at least a line")
    return lines


def _print(
    output: Output,
    arguments: argparse.Namespace,
    found: list[Response],
    concepts: list[Concept],
    sampled: Sampled,
    facts: NeuronFacts | None,
) -> None:
    if facts is not None:
        active = f"active at {facts.n_active / facts.n_tokens:.2%} of {facts.n_tokens:,} tokens"
        output.say(
            visible(f"neuron {arguments.neuron}: {active}, at most {facts.max_activation or 0:.4g} (1x)")
        )
    heads = [_head(response, arguments.mode) for response in found]
    output.say(f"{arguments.mode} at {arguments.positions} positions")
    for number, prompt in enumerate(sampled.prompts[: max(arguments.show, 0)]):
        texts = rich.table.Table(title=rich.text.Text(visible(prompt)), title_justify="left", show_lines=True)
        for head in heads:
            texts.add_column(head, ratio=1, overflow="fold")
        texts.add_row(*(rich.text.Text(visible(response.texts[number][0])) for response in found))
        output.console.print(texts)
    rates = (f"{one.name} %" for one in concepts)
    table = shared.table_of([arguments.mode, *rates, "perplexity", *(f"dist-{n}" for n in dose.DISTINCT)])
    for head, response in zip(heads, found, strict=True):
        rates = (_with_interval(response.rates[one.name], 100, "{:.1f}") for one in concepts)
        varied = (_number(response.distinct[n].value, "{:.2f}") for n in dose.DISTINCT)
        table.add_row(head, *rates, _with_interval(response.perplexity, 1, "{:.1f}"), *varied)
    output.console.print(table)
    for one in concepts:
        output.say(visible(f"{one.name}, hits in 100 tokens: {one.description}"))
    drawn = "prompts" if len(sampled.prompts) > 1 else "samples"
    output.say(
        "perplexity: of the text given its prompt, by the unsteered model; dist-n: distinct n-grams for each "
        f"token of a text; in brackets 95 % by bootstrap over {drawn}; {len(sampled.prompts)} prompts, "
        f"{sampled.samples} samples of each"
    )


def _head(response: Response, mode: str) -> str:
    if response.value is None:
        return "unsteered"
    return f"{response.value:.4g}" if needs_value(mode) else mode


def _with_interval(estimate: Estimate, factor: float, form: str) -> str:
    value, low, high = (_number(factor * figure, form) for figure in dataclasses.astuple(estimate))
    return value if np.isnan(estimate.low) else f"{value} [{low}, {high}]"


def _number(value: float, form: str) -> str:
    return "-" if np.isnan(value) else form.format(value)
