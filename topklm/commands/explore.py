"""`topklm explore`: pages on which a person sees what the neurons of a run stand for."""

import argparse
from collections.abc import Callable
import re
import webbrowser

from topklm.commands import shared
from topklm.commands.shared import Output
from topklm.neurons import NeuronsFolder
from topklm.progress import Progress
from topklm.storage.files import local_path

DESCRIPTION = (
    "Serves pages on which the neurons of a run can be seen, searched and labelled; what has not been "
    "harvested and measured is, meanwhile. With --export, writes them as one file instead."
)
EXAMPLE = "topklm explore runs/small"

PORT = 8765
FORMATS = ("html", "neuronpedia")
_NEEDED = ("jinja2", "pyarrow", "starlette", "uvicorn", "regex")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run", "step")
    add("--port N", "0: any that is free", PORT)
    text = "where to listen; on others than the default a token is demanded"
    add("--host ADDRESS", text, "127.0.0.1")
    add("--export PATH", "write the pages as one HTML file, and end")
    text = "--export: one page, or a folder of Neuronpedia's bulk import"
    add("--format", text, "html", choices=FORMATS)
    text = "--format neuronpedia: what it calls the model; default the run's"
    add("--model-id NAME", text)
    shared.flags(parser, "neurons")
    text = "open the pages in a browser; default not"
    add("--open", text, action=argparse.BooleanOptionalAction, default=False)


def run(arguments: argparse.Namespace) -> None:
    for name in ("neurons", "model_id"):
        if getattr(arguments, name) is not None and arguments.export is None:
            raise shared.wrong(arguments, name, "goes with --export only; leave it out")
    neurons = shared.neurons(arguments.neurons)
    out = None if arguments.export is None else local_path(arguments.export, "--export")
    shared.check_installed("explore", _NEEDED)
    shared.check_on_disk(arguments.run, "pages are made from a folder on a disk; copy the run to one")
    if out is None:
        _serve(arguments)
        return
    # These need packages of the extra.
    from topklm.commands.neurons import ensure_measured  # noqa: PLC0415
    from topklm.explorer import neuronpedia, pages  # noqa: PLC0415
    from topklm.explorer.neuron_data import NeuronData  # noqa: PLC0415

    progress = Output().progress
    folder = ensure_measured(*shared.load(arguments), progress)
    source = NeuronData(folder)
    if arguments.format == "neuronpedia":
        model_id = arguments.model_id or re.sub(r"[^a-z0-9_-]", "-", folder.run.resolve().name.lower())
        neuronpedia.export(source, out, model_id=model_id, neurons=neurons, progress=progress)
        print(f"{out}: Neuronpedia's bulk import of {model_id}")
    else:
        n = pages.export(source, out, neurons)
        print(f"{out}: {n:,} neurons, {out.stat().st_size / 2**20:.1f} MiB")


def _serve(arguments: argparse.Namespace) -> None:
    """Serves at once, and makes meanwhile the figures that are missing."""
    from topklm.web import listen  # noqa: PLC0415 - see `run`

    with listen(arguments.host, arguments.port) as listening:  # a taken port shows before work is done
        from topklm.commands import neurons as neurons_verb  # noqa: PLC0415
        from topklm.explorer import app  # noqa: PLC0415
        from topklm.explorer.app import Preparing  # noqa: PLC0415
        from topklm.explorer.neuron_data import NeuronData  # noqa: PLC0415
        from topklm.inference.load import checkpoint_step  # noqa: PLC0415
        from topklm.runtime import compilation_cache  # noqa: PLC0415

        step = checkpoint_step(arguments.run, arguments.step)
        folder = NeuronsFolder(local_path(arguments.run, "RUN"), step)
        compilation_cache.enable()

        def opened(address: str, more: str = "") -> None:
            print(f"{arguments.run}: open {address}   ({more}Ctrl-C ends it)", flush=True)
            if arguments.open:
                webbrowser.open(address)

        if neurons_verb.is_measured(folder):
            made = app.create(NeuronData(folder))
            app.serve(made, made.state.closing, listening, arguments.host, lambda at, end: opened(at))
            return

        def work(progress: Progress, ready: Callable[[NeuronsFolder], None]) -> NeuronsFolder:
            model, layout = shared.load(arguments)
            return neurons_verb.ensure_measured(model, layout, progress, ready)

        arguments.step = step
        preparing = Preparing(folder.run.resolve().name, work, Output().progress)

        def begin(address: str, end: Callable[[], None]) -> None:
            opened(address, "it says how far the work is; ")
            preparing.start(end)

        app.serve(preparing, preparing.close, listening, arguments.host, begin)
        preparing.finish(print)
