"""`topklm steer`: measures the effect of setting a neuron on the text, and how many neurons have one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.table
from rich.text import Text

from topklm.commands import shared
from topklm.commands.shared import Output
from topklm.errors import UserError, visible
from topklm.imports import when_used
from topklm.inference.interventions import POSITIONS, Intervention, needs_value, times_of
from topklm.steering import PROMPTS, Sampled, SurveySettings
from topklm.storage.files import is_bucket, local_path

with when_used():
    from topklm.neurons import ablate_set, dictionary, search
    from topklm.steering import concepts as concept_lib
    from topklm.steering import dose, survey
    from topklm.steering import survey as survey_lib

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel
    from topklm.neurons import NeuronsFolder
    from topklm.neurons.ablate_set import Estimate
    from topklm.neurons.store import Store
    from topklm.steering.concepts import Concept, NeuronFacts
    from topklm.steering.dose import Response

DESCRIPTION = (
    "Continues prompts with one neuron set to one value after another, shows the texts side by side, and "
    "measures them: how often the neuron's concept comes, how fluent the unsteered model finds them, how "
    "varied they are. With --toward: the neurons that raise the words of a pattern most, for what they cost, "
    "and the texts of the first. With --survey: of all living neurons, the share that raises its concept "
    "more than random directions of the same length do."
)
EXAMPLE = "topklm steer runs/small --neuron 2:117 --values 0.5x,1x,2x"

_OF_TEXTS = ("prompt", "prompts")
_OF_NEURON = ("concept_regex", "concept_words")
_OF_MANY = ("layers", "count", "bound", "neutral_prompts", "directions")
_DEFAULT_TIMES, _DEFAULT_VALUES = "0,0.5x,1x,2x", "0,1,2,4,8"
_NOTHING = "-"
_SIDE_BY_SIDE = 100  # columns of a terminal, from which texts stand beside one another


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run", "seed", "step", "json")
    either = shared.flags(parser.add_mutually_exclusive_group(required=True))
    either("--neuron L:N", "steer neuron N of layer L, e.g. 2:117")
    either("--toward PATTERN", "find the neurons that raise tokens beginning a match, and steer the first")
    either("--survey", "steer all living neurons, without writing text", False)
    add(
        "--values X,Y,...",
        "in units of the neuron's activation; 2x: twice its largest activation on the measured text; "
        f"default {_DEFAULT_TIMES} if measured, else {_DEFAULT_VALUES}. With --survey: lengths of the added "
        "vector, in units of the mean length of what the layer hands on; default "
        f"{','.join(map(str, SurveySettings.strengths))}",
    )
    add = shared.flags(parser.add_argument_group("with --neuron and --toward"))
    shared.add_mode(add)
    add("--positions", "", "all", choices=POSITIONS)
    text = "may be given several times; default eight of ours, with --toward pieces of harvested text"
    add("--prompt TEXT", text, action="append")
    add("--prompts FILE", "a prompt on each line")
    add("--samples N", "of each prompt", Sampled.samples)
    add("--max-new-tokens N", "", Sampled.max_new_tokens)
    add("--temperature T", "0 is greedy", Sampled.temperature)
    add("--show N", "prompts whose texts are shown", 2)
    add = shared.flags(parser.add_argument_group("with --neuron"))
    add("--concept-regex R", "count what matches, in any case")
    add("--concept-words WORDS", "count whole words: a,b,c; or a file with a word on each line")
    add = shared.flags(parser.add_argument_group("with --toward"))
    add("--top N", "neurons whose texts are written and measured; default 1", int)
    add("--limit N", "neurons that are ranked; default 20", int)
    add = shared.flags(parser.add_argument_group("with --survey"))
    add("--against RUN", "survey this run too, a Base LM say")
    group = parser.add_argument_group("with --toward and --survey")
    add = shared.flags(group, "layers")
    add("--count N", "neurons of each layer, drawn; default all", int)
    shared.former(group, "--neurons", "count", int)
    text = (
        "a neuron counts at the largest value at which the steered next-token distribution is within this KL "
        f"divergence of the unsteered one; default {SurveySettings.bound}"
    )
    add("--bound NATS", text, float)
    text = (
        "pieces of harvested text, of documents that no concept is read from; default "
        f"{SurveySettings.prompts}"
    )
    add("--neutral-prompts N", text, int)
    text = f"random ones, of each layer; default {SurveySettings.random_directions}"
    add("--directions N", text, int)


def run(arguments: argparse.Namespace) -> None:
    output = Output(arguments.json)
    if arguments.survey:
        shared.check_goes_with(arguments, "neuron", *_OF_TEXTS, *_OF_NEURON)
        shared.check_goes_with(arguments, "toward", "top", "limit")
        content, show = _survey(arguments, output)
    elif arguments.toward is not None:
        shared.check_goes_with(arguments, "neuron", *_OF_NEURON)
        shared.check_goes_with(arguments, "survey", "against")
        content, show = _toward(arguments, output)
    else:
        shared.check_goes_with(arguments, "toward", "top", "limit")
        shared.check_goes_with(arguments, "survey", "against", *_OF_MANY)
        content, show = _steer(arguments, output)
    output.give(content, show)


def _steer(arguments: argparse.Namespace, output: Output) -> tuple[dict[str, Any], Callable[[], None]]:
    """Writes and measures texts; returns all of it, and the function that shows it to a person."""
    layer, neuron = shared.neuron(arguments.neuron)
    sampled, asked = _sampled(arguments), _asked(arguments)
    model = shared.load_onto_one_device(arguments.run, arguments.step)
    with shared.refused_as("--neuron", value=arguments.neuron):
        Intervention(layer, neuron).check(model.cfg)
    folder = None if is_bucket(arguments.run) else shared.folder_of(model)
    facts = None if folder is None else concept_lib.read_facts(folder, layer, neuron)
    values = _values(arguments, (layer, neuron), _largest(model, folder, facts, layer, neuron))
    concepts = asked or concept_lib.own_concepts(model, folder, facts, layer, neuron)
    found = _respond(arguments, output, model, (layer, neuron), values, concepts, sampled)
    content = survey_lib.without_nan(
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

    def show() -> None:
        if facts is not None:
            active = f"active at {facts.n_active / facts.n_tokens:.2%} of {facts.n_tokens:,} tokens"
            at_most = f"at most {facts.max_activation or 0:.4g} (1x)"
            output.say(visible(f"neuron {arguments.neuron}: {active}, {at_most}"))
        _print_responses(output, arguments, found, concepts, sampled)

    return content, show


def _largest(
    model: LanguageModel, folder: NeuronsFolder | None, facts: NeuronFacts | None, layer: int, neuron: int
) -> float | None:
    """Returns a neuron's largest activation, where it was measured or harvested; None of a dead one too."""
    if facts is not None:
        return facts.max_activation
    if folder is None or not folder.store.exists():
        return None
    store = shared.open_store(folder, model)
    if store.metadata.dictionary or layer not in store.metadata.layers:
        return None
    return store.largest_activation(layer, neuron) if len(store.neuron(layer, neuron).values) else None


