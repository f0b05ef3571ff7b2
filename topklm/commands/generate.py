"""`topklm generate`: continues a prompt with a trained model."""

import argparse
import json

import topklm
from topklm.commands import shared, steer_args
from topklm.errors import UserError

DESCRIPTION = "Continues a prompt with the newest checkpoint of a run."
EXAMPLE = 'topklm generate runs/small "The city of" --temperature 0.7'

_OPTIONS = ("topk_k", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "when_full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    shared.add_run(parser)
    parser.add_argument("prompt", help="text that begins a document")
    parser.add_argument("--max-new-tokens", type=int, default=50, help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy; default %(default)s")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="only the K most likely tokens; 0: all"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="only the most likely tokens that make up P"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="only tokens P times as likely as the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens that the text holds already become less likely",
    )
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument(
        "--when-full",
        choices=("slide", "halve", "stop"),
        default="slide",
        help="beyond the context: see its last tokens, run anew for each (slide); forget half (halve, "
        "faster); end there, and refuse a longer prompt (stop); default %(default)s",
    )
    parser.add_argument(
        "--topk-k", type=int, metavar="K", help="neurons that each TopK keeps; default as in training"
    )
    steer_args.add_arguments(parser)
    parser.add_argument("--stream", action="store_true", help="print the text while it is made")
    shared.add_step(parser)
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    shared.check_at_least(arguments, 0, "temperature", "max_new_tokens")
    if arguments.json and arguments.stream:
        raise UserError("--stream with --json: one object is printed at the end; leave one of the two out")
    model = topklm.load(arguments.run, step=arguments.step)
    options = {name: getattr(arguments, name) for name in _OPTIONS}
    options["steer"] = steer_args.interventions(arguments, model.config.model)
    steer_args.warn_of_another_model(arguments, model)
    settings = arguments.max_new_tokens, arguments.temperature, arguments.seed
    with shared.arguments_are_flags(arguments):
        text = model.generate(arguments.prompt, *settings, stream=arguments.stream, **options)
    if arguments.stream:
        print(arguments.prompt, end="", flush=True)
        for piece in text:
            print(piece, end="", flush=True)
        print()
    elif arguments.json:
        print(json.dumps({"run": model.run, "step": model.step, "text": text}))
    else:
        print(text)
