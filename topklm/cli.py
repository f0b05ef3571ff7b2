"""The `topklm` command: finds the module of a verb in `topklm.commands`, and runs it.

Imports nothing else of the library, so that it starts at once and a verb loads only what it needs.
"""

from collections.abc import Sequence
import contextlib
import importlib
import keyword
import os
from pathlib import Path
import sys
from types import ModuleType

from topklm import commands, errors
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
        command.run(commands.parse(verb, command, rest))
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
        raise errors.UserError(
            "bench: the benchmarks are not installed with the package; clone the repository and run "
            "`python -m topklm bench ...` there"
        )
    sys.path.insert(0, str(root))  # before another folder of that name in the working directory
    importlib.import_module("benchmarks.command").run(words)


def _module(verb: str) -> ModuleType:
    name = f"{verb}_folder" if keyword.iskeyword(verb) else verb.replace("-", "_")
    return importlib.import_module(f"topklm.commands.{name}")


def _parser(verb: str = "") -> commands.Parser:
    """Returns the parser of the verbs' names, and of the arguments of one of them."""
    parser = commands.Parser(
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