def _respond(
    arguments: argparse.Namespace,
    output: Output,
    model: LanguageModel,
    neuron: tuple[int, int],
    values: Sequence[float],
    concepts: Sequence[Concept],
    sampled: Sampled,
) -> list[Response]:
    """Writes and measures the texts of one neuron."""
    total = (1 + len(values)) * len(sampled.prompts) * sampled.samples
    with (
        shared.arguments_are_flags(arguments),
        output.progress.phase("writing texts", total) as report,
    ):
        return dose.respond(
            model,
            neuron,
            values,
            concepts,
            sampled,
            mode=arguments.mode,
            positions=arguments.positions,
            report=report,
        )


def _sampled(arguments: argparse.Namespace, default: Sequence[str] = PROMPTS) -> Sampled:
    shared.check_at_least(arguments, 1, "samples", "max_new_tokens")
    shared.check_at_least(arguments, 0, "temperature")
    if arguments.prompt and arguments.prompts:
        raise UserError("--prompt with --prompts: leave one of the two out")
    prompts = _lines(arguments.prompts, "--prompts") if arguments.prompts else arguments.prompt
    settings = arguments.samples, arguments.max_new_tokens, arguments.temperature, arguments.seed
    return Sampled(tuple(prompts or default), *settings)


def _values(arguments: argparse.Namespace, neuron: tuple[int, int], largest: float | None) -> list[float]:
    """Reads --values, in units of the neuron's activation, of which the largest may not be known."""
    if not needs_value(arguments.mode):
        if arguments.values is not None:
            raise shared.wrong(arguments, "values", f"mode {arguments.mode} has no use for values")
        return [0.0]
    is_scale = arguments.mode == "scale"
    text = arguments.values or (_DEFAULT_TIMES if largest is not None and not is_scale else _DEFAULT_VALUES)

    def wrong(reason: str) -> UserError:
        return UserError(reason, field="--values", value=text)

    values = []
    for part in (part.strip() for part in text.split(",")):
        times = times_of(part)
        if times is not None and is_scale:
            raise wrong("mode scale multiplies already; leave the x out")
        if times is not None and largest is None:
            raise wrong(
                f"the largest activation of {arguments.neuron} is not known, or it is never active: run "
                f"topklm neurons harvest {arguments.run}, or give values without x"
            )
        try:
            value = float(part) if times is None or largest is None else times * largest
        except ValueError as e:
            raise wrong(f"{part!r} is no number; give e.g. 0,1,2 or 1x,2x") from e
        with shared.refused_as("--values", value=text):
            Intervention(*neuron, value, arguments.mode).check()
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
        text = local_path(path, flag).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{flag} = {path}: cannot be read ({e}); give a text file in UTF-8") from e
    if not (lines := [line for line in text.splitlines() if line.strip()]):
        raise UserError(f"{flag} = {path}: is empty; give at least a line")
    return lines


