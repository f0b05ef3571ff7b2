"""The `topklm` command: a verb, and a thin call into the library."""

import argparse
from collections.abc import Sequence
import json
import math
import sys
from typing import NoReturn

from topklm import errors, main
from topklm.inference.load import load


def run() -> int:
    """The console script's entry: returns the exit code."""
    errors.report_each_failure_once()
    return main.guarded(lambda: dispatch(sys.argv[1:]))


def dispatch(argv: Sequence[str]) -> None:
    """Runs one verb with its arguments."""
    if argv and argv[0] == "train":
        # Its flags are those of the config, which argparse does not know.
        main.main(["topklm train", *argv[1:]])
        return
    arguments = _parser().parse_args(argv)
    arguments.call(arguments)


def _generate(arguments: argparse.Namespace) -> None:
    for flag in ("temperature", "max_new_tokens"):
        value = getattr(arguments, flag)
        if not 0 <= value < math.inf:
            raise errors.UserError(f"--{flag.replace('_', '-')} = {value}: must be 0 or more")
    model = load(arguments.run, step=arguments.step)
    text = model.generate(arguments.prompt, arguments.max_new_tokens, arguments.temperature, arguments.seed)
    if arguments.json:
        print(json.dumps({"run": model.run, "step": model.step, "text": text}))
    else:
        print(text)


class _Parser(argparse.ArgumentParser):
    """One whose complaints are one line, like all of ours."""

    def error(self, message: str) -> NoReturn:
        raise errors.UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("topklm", description="Train TopK language models and read them.")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    verbs.add_parser("train", help=f"train a model; the same as {main.EXAMPLE}", add_help=False)
    generate = verbs.add_parser(
        "generate",
        help="continue a prompt",
        description="Continues a prompt with the newest checkpoint of a run.",
        epilog='example: topklm generate runs/small "The city of" --temperature 0.7',
    )
    generate.add_argument("run", metavar="RUN", help="run folder, e.g. runs/small")
    generate.add_argument("prompt", help="text that begins a document")
    generate.add_argument("--max-new-tokens", type=int, default=50, help="default %(default)s")
    generate.add_argument("--temperature", type=float, default=0.7, help="0 is greedy; default %(default)s")
    generate.add_argument("--seed", type=int, default=0, help="default %(default)s")
    generate.add_argument("--step", type=int, help="which checkpoint; default the newest")
    generate.add_argument("--json", action="store_true", help="print one JSON object")
    generate.set_defaults(call=_generate)
    return parser
