"""Draws pages from the data of `topklm.explorer.views`: templates, plots, and what they call."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import importlib.resources
import math
from typing import Any
from urllib.parse import urlencode

import jinja2
from markupsafe import Markup
import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from topklm.explorer import formatting, plots
from topklm.explorer.index import READABLE
from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.views import neuron as neuron_view
from topklm.explorer.views.markup import (
    by_part,
    chip,
    chips,
    effects,
    examples,
    level,
    pieces,
    shaded,
    share_bar,
    shares,
    similar,
    written,
)
from topklm.explorer.views.overview import Asked
from topklm.neurons.statistics import catalog
from topklm.neurons.statistics.catalog import Statistic

_MOST_POINTS = 2000
_DENSITY_LOW = 1e-5


def environment() -> jinja2.Environment:
    """Templates with everything that they call; whatever text they are given is escaped."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("topklm.explorer"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,  # nobody edits templates while this runs
    )
    numbers = catalog.numbers()
    made.filters.update(
        figure=lambda value, name: formatting.write_as(numbers[name].kind, value),
        count=lambda value: formatting.write_as("count", value),
        share=lambda value: formatting.write_as("share", value),
        effect=lambda value: formatting.write_as("effect", value),
        short=lambda value: formatting.write_as("number", value),
        query=urlencode,
        chip=chip,
    )
    made.globals.update(
        figures=list(numbers.values()),
        figure_of=numbers,
        definitions=catalog.others(),
        tile_note=tile_note,
        part_titles=neuron_view.part_titles(),
        pieces=pieces,
        shaded=shaded,
        level=level,
        chips=chips,
        by_part=by_part,
        examples=examples,
        shares=shares,
        effects=effects,
        similar=similar,
        written=written,
        activation_histogram=activation_histogram,
        share_bar=share_bar,
        first_columns=[statistic for statistic in numbers.values() if statistic.first],
        example_tokens=neuron_view.EXAMPLE_TOKENS,
        link=neuron_address,
        labels_of=lambda labels: {(item["layer"], item["neuron"]): item["label"] for item in labels},
    )
    return made


def neuron_address(layer: int, neuron: int) -> str:
    """Returns the stable link of a neuron."""
    return f"/neurons/{layer}/{neuron}"


@dataclasses.dataclass(frozen=True)
class Sorting:
    """The heads of the overview's table: its order, and links that sort it otherwise."""

    asked: Asked

    @property
    def sort(self) -> str:
        """The figure, or "readable"."""
        return self.asked.sort

    @property
    def falling(self) -> bool:
        """The largest first."""
        return self.asked.falling

    @property
    def columns(self) -> list[Statistic]:
        """Those shown: the first ones and what is sorted or filtered by, or all."""
        named = {self.asked.sort, *self.asked.ranges}
        known = catalog.numbers().values()
        return [s for s in known if self.asked.all_columns or s.first or s.name in named]

    @property
    def without_sort(self) -> str:
        """The query of the same neurons in the order that nobody has to ask for."""
        return self._query(sort=READABLE, falling=False)

    def link(self, name: str) -> str:
        """Sorts by a figure; by the same one again, the other way round."""
        falling = not self.falling if name == self.sort else False
        return f"/?{self._query(sort=name, falling=falling)}"

    def page_link(self, page: int) -> str:
        """Returns a link to another page of the same table."""
        return f"/?{urlencode(dataclasses.replace(self.asked, page=page).query())}"

    def _query(self, **changes: Any) -> str:
        return urlencode(dataclasses.replace(self.asked, page=1, **changes).query())


def tile_note(statistic: Statistic, data: Mapping[str, Any]) -> str:
    """Returns the words below the number of a statistic's tile.

    Args:
        statistic: With a number.
        data: As the view of a neuron has them.
    """
    return statistic.note.format_map(_Written(data))


class _Written(dict[str, str]):
    """Numbers of a neuron as its tiles write them; made when a note asks for them.

    Args:
        data: As the view of a neuron has them.
    """

    def __init__(self, data: Mapping[str, Any]):
        super().__init__()
        self._data = data

    def __missing__(self, name: str) -> str:
        if name in self._data["figures"]:
            return formatting.written(name, self._data["figures"][name])
        return formatting.write_as("count" if name.startswith("n_") else "number", self._data[name])