def _print_responses(
    output: Output,
    arguments: argparse.Namespace,
    found: list[Response],
    concepts: list[Concept],
    sampled: Sampled,
) -> None:
    heads = [_head(response, arguments.mode) for response in found]
    output.say(f"{arguments.mode} at {arguments.positions} positions")
    for number, prompt in enumerate(sampled.prompts[: max(arguments.show, 0)]):
        title, shown = Text(visible(prompt)), [Text(visible(response.texts[number][0])) for response in found]
        if output.console.width < _SIDE_BY_SIDE:
            pairs = list(zip(heads, shown, strict=True))
            output.console.print(shared.table([arguments.mode, "text"], pairs, title, left=["text"]))
            continue
        texts = rich.table.Table(title=title, title_justify="left", show_lines=True)
        for head in heads:
            texts.add_column(head, ratio=1, overflow="fold")
        texts.add_row(*shown)
        output.console.print(texts)
    rows = [
        [
            head,
            *(_with_interval(response.rates[one.name], 100) for one in concepts),
            _with_interval(response.perplexity, 1),
            *(_number(response.distinct[n].value, "{:.2f}") for n in dose.DISTINCT),
        ]
        for head, response in zip(heads, found, strict=True)
    ]
    rates, varied = (f"{one.name} %" for one in concepts), (f"dist-{n}" for n in dose.DISTINCT)
    output.console.print(shared.table([arguments.mode, *rates, "perplexity", *varied], rows))
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


def _with_interval(estimate: Estimate, factor: float) -> str:
    value, low, high = (_number(factor * figure, "{:.1f}") for figure in dataclasses.astuple(estimate))
    return value if np.isnan(estimate.low) else f"{value} [{low}, {high}]"


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return _NOTHING if value is None or math.isnan(value) else form.format(value)


def _toward(arguments: argparse.Namespace, output: Output) -> tuple[dict[str, Any], Callable[[], None]]:
    """Ranks neurons on half of the documents, and writes texts that continue pieces of the other half."""
    shared.check_at_least(arguments, 1, "top", "limit")
    concept = concept_lib.of_regex(arguments.toward, "--toward")
    settings = _settings(arguments, with_values=False)
    _sampled(arguments)  # refuses what is wrong before the work
    model, store = _open(arguments.run, arguments.step)
    matches = search.StoredText(store, model.tokenizer).matches(arguments.toward)
    tokens = survey.pattern_tokens(store, matches, model.cfg.vocab_size)
    bounds = store.document_bounds()
    if len(bounds) < 3:
        raise UserError(f"{store.folder} holds one document, and must hold two or more: harvest more text")
    prompts = []
    for half, n in zip(
        ablate_set.halves(len(bounds) - 1, arguments.seed), (settings.prompts, len(PROMPTS)), strict=True
    ):
        among = np.zeros(store.n_tokens, bool)
        for number in half:
            among[bounds[number] : bounds[number + 1]] = True
        length, separator_id = settings.prompt_tokens, model.tokenizer.separator_id
        prompts.append(survey_lib.neutral_prompts(store, n, length, separator_id, arguments.seed, among))
    ranked = survey.rank(store, model.cfg, model.params, tokens, prompts[0], settings, output.progress)
    if not ranked:
        raise UserError(f"no neuron stays within --bound = {settings.bound:g} nats: give a larger one")
    texts = [model.tokenizer.decode(ids[1:]) for ids in prompts[1].tokens]
    sampled = _sampled(arguments, texts)
    doses = []
    for one in ranked[: arguments.top or 1]:
        neuron = one.layer, one.neuron
        values = _values(arguments, neuron, model.largest_activation(*neuron))
        doses.append((one, _respond(arguments, output, model, neuron, values, [concept], sampled)))
    shown, labels = ranked[: arguments.limit or 20], shared.labels_of(model)
    pieces = model.tokenizer.token_strings(tokens)
    content = survey_lib.without_nan(
        {
            "run": model.run,
            "step": model.step,
            "toward": arguments.toward,
            "tokens": pieces,
            "settings": dataclasses.asdict(settings),
            "mode": arguments.mode,
            "positions": arguments.positions,
            "sampled": dataclasses.asdict(sampled),
            "neurons": shared.with_labels(shown, labels),
            "doses": [
                {
                    "layer": one.layer,
                    "neuron": one.neuron,
                    "responses": [dataclasses.asdict(response) for response in responses],
                }
                for one, responses in doses
            ],
        }
    )

    def show() -> None:
        output.say(visible(f"tokens that begin a match: {', '.join(repr(piece) for piece in pieces)}"))
        cells = [
            [
                f"{one.gain_per_nat:.2f}",
                f"{one.gain:+.2f}",
                f"{one.divergence:.2f}",
                f"{one.strength:g}",
                f"{one.random:.2f}",
            ]
            for one in shown
        ]
        heads = ("gain/KL", "gain", "KL", "value", "random")
        output.console.print(shared.table_of_neurons(heads, shown, cells, labels))
        output.say(
            "gain: rise of ln P(the next token is one of these), KL: divergence from the unsteered next "
            f"token, both nats, means over {settings.prompts} prompts of one half of the documents; value: "
            "length of the added vector, in mean lengths of what the layer hands on, the largest with KL at "
            f"most {settings.bound:g}; random: 95th percentile of gain/KL of random directions of this length"
        )
        for one, responses in doses:
            output.say(f"neuron {one.layer}:{one.neuron}, prompts of the other half of the documents")
            _print_responses(output, arguments, responses, [concept], sampled)

    return content, show


