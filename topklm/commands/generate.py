"""`topklm generate`: continues a prompt with a trained model."""

import argparse
import json
import math

import topklm
from topklm.errors import UserError

DESCRIPTION = "Continues a prompt with the newest checkpoint of a run."
EXAMPLE = 'topklm generate runs/small "The city of" --temperature 0.7'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("run", metavar="RUN", help="run folder, e.g. runs/small")
    parser.add_argument("prompt", help="text that begins a document")
    parser.add_argument("--max-new-tokens", type=int, default=50, help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--step", type=int, help="which checkpoint; default the newest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    for flag in ("temperature", "max_new_tokens"):
        value = getattr(arguments, flag)
        if not 0 <= value < math.inf:
            raise UserError(f"--{flag.replace('_', '-')} = {value}: must be 0 or more")
    model = topklm.load(arguments.run, step=arguments.step)
    text = model.generate(arguments.prompt, arguments.max_new_tokens, arguments.temperature, arguments.seed)
    if arguments.json:
        print(json.dumps({"run": model.run, "step": model.step, "text": text}))
    else:
        print(text)
