"""The data of each page as plain values, for templates and for the JSON API.

The overview has the run as a whole: its layers side by side, and its neurons as a table, sorted and filtered.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any
from urllib.parse import urlencode

import numpy as np

from topklm.errors import UserError
from topklm.explorer.neuron_data import LISTED_TOKENS, NeuronRows, StoreWindow
from topklm.explorer.steering import LiveModel
from topklm.neurons.statistics import catalog
from topklm.neurons.statistics.activity import RANGE_PARTS
from topklm.web import whole_number

EXAMPLE_TOKENS = 128
_SNIPPET_TOKENS, _SNIPPET_AFTER = 6, 5  # before and after the token of a snippet
MOST_CONTEXT = 1024  # tokens that can be asked for around one

LabelOf = Mapping[tuple[int, int], str]


def neuron(
    source: NeuronRows,
    layer: int,
    neuron: int,
    example_tokens: int = EXAMPLE_TOKENS,
    labels: LabelOf | None = None,
) -> dict[str, Any]:
    """Returns all of a neuron's page; examples of at most `example_tokens`; labels by default `named()`."""
    number = source.number(layer, neuron)
    row, measured = source.row(number), source.measured
    labels = source.named() if labels is None else labels
    counts = row["histogram"] or []
    before, after = (source.place((number + step) % source.n_neurons) for step in (-1, 1))
    return {
        **{name: getattr(measured, name) for name in ("run", "step", "kind", "dictionary")},
        "layer": layer,
        "neuron": neuron,
        "label": labels.get((layer, neuron), ""),
        "notes": notes(source, layer, neuron),
        "dead": not row["n_active"],
        "n_tokens": measured.n_tokens,
        "figures": {name: row[name] for name in source.figures},
        "ranks": {name: source.rank(number, name) for name, figure in source.figures.items() if figure.first},
        "same_index": [
            {
                "layer": other,
                "neuron": neuron,
                "label": labels.get((other, neuron), ""),
                "density": source.row(source.number(other, neuron), ["density"])["density"],
                "input_tokens": strongest_tokens(source, other, neuron),
            }
            for other in measured.layers
            if other != layer
        ],
        "effective_tokens": _exp(row["token_entropy_corrected"]),
        "effective_clusters": _exp(row["semantic_entropy_corrected"]),
        "histogram": {
            "width": (row["max_activation"] or 0) / len(counts) if counts else None,
            "counts": counts,
        },
        "input_tokens": _with_counts(source, layer, neuron, _input_tokens(source, row)),
        "output_tokens": {
            lens: _output_tokens(source, row, lens)
            | {"common": _output_tokens(source, row, f"{lens}_common") if row[f"{lens}_common_top"] else None}
            for lens in ("identity", "jacobian")
        },
        "similar": {
            kind: [
                {
                    "layer": layer,
                    "neuron": other,
                    "label": labels.get((layer, other), ""),
                    "input_tokens": strongest_tokens(source, layer, other),
                    "similarity": similarity,
                }
                for other, similarity in zip(row[name] or (), row[f"{name}_similarity"] or (), strict=True)
            ]
            for kind, name in (("coactive", "coactive"), ("effect", "similar_effect"))
        },
        "examples": _examples(source, layer, neuron, row, example_tokens),
        "previous": {"layer": before[0], "neuron": before[1]},
        "next": {"layer": after[0], "neuron": after[1]},
        **{name: getattr(measured, name) for name in ("embedding", "n_clusters", "source")},
    }


def notes(source: NeuronRows, layer: int, neuron: int) -> list[dict[str, Any]]:
    """Returns the labels of a neuron with their comments, and whether each holds at this step."""
    step, found = source.measured.step, source.labels.notes().get((layer, neuron), ())
    return [{**dataclasses.asdict(note), "holds": note.holds(step), "steps": note.steps} for note in found]


def context(source: NeuronRows, layer: int, neuron: int, at: int, size: int) -> dict[str, Any]:
    """Returns `size` tokens around one of the store, with activations; raises NotThereError without it."""
    window = source.window(at, max(1, min(size, MOST_CONTEXT)))
    return _activations(source, layer, neuron, [window], [at])[0]


def on_text(source: NeuronRows, reader: LiveModel, layer: int, neuron: int, text: str) -> dict[str, Any]:
    """Returns the neuron on a text of one's own; UserError if that is empty or too long."""
    source.number(layer, neuron)
    ids = reader.ids(text)
    values = reader.activations(ids, layer, neuron).tolist()
    return {"layer": layer, "neuron": neuron, "tokens": source.running_texts(ids), "values": values}


def summary(source: NeuronRows, number: int, labels: LabelOf) -> dict[str, Any]:
    """Returns a neuron as a line of a table: its figures, label and strongest input tokens."""
    layer, neuron = source.place(number)
    row = source.row(number, [*source.figures, "top_tokens", "top_token_shares"])
    return {
        "layer": layer,
        "neuron": neuron,
        "label": labels.get((layer, neuron), ""),
        "dead": not row["n_active"],
        "figures": {name: row[name] for name in source.figures},
        "input_tokens": _input_tokens(source, row)[:5],
        "snippet": next(snippets(source, number), None),
    }