def _survey(arguments: argparse.Namespace, output: Output) -> tuple[dict[str, Any], Callable[[], None]]:
    """Surveys one run or two; returns the findings, and the function that shows them to a person."""
    settings = _settings(arguments)
    # Both are opened before the first is surveyed, which takes long.
    opened = [_open(arguments.run, arguments.step)]
    if arguments.against is not None:
        # RUN itself is surveyed at the same step twice.
        opened.append(
            _open(arguments.against, arguments.step if arguments.against == arguments.run else None)
        )
    found = []
    for model, store in opened:
        layers = survey_lib.survey(
            store,
            model.cfg,
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
        neurons = survey_lib.neuron_rows(layers, settings, model.tokenizer)
        found.append({**facts, **survey_lib.summarise(layers, settings), "neurons": neurons})
    return {"surveys": found}, lambda: _print_surveys(output, found, settings)


def _settings(arguments: argparse.Namespace, with_values: bool = True) -> SurveySettings:
    """Reads the settings of what many neurons are tried with; --values are lengths, or are for texts."""
    given: dict[str, Any] = {"seed": arguments.seed}
    if with_values and arguments.values is not None:
        given["strengths"] = tuple(sorted(_numbers(arguments.values)))
        if not all(0 < value < math.inf for value in given["strengths"]):
            raise shared.wrong(arguments, "values", allowed="above 0 with --survey")
    if arguments.layers is not None:
        given["layers"] = arguments.layers
    shared.check_at_least(arguments, 1, "count", "neutral_prompts", "directions")
    if arguments.bound is not None and not 0 < arguments.bound < math.inf:
        raise shared.wrong(arguments, "bound", allowed="above 0, nats")
    given |= {"neurons": arguments.count, "bound": arguments.bound}
    given |= {"prompts": arguments.neutral_prompts, "random_directions": arguments.directions}
    return SurveySettings(**{name: value for name, value in given.items() if value is not None})


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as e:
        allowed = "numbers with commas between, e.g. 0,1,2"
        raise UserError(field="--values", value=text, allowed=allowed) from e


def _open(run: str, step: int | None) -> tuple[LanguageModel, Store]:
    shared.check_on_disk(run)
    model = shared.load_onto_one_device(run, step)
    store = shared.open_store(shared.folder_of(model), model)
    dictionary.check_coordinates(store.metadata.dictionary, "steer --survey")
    return model, store


def _print_surveys(output: Output, found: Sequence[dict[str, Any]], settings: SurveySettings) -> None:
    heads = ["run", "layer", "n", "value", "KL", "gain", "rand", "steer %", "mis %", "spec %", "prompt"]
    for kind in concept_lib.KINDS:
        rows = [[one["run"], *_row(layer, kind)] for one in found for layer in one["layers"]]
        output.console.print(shared.table(heads, rows, f"concept: {kind} tokens"))
    n = settings.prompts
    for line in (
        f"gain: median rise of ln P(the next token is of the concept) after {n} neutral prompts, nats, at "
        f"the largest value with a KL divergence of at most {settings.bound:g} nats from the unsteered model",
        "rand: median over concepts of the 95th percentile of as long random directions; steer: share "
        "of neurons above that; mis: the same of neurons with another neuron's concept",
        "spec: of neurons also above the 95th percentile of the others of the layer; in brackets 95 %; "
        "prompt: the gain with all tokens of the concept before the prompt",
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


def _share(share: dict[str, float | None]) -> str:
    value, low, high = (f"{100 * (share[name] or 0):.0f}" for name in ("share", "low", "high"))
    return f"{value} [{low}, {high}]"
