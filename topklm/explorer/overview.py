"""The run as a whole: its layers side by side, and its neurons as a table that is sorted and filtered."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any
from urllib.parse import urlencode

import numpy as np

from topklm.errors import UserError
from topklm.explorer.neuron_data import NeuronRows
from topklm.explorer.views import LabelOf, summary
from topklm.neurons.statistics import catalog
from topklm.web.http import whole_number

PAGE = 50  # neurons of the table at once
READABLE = "readable"  # the default order


@dataclasses.dataclass(frozen=True)
class Asked:
    """The parameters of a link to the table; `query` is the way back."""

    sort: str = READABLE  # or a figure
    falling: bool = False  # the largest first; neurons without the figure come last both ways
    layers: tuple[int, ...] = ()  # only these; all if empty
    # The least and the largest value of figures, either of which may be None.
    ranges: Mapping[str, tuple[float | None, float | None]] = dataclasses.field(default_factory=dict)
    labelled: bool = False  # only neurons with a label
    all_columns: bool = False
    page: int = 1
    step: int | None = None  # of a trace
    trace: str = ""  # its name, where it is not that of these neurons
    known: Mapping[str, catalog.Figure] = dataclasses.field(default_factory=catalog.numbers)  # all figures
    path: str = "/"  # of the page
    default: str = READABLE  # the order without a wish

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, str],
        layers: tuple[int, ...],
        known: Mapping[str, catalog.Figure] | None = None,
        path: str = "/",
        default: str = READABLE,
    ) -> "Asked":
        """Reads the parameters of a link: sort, order, layer ("0" or "0,2"), labelled, columns, page, step.

        NAME.min and NAME.max are bounds of figures; `layers` are all that there are, and so are figures
        `known`. UserError for other values.
        """
        sort, page = parameters.get("sort") or default, whole_number(parameters.get("page") or "1")
        known = catalog.numbers() if known is None else known
        if sort != READABLE and sort not in known:
            raise UserError(f"sort = {sort}: must be {READABLE} or one of {', '.join(known)}")
        if not page:
            raise UserError(f"page = {parameters['page']}: must be a number from 1")
        chosen = dict[int, None]()  # each once
        for part in filter(None, parameters.get("layer", "").split(",")):
            if (layer := whole_number(part)) not in layers:
                raise UserError(f"layer = {part}: must be one of {', '.join(map(str, layers))}")
            chosen[layer] = None
        bounds = {
            name: (_bound(parameters, f"{name}.min"), _bound(parameters, f"{name}.max")) for name in known
        }
        return cls(
            sort,
            parameters.get("order") == "falling",
            tuple(chosen),
            {name: ends for name, ends in bounds.items() if ends != (None, None)},
            parameters.get("labelled") == "1",
            parameters.get("columns") == "all",
            page,
            whole_number(parameters.get("step", "")),
            parameters.get("trace", ""),
            known,
            path,
            default,
        )

    def query(self) -> dict[str, str]:
        """Returns the parameters of a link that asks for this; defaults are left out."""
        said = {
            "step": "" if self.step is None else str(self.step),
            "trace": self.trace,
            "sort": self.sort if self.sort != self.default else "",
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

    def address(self, **changes: Any) -> str:
        """Returns a link that asks for this with some changes; the first page, unless `page` is changed."""
        return f"{self.path}?{urlencode(dataclasses.replace(self, **{'page': 1, **changes}).query())}"

    @property
    def columns(self) -> list[catalog.Figure]:
        """Columns of the table: the first ones and those that it is sorted or filtered by, or all."""
        named = {self.sort, *self.ranges}
        return [one for one in self.known.values() if self.all_columns or one.first or one.name in named]


def overview(source: NeuronRows, asked: Asked) -> dict[str, Any]:
    """Returns all that the overview shows; raises UserError as `table`."""
    names = "run step kind dictionary d_model topk_k source n_tokens n_documents embedding n_clusters"
    return {
        **{name: getattr(source.measured, name) for name in names.split()},
        "layers": layers(source),
        "table": table(source, asked),
    }


def layers(source: NeuronRows) -> list[dict[str, Any]]:
    """Returns each layer: how many neurons are dead, and the middle of the others' figures."""
    d = source.measured.d_model
    names = "density", "token_entropy_corrected", "semantic_entropy_corrected"
    alive = source.column("n_active").reshape(-1, d) > 0
    columns = {name: source.column(name).reshape(-1, d) for name in names}
    found = []
    for place, layer in enumerate(source.measured.layers):
        medians = {}
        for name, column in columns.items():
            values = column[place][alive[place] & np.isfinite(column[place])]
            medians[name] = float(np.median(values)) if len(values) else None
        n_dead = int(d - alive[place].sum())
        found.append({"layer": layer, "n_neurons": d, "n_dead": n_dead, "median": medians})
    return found


def select(source: NeuronRows, asked: Asked, labels: LabelOf) -> np.ndarray:
    """Returns the numbers of all neurons asked for, int64[n], in order; equal ones as `readable_first`."""
    measured, order = source.measured, source.readable
    if asked.sort != READABLE:
        values = source.column(asked.sort)[order]
        order = order[np.lexsort((-values if asked.falling else values, np.isnan(values)))]  # stable
    elif asked.falling:
        order = order[::-1]
    kept = np.ones(source.n_neurons, bool)
    if asked.layers:
        kept &= np.repeat(np.isin(measured.layers, asked.layers), measured.d_model)
    if asked.labelled:
        kept &= np.isin(np.arange(len(kept)), [source.number(*place) for place in labels])
    for name, (least, most) in asked.ranges.items():
        values = source.column(name)  # NaN is in no range
        kept &= values >= (-np.inf if least is None else least)
        kept &= values <= (np.inf if most is None else most)
    return order[kept[order]]


def table(source: NeuronRows, asked: Asked) -> dict[str, Any]:
    """Returns a page of neurons; UserError for a page that is not there."""
    labels = source.named()
    found = select(source, asked, labels)
    n_pages = max(1, math.ceil(len(found) / PAGE))
    if asked.page > n_pages:
        raise UserError(f"page {asked.page}: must be from 1 to {n_pages}")
    shown = found[(asked.page - 1) * PAGE : asked.page * PAGE].tolist()
    return {
        "count": len(found),
        "page": asked.page,
        "n_pages": n_pages,
        "neurons": [summary(source, number, labels) for number in shown],
    }


def random_neuron(source: NeuronRows, seed: int | None = None) -> tuple[int, int]:
    """Returns layer and number of any neuron that is not dead; of any at all where all are."""
    alive = np.flatnonzero(source.column("n_active") > 0)
    pick = np.random.default_rng(seed)
    return source.place(int(pick.choice(alive) if len(alive) else pick.integers(source.n_neurons)))


def _bound(parameters: Mapping[str, str], name: str) -> float | None:
    text = parameters.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{name} = {text}: must be a number")
    return value
