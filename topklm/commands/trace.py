"""`topklm trace`: neurons over the checkpoints of a run.

`topklm trace facts`: neurons that tell known facts from forgotten ones; flags that it and `run` share.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import math
import re
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from topklm.commands import shared
from topklm.commands.shared import Output, Verb
from topklm.errors import ArgumentError, UserError, disk_errors_are_user_errors
from topklm.imports import when_used
from topklm.progress import Progress
from topklm.storage.files import local_path, write_atomically

with when_used():
    from topklm.checkpoint import run_folder
    from topklm.explorer import traced
    from topklm.neurons import documents as documents_lib
    from topklm.runtime import compilation_cache
    from topklm.steering import survey
    from topklm.trace import changes, facts, language, measure, read, summary, tables

if TYPE_CHECKING:
    from topklm.explorer.traced import Trace
    from topklm.inference.language_model import LanguageModel
    from topklm.layout import Layout
    from topklm.trace.facts import Awareness
    from topklm.trace.summary import Summary
    from topklm.trace.tables import TraceFolder

DESCRIPTION = "Follows the neurons of a run over its checkpoints, on the same held-out tokens."
EXAMPLE = "topklm trace run runs/small"

_TOKENS, _MIN_TOKENS, _SAE_TOKENS = 70_000, 30, 250_000
_DICTIONARIES = ("coordinates", "sae-fresh", "sae-same-seed", "sae-chained")  # as `read.DICTIONARIES`
_COLUMNS = 9  # of a table of 80 characters, beside the names of its rows
_WIDTH, _NAME_WIDTH = 80, 24
_LAYERS = 3  # shown of more
_WORDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    verbs = {
        "run": Verb(
            "read the same text through every checkpoint, and write the tables",
            "Reads the same held-out tokens through every checkpoint of a run, compares each neuron with "
            "itself at the reference, at the step before and in other layers, and writes tables of Parquet "
            "into RUN/neurons/trace. Started again it goes on after the last whole step. The processes of a "
            "launcher share the steps.",
            EXAMPLE,
            _add_run,
            _run,
        ),
        "show": Verb(
            "one neuron over the steps",
            "Shows a neuron at each step: correlation with the reference, density, its strongest tokens.",
            "topklm trace show runs/small 2:117",
            _add_show,
            _show,
        ),
        "report": Verb(
            "medians over the neurons by step, beside their nulls; figures",
            "Shows medians over neurons at chosen steps, beside those by chance; of several runs side by "
            "side, and draws the figures.",
            "topklm trace report runs/small --against runs/small-base --figures figures",
            _add_report,
            _report,
        ),
        "facts": _FACTS_VERB,
    }
    shared.add_verbs(parser, verbs, "run|show|report|facts")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run", "json")
    add_steps(parser)
    text = "of held-out text, in the whole windows that have them"
    add("--tokens N", text, _TOKENS)
    add("--min-tokens N", "neurons active at fewer of the reference are in no median", _MIN_TOKENS)
    add("--reference STEP", "step that all are compared with; default the last", int)
    text = (
        "a Base LM's stand-in for neurons, needed there; coordinates: positive, the k largest; sae-...: an "
    )
    text += "autoencoder for each checkpoint, with seeds of their own, one seed, or trained on from the last"
    add("--dictionary NAME", text, choices=_DICTIONARIES)
    add("--topk-k K", "of a Base LM, how many of a token are kept; default the config's topk_k", int)
    shared.flags(parser, "layers")
    add("--sae-tokens N", "of training text, from which each autoencoder is made", _SAE_TOKENS)
    add("--source TEXT", "prepared folder, or files, globs, URLs of text; default the run's data")
    add("--keep-events", "keep the activations of every step, not of the reference alone", False)
    add("--no-language", "leave out figures of the whole model but its loss", False)
    add_language(parser)
    add("--restart", "delete a trace of other settings that is there, and begin again", False)


def _add_named(parser: argparse.ArgumentParser) -> None:
    shared.flags(parser)("--dictionary NAME", "that of a Base LM's trace", choices=_DICTIONARIES)


def _add_show(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run")
    add("neuron L:N", "layer and number, e.g. 2:117")
    _add_named(parser)
    shared.flags(parser, "json")


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run")
    _add_named(parser)
    shared.flags(parser, "layers")
    text = "other traced runs: another seed, or the Base LM; neurons are matched where both read one text"
    add("--against RUN", text, nargs="+", default=[])
    add("--breaks N", "cut each curve into N + 1 straight pieces, three steps long or more, that fit best", 0)
    add("--figures DIR", "draw the figures into this folder, which is made")
    shared.flags(parser, "json")


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    shared.check_installed("topklm trace", ["pyarrow", "scipy"])
    shared.check_on_disk(arguments.run, "a trace is kept on a disk; copy the run folder to one")
    arguments.call(arguments)


def _run(arguments: argparse.Namespace) -> None:
    from topklm import distributed  # noqa: PLC0415 - imports JAX, which --help does without

    shared.check_at_least(arguments, 1, "tokens", "min_tokens", "topk_k", "sae_tokens")
    if arguments.tokens < arguments.min_tokens:
        raise shared.wrong(arguments, "tokens", allowed=f"--min-tokens = {arguments.min_tokens} or more")
    with distributed.session():
        _trace(arguments)


def _trace(arguments: argparse.Namespace) -> None:
    """Traces a run as one of its processes, the first of which prints."""
    from topklm import distributed  # noqa: PLC0415 - see `_run`

    is_first = distributed.is_primary()
    output = Output(arguments.json if is_first else None)
    progress = output.progress if is_first else Progress(lambda line: None)
    steps, reference = distributed.of_first("steps", lambda: _steps(arguments))
    run_folder.check_shared(local_path(arguments.run, "RUN"), "RUN")
    layout = shared.local_layout()
    compilation_cache.enable()
    config = run_folder.saved_config(local_path(arguments.run, "RUN"))
    assert config is not None
    model = read.load_step(arguments.run, reference, layout, config)
    options = read.Options(
        arguments.tokens,
        arguments.min_tokens,
        arguments.dictionary or "",
        arguments.topk_k,
        arguments.layers,
        arguments.sae_tokens,
        arguments.source,
        arguments.keep_events,
    )
    source = read.Checkpoints(arguments.run, model, layout, options, progress)
    measures = [] if arguments.no_language else measures_of(arguments, model, layout)
    for note in (note for one in measures for note in one.notes):
        progress.say(note)
    described = {key: value for one in measures for key, value in one.describe().items()}
    folder = tables.TraceFolder(local_path(arguments.run, "RUN"), tables.name_of(options.dictionary))
    settings = source.settings(reference, described)
    source.check_same_everywhere(settings)
    with folder.writing(settings, arguments.restart):
        steps = distributed.of_first("all steps", lambda: _with_earlier(steps, folder, arguments.run))
        source.prepare(steps, folder)
        measure.trace(folder, settings, source, steps, progress, measures, arguments.keep_events)
    if not is_first:
        return
    done = folder.steps()
    facts = {
        "trace": str(folder.path),
        "settings": tables.as_facts(settings),
        "steps": done,
    }
    line = f"{folder.path}: {tables.described(settings)}; {len(done)} steps; topklm trace report"
    output.give(facts, lambda: output.say(f"{line} {arguments.run}"))


def _with_earlier(steps: Sequence[int], folder: TraceFolder, run: str) -> list[int]:
    """Adds the steps of earlier calls, which stay; they are done again where another is now before them."""
    saved = read.readable(run)
    return sorted({*steps, *(step for step in folder.steps() if step in saved)})


def _steps(arguments: argparse.Namespace) -> tuple[list[int], int]:
    """Returns the steps that are asked for, rising, and the reference; UserError if they are not there."""
    steps = chosen_steps(arguments)
    reference = steps[-1] if arguments.reference is None else arguments.reference
    if reference not in steps:
        allowed = f"one of the steps, {', '.join(map(str, steps))}"
        raise shared.wrong(arguments, "reference", allowed=allowed)
    if len(steps) < 2 and len(read.readable(arguments.run)) > 1:
        raise shared.wrong(arguments, "steps", allowed="two or more, or all")
    if len(steps) < 2:
        raise UserError(
            f"{arguments.run} has one step to trace, {steps[0]}: train with --config.checkpoint.trace=log, "
            "which keeps early ones"
        )
    return steps, reference


def _show(arguments: argparse.Namespace) -> None:
    output = Output(arguments.json)
    trace = traced.open_trace(arguments.run, arguments.dictionary or "")
    try:
        neuron = trace.neuron(*shared.neuron(arguments.neuron, "NEURON"))
    except ArgumentError as e:
        raise e.named("NEURON") from e
    formation = trace.table("formation").to_pylist()
    row = next(r for r in formation if (r["layer"], r["neuron"]) == (neuron.layer, neuron.number))
    rows = neuron.rows.to_pylist()
    words = {step: neuron.words(step) for step in trace.steps.tolist()}
    facts = {
        "run": arguments.run,
        "settings": tables.as_facts(trace.settings),
        "formation": row,
        "steps": [{**one, "top_token_texts": words[one["step"]]} for one in rows],
    }
    output.give(survey.without_nan(facts), lambda: _show_neuron(output, trace, row, rows, words))


def _show_neuron(
    output: Output,
    trace: Trace,
    formation: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    words: dict[int, list[str]],
) -> None:
    onsets = [f"{name.replace('onset_', '')} {formation[name]}" for name in formation if "onset" in name]
    output.say(f"neuron {formation['layer']}:{formation['neuron']} of {tables.described(trace.settings)}")
    output.say(f"onsets (steps): {', '.join(onsets)}; turnovers {formation['turnovers']}")
    heads = ("step", "r", "other", "Jaccard", "density", "strongest tokens")
    cells = [
        (
            f"{row['step']:,}",
            _number(row["r_reference"]),
            _number(row["r_other"]),
            _number(row["jaccard_reference"]),
            f"{row['density']:.2%}",
            " ".join(map(repr, words[row["step"]][:_WORDS])),
        )
        for row in rows
    ]
    output.console.print(shared.table(heads, cells, left=["strongest tokens"]))


def _report(arguments: argparse.Namespace) -> None:
    shared.check_at_least(arguments, 0, "breaks")
    output = Output(arguments.json)
    trace = traced.open_trace(arguments.run, arguments.dictionary or "")
    own = trace.summary
    most = changes.most_breaks(len(own.steps))
    if arguments.breaks > most:
        allowed = f"at most {most}, for {len(own.steps)} steps"
        raise shared.wrong(arguments, "breaks", allowed=allowed)
    layers = own.settings.layers if arguments.layers is None else arguments.layers
    if missing := set(layers) - set(own.settings.layers):
        allowed = f"of {', '.join(map(str, own.settings.layers))}"
        raise UserError(field="--layers", value=",".join(map(str, sorted(missing))), allowed=allowed)
    others = _others(arguments)
    facts = survey.without_nan(
        {
            "run": arguments.run,
            "settings": tables.as_facts(own.settings),
            "steps": own.steps,
            "values": {name: x.tolist() for name, x in own.values().items()},
            "layers": {
                str(layer): {name: x.tolist() for name, x in own.of_layer(layer).items()} for layer in layers
            },
            "pairs": {
                f"{a}-{b}": {name: x.tolist() for name, x in own.of_pair(a, b).items()}
                for a, b in own.pairs()
            },
            "relations": {name: [vars(one) for one in of] for name, of in own.relations.items()},
            "changes": own.changes(arguments.breaks),
            "onsets": {str(layer): _onset_counts(own, layer) for layer in layers},
            "counted": {str(layer): int(alive.sum()) for layer, alive in own.living.items()},
            "beside": [_beside(other) for other in (own, *others)],
            "matched": _matched(trace, others),
        }
    )
    if arguments.figures is not None:
        folder = local_path(arguments.figures, "--figures")
        with disk_errors_are_user_errors(f"writing {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            for name, draw in traced.FIGURES.items():
                write_atomically(folder / f"{name}.svg", draw([own, *others]).encode())
    output.give(facts, lambda: _show_report(output, own, facts, layers))


def _others(arguments: argparse.Namespace) -> list[Summary]:
    """Opens all traces of --against."""
    found = []
    for name in arguments.against:
        folder = local_path(name, "--against")
        names = tables.names(folder)
        if not names:
            tables.TraceFolder(folder).settings()  # says so, or that the trace is not finished
            raise UserError(
                f"its trace is not finished; run topklm trace run {name}", field="--against", value=name
            )
        found += [summary.Summary(tables.TraceFolder(folder, of)) for of in names]
    return found


def _onset_counts(own: Summary, layer: int) -> dict[str, dict[str, int]]:
    """Counts the neurons of a layer by the step of each of their onsets."""
    names = (name for name in tables.FORMATION_DEFINITIONS if name.startswith("onset"))
    return {name: summary.onset_counts(own.onsets(layer, name)) for name in names}


def _beside(trace: Summary) -> dict[str, Any]:
    """Returns identity to the reference, by index and by match, of all layers together."""
    names = {"r_reference": "same_index", "r_matched": "matched", "r_other": "other_index"}
    found = {to: trace.over_layers(name).tolist() for name, to in names.items()}
    facts = {"trace": trace.name, "dictionary": trace.settings.dictionary, "steps": trace.steps}
    return {**facts, "reference": trace.settings.reference, **found}


def _matched(trace: Trace, others: Sequence[Summary]) -> list[dict[str, Any]]:
    """Matches neurons of traces that read the same text, or says why that cannot be."""
    found = []
    own = trace.summary.folder
    for other in others:
        summary.check_same_tokenizer(trace.settings, other.settings)
        rows: list[dict[str, Any]] = []
        why = summary.why_not_matched(trace.settings, other.settings)
        for steps in [] if why else summary.shared_steps(own, other.folder):
            rows += summary.against(own, other.folder, steps)
        facts = {"trace": other.name, "dictionary": other.settings.dictionary}
        found.append({**facts, "not_matched": why, "rows": rows})
    return found


def _show_report(output: Output, own: Summary, facts: dict[str, Any], layers: Sequence[int]) -> None:
    _say(output, tables.described(own.settings))
    at = summary.columns_of(own.steps, _COLUMNS)
    heads = ["step", *(f"{own.steps[n]:,}" for n in at)]
    values = own.values()
    _print(output, heads, [(name, x[at]) for name, x in values.items()])
    shown = [*layers] if len(layers) <= _LAYERS else [layers[0], layers[len(layers) // 2], layers[-1]]
    for layer in shown:
        found = own.of_layer(layer)
        counted, width = own.living[layer].sum(), own.settings.width
        output.say(f"layer {layer}: medians over {counted:,} of {width:,} neurons")
        _print(output, heads, [(summary.TITLES[name], x[at]) for name, x in found.items()])
    output.say("onsets: neurons whose r stays above .5, .9 from a step on")
    for layer in shown:
        counts = facts["onsets"][str(layer)]
        for name, level in (("onset_50", ".5"), ("onset_90", ".9")):
            said = ", ".join(f"{step}: {n}" for step, n in counts[name].items() if n)
            _say(output, f"  layer {layer}, {level}:  {said}")
    if own.relations:
        output.say("arcs found by one head, chosen on the other half of the sentences (by one distance)")
        for name, of in own.relations.items():
            title = f"{name} ({_number(of[-1].distance)})"
            _print_row(output, title, [of[n].uas for n in at])
    output.say("steps from which a curve rises, falls faster than before; breaks, if asked for")
    for name, ways in facts["changes"].items():
        dated = [ways["rises"], ways["falls"], *ways.get("breaks", [])]
        steps = "".join(f"{'-' if step is None else f'{step:,}':>8}" for step in dated)
        output.say(f"  {name[:_NAME_WIDTH]:<{_NAME_WIDTH}}{steps}")
    if len(facts["beside"]) > 1:
        output.say("r to each trace's own reference, medians over all layers")
        for beside in facts["beside"]:
            chosen = summary.columns_of(beside["steps"], _COLUMNS)
            rows = [
                (title, [np.nan if beside[name][n] is None else beside[name][n] for n in chosen])
                for name, title in (("same_index", "same index"), ("matched", "one-to-one match"))
            ]
            _print(output, [beside["trace"], *(f"{beside['steps'][n]:,}" for n in chosen)], rows)
    for matched in facts["matched"]:
        if matched["not_matched"]:
            _say(output, f"neurons are not matched: {matched['not_matched']}")
            continue
        output.say(f"neurons of both, {matched['trace']}: medians of r, and of the match the shares")
        heads = ["step", "layer", "same index", "best other", "matched", "shifted", "own index", "r > .5"]
        names = ("same_index", "other_index", "matched", "matched_shifted")
        cells = [
            [f"{row['step']:,}", str(row["layer"])]
            + [_number(row[name]) for name in names]
            + [f"{row[name] or 0:.1%}" for name in ("matched_same_index", "matched_strong")]
            for row in matched["rows"]
        ]
        output.console.print(shared.table(heads, cells))


def _say(output: Output, text: str) -> None:
    """Prints a text in lines of at most 80 characters."""
    for line in textwrap.wrap(text, _WIDTH, subsequent_indent="    "):
        output.say(line)


def _print(output: Output, heads: Sequence[str], rows: Sequence[tuple[str, Any]]) -> None:
    """Prints rows of numbers in at most 80 characters."""
    width = (_WIDTH - _NAME_WIDTH) // _COLUMNS
    output.say(f"{heads[0][:_NAME_WIDTH]:<{_NAME_WIDTH}}{''.join(f'{head:>{width}}' for head in heads[1:])}")
    for name, values in rows:
        _print_row(output, name, values)


def _print_row(output: Output, name: str, values: Any) -> None:
    width = (_WIDTH - _NAME_WIDTH) // _COLUMNS
    cells = "".join(f"{_number(value):>{width}}" for value in values)
    output.say(f"{name[:_NAME_WIDTH]:<{_NAME_WIDTH}}{cells}")


def _number(value: float | None) -> str:
    if value is None or np.isnan(value):
        return "-"
    text = f"{round(value, 2) + 0.0:.2f}"  # no minus before a zero
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def add_language(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of figures of language."""
    add = shared.flags(parser)
    text = (
        "parsed sentences as CoNLL-U (also .gz, .xz), such as a treebank of Universal Dependencies: which "
        "heads find which relations"
    )
    add("--conllu FILE", text)
    add("--blimp N", "minimal pairs of each paradigm of BLiMP; 0: none", 0)


