"""The explorer's addresses: which page or JSON is answered to which request.

Slow work is done in threads of its own, one at a time for the model and one for regular expressions, so that
other requests do not wait for it.

A run's pages are served while they are being made (`Preparing`), by a thread of this process: there is one
copy of JAX. Until there is a table of neurons, every page says how far the work is; then the explorer's own
take its place, and again when ablation effects have come. The work ends where it next tells of itself: all
that it writes, it writes whole.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
import contextlib
import functools
import itertools
import re
import secrets
import socket
import threading
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from topklm import web
from topklm.errors import EXIT_INTERRUPTED, UserError, end_at_once
from topklm.explorer import finding, markup, pages, traces, views
from topklm.explorer.finding import Index
from topklm.explorer.markup import Link
from topklm.explorer.neuron_data import NeuronData, NeuronRows, NotThereError
from topklm.explorer.steering import COLUMNS, NAMES, LiveModel, SteerSettings, Writing, box
from topklm.explorer.trace_pages import TracePages
from topklm.explorer.traces import StepData
from topklm.explorer.views import Asked
from topklm.neurons import NeuronsFolder
from topklm.neurons.labels import Note, read_export, step_of
from topklm.progress import Progress, StoppedError, WatchedProgress
from topklm.web import (
    EMBEDDED,
    BusyError,
    Guard,
    Json,
    Say,
    Stream,
    check_not_busy,
    comes_from_elsewhere,
    field,
    fields,
    file,
    is_loopback,
    number,
    redirect_with,
    run_limited,
    taken,
    to_json,
    whole_number,
)

SUGGESTED = 10  # neurons to label
MAX_BODY = 2**20  # bytes: the labels of a run


def create(
    source: NeuronData,
    report: Callable[[str], None] = print,
    reader: LiveModel | None = None,
    work: Any = None,
) -> Starlette:
    """Returns the application; its `state.closing` is to be called when the server is told to stop.

    `report` is told when the index is made. `reader` is `state.reader` of an earlier application of this run,
    whose model is loaded already; `work`, a `Preparing`, makes more figures meanwhile.
    """
    here = _Explorer(source, Index(source, report), reader, work)
    neuron = "/neurons/{layer:number}/{neuron:number}"
    routes = [
        Route("/", here.overview),
        Route("/random", here.random),
        Route(neuron, here.neuron),
        Route(f"{neuron}/preview", here.preview),
        Route(f"{neuron}/text", here.to_text, methods=["POST"]),
        Route(f"{neuron}/steer", here.to_steer, methods=["POST"]),
        Route(f"{neuron}/label", here.label, methods=["POST"]),
        Route("/go", here.go),
        Route("/prompt", here.prompt),
        Route("/prompt", here.to_prompt, methods=["POST"]),
        Route("/search", here.search),
        Route("/labels", here.labels),
        Route("/labels", here.to_labels, methods=["POST"]),
        Route("/labels/next", here.next_unlabelled),
        Route("/api/overview", here.overview_json),
        Route(f"/api{neuron}", here.neuron_json),
        Route(f"/api{neuron}/context", here.context_json),
        Route(f"/api{neuron}/text", here.text_json, methods=["POST"]),
        Route(f"/api{neuron}/steer", here.steer_json, methods=["POST"]),
        Route(f"/api{neuron}/label", here.label_json, methods=["POST"]),
        Route("/api/prompt", here.prompt_json, methods=["POST"]),
        Route("/api/search", here.search_json),
        Route("/api/set", here.set_json),
        Route("/api/labels", here.add_labels, methods=["POST"]),
        Route("/api/labels.json", here.labels_json),
        Route("/api/labels.csv", here.labels_csv),
        Route(here.static.route, here.static.answer),
        *here.of_trace.routes,
    ]
    if work is not None:
        routes.append(Route("/api/progress", work.answer))
    kinds = UserError, BusyError, HTTPException, Exception
    application = Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, here.error))
    application.state.closing, application.state.reader = here.close, here.reader
    return application


class _Explorer:
    """Answers requests; methods that end on `_json` give data, the others pages."""

    def __init__(self, source: NeuronData, index: Index, reader: LiveModel | None, work: Any):
        self._source, self._index = source, index
        self.reader = reader or LiveModel(str(source.folder.run), source.store.metadata)
        self.static = pages.Static()
        self._templates = pages.environment(source)
        self._templates.globals |= {"static": self.static.address, "work": work}
        turns = [anyio.CapacityLimiter(1) for _ in range(4)]
        self._model_turn, self._regex_turn, self._words_turn, self._writing_turn = turns
        self._closing = False
        self._sentences = functools.cache(lambda: views.sentences(source))
        self.of_trace = TracePages(source, self._page)
        self._templates.globals["has_trace"] = lambda: bool(self.of_trace.traces.names())

    # Pages

    def overview(self, request: Request) -> Response:
        source = self.of_trace.at(request)
        asked = self._asked(request, source)
        about = self.of_trace.about(source)
        drawn = _plots(source, about["link"]) if about else self._plots
        about |= {"data": views.overview(source, asked), "asked": asked, "drawn": drawn}
        return self._page(request, "overview.html", steps=self.of_trace.slider(source, asked), **about)

    def random(self, _request: Request) -> Response:
        return _to_neuron(*views.random_neuron(self._source))

    def go(self, request: Request) -> Response:
        """Redirects to the neuron that was typed as 1:137 or 1/137."""
        text = request.query_params.get("neuron", "").strip()
        found = re.fullmatch(r"([0-9]{1,9})\s*[:/]\s*([0-9]{1,9})", text)
        if not found:
            raise UserError(
                f"neuron = {text}: must be LAYER:NEURON, e.g. {self._source.measured.layers[0]}:17"
            )
        layer, neuron = int(found[1]), int(found[2])
        self._source.number(layer, neuron)
        return _to_neuron(layer, neuron)

    async def neuron(self, request: Request) -> Response:
        place, text = self._place(request), request.query_params.get("text", "")
        source, about = await run_in_threadpool(self._of_neuron, request, place)
        if request.query_params.get("embed") == "1":
            alone = {**about, "steps": None, "life_hint": ""}
            page = await run_in_threadpool(self._page, request, "embed.html", **alone)
            # It changes nothing, so pages of others may hold it in a frame.
            page.headers["content-security-policy"] = EMBEDDED
            return page
        if source is self._source:
            own, problem = await _tried(request, text, self._with_model, views.on_text, *place, text)
            about |= {"text": text, "own": own, "problem": problem, "steer": await self._box(request)}
        return await run_in_threadpool(self._page, request, "neuron.html", **about)

    def _of_neuron(self, request: Request, place: tuple[int, int]) -> tuple[NeuronRows, dict[str, Any]]:
        source = self.of_trace.at(request)
        about = self.of_trace.about(source) | self.of_trace.strip(source, *place)
        return source, about | {"data": views.neuron(source, *place)}

    def preview(self, request: Request) -> Response:
        """Returns the card that a script shows beside links to the neuron."""
        place, source = self._place(request), self.of_trace.at(request)
        if isinstance(source, StepData):
            item = traces.at_step(source, *place, source.named())
        else:
            item = views.summary(source, source.number(*place), source.named())
        return self._page(request, "preview.html", item=item)

    async def to_text(self, request: Request) -> Response:
        address = pages.neuron_address(*self._place(request))
        return redirect_with(address, {"text": await field(request, "text")}, "#own-text")

    async def label(self, request: Request) -> Response:
        source = self.of_trace.at(request)
        step = None if source is self._source else source.measured.step
        return _to_neuron(*await self._set_label(request), step)

    async def prompt(self, request: Request) -> Response:
        text, by = request.query_params.get("text", ""), request.query_params.get("by", "activation")
        data, problem = await _tried(request, text, self._with_model, views.prompt, text, by)
        about = {"text": text, "data": data, "problem": problem, "most_tokens": self.reader.most_tokens}
        if data:
            chosen = number(request, "token") if "token" in request.query_params else None
            if chosen is not None and chosen >= len(data["tokens"]):
                raise NotThereError(f"token {chosen}: the text has {len(data['tokens'])}, counted from 0")
            shown = await run_in_threadpool(views.prompt_page, self._source, data, chosen)
            about |= {"chosen": chosen, **shown}
        elif not text:
            about["sentences"] = await run_in_threadpool(self._sentences)
        return await run_in_threadpool(self._page, request, "prompt.html", 400 if problem else 200, **about)

    async def to_prompt(self, request: Request) -> Response:
        content = await fields(request)
        kept = {"by": str(content["by"])} if content.get("by") else {}
        return redirect_with("/prompt", {"text": await field(request, "text"), **kept})

    async def search(self, request: Request) -> Response:
        asked = request.query_params
        data, problem = await _tried(request, asked.get("q", ""), self._found, request)
        about = {"asked": asked, "kind": asked.get("kind", "words"), "data": data, "problem": problem}
        about["n_shown"] = finding.SHOWN
        return await run_in_threadpool(self._page, request, "search.html", 400 if problem else 200, **about)

    def labels(self, request: Request, said: str = "", problem: str = "") -> Response:
        labels = self._source.named()
        suggested = itertools.islice(views.unlabelled(self._source), SUGGESTED)
        about = {"neurons": views.labelled(self._source), "said": said, "problem": problem}
        about["suggested"] = [views.summary(self._source, number, labels) for number in suggested]
        return self._page(request, "labels.html", 400 if problem else 200, **about)

    async def to_labels(self, request: Request) -> Response:
        """Adds the labels of a file whose content was sent."""
        said = problem = ""
        try:
            added = await run_in_threadpool(self._add_labels, await field(request, "content"))
            said = f"{added['added']:,} labels added, {added['changed']:,} changed."
        except UserError as e:
            problem = str(e)
        return await run_in_threadpool(self.labels, request, said, problem)

    def next_unlabelled(self, request: Request) -> Response:
        """Redirects to the next neuron without a label, in the order in which a person can name them."""
        found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text := request.query_params.get("after", ""))
        if text and not found:
            raise UserError(f"after = {text}: must be LAYER:NEURON")
        after = (int(found[1]), int(found[2])) if found else None
        number = next(views.unlabelled(self._source, after), None)
        return RedirectResponse("/labels", 303) if number is None else _to_neuron(*self._source.place(number))

    # Data

    def overview_json(self, request: Request) -> Response:
        source = self.of_trace.at(request)
        return Json(views.overview(source, self._asked(request, source)))

    def neuron_json(self, request: Request) -> Response:
        _, about = self._of_neuron(request, self._place(request))
        return Json({**about["data"], "trace": about["life"]})

    def context_json(self, request: Request) -> Response:
        place = self._place(request)
        data = views.context(self._source, *place, number(request, "at"), number(request, "size"))
        strongest = self._source.row(self._source.number(*place), ["max_activation"])["max_activation"]
        shaded = markup.pieces(data["tokens"], data["values"], strongest, data["example"])
        return Json({**data, "pieces": [piece._asdict() for piece in shaded]})

    async def text_json(self, request: Request) -> Response:
        text = await field(request, "text")
        return Json(await self._with_model(views.on_text, *self._place(request), text))

    async def label_json(self, request: Request) -> Response:
        layer, neuron = await self._set_label(request)
        label = self._source.named().get((layer, neuron), "")
        notes = views.notes(self._source, layer, neuron)
        return Json({"layer": layer, "neuron": neuron, "label": label, "notes": notes})

    async def prompt_json(self, request: Request) -> Response:
        by = str((await fields(request)).get("by", "activation"))
        return Json(await self._with_model(views.prompt, await field(request, "text"), by))

    async def search_json(self, request: Request) -> Response:
        return Json(await self._found(request))

    async def set_json(self, request: Request) -> Response:
        """Gives the neurons of a search as a file of interventions."""
        data, name = await self._found(request), request.query_params.get("list", "neurons")
        made = finding.as_set(self._source, data, name, number(request, "top"))
        return file(made[1], "application/json", made[0])

    async def add_labels(self, request: Request) -> Response:
        return Json(await run_in_threadpool(self._add_labels, await field(request, "content")))

    def labels_json(self, _request: Request) -> Response:
        return file(self._source.labels.as_json(), "application/json", "labels.json")

    def labels_csv(self, _request: Request) -> Response:
        return file(self._source.labels.as_csv(), "text/csv; charset=utf-8", "labels.csv")

    # Steer boxes: one pair of texts is written at a time; between its tokens others have the model

    def close(self) -> None:
        """Ends what is being written, for a server that is told to stop; the last line is then missing."""
        self._closing = True

    async def steer_json(self, request: Request) -> Response:
        """Streams lines of JSON: the prompt, pieces of both columns as they come, at last the end of each."""
        writing = await self._begin(request, SteerSettings.of(await fields(request)))

        async def write(say: Say) -> None:
            async with taken(self._writing_turn):
                async for line in self._lines(writing):
                    await say(to_json(line) + b"\n")

        return Stream(write, "application/x-ndjson")

    async def to_steer(self, request: Request) -> Response:
        """Sends on to the page with both texts, which has all settings in its link."""
        address, content = pages.neuron_address(*self._place(request)), await fields(request)
        chosen = {name: str(content[name]) for name in NAMES if name in content}
        return redirect_with(address, chosen, "#steer")

    async def _box(self, request: Request) -> dict[str, Any]:
        """Returns the content of a page's box, with both texts if the link asks for them."""
        asked = request.query_params
        shown = await run_in_threadpool(box, self._source, *self._place(request))
        chosen = {name: asked[name] for name in NAMES if name in asked} if "prompt" in asked else {}
        shown["chosen"] |= chosen
        shown["written"], shown["problem"] = await _tried(request, chosen, self._whole, request, chosen)
        return shown

    async def _whole(self, request: Request, chosen: dict[str, str]) -> dict[str, Any]:
        writing = await self._begin(request, SteerSettings.of(chosen))
        async with taken(self._writing_turn):
            lines = [line async for line in self._lines(writing)]
        if "ends" not in lines[-1]:
            raise BusyError
        pieces = {name: [line for line in lines[1:-1] if line["column"] == name] for name in COLUMNS}
        return {**lines[0], "pieces": pieces, **lines[-1]}

    async def _begin(self, request: Request, settings: SteerSettings) -> Writing:
        check_not_busy(self._writing_turn)
        place = self._place(request)
        return await run_limited(self._model_turn, Writing, self._source, self.reader, *place, settings)

    async def _lines(self, writing: Writing) -> AsyncIterator[dict[str, Any]]:
        # Who has begun may wait for the model, however many others do.
        yield {"prompt": writing.prompt}
        while not writing.done:
            if self._closing:
                return
            for piece in await anyio.to_thread.run_sync(writing.more, limiter=self._model_turn):
                yield piece
        yield {"ends": await anyio.to_thread.run_sync(writing.ends, limiter=self._model_turn)}

    # Shared

    def error(self, request: Request, error: Exception) -> Response:
        """Answers with what is wrong, in the form that was asked for."""
        headers: dict[str, str] = {}
        if isinstance(error, UserError):
            status, message = 404 if isinstance(error, NotThereError) else 400, str(error)
        elif isinstance(error, BusyError):
            status, message = 503, "too many are waiting for this already: try again in a moment"
        elif isinstance(error, HTTPException):
            status, headers = error.status_code, dict(error.headers or {})
            message = "there is no such page" if status == 404 else error.detail
        else:
            status, message = 500, "this page could not be made; the terminal says why"
        if request.scope["path"].startswith("/api/"):
            return Json({"error": message}, status, headers)
        answer = self._page(request, "error.html", status, message=message, code=status)
        answer.headers.update(headers)
        return answer

    def _page(self, request: Request, template: str, status: int = 200, **content: Any) -> Response:
        theme = request.cookies.get("topklm_theme")
        about = {"theme": theme if theme in ("light", "dark") else "", "page": template.removesuffix(".html")}
        text = self._templates.get_template(template).render({**about, **content})
        return HTMLResponse(text, status, {"cache-control": "no-store"})

    @functools.cached_property
    def _plots(self) -> dict[str, Any]:
        return _plots(self._source, pages.neuron_address)

    def _asked(self, request: Request, source: NeuronRows) -> Asked:
        # Of several boxes with one name, all that are ticked.
        several = {"layer": ",".join(request.query_params.getlist("layer"))}
        parameters = {**dict(request.query_params), **several}
        return Asked.of(parameters, source.measured.layers, source.figures)

    async def _found(self, request: Request) -> dict[str, Any]:
        asked = request.query_params
        text, kind = asked.get("q", ""), asked.get("kind", "words")
        if kind not in finding.KINDS:
            raise UserError(f"kind = {kind}: must be one of {', '.join(finding.KINDS)}")
        if kind == "words":
            counted = asked.get("literal") == "1"
            return await run_limited(
                self._words_turn, finding.words, self._source, self._index, text, counted
            )
        options = (asked.get("case") != "1", asked.get("ends") == "1")
        return await run_limited(self._regex_turn, finding.regex, self._source, text, *options)

    async def _with_model(self, view: Callable[..., Any], *arguments: Any) -> Any:
        return await run_limited(self._model_turn, view, self._source, self.reader, *arguments)

    async def _set_label(self, request: Request) -> tuple[int, int]:
        place, content = self._place(request), await fields(request)
        comment, by = (str(content.get(name) or "") for name in ("comment", "by"))
        at = whole_number(str(content.get("at") or "0"))
        if at is None:
            raise UserError(f"at = {content['at']}: must be a whole number")
        steps = (step_of(name, str(content.get(name) or "")) for name in ("from_step", "to_step"))
        note = Note(await field(request, "label"), comment, by, *steps)
        await run_in_threadpool(self._source.labels.set, *place, note, at)
        return place

    def _add_labels(self, content: str) -> dict[str, int]:
        read = read_export(content)
        for place, _ in read:
            self._source.number(*place)
        added, changed = self._source.labels.add(read)
        return {"added": added, "changed": changed}

    def _place(self, request: Request) -> tuple[int, int]:
        """Returns the layer and the neuron of an address; raises NotThereError if there is no such neuron."""
        place = request.path_params["layer"], request.path_params["neuron"]
        self._source.number(*place)
        return place


