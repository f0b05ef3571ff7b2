"""`topklm steer`: measures the effect of setting a neuron on the text, and how many neurons have one."""

import argparse
import json

from topklm.commands import shared, steer_dose, steer_survey
from topklm.commands.shared import Output
from topklm.errors import disk_errors_are_user_errors
from topklm.steering.survey import SurveySettings
from topklm.storage.files import local_path, write_atomically

DESCRIPTION = (
    "Continues prompts with one neuron set to one value after another, shows the texts side by side, and "
    "measures them: how often the neuron's concept comes, how fluent the unsteered model finds them, how "
    "varied they are. With --survey: of all living neurons, the share that raises its concept more than "
    "random directions of the same length do."
)
EXAMPLE = "topklm steer runs/small --neuron 2:117 --values 0.5x,1x,2x"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    shared.add_run(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--neuron", metavar="L:N", help="steer neuron N of layer L, e.g. 2:117")
    what.add_argument("--survey", action="store_true", help="steer all living neurons, without writing text")
    parser.add_argument(
        "--values",
        metavar="X,Y,...",
        help="in units of the neuron's activation; 2x: twice its largest activation on the measured text; "
        f"default {steer_dose.DEFAULT_TIMES} if measured, else {steer_dose.DEFAULT_VALUES}. With --survey: "
        "lengths of the added vector, in units of the mean length of what the layer hands on; default "
        f"{','.join(map(str, SurveySettings.strengths))}",
    )
    steer_dose.add_arguments(parser)
    steer_survey.add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; default %(default)s")
    shared.add_step(parser)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print one JSON object, or write it to a file"
    )


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    output = Output(arguments.json == "-")
    if arguments.survey:
        shared.check_goes_with(arguments, "neuron", *steer_dose.FLAGS)
        content, show = steer_survey.run(arguments, output)
    else:
        shared.check_goes_with(arguments, "survey", *steer_survey.FLAGS)
        content, show = steer_dose.run(arguments, output)
    output.give(content, show)
    if arguments.json not in (None, "-"):
        with disk_errors_are_user_errors(f"writing {arguments.json}"):
            write_atomically(
                local_path(arguments.json, "--json"), (json.dumps(content, indent=1) + "\n").encode()
            )
