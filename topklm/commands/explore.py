"""`topklm explore`: pages on which a person sees what the neurons of a run stand for."""

import argparse
import importlib.util
import re
import webbrowser

import rich.console

from topklm.errors import UserError
from topklm.progress import TerminalProgress
from topklm.storage.files import is_bucket, local_path

DESCRIPTION = (
    "Serves pages on which the neurons of a run can be seen, searched and labelled; harvests and measures "
    "first what is missing. With --export, writes them as one file instead."
)
EXAMPLE = "topklm explore runs/small"

PORT = 8765
FORMATS = ("html", "neuronpedia")
_NEEDED = ("jinja2", "pyarrow", "starlette", "uvicorn", "regex")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("run", metavar="RUN", help="run folder, e.g. runs/small")
    parser.add_argument(
        "--port", type=int, default=PORT, metavar="N", help="0: any that is free; default %(default)s"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen; on others than the default a token is demanded",
    )
    parser.add_argument("--step", type=int, help="which checkpoint; default the newest")
    parser.add_argument("--export", metavar="PATH", help="write the pages as one HTML file, and end")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="html",
        help="--export: one page, or a folder of Neuronpedia's bulk import; default %(default)s",
    )
    parser.add_argument(
        "--model-id", metavar="NAME", help="--format neuronpedia: what it calls the model; default the run's"
    )
    parser.add_argument(
        "--neurons", metavar="L:N,...", help="--export: pages of these, e.g. 0:17,2:5; default all"
    )
    parser.add_argument(
        "--open",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="open the pages in a browser; default not",
    )


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    for flag in ("neurons", "model_id"):
        value = getattr(arguments, flag)
        if value is not None and arguments.export is None:
            raise UserError(f"--{flag.replace('_', '-')} = {value}: goes with --export only; leave it out")
    neurons = _neurons(arguments.neurons)
    out = None if arguments.export is None else local_path(arguments.export, "--export")
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"explore needs {', '.join(missing)}: run pip install 'topklm[explore]'")
    if is_bucket(arguments.run):
        raise UserError(f"RUN = {arguments.run}: pages are made from a folder on a disk; copy the run to one")
    # What follows needs packages of the extra, which may not be there for those above.
    from topklm.commands.neurons import ensure_measured  # noqa: PLC0415
    from topklm.explorer import app, export, neuronpedia  # noqa: PLC0415
    from topklm.explorer.neuron_data import NeuronData  # noqa: PLC0415
    from topklm.web.server import listen  # noqa: PLC0415

    if out is None:
        listen(arguments.host, arguments.port).close()  # a taken port shows before work is done
    console = rich.console.Console()
    folder = ensure_measured(arguments.run, arguments.step, console)
    source = NeuronData(folder)
    if out is not None and arguments.format == "neuronpedia":
        model_id = arguments.model_id or re.sub(r"[^a-z0-9_-]", "-", folder.run.resolve().name.lower())
        progress = TerminalProgress(console)
        neuronpedia.export(
            folder, source.tokenizer, out, model_id=model_id, neurons=neurons, progress=progress
        )
        print(f"{out}: Neuronpedia's bulk import of {model_id}")
        return
    if out is not None:
        n = export.export(source, out, neurons)
        size = out.stat().st_size / 2**20
        print(f"{out}: {n:,} neurons, {size:.1f} MiB")
        return

    def ready(address: str) -> None:
        print(f"{arguments.run}: open {address}   (Ctrl-C ends it)", flush=True)
        if arguments.open:
            webbrowser.open(address)

    app.serve(source, arguments.host, arguments.port, ready)


def _neurons(text: str | None) -> list[tuple[int, int]] | None:
    """None for all."""
    if text is None or text == "all":
        return None
    found = [re.fullmatch(r"(\d{1,9}):(\d{1,9})", part.strip()) for part in text.split(",")]
    if not all(found):
        raise UserError(
            f"--neurons = {text}: must be all, or LAYER:NEURON with commas between, e.g. 0:17,2:5"
        )
    return [(int(place[1]), int(place[2])) for place in found if place]