async def _tried(
    request: Request, asked: Any, make: Callable[..., Awaitable[Any]], *arguments: Any
) -> tuple[Any, str]:
    """Returns what a page was asked for, which takes long to make, and the problem if it cannot be made.

    Nothing is made where nothing was asked for, or by another site's page.
    """
    if not asked or comes_from_elsewhere(request.headers):
        return None, ""
    try:
        return await make(*arguments), ""
    except UserError as e:
        return None, str(e)


def _to_neuron(layer: int, neuron: int, step: int | None = None) -> Response:
    return RedirectResponse(pages.neuron_address(layer, neuron, step), 303)


def _plots(source: NeuronRows, link: Link) -> dict[str, Any]:
    return {"layers": pages.layer_plots(source), "entropies": pages.entropy_map(source, link)}


def serve(
    application: ASGIApp,
    closing: Callable[[], None],
    listening: socket.socket,
    host: str,
    ready: Callable[[str, Callable[[], None]], None],
) -> None:
    """Answers until Ctrl-C at an address of `web.listen`; other hosts than the loopback need a token.

    `closing` is called when the server is told to stop; `ready` is told the address to open, once it can be
    opened, and what ends the server.
    """
    port = listening.getsockname()[1]
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    names = web.names_of(host, port) if token is None else None
    guarded = Guard(application, names, token, max_body=MAX_BODY)
    address = f"http://{web.name_of(host)}:{port}/" + (f"?token={token}" if token else "")
    running = web.make_server(guarded, closing=closing)
    web.run(running, listening, lambda: ready(address, running.end))


