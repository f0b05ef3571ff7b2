"""Draws pages from the data of `views`: templates, plots, and what they call."""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import functools
import hashlib
import importlib.resources
import math
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
import zlib

import jinja2
from markupsafe import Markup
import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.explorer import markup, plots, traces, views
from topklm.explorer.neuron_data import NeuronData, NeuronRows
from topklm.explorer.traces import FIGURES, FORMATION, TraceData, Traces
from topklm.neurons.labels import MAX_CHARACTERS, MAX_COMMENT
from topklm.neurons.statistics import catalog
from topklm.neurons.statistics.catalog import COMMON
from topklm.storage.files import write_atomically

# Not as the machine has it set: browsers run scripts of this kind only.
_MEDIA_TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_FOR_EVER = "public, max-age=31536000, immutable"
_MOST_POINTS = 2000
_DENSITY_LOW = 1e-5


def templates() -> jinja2.Environment:
    """Opens the templates; whatever text they are given is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("topklm.explorer"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,  # nobody edits templates while this runs
    )


def environment(source: NeuronRows) -> jinja2.Environment:
    """Makes the templates with everything that pages of neurons call."""
    made = templates()
    numbers = source.figures
    kinds = {one.name: one.kind for one in (*numbers.values(), *FIGURES, *FORMATION)}
    made.filters.update(
        figure=lambda value, name: markup.write_as(kinds[name], value),
        r=functools.partial(markup.write_as, "correlation"),
        effect=functools.partial(markup.write_as, "effect"),
        count=functools.partial(markup.write_as, "count"),
        share=functools.partial(markup.write_as, "share"),
        short=functools.partial(markup.write_as, "number"),
        query=urlencode,
        chip=markup.chip,
    )
    made.globals.update(
        measured=source.measured,
        max_label=MAX_CHARACTERS,
        max_comment=MAX_COMMENT,
        common_tokens=COMMON,
        markup=markup,
        figures=list(numbers.values()),
        figure_of=numbers,
        first_columns=[statistic for statistic in numbers.values() if statistic.first],
        definitions=catalog.others(),
        tile_notes=tile_notes,
        part_titles=views.part_titles(),
        activation_histogram=activation_histogram,
        example_tokens=views.EXAMPLE_TOKENS,
        link=neuron_address,
        at_step=None,
        at_steps=(),
        life=None,
        life_hint="",
        life_said=traces.life_said,
        step_address=neuron_address,
        step_title=step_title,
        figure_of_trace={one.name: one for one in (*FIGURES, *FORMATION)},
        steps=None,
        has_trace=lambda: False,
        prompt_address=prompt_address,
    )
    return made


def static_files() -> dict[str, bytes]:
    """Reads the scripts, the stylesheet and the icon of the pages, by name."""
    folder = importlib.resources.files("topklm.explorer").joinpath("static")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Static:
    """Scripts, stylesheet and icon at addresses that change with their content: browsers keep them."""

    route = "/static/{version}/{name}"

    def __init__(self) -> None:
        self._files = static_files()
        parts = (name.encode() + content for name, content in sorted(self._files.items()))
        self._version = hashlib.sha256(b"".join(parts)).hexdigest()[:12]
        self.address = f"/static/{self._version}"

    async def answer(self, request: Request) -> Response:
        """Returns one of them; raises HTTPException for another."""
        name = request.path_params["name"]
        if name not in self._files or request.path_params["version"] != self._version:
            raise HTTPException(404)
        media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
        return Response(self._files[name], media_type=media_type, headers={"cache-control": _FOR_EVER})


def neuron_address(layer: int, neuron: int, step: int | None = None) -> str:
    """Returns the stable link of a neuron, as it was measured or at a step of its trace."""
    return f"/neurons/{layer}/{neuron}" + ("" if step is None else f"?step={step}")


def prompt_address(text: str, by: str = "activation", token: int | None = None) -> str:
    """Returns the link of a prompt's page, of all tokens or one."""
    asked = {"text": text, "by": "" if by == "activation" else by, "token": "" if token is None else token}
    return f"/prompt?{urlencode({k: v for k, v in asked.items() if v != ''}, errors='replace')}"


