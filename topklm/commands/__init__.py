"""The verbs of the `topklm` command, a module each, and how their command lines are read.

A module has `DESCRIPTION`, `EXAMPLE`, `add_arguments(parser)` and `run(arguments)`; where flags that its
parser does not know are those of a config, also `TAKES_CONFIG = True`; where its positional arguments are
files that it reads, also `READS_FILES = True`.
"""

import argparse
from collections.abc import Sequence
import difflib
from typing import Any, NoReturn

from topklm.errors import UserError

_LONGEST_NAME = 100  # characters: comparing takes the product of two lengths


class Parser(argparse.ArgumentParser):
    """Complains in one line, as all errors are, and names the nearest of the values that there are."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuses what is none of an argument's choices; argparse calls it."""
        if action.choices is not None and value not in action.choices:
            near = difflib.get_close_matches(str(value)[:_LONGEST_NAME], map(str, action.choices), n=1)
            there = (
                f"did you mean {near[0]}?" if near else f"choose from {', '.join(map(str, action.choices))}"
            )
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {there}")


def with_json(argv: Sequence[str], takes_file: bool = True) -> list[str]:
    """Returns the words of a command line with the FILE of `--json [FILE]` joined to it, "-" where none is.

    A word after --json is its FILE if it ends in .json. Others, such as RUN, are for the verb, and so are all
    where `takes_file` is False; `--json=FILE` takes any.
    """
    words = list(argv)
    for i in reversed([i for i, word in enumerate(words) if word == "--json"]):
        has_file = takes_file and words[i + 1 :] and (words[i + 1] == "-" or words[i + 1].endswith(".json"))
        words[i : i + 1 + bool(has_file)] = [f"--json={words[i + 1] if has_file else '-'}"]
    return words


def parse(verb: str, command: Any, argv: Sequence[str]) -> argparse.Namespace:
    """Reads the words after a verb's name; flags of a config are in `config_flags` of what it returns."""
    takes_config = getattr(command, "TAKES_CONFIG", False)
    parser = Parser(
        f"topklm {verb}",
        description=command.DESCRIPTION,
        epilog=f"example: {command.EXAMPLE}",
        allow_abbrev=not takes_config,  # --config is a beginning of its fields
    )
    command.add_arguments(parser)
    # argparse takes it for the mark after which all is positional, and gives an empty list.
    if odd := next((part for part in argv if part.startswith("--") and part.endswith("=--")), None):
        raise UserError(f"{odd!r}: -- is no value; see {parser.prog} --help")
    argv = with_json(argv, takes_file=not getattr(command, "READS_FILES", False))
    arguments, others = parser.parse_known_args(argv)
    if takes_config:
        arguments.config_flags = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return arguments
