"""`topklm trace facts`: neurons that tell known facts from forgotten ones; flags that it and `run` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import math
import re
from typing import TYPE_CHECKING

from topklm.commands import shared
from topklm.commands.shared import Output, Verb
from topklm.imports import when_used
from topklm.storage.files import local_path

with when_used():
    from topklm.checkpoint import run_folder
    from topklm.neurons import documents as documents_lib
    from topklm.runtime import compilation_cache
    from topklm.steering import survey
    from topklm.trace import changes, facts, language, read

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel
    from topklm.layout import Layout
    from topklm.trace.facts import Awareness


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


def _run(arguments: argparse.Namespace) -> None:
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
            report(1, 0, 0)
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
    output.give(survey.without_nan(content), lambda: _show(output, title, measured))


def _show(output: Output, title: str, measured: Sequence[Awareness]) -> None:
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


FACTS = Verb(
    "neurons that tell known facts from forgotten ones, over the steps",
    "Makes facts of the run's own training articles, and finds at each step which neurons are active more "
    "often at the names of things whose fact the model has; chosen on one half and scored on the other, "
    "beside the published figure, and both with shuffled labels.",
    "topklm trace facts runs/small --steps log --json",
    _add,
    _run,
)