def tile_notes(data: Mapping[str, Any], figures: Mapping[str, catalog.Figure]) -> dict[str, str]:
    """Returns the words below the number of each tile of a neuron, by the name of the figure."""
    kinds = {name: figure.kind for name, figure in figures.items()}
    others = {"n_tokens": "count", "n_clusters": "count"}
    others |= {"effective_tokens": "number", "effective_clusters": "number"}
    written = {name: markup.write_as(kind, data[name]) for name, kind in others.items()}
    written |= {name: markup.write_as(kind, data["figures"][name]) for name, kind in kinds.items()}
    return {name: figure.note.format_map(written) for name, figure in figures.items() if figure.first}


_AT_STEP = {
    "density": "density {}",
    "token_entropy_corrected": "token entropy {} nats",
    "semantic_entropy_corrected": "semantic entropy {} nats",
    "by_token": "{} explained by the token",
    "r_reference": "r {}",
    "jaccard_reference": "Jaccard {}",
}


def step_title(figures: Mapping[str, Any]) -> str:
    """Returns a neuron at a step in a line, from its figures."""
    kinds = {one.name: one.kind for one in (*catalog.numbers().values(), *FIGURES)}
    said = (words.format(markup.write_as(kinds[name], figures[name])) for name, words in _AT_STEP.items())
    step = f"step {figures['step']:,}: " if "step" in figures else ""
    return step + ", ".join(said)


def activation_histogram(data: Mapping[str, Any]) -> Markup:
    """Draws the histogram of a neuron's page."""
    counts, highest = data["histogram"]["counts"], data["figures"]["max_activation"]
    about = (
        f"Histogram of the activations of neuron {data['neuron']} of layer {data['layer']}, from 0 to "
        f"{markup.write_as('number', highest)}; {sum(counts):,} tokens."
    )
    return plots.histogram(counts, highest, "activation", "tokens (square-root scale)", about)


