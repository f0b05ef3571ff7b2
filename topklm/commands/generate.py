"""`topklm generate`: continues a prompt with a trained model."""

import argparse

from topklm.commands import shared
from topklm.errors import UserError

DESCRIPTION = "Continues a prompt with the newest checkpoint of a run."
EXAMPLE = 'topklm generate runs/small "The city of" --temperature 0.7'

_OPTIONS = ("topk_k", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "when_full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run")
    add("prompt", "text that begins a document")
    add("--max-new-tokens N", "", 50)
    add("--temperature T", "0 is greedy", 0.7)
    add("--top-k K", "only the K most likely tokens; 0: all", 0)
    add("--top-p P", "only the most likely tokens that make up P", 1.0)
    add("--min-p P", "only tokens P times as likely as the likeliest", 0.0)
    text = "above 1: tokens that the text holds already become less likely"
    add("--repetition-penalty X", text, 1.0)
    add("--stop TEXT", "end before this text; may be given several times", action="append")
    add(
        "--when-full",
        "beyond the context: see its last tokens, run again for each (slide); forget half (halve, "
        "faster); end there, and refuse a longer prompt (stop)",
        "slide",
        choices=("slide", "halve", "stop"),
    )
    add("--topk-k K", "neurons that each TopK keeps; default as in training", int)
    shared.add_steering(parser)
    add("--stream", "print the text while it is made", False)
    shared.flags(parser, "seed", "step", "json")


def run(arguments: argparse.Namespace) -> None:
    shared.check_at_least(arguments, 0, "temperature", "max_new_tokens")
    if arguments.json and arguments.stream:
        raise UserError("--stream with --json: one object is printed at the end; leave one of the two out")
    output = shared.Output(arguments.json)
    model = shared.load_onto_one_device(arguments.run, arguments.step)
    options = {name: getattr(arguments, name) for name in _OPTIONS}
    options["steer"] = shared.interventions(arguments, model)
    shared.warn_of_another_model(arguments, model)
    settings = arguments.max_new_tokens, arguments.temperature, arguments.seed
    with shared.arguments_are_flags(arguments), shared.compiling() as is_done:
        text = model.generate(arguments.prompt, *settings, stream=arguments.stream, **options)
        if arguments.stream:
            print(arguments.prompt, end="")
            for piece in text:
                is_done()
                print(piece, end="", flush=True)
            print()
    if not arguments.stream:
        facts = {"run": model.run, "step": model.step, "text": text}
        output.give(facts, lambda: print(text))