def activation_histogram(data: Mapping[str, Any]) -> Markup:
    """Draws the histogram of a neuron's page."""
    counts, highest = data["histogram"]["counts"], data["figures"]["max_activation"]
    about = (
        f"Histogram of the activations of neuron {data['neuron']} of layer {data['layer']}, from 0 to "
        f"{formatting.short(highest)}; {formatting.write_as('count', sum(counts))} tokens."
    )
    return plots.histogram(counts, highest, "activation", "tokens (square-root scale)", about)


def layer_plots(source: NeuronData) -> list[dict[str, Any]]:
    """Returns the overview's plots, layers side by side, each with a title and a sentence."""
    measured, d = source.measured, source.measured.d_model
    parts = [(str(layer), slice(place * d, (place + 1) * d)) for place, layer in enumerate(measured.layers)]

    def groups(name: str) -> list[plots.Group]:
        values = source.column(name)
        found = [(layer, values[part]) for layer, part in parts]
        return [plots.Group(layer, v[np.isfinite(v)]) for layer, v in found]

    density = groups("density")
    living = [plots.Group(group.name, group.values[group.values > 0]) for group in density]
    least = min((float(group.values.min()) for group in living if len(group.values)), default=_DENSITY_LOW)
    shares = plots.Axis("density, share of tokens", 10 ** math.floor(math.log10(least)), 1, True, _percent)
    found = [
        {
            "title": "Density",
            "about": "How often neurons are active. The line is the median; dead neurons are left out.",
            "plot": plots.violins(living, shares, "layer", "Density of the neurons of each layer."),
        }
    ]
    for name, title, about in (
        ("token_entropy_corrected", "Token entropy", "Low: few tokens. High: many."),
        ("semantic_entropy_corrected", "Semantic entropy", "The same after similar tokens are merged."),
    ):
        values = groups(name)
        axis = plots.Axis(f"{title.lower()}, nats", 0, _highest([group.values for group in values]))
        plot = plots.violins(values, axis, "layer", f"{title} of the neurons of each layer, nats.")
        found.append({"title": title, "about": about, "plot": plot})
    dead = [(layer, int((source.column("n_active")[part] == 0).sum())) for layer, part in parts]
    said = f"Never active on these {measured.n_tokens:,} tokens, of {d:,} in each layer."
    plot = plots.bars(dead, max(d // 10, *(n for _, n in dead)), "layer", "dead neurons", said)
    found.append({"title": "Dead neurons", "about": said, "plot": plot})
    return found


def entropy_map(source: NeuronData) -> Markup:
    """Returns every neuron by its two entropies; of very many, as many as can be told apart."""
    across, up = source.column("token_entropy_corrected"), source.column("semantic_entropy_corrected")
    there = np.flatnonzero(np.isfinite(across) & np.isfinite(up))
    there = there[:: max(1, -(-len(there) // _MOST_POINTS))]
    points = []
    for number in there.tolist():
        layer, neuron = source.place(number)
        title = f"layer {layer}, neuron {neuron}"
        points.append((float(across[number]), float(up[number]), title, neuron_address(layer, neuron)))
    x = plots.Axis("token entropy, nats", 0, _highest([across[there]]))
    y = plots.Axis("semantic entropy, nats", 0, _highest([up[there]]))
    about = f"{len(points):,} neurons by token entropy and semantic entropy."
    return plots.scatter(points, x, y, about, (860, 300))


def _highest(values: Sequence[np.ndarray]) -> float:
    return max((float(v.max()) for v in values if len(v)), default=1.0) * 1.05 or 1.0


def _percent(share: float) -> str:
    return f"{100 * share:g}\N{NO-BREAK SPACE}%"


# Not as the machine has it set: browsers run scripts of this kind only.
_KINDS = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_FOR_EVER = "public, max-age=31536000, immutable"


class StaticFiles:
    """Answers requests for the package's static files, and for no others."""

    def __init__(self) -> None:
        folder = importlib.resources.files("topklm.explorer").joinpath("static")
        self._files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(name.encode() + content)
        self.version = digest.hexdigest()[:12]

    async def answer(self, request: Request) -> Response:
        """Returns the file that is named."""
        name = request.path_params["name"]
        if name not in self._files or request.path_params["version"] != self.version:
            raise HTTPException(404)
        kind = _KINDS[name.rpartition(".")[2]]
        return Response(self._files[name], media_type=kind, headers={"cache-control": _FOR_EVER})