def snippets(source: NeuronRows, number: int) -> Iterator[tuple[str, str, str]]:
    """Yields the tokens of the strongest examples of a neuron, each with the text before and after it."""
    for at in source.strongest_examples(number):
        window = source.window(at, 2 * _SNIPPET_TOKENS)
        texts, place = source.running_texts(window.ids), at - window.begin
        before, after = texts[max(0, place - _SNIPPET_TOKENS) : place], texts[place + 1 :][:_SNIPPET_AFTER]
        yield "".join(before), texts[place], "".join(after)


def part_titles() -> list[str]:
    """Returns the titles of the parts of the examples: the strongest, then rising parts of the range."""
    step = 100 // RANGE_PARTS
    parts = [f"{step * n}\N{EN DASH}{step * (n + 1)}\N{NO-BREAK SPACE}%" for n in range(RANGE_PARTS)]
    return ["Strongest", *parts]


def labelled(source: NeuronRows) -> list[dict[str, Any]]:
    """Returns all neurons that have a label, with `notes`: each label, its comment, and who wrote it."""
    labels = source.named()
    return [summary(source, source.number(*at), labels) | {"notes": notes(source, *at)} for at in labels]


def unlabelled(source: NeuronRows, after: tuple[int, int] | None = None) -> Iterator[int]:
    """Yields living neurons without a label, first the most readable; with `after`, from there round."""
    order = source.readable.tolist()
    if after is not None:
        place = order.index(source.number(*after)) + 1
        order = order[place:] + order[:place]
    labels = source.named()
    alive = source.column("n_active") > 0
    return (number for number in order if alive[number] and source.place(number) not in labels)


def _exp(entropy: float | None) -> float | None:
    return None if entropy is None else math.exp(entropy)


def _weighed(
    source: NeuronRows, ids: Iterable[int] | None, name: str, weights: Iterable[float] | None
) -> list[dict[str, Any]]:
    found = list(zip(ids or (), weights or (), strict=True))[:LISTED_TOKENS]
    texts = source.texts([token for token, _ in found])
    return [
        {"id": token, "token": text, name: weight} for (token, weight), text in zip(found, texts, strict=True)
    ]


def _output_tokens(source: NeuronRows, row: Mapping[str, Any], lens: str) -> dict[str, list[dict[str, Any]]]:
    return {
        end: _weighed(source, row[f"{lens}_{end}"], "effect", row[f"{lens}_{end}_effects"])
        for end in ("top", "bottom")
    }


