"""The `topklm` command: finds the module of a verb in `topklm.commands`, reads its command line, and runs it.

Imports nothing else of the library, so that it starts at once and a verb loads only what it needs.
"""

import argparse
from collections.abc import Sequence
import contextlib
import difflib
import importlib
import keyword
import os
from pathlib import Path
import sys
from types import ModuleType
from typing import Any, NoReturn

from topklm import errors
from topklm.errors import UserError
from topklm.runtime import process

VERBS = {
    "train": "train a model",
    "prepare": "turn text into a dataset of token shards",
    "data": "look into a dataset, check it, or export its text",
    "generate": "continue a prompt",
    "steer": "set a neuron, and measure what that does to the text",
    "neurons": "harvest, measure and find the neurons of a model",
    "sae": "train and measure sparse autoencoders of a Base LM",
    "trace": "follow the neurons of a run over its checkpoints",
    "eval": "evaluate runs at tasks, and against others",
    "unlearn": "make a model forget a text, and say what that costs",
    "study": "judge the claims made of TopK LMs by runs",
    "compare": "compare two runs: bits per byte, neurons, ablations",
    "runs": "list runs, how far each is and how well it does",
    "show": "look into a run: config, loss, checkpoints, neurons",
    "serve": "answer OpenAI's clients with a model",
    "explore": "look at a model's neurons in the browser",
    "export": "write a run for Hugging Face, SAELens or delphi",
    "import": "make a run of a Hugging Face model",
    "doctor": "check that this machine and a run folder can train",
    "compile-check": "compile a train step for a TPU slice without one",
    "bench": "measure a part of the library on this machine",
}

_LONGEST_NAME = 100  # characters: comparing takes the product of two lengths

# Their work is not what they print: they go on when nobody reads that any more.
_GOES_ON = (
    "train",
    "prepare",
    "data export",
    "steer",
    "neurons harvest",
    "neurons measure",
    "neurons card",
    "sae train",
    "trace run",
    "eval",
    "unlearn",
    "study",
    "serve",
    "explore",
)


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


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the console script; returns the exit code."""
    if "_ARGCOMPLETE" in os.environ:
        return _complete(os.environ.get("COMP_LINE", "").split())
    arguments = sys.argv[1:] if argv is None else argv
    errors.report_each_failure_once()
    goes_on = f"{' '.join(arguments[:2])} ".startswith(tuple(f"{verb} " for verb in _GOES_ON))
    on_storage = errors.EXIT_TRY_AGAIN if arguments[:1] == ["train"] else errors.EXIT_USER_ERROR
    # A trainer hears its signals by itself, and saves.
    unwinds = contextlib.nullcontext() if arguments[:1] == ["train"] else errors.sigterm_unwinds()
    with errors.output_never_ends_it(goes_on), unwinds:
        code = errors.guarded(lambda: _start(arguments), on_storage)
    if code in (errors.EXIT_INTERRUPTED, errors.EXIT_TERMINATED):
        errors.end_at_once(code)
    return code


def _start(argv: Sequence[str]) -> None:
    if argv[:1] in (["train"], ["bench"]):
        process.restart_with_tcmalloc()
    dispatch(argv)


def dispatch(argv: Sequence[str]) -> None:
    """Runs one verb with its arguments."""
    verb, *rest = argv or ["--help"]
    if verb == "bench":
        _bench(rest)
        return
    if verb in VERBS:
        command = _module(verb)
        command.run(parse(verb, command, rest))
        return
    if argv[:1] == ["--version"]:
        from topklm.commands import shared  # noqa: PLC0415

        shared.print_versions()
        return
    _parser().parse_args([verb, *rest])  # shows the help, or says what is wrong


def _bench(words: Sequence[str]) -> None:
    """Hands over to the harness in `benchmarks/`, which lies beside the package in a clone."""
    root = Path(__file__).parents[1]
    if not (root / "benchmarks" / "command.py").is_file():
        raise UserError(
            "bench: the benchmarks are not installed with the package; clone the repository and run "
            "`python -m topklm bench ...` there"
        )
    sys.path.insert(0, str(root))  # before another folder of that name in the working directory
    importlib.import_module("benchmarks.command").run(words)


def _module(verb: str) -> ModuleType:
    name = f"{verb}_folder" if keyword.iskeyword(verb) else verb.replace("-", "_")
    return importlib.import_module(f"topklm.commands.{name}")


def _parser(verb: str = "") -> Parser:
    """Returns the parser of the verbs' names, and of the arguments of one of them."""
    parser = Parser(
        "topklm",
        description="Train TopK language models and read them.",
        epilog="topklm VERB --help explains a verb, with an example.",
    )
    parser.add_argument("--version", action="store_true", help="print versions and devices, and end")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for name, summary in VERBS.items():
        inner = verbs.add_parser(name, help=summary)
        if name == verb != "bench":
            _module(name).add_arguments(inner)
    return parser


def _complete(words: Sequence[str]) -> int:
    """Tells a shell how a command line goes on; nothing without the package argcomplete."""
    with contextlib.suppress(ImportError):
        import argcomplete  # noqa: PLC0415 - of an extra

        parser = _parser(words[1] if len(words) > 1 else "")
        # Fields of a config are in no help; flags are shown once a dash is there.
        argcomplete.autocomplete(parser, always_complete_options=False, print_suppressed=True)
    return 0
