"""The run as a whole: its layers side by side, and its neurons as a table that is sorted and filtered."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from topklm.errors import UserError
from topklm.explorer.index import READABLE, Index, Wanted
from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.views.neuron import summary
from topklm.neurons.statistics import catalog

PAGE = 50  # neurons of the table at once


@dataclasses.dataclass(frozen=True)
class Asked:
    """The parameters of a link to the table; `query` is the way back.

    Attributes:
        sort: A figure, or `READABLE`.
        falling: The largest first.
        layers: Only these; all if empty.
        ranges: Least and largest value of figures.
        labelled: Only neurons with a label.
        all_columns: Every statistic.
        page: From 1.
    """

    sort: str = READABLE
    falling: bool = False
    layers: tuple[int, ...] = ()
    ranges: Mapping[str, tuple[float | None, float | None]] = dataclasses.field(default_factory=dict)
    labelled: bool = False
    all_columns: bool = False
    page: int = 1

    @classmethod
    def of(cls, parameters: Mapping[str, str], layers: tuple[int, ...]) -> "Asked":
        """Returns from the parameters of a link.

        Args:
            parameters: By name: sort, order, layer ("0" or "0,2"), labelled, columns, page, and NAME.min and
                NAME.max of each figure.
            layers: All that there are.

        Raises:
            UserError: For values that make no sense.
        """
        sort = parameters.get("sort") or READABLE
        known = catalog.numbers()
        if sort != READABLE and sort not in known:
            raise UserError(f"sort = {sort}: must be {READABLE} or one of {', '.join(known)}")
        ranges = {}
        for name in known:
            bounds = tuple(_number(parameters, f"{name}.{end}") for end in ("min", "max"))
            if bounds != (None, None):
                ranges[name] = (bounds[0], bounds[1])
        return cls(
            sort,
            parameters.get("order") == "falling",
            _layers(parameters.get("layer", ""), layers),
            ranges,
            parameters.get("labelled") == "1",
            parameters.get("columns") == "all",
            _page(parameters.get("page") or "1"),
        )

    def query(self) -> dict[str, str]:
        """Returns the parameters of a link that asks for this; defaults are left out."""
        said = {
            "sort": self.sort if self.sort != READABLE else "",
            "order": "falling" if self.falling else "",
            "layer": ",".join(map(str, self.layers)),
            "labelled": "1" if self.labelled else "",
            "columns": "all" if self.all_columns else "",
            "page": str(self.page) if self.page > 1 else "",
        }
        for name, bounds in self.ranges.items():
            for end, bound in zip(("min", "max"), bounds, strict=True):
                said[f"{name}.{end}"] = "" if bound is None else f"{bound:g}"
        return {name: value for name, value in said.items() if value}


def overview(source: NeuronData, index: Index, asked: Asked) -> dict[str, Any]:
    """Returns all that the overview shows.

    Raises:
        UserError: For a page that is not there.
    """
    measured = source.measured
    return {
        "run": measured.run,
        "step": measured.step,
        "kind": measured.kind,
        "dictionary": measured.dictionary,
        "d_model": measured.d_model,
        "topk_k": measured.topk_k,
        "source": measured.source,
        "n_tokens": measured.n_tokens,
        "n_documents": measured.n_documents,
        "embedding": measured.embedding,
        "n_clusters": measured.n_clusters,
        "layers": layers(source),
        "table": table(source, index, asked),
    }


def layers(source: NeuronData) -> list[dict[str, Any]]:
    """Returns each layer: how many neurons are dead, and the middle of the others' figures."""
    d, found = source.measured.d_model, []
    for place, layer in enumerate(source.measured.layers):
        part = slice(place * d, (place + 1) * d)
        alive = source.column("n_active")[part] > 0
        medians = {}
        for name in ("density", "token_entropy_corrected", "semantic_entropy_corrected"):
            values = source.column(name)[part][alive]
            values = values[np.isfinite(values)]
            medians[name] = float(np.median(values)) if len(values) else None
        found.append({"layer": layer, "n_neurons": d, "n_dead": int(d - alive.sum()), "median": medians})
    return found


def table(source: NeuronData, index: Index, asked: Asked) -> dict[str, Any]:
    """Returns a page of neurons.

    Raises:
        UserError: For a page that is not there.
    """
    labels = source.named()
    numbers = [source.number(*place) for place in labels] if asked.labelled else None
    wanted = Wanted(asked.sort, asked.falling, asked.layers, asked.ranges, numbers)
    count, found = index.neurons(wanted, (asked.page - 1) * PAGE, PAGE)
    n_pages = max(1, math.ceil(count / PAGE))
    if asked.page > n_pages:
        raise UserError(f"page {asked.page}: must be from 1 to {n_pages}")
    return {
        "count": count,
        "page": asked.page,
        "n_pages": n_pages,
        "neurons": [summary(source, number, labels) for number in found],
    }


def random_neuron(source: NeuronData, seed: int | None = None) -> tuple[int, int]:
    """Returns layer and number of any neuron that is not dead; of any at all where all are."""
    alive = np.flatnonzero(source.column("n_active") > 0)
    pick = np.random.default_rng(seed)
    return source.place(int(pick.choice(alive) if len(alive) else pick.integers(source.n_neurons)))


def _number(parameters: Mapping[str, str], name: str) -> float | None:
    text = parameters.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError as e:
        raise UserError(f"{name} = {text}: must be a number") from e
    if not math.isfinite(value):
        raise UserError(f"{name} = {text}: must be a number")
    return value


def _layers(text: str, there_are: tuple[int, ...]) -> tuple[int, ...]:
    found = []
    for part in filter(None, text.split(",")):
        if not (part.isascii() and part.isdigit() and len(part) < 10 and int(part) in there_are):
            raise UserError(f"layer = {part}: must be one of {', '.join(map(str, there_are))}")
        found.append(int(part))
    return tuple(dict.fromkeys(found))


def _page(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and 1 <= int(text) <= 10**9):
        raise UserError(f"page = {text}: must be a number from 1")
    return int(text)
