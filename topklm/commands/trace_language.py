"""The flags of `topklm trace run` for figures of language, and `topklm trace facts`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from topklm.commands import shared
from topklm.imports import when_used

with when_used():
    from topklm.trace import language

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of figures of language."""
    add = shared.flags(parser)
    text = (
        "parsed sentences as CoNLL-U (also .gz, .xz), such as a treebank of Universal Dependencies: which "
        "heads find which relations"
    )
    add("--conllu FILE", text)
    add("--blimp N", "minimal pairs of each paradigm of BLiMP; 0: none", 0)


def measures_of(arguments: argparse.Namespace, model: LanguageModel) -> list[language.LanguageMeasures]:
    """Returns the figures of language that a run is asked for; UserError for a file that is no treebank."""
    shared.check_at_least(arguments, 0, "blimp")
    conllu = None if arguments.conllu is None else Path(arguments.conllu)
    return [language.LanguageMeasures(model, blimp=arguments.blimp, conllu=conllu)]