# Does the work; tells when pages can be shown, and returns when nothing is missing.
Work = Callable[[Progress, Callable[[NeuronsFolder], None]], NeuronsFolder]


class Preparing:
    """The application of the moment, and the thread whose `work` harvests and measures what it shows."""

    def __init__(self, run: str, work: Work, progress: Progress):
        self.progress = WatchedProgress(progress)
        self.problem = ""  # why a part of the figures is missing for good
        self._work = work
        self._made = 0  # how often there was more to show
        self._error: BaseException | None = None
        self._static = pages.Static()
        template = pages.templates().get_template("preparing.html")
        self._render = lambda **content: template.render(run=run, static=self._static.address, **content)
        waiting = [
            Route("/api/progress", self.answer),
            Route(self._static.route, self._static.answer),
            Route("/{path:path}", self._page, methods=["GET", "POST"]),
        ]
        self._current: ASGIApp = Starlette(routes=waiting)
        self._explorer: Starlette | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._end: Callable[[], None] = lambda: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request with what there is."""
        await self._current(scope, receive, send)

    def start(self, end: Callable[[], None]) -> None:
        """Begins the work; `end` is called if it fails before there is anything to show."""
        self._end = end
        self._thread.start()

    def close(self) -> None:
        """Is called when the server is told to stop."""
        self.progress.stop()
        if self._explorer is not None:
            self._explorer.state.closing()

    def finish(self, say: Callable[[str], None]) -> None:
        """Waits for the end of the work; raises its error if nothing could be shown."""
        self.progress.stop()
        try:
            self._thread.join(0.5)
            if self._thread.is_alive():
                say(f"ending after this step: {self.progress.name}   (Ctrl-C again: at once)")
                self._thread.join()
        except KeyboardInterrupt:
            end_at_once(EXIT_INTERRUPTED)
        if self._error is not None:
            raise self._error

    @property
    def done(self) -> bool:
        """Whether nothing is being made any more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def facts(self) -> dict[str, Any]:
        """Returns how far the work is, and how often there was more to show."""
        progress = self.progress
        return {
            "stage": progress.name,
            "share": progress.share,
            "seconds_left": None if progress.seconds_left is None else round(progress.seconds_left),
            "made": self._made,
            "done": self.done,
            "problem": self.problem,
        }

    def answer(self, _request: Request) -> Response:
        """Returns `facts` as JSON."""
        return Json(self.facts())

    def _page(self, request: Request) -> Response:
        if request.url.path.startswith("/api/"):
            return Json({"error": "neurons are still being measured"}, 503, {"retry-after": "5"})
        theme = request.cookies.get("topklm_theme")
        theme = theme if theme in ("light", "dark") else ""
        return HTMLResponse(self._render(theme=theme, work=self), 200, {"cache-control": "no-store"})

    def _run(self) -> None:
        try:
            with contextlib.suppress(StoppedError):
                self._show(self._work(self.progress, self._show))
        except UserError as e:
            if self._explorer is None:
                self._error = e
            else:
                self.problem = str(e)
                self._made += 1
                with contextlib.suppress(StoppedError):
                    self.progress.say(f"{e}; pages are shown without")
        except BaseException as e:  # told in the main thread
            self._error = e
        finally:
            if self._error is not None:
                self._end()

    def _show(self, folder: NeuronsFolder) -> None:
        source = NeuronData(folder)
        reader = None if self._explorer is None else self._explorer.state.reader
        made = create(source, self.progress.say, reader=reader, work=self)
        self._current = self._explorer = made
        self._made += 1