def layer_plots(source: NeuronRows) -> list[dict[str, Any]]:
    """Returns the overview's plots, layers side by side, each with a title and a sentence."""
    measured, d = source.measured, source.measured.d_model

    def by_layer(name: str) -> dict[str, np.ndarray]:
        values = source.column(name).reshape(-1, d)
        return {str(layer): v[np.isfinite(v)] for layer, v in zip(measured.layers, values, strict=True)}

    living = {layer: values[values > 0] for layer, values in by_layer("density").items()}
    least = min((float(values.min()) for values in living.values() if len(values)), default=_DENSITY_LOW)
    shares = plots.Axis("density, share of tokens", 10 ** math.floor(math.log10(least)), 1, True, _percent)
    found = [
        {
            "title": "Density",
            "about": "How often neurons are active. The line is the median; dead neurons are left out.",
            "plot": plots.violins(living, shares, "Density of the neurons of each layer."),
        }
    ]
    for name, title, about in (
        ("token_entropy_corrected", "Token entropy", "Low: few tokens. High: many."),
        ("semantic_entropy_corrected", "Semantic entropy", "The same after similar tokens are merged."),
    ):
        values = by_layer(name)
        axis = plots.Axis(f"{title.lower()}, nats", 0, _highest(values.values()))
        plot = plots.violins(values, axis, f"{title} of the neurons of each layer, nats.")
        found.append({"title": title, "about": about, "plot": plot})
    dead = {layer: int((values == 0).sum()) for layer, values in by_layer("n_active").items()}
    if not any(dead.values()):
        return found
    said = f"Never active on these {measured.n_tokens:,} tokens, of {d:,} in each layer."
    plot = plots.bars(dead, max(d // 10, *dead.values()), "dead neurons", said)
    found.append({"title": "Dead neurons", "about": said, "plot": plot})
    return found


def entropy_map(source: NeuronRows, link: markup.Link) -> dict[str, Any]:
    """Draws every neuron by its two entropies, of very many as many as show; with the layers' colours."""
    names = "token_entropy_corrected", "semantic_entropy_corrected"
    across, up = map(source.column, names)
    there = np.flatnonzero(np.isfinite(across) & np.isfinite(up))
    there = there[:: max(1, -(-len(there) // _MOST_POINTS))]
    layers = source.measured.layers
    depths = {layer: plots.depth(place, len(layers)) for place, layer in enumerate(layers)}
    points = []
    for number in there.tolist():
        layer, neuron = source.place(number)
        title, address = f"layer {layer}, neuron {neuron}", link(layer, neuron) or ""
        points.append(plots.Point(float(across[number]), float(up[number]), title, address, depths[layer]))
    x = plots.Axis("token entropy, nats", 0, _highest([across[there]]))
    y = plots.Axis("semantic entropy, nats", 0, _highest([up[there]]))
    about = f"{len(points):,} neurons by token entropy and semantic entropy."
    return {"plot": plots.scatter(points, x, y, about, names), "depths": depths}


def _highest(values: Iterable[np.ndarray]) -> float:
    return max((float(v.max()) for v in values if len(v)), default=1.0) * 1.05 or 1.0


def _percent(share: float) -> str:
    return f"{100 * share:g}\N{NO-BREAK SPACE}%"


EXAMPLE_TOKENS = 64  # of a window; a file with all neurons is to stay one that browsers like
_LEVEL = 6  # of compression

_SCRIPTS = ("tabs.js", "look.js", "keys.js", "export.js")


def export(source: NeuronData, path: Path, neurons: Sequence[tuple[int, int]] | None = None) -> int:
    """Writes the same pages as one file that opens from a disk; returns how many neurons have one.

    They stand in it compressed, and a script shows the one that the address asks for (#/neurons/1/17, or
    #/neurons/1/17/64 at a step of the trace, if there is one).
    Nothing is loaded from anywhere: the file's own policy allows no script but ours, and no address.
    UserError if there is no such neuron, or the file, which is there whole or not at all, cannot be written.
    """
    numbers = source.readable.tolist()
    if neurons is not None:
        wanted = {source.number(layer, neuron) for layer, neuron in neurons}
        numbers = [number for number in numbers if number in wanted]
    held = {source.place(number) for number in numbers}
    templates = environment(source)
    templates.globals["link"] = lambda layer, neuron: (
        f"#/neurons/{layer}/{neuron}" if (layer, neuron) in held else None
    )
    templates.globals["step_address"] = lambda layer, neuron, step: f"#/neurons/{layer}/{neuron}/{step}"
    trace, labels = Traces(source.folder.run, source).own(), source.named()
    files = {name: content.decode() for name, content in static_files().items()}
    script, style = _script(files), files["style.css"]
    text = templates.get_template("export.html").render(
        drawn=layer_plots(source),
        neurons=[_with_onsets(views.summary(source, number, labels), trace) for number in numbers],
        formed=[figure for figure in FORMATION if figure.first] if trace else [],
        traced=list(_of_trace(trace, templates)) if trace else [],
        pages=list(_pages(source, trace, templates, numbers, labels)),
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


def _with_onsets(item: dict[str, Any], trace: TraceData | None) -> dict[str, Any]:
    """Adds the figures of formation of a neuron, None where it is not traced."""
    number = None if trace is None else trace.number(item["layer"], item["neuron"])
    formed = {} if trace is None or number is None else trace.formed(number)
    item["figures"] |= {figure.name: formed.get(figure.name) for figure in FORMATION}
    return item


def _of_trace(trace: TraceData, templates: jinja2.Environment) -> Iterator[dict[str, Any]]:
    """Yields the pages of a trace, as `_pages`."""
    drawn = traces.drawn_formation(trace, [], None)
    shown = {
        "formation": {"data": traces.formation(trace), "drawn": drawn},
        "layers": {"data": traces.layers(trace), "drawn": traces.drawn_layers(trace)},
    }
    for name, content in shown.items():
        text = templates.get_template("export_trace.html").render(page=name, **content)
        yield {"id": f"p-{name}", "title": name.capitalize(), "packed": _packed(text)}


def _pages(
    source: NeuronData,
    trace: TraceData | None,
    templates: jinja2.Environment,
    numbers: Sequence[int],
    labels: Mapping[tuple[int, int], str],
) -> Iterator[dict[str, Any]]:
    """Yields pages by layer and neuron; their content is a future."""
    body = templates.get_template("export_neuron.html")
    steps = [trace.at(step) for step in trace.steps] if trace else []
    # zlib lets go of the interpreter, so that the next page is drawn meanwhile.
    with futures.ThreadPoolExecutor(1) as packing:
        for number in source.reading_ahead(sorted(numbers)):
            layer, neuron = source.place(number)
            data = views.neuron(source, layer, neuron, example_tokens=EXAMPLE_TOKENS, labels=labels)
            life = trace and traces.life(trace, layer, neuron)
            at_steps = [traces.at_step(step, layer, neuron, labels) for step in steps] if life else []
            text = body.render(
                data=data, own_text=False, example_tokens=EXAMPLE_TOKENS, life=life, at_steps=at_steps
            )
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
