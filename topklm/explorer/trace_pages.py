"""Pages about a trace, and what a trace adds to other pages: the strip of a neuron, the slider over steps."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from topklm.errors import UserError
from topklm.explorer import traces, views
from topklm.explorer.neuron_data import NeuronData, NeuronRows, NotThereError
from topklm.explorer.pages import neuron_address
from topklm.explorer.traces import FORMATION, StepData, TraceData, Traces
from topklm.explorer.views import READABLE, Asked
from topklm.web import Json, number

Page = Callable[..., Response]  # (request, template, status, **content)
_SORT = "onset_50"  # of the table of formation


class TracePages:
    """Answers `/formation` and `/layers`, and gives other pages their part of the trace."""

    def __init__(self, source: NeuronData, page: Page):
        self._source, self._page = source, page
        self.traces = Traces(source.folder.run, source)
        self._drawn = functools.lru_cache(4)(self._draw)
        self.routes = [
            Route("/formation", self.formation),
            Route("/layers", self.layers),
            Route("/api/formation", self.formation_json),
            Route("/api/layers", self.layers_json),
        ]

    # Other pages

    def at(self, request: Request) -> NeuronRows:
        """Returns neurons at the step that a link asks for, or as measured; NotThereError if not traced."""
        if "step" not in request.query_params:
            return self._source
        step = number(request, "step")
        trace = self.traces.own()
        if trace is None:
            raise NotThereError(f"step {step}: no step of these neurons is traced; run {self.traces.command}")
        return trace.at(step)

    def strip(self, source: NeuronRows, layer: int, neuron: int) -> dict[str, Any]:
        """Returns what a neuron's page shows of the trace, or the line that says why it shows nothing."""
        found: dict[str, Any] = {"life": None, "life_hint": "", "steps": None}
        if not self.traces.own_name:
            return found
        try:
            trace = self.traces.own()
            found["life"] = trace and traces.life(trace, layer, neuron)
        except UserError as e:
            return {**found, "life_hint": str(e)}
        if trace is None:
            return {**found, "life_hint": f"{self.traces.command} shows here how this neuron formed."}
        if found["life"] is None:
            return {**found, "life_hint": f"Layer {layer} is not traced."}

        def address(step: int | None) -> str:
            return neuron_address(layer, neuron, step)

        steps = traces.step_links(trace.steps, source.measured.step, address, self._source.measured.step)
        return {**found, "steps": steps}

    def slider(self, source: NeuronRows, asked: Asked) -> dict[str, Any] | None:
        """Returns the links of the overview's slider; None without a trace that can be read."""
        try:
            trace = self.traces.own()
            if trace is None:
                return None
            other = trace.at(trace.steps[0])
        except UserError:
            return None
        address = functools.partial(_address, asked, {*self._source.figures} & {*other.figures})
        return traces.step_links(trace.steps, source.measured.step, address, self._source.measured.step)

    def about(self, source: NeuronRows) -> dict[str, Any]:
        """Returns what templates are told of a step, in place of what they know of the measured one."""
        if not isinstance(source, StepData):
            return {}
        step, formed = source.measured.step, {figure.name for figure in FORMATION}
        tiles = [one for one in source.figures.values() if one.first and one.name not in formed]
        return {
            "at_step": step,
            "measured": source.measured,
            "now": self._source.measured.step,
            "figures": list(source.figures.values()),
            "figure_of": source.figures,
            "first_columns": tiles,
            "link": functools.partial(neuron_address, step=step) if source.is_own else _no_link,
        }

    # Pages of their own

    def formation(self, request: Request) -> Response:
        """Shows when the neurons of a trace formed."""
        trace, about = self._chosen(request)
        if trace is None:
            return self._page(request, "formation.html", trace=None, **about)
        others = [one for one in map(self._opened, self.traces.names()) if one not in (None, trace)]
        source, asked = self._asked(request, trace)
        self_of_step = functools.partial(_address, asked, None)
        return self._page(
            request,
            "formation.html",
            trace=trace,
            data=traces.formation(trace),
            drawn=self._drawn(trace, tuple(others)),
            table=views.table(source, asked),
            asked=asked,
            step=source.measured.step,
            steps=traces.step_links(trace.steps, source.measured.step, self_of_step, _before(trace)),
            figure_of=source.figures,
            link=neuron_address if source.is_own else _no_link,
            **about,
        )

    def layers(self, request: Request) -> Response:
        """Shows how alike neurons of one index are in two layers."""
        trace, about = self._chosen(request)
        if trace is None:
            return self._page(request, "layers.html", trace=None, **about)
        data, drawn = traces.layers(trace), traces.drawn_layers(trace)
        return self._page(request, "layers.html", trace=trace, data=data, drawn=drawn, **about)

    def formation_json(self, request: Request) -> Response:
        """Gives the figures of `formation`."""
        trace = self._needed(request)
        table = views.table(*self._asked(request, trace))
        return Json({**traces.formation(trace), "table": table})

    def layers_json(self, request: Request) -> Response:
        """Gives the figures of `layers`."""
        return Json(traces.layers(self._needed(request)))

    def _chosen(self, request: Request) -> tuple[TraceData | None, dict[str, Any]]:
        names = self.traces.names()
        about = {"names": names, "command": self.traces.command}
        if not names and not request.query_params.get("trace"):
            return None, about
        return self._needed(request), about

    def _needed(self, request: Request) -> TraceData:
        names = self.traces.names()
        return self.traces.open(request.query_params.get("trace") or (names[0] if names else "trace"))

    def _opened(self, name: str) -> TraceData | None:
        """Opens a trace to be shown beside another; one that cannot be read is left out."""
        try:
            return self.traces.open(name)
        except UserError:
            return None

    def _draw(self, trace: TraceData, others: tuple[TraceData, ...]) -> Mapping[str, Any]:
        is_own = trace.name == self.traces.own_name
        return traces.drawn_formation(trace, others, neuron_address if is_own else None)

    def _asked(self, request: Request, trace: TraceData) -> tuple[StepData, Asked]:
        """Returns the table's step, by default the last before the reference, and its order."""
        step = number(request, "step") if "step" in request.query_params else _before(trace)
        source = trace.at(step)
        parameters = {**dict(request.query_params), "layer": ",".join(request.query_params.getlist("layer"))}
        asked = Asked.of(parameters, source.measured.layers, source.figures, "/formation", _SORT)
        return source, asked


def _no_link(layer: int, neuron: int) -> None:
    return None


def _before(trace: TraceData) -> int:
    return max((step for step in trace.steps if step < trace.settings.reference), default=trace.steps[0])


def _address(asked: Asked, known: set[str] | None, step: int | None) -> str:
    """Returns the link of a table at another step, without an order or bounds that are not known there."""
    if known is None:
        return asked.address(step=step)
    sort = asked.sort if asked.sort in known else READABLE
    ranges = {name: bounds for name, bounds in asked.ranges.items() if name in known}
    return asked.address(step=step, sort=sort, ranges=ranges)
