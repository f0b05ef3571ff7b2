"""The same pages in one file that opens from a disk, without a server.

Pages of neurons stand in the file compressed, and a script shows the one that the address asks for
(#/neurons/1/17); the overview sorts itself. Nothing is loaded from anywhere: the file's own policy allows no
script but ours, and no address.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import hashlib
from pathlib import Path
from typing import Any
import zlib

import jinja2

from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.explorer import pages, views
from topklm.explorer.neuron_data import NeuronData
from topklm.storage.files import write_atomically

EXAMPLE_TOKENS = 64  # of a window; a file with all neurons is to stay one that browsers like
_LEVEL = 6  # of compression

_SCRIPTS = ("tabs.js", "look.js", "keys.js", "export.js")


def export(source: NeuronData, path: Path, neurons: Sequence[tuple[int, int]] | None = None) -> int:
    """Writes the file, whole or not at all, and returns how many neurons have a page; default all of them.

    UserError if there is no such neuron, or the file cannot be written.
    """
    numbers = source.readable.tolist()
    if neurons is not None:
        wanted = {source.number(layer, neuron) for layer, neuron in neurons}
        numbers = [number for number in numbers if number in wanted]
    held = {source.place(number) for number in numbers}
    templates = pages.environment(source)
    templates.globals["link"] = lambda layer, neuron: (
        f"#/neurons/{layer}/{neuron}" if (layer, neuron) in held else None
    )
    labels = source.named()
    files = {name: content.decode() for name, content in pages.static_files().items()}
    script, style = _script(files), files["style.css"]
    text = templates.get_template("export.html").render(
        drawn=pages.layer_plots(source),
        neurons=[views.summary(source, number, labels) for number in numbers],
        pages=list(_pages(source, templates, numbers, labels)),
        script=script,
        style=style,
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:",
    )
    with disk_errors_are_user_errors(f"writing {path}"):
        if not path.parent.is_dir():
            raise UserError(
                f"--export = {path}: there is no folder {path.parent}; make it, or choose another"
            )
        write_atomically(path, text.encode())
    return len(numbers)


def _pages(
    source: NeuronData,
    templates: jinja2.Environment,
    numbers: Sequence[int],
    labels: Mapping[tuple[int, int], str],
) -> Iterator[dict[str, Any]]:
    """Yields pages by layer and neuron; their content is a future."""
    body = templates.get_template("export_neuron.html")
    # zlib lets go of the interpreter, so that the next page is drawn meanwhile.
    with futures.ThreadPoolExecutor(1) as packing:
        for number in source.reading_ahead(sorted(numbers)):
            layer, neuron = source.place(number)
            data = views.neuron(source, layer, neuron, example_tokens=EXAMPLE_TOKENS, labels=labels)
            text = body.render(data=data, own_text=False, example_tokens=EXAMPLE_TOKENS)
            yield {
                "id": f"n-{layer}-{neuron}",
                "title": f"{layer}:{neuron} {data['label']}".strip(),
                "packed": packing.submit(_packed, text),
            }


def _packed(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode(), _LEVEL)).decode()


def _script(files: Mapping[str, str]) -> str:
    """Returns our modules as one script: exports and imports have one name everywhere."""
    lines = "\n".join(files[name] for name in _SCRIPTS).splitlines()
    kept = [line.removeprefix("export ") for line in lines if not line.startswith("import ")]
    return "(() => {\n" + "\n".join(kept) + "\n})();\n"


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