def _input_tokens(source: NeuronRows, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return _weighed(source, row["top_tokens"], "share", row["top_token_shares"])


def _with_counts(
    source: NeuronRows, layer: int, neuron: int, tokens: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Adds how often each token stands in the store, and at how many of these the neuron is active."""
    if not tokens:
        return []
    counts = source.counted(layer, neuron, [token["id"] for token in tokens])
    return [
        {
            **token,
            "occurrences": int(source.occurrences[token["id"]]),
            "active": None if counts is None else counts[place],
        }
        for place, token in enumerate(tokens)
    ]


def strongest_tokens(source: NeuronRows, layer: int, neuron: int) -> list[str]:
    """Returns the input tokens that a neuron is most active at, three at most."""
    row = source.row(source.number(layer, neuron), ["top_tokens"])
    return source.texts((row["top_tokens"] or [])[:3])


def _examples(
    source: NeuronRows, layer: int, neuron: int, row: Mapping[str, Any], size: int
) -> list[dict[str, Any]]:
    names = ("examples", "example_activations", "example_parts")
    positions, strengths, parts = (row[name] or [] for name in names)
    found = _activations(source, layer, neuron, source.windows(positions, size), positions)
    strongest = row["max_activation"] or 1
    return [
        {
            "part": part,
            "activation": activation,
            "strongest": strongest,
            "loss": source.loss(shown["at"]),
            "next_loss": source.loss(shown["at"] + 1, shown["at"]),
            **shown,
        }
        for part, activation, shown in zip(parts, strengths, found, strict=True)
    ]


def _activations(
    source: NeuronRows, layer: int, neuron: int, windows: Sequence[StoreWindow], positions: Sequence[int]
) -> list[dict[str, Any]]:
    """Returns the neuron in each window, and which of its tokens it is about."""
    bounds = [(window.begin, window.begin + len(window.ids)) for window in windows]
    values = source.activations(layer, neuron, bounds)
    return [
        {
            "at": at,
            "document": window.document,
            "begin": window.begin,
            "example": at - window.begin,
            "tokens": source.running_texts(window.ids),
            "values": of_neuron.tolist(),
        }
        for window, at, of_neuron in zip(windows, positions, values, strict=True)
    ]


RANKINGS = {"activation": "activation", "share": "share of its own highest"}
_SHOWN_NEURONS = 4  # neurons of a layer in a row of the page

_N_SENTENCES, _SENTENCE_TOKENS = 5, 160
_SENTENCE = re.compile(r"\s*(\S.{15,140}?[^.\s]{3}[.!?])(?=\s)")  # no end after an initial or "e.g."


def prompt(source: NeuronRows, reader: LiveModel, text: str, by: str = "activation") -> dict[str, Any]:
    """Returns the active neurons of each token of a text, those first that are high in a ranking.

    `by` is one of `RANKINGS`. A share is of the neuron's largest activation in the harvested text; it is null
    for a neuron that was never active there, which then comes last. UserError if the text is empty or too
    long.
    """
    if by not in RANKINGS:
        raise UserError(f"by = {by}: must be one of {', '.join(RANKINGS)}")
    ids, labels, layers = reader.ids(text), source.named(), source.measured.layers
    read = reader.read(ids)
    highest = source.column("max_activation").reshape(len(layers), -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.stack([v / highest[s][i] for s, (i, v) in enumerate(zip(*read[:2], strict=True))])
    if by == "share":
        # Not a number is after every number.
        order = np.argsort(-np.where(read.values == 0, np.nan, shares), axis=-1, kind="stable")
    else:
        order = np.broadcast_to(np.arange(shares.shape[-1]), shares.shape)
    sorted_ = [np.take_along_axis(x, order, axis=-1).tolist() for x in (*read[:2], shares)]
    expected = zip(read.next_ids.tolist(), read.next_probabilities.tolist(), strict=True)
    tokens = [
        {
            "token": token,
            "id": token_id,
            "loss": float(loss),
            "next": [
                {"id": one, "token": shown, "probability": probability}
                for one, shown, probability in zip(following, source.texts(following), chances, strict=True)
            ],
            "layers": [
                {
                    "layer": layer,
                    "neurons": [
                        {"neuron": neuron, "activation": value, "share": None if math.isnan(share) else share}
                        for neuron, value, share in zip(*(x[place][at] for x in sorted_), strict=True)
                        if value
                    ],
                }
                for place, layer in enumerate(layers)
            ],
        }
        for at, (token, token_id, loss, (following, chances)) in enumerate(
            zip(source.running_texts(ids), ids.tolist(), read.losses, expected, strict=True)
        )
    ]
    seen = {place for token in tokens for place in _active_places(token)}
    return {
        "text": text,
        "by": by,
        "layers": list(layers),
        "tokens": tokens,
        "labels": [
            {"layer": layer, "neuron": neuron, "label": labels[layer, neuron]}
            for layer, neuron in sorted(seen & labels.keys())
        ],
    }


def prompt_page(source: NeuronRows, data: Mapping[str, Any], chosen: int | None) -> dict[str, Any]:
    """Returns what the page shows besides the data of `prompt`, of all tokens or the chosen one.

    `named`: the labels of neurons by layer and number. `highest`: the largest activation of each layer,
    leaving out the first token, whose activations are far from all others in most models. `usual`: the tokens
    that the neurons on the page are most active at.
    """
    highest = dict.fromkeys(data["layers"], 1e-9)
    for token in data["tokens"][1:] or data["tokens"]:
        for layer in token["layers"]:
            sizes = (abs(neuron["activation"]) for neuron in layer["neurons"])
            highest[layer["layer"]] = max(highest[layer["layer"]], *sizes, 0)
    if chosen is None:
        places = {place for token in data["tokens"] for place in _active_places(token, _SHOWN_NEURONS)}
    else:
        places = set(_active_places(data["tokens"][chosen]))
    return {
        "named": {(item["layer"], item["neuron"]): item["label"] for item in data["labels"]},
        "highest": highest,
        "usual": {place: strongest_tokens(source, *place) for place in places},
        "rankings": RANKINGS,
        "n_shown": _SHOWN_NEURONS,
    }


def sentences(source: NeuronRows) -> list[str]:
    """Returns some sentences of the harvested text, from documents far from one another."""
    starts, _ = source.documents
    n = len(starts) - 1
    order = sorted(range(n), key=lambda place: (place * _N_SENTENCES) % n) if n else []
    found: list[str] = []
    for place in order:
        begin, end = int(starts[place]), int(starts[place + 1])
        text = source.plain_text(begin, min(end, begin + _SENTENCE_TOKENS))
        if (match := _SENTENCE.match(text)) and match[1].isprintable() and match[1] not in found:
            found.append(match[1])
        if len(found) == _N_SENTENCES:
            break
    return found


def _active_places(token: Mapping[str, Any], most: int | None = None) -> list[tuple[int, int]]:
    return [(layer["layer"], item["neuron"]) for layer in token["layers"] for item in layer["neurons"][:most]]


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