def measures_of(
    arguments: argparse.Namespace, model: LanguageModel, layout: Layout
) -> list[language.LanguageMeasures]:
    """Returns the figures of language that a run is asked for; UserError for a file that is no treebank."""
    shared.check_at_least(arguments, 0, "blimp")
    conllu = None if arguments.conllu is None else local_path(arguments.conllu, "--conllu")
    return [language.LanguageMeasures(model, layout, blimp=arguments.blimp, conllu=conllu)]


def add_steps(parser: argparse.ArgumentParser) -> None:
    """Declares which steps of a run are meant."""
    text = "of those there are: all; log, each at least sqrt 2 times the one before; or numbers, 0,64,200"
    shared.flags(parser)("--steps WHICH", text, "all")


def chosen_steps(arguments: argparse.Namespace) -> list[int]:
    """Returns the steps that are asked for, rising; UserError if they are not there."""
    saved = read.readable(arguments.run)
    if arguments.steps in ("all", "log"):
        return saved if arguments.steps == "all" else changes.log_spaced(saved)
    parts = [part.strip() for part in arguments.steps.split(",")]
    if not all(re.fullmatch(r"\d{1,12}", part) for part in parts):
        raise shared.wrong(arguments, "steps", allowed="all, log, or numbers with commas between")
    steps = sorted({*map(int, parts)})
    if missing := [step for step in steps if step not in saved]:
        there = ", ".join(map(str, saved))
        raise shared.wrong(arguments, "steps", f"there is no checkpoint {missing[0]}; there are {there}")
    return steps


