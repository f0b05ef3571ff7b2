"""The flags of `topklm trace run` for figures of language, and those for steps, which other verbs share."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from topklm.commands import shared
from topklm.imports import when_used
from topklm.storage.files import local_path

with when_used():
    from topklm.trace import changes, language, read

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel
    from topklm.layout import Layout


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