_FACTS, _OTHERS = 4000, 9


def _add(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run")
    add_steps(parser)
    add("--facts N", "at most, of the run's own training articles", _FACTS)
    add("--others N", "answers of other facts, which the right one must beat to be known", _OTHERS)
    shared.flags(parser, "seed", "json")


def _run_facts(arguments: argparse.Namespace) -> None:
    shared.check_at_least(arguments, facts.FEWEST, "facts")
    shared.check_at_least(arguments, 1, "others")
    shared.check_at_least(arguments, 0, "seed")
    output = Output(arguments.json)
    steps = chosen_steps(arguments)
    layout = shared.local_layout()
    compilation_cache.enable()
    config = run_folder.saved_config(local_path(arguments.run, "RUN"))
    assert config is not None
    model = read.load_step(arguments.run, steps[-1], layout, config)
    articles = documents_lib.open_documents(model.tokenizer, model.config.data, split="train")
    sizes = model.cfg.context_length, arguments.facts, arguments.others, arguments.seed
    found = facts.collect(articles, model.tokenizer, *sizes)
    reader = facts.FactReader(model, found)
    measured = list[facts.Awareness]()
    n_kinds = {kind: int((found.kinds == kind).sum()) for kind in sorted({*found.kinds.tolist()})}
    with output.progress.phase("checkpoints", len(steps)) as report:
        for step in steps:
            params = read.load_step(arguments.run, step, layout, config).params
            measured.append(reader.measure(step, params, arguments.seed))
            report(1)
    content = {
        "run": arguments.run,
        "facts": len(found.facts),
        "by_kind": n_kinds,
        "others": arguments.others,
        "seed": arguments.seed,
        "steps": [dataclasses.asdict(one) for one in measured],
    }
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in n_kinds.items())
    title = f"{len(found.facts):,} facts ({kinds}), each against {arguments.others} other answers"
    output.give(survey.without_nan(content), lambda: _show_facts(output, title, measured))


def _show_facts(output: Output, title: str, measured: Sequence[Awareness]) -> None:
    output.say(title)
    heads = ("step", "known", "greedy", "layer", "held out", "shuffled", "in sample", "shuffled")
    cells = []
    for one in measured:
        share = one.n_known / (one.n_known + one.n_forgotten)
        for layer in one.layers:
            figures = (layer.held_out, layer.held_out_shuffled, layer.in_sample, layer.in_sample_shuffled)
            row = [f"{one.step:,}", f"{share:.1%}", f"{one.greedy:.1%}", str(layer.layer)]
            shown = ["-" if math.isnan(value) else f"{value:.3f}" for value in figures]
            cells.append((*row, *shown))
    output.console.print(shared.table(heads, cells))
    output.say("f(known) - f(forgotten) at the name's last token, mean of the five largest of a layer")


_FACTS_VERB = Verb(
    "neurons that tell known facts from forgotten ones, over the steps",
    "Makes facts of the run's own training articles, and finds at each step which neurons are active more "
    "often at the names of things whose fact the model has; chosen on one half and scored on the other, "
    "beside the published figure, and both with shuffled labels.",
    "topklm trace facts runs/small --steps log --json",
    _add,
    _run_facts,
)
