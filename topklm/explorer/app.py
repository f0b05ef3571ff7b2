"""The explorer's addresses: which page or JSON is answered to which request.

Slow work is done in threads of its own, one at a time for the model and one for regular expressions, so that
other requests do not wait for it.
"""

from collections.abc import Callable
import dataclasses
import functools
import secrets
from typing import Any
from urllib.parse import urlencode

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from topklm.errors import UserError
from topklm.explorer import pages
from topklm.explorer.index import Index
from topklm.explorer.live_model import LiveModel
from topklm.explorer.neuron_data import NeuronData, NotThereError
from topklm.explorer.pages import StaticFiles
from topklm.explorer.requests import BusyError, field, file, number, redirect_with, run_in_thread, run_limited
from topklm.explorer.steering_answers import SteeringAnswers
from topklm.explorer.views import neuron as neuron_view
from topklm.explorer.views import overview as overview_view
from topklm.explorer.views import search as search_view
from topklm.explorer.views.overview import Asked
from topklm.neurons.labels import MAX_CHARACTERS
from topklm.web import server
from topklm.web.http import Guard, Json, comes_from_elsewhere, is_loopback


def create(source: NeuronData, report: Callable[[str], None] = print) -> Starlette:
    """Returns the application; its `state.closing` is to be called when the server is told to stop.

    Args:
        source: The run's neurons.
        report: Is told when the index is made.
    """
    here = _Explorer(source, Index(source, report))
    routes = [
        Route("/", here.overview),
        Route("/random", here.random),
        Route("/neurons/{layer:number}/{neuron:number}", here.neuron),
        Route("/neurons/{layer:number}/{neuron:number}/text", here.to_text, methods=["POST"]),
        Route("/neurons/{layer:number}/{neuron:number}/steer", here.steering.to_page, methods=["POST"]),
        Route("/neurons/{layer:number}/{neuron:number}/label", here.label, methods=["POST"]),
        Route("/go", here.go),
        Route("/prompt", here.prompt),
        Route("/prompt", here.to_prompt, methods=["POST"]),
        Route("/search", here.search),
        Route("/labels", here.labels),
        Route("/api/overview", here.overview_json),
        Route("/api/neurons/{layer:number}/{neuron:number}", here.neuron_json),
        Route("/api/neurons/{layer:number}/{neuron:number}/context", here.context_json),
        Route("/api/neurons/{layer:number}/{neuron:number}/text", here.text_json, methods=["POST"]),
        Route("/api/neurons/{layer:number}/{neuron:number}/steer", here.steering.stream, methods=["POST"]),
        Route("/api/neurons/{layer:number}/{neuron:number}/label", here.label_json, methods=["POST"]),
        Route("/api/prompt", here.prompt_json, methods=["POST"]),
        Route("/api/search", here.search_json),
        Route("/api/labels.json", here.labels_json),
        Route("/api/labels.csv", here.labels_csv),
        Route("/static/{version}/{name}", here.files.answer),
    ]
    errors: dict[Any, Any] = {
        UserError: here.mistake,
        BusyError: here.busy,
        HTTPException: here.http_error,
        Exception: here.bug,
    }
    application = Starlette(routes=routes, exception_handlers=errors)
    application.state.closing = here.steering.close
    return application


class _Explorer:
    """Answers requests; methods that end on `_json` give data, the others pages."""

    def __init__(self, source: NeuronData, index: Index):
        self._source, self._index = source, index
        self._reader = LiveModel(str(source.folder.run), source.store.metadata)
        self.files = StaticFiles()
        self._templates = pages.environment()
        self._templates.globals["static"] = f"/static/{self.files.version}"
        self._model_turn = anyio.CapacityLimiter(1)
        self._regex_turn = anyio.CapacityLimiter(1)
        self.steering = SteeringAnswers(source, self._reader, self._model_turn)

    # Pages

    def overview(self, request: Request) -> Response:
        asked = self._asked(request)
        data = overview_view.overview(self._source, self._index, asked)
        return self._page(
            request, "overview.html", data=data, asked=asked, sorting=pages.Sorting(asked), drawn=self._plots
        )

    def random(self, _request: Request) -> Response:
        layer, neuron = overview_view.random_neuron(self._source)
        return RedirectResponse(f"/neurons/{layer}/{neuron}", 303)

    def go(self, request: Request) -> Response:
        """Redirects to the neuron that was typed as 1:137 or 1/137."""
        text = request.query_params.get("neuron", "").strip()
        parts = text.replace("/", ":").split(":")
        if len(parts) != 2 or not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
            raise UserError(
                f"neuron = {text}: must be LAYER:NEURON, e.g. {self._source.measured.layers[0]}:17"
            )
        layer, neuron = map(int, parts)
        self._source.number(layer, neuron)
        return RedirectResponse(f"/neurons/{layer}/{neuron}", 303)

    async def neuron(self, request: Request) -> Response:
        layer, neuron = request.path_params["layer"], request.path_params["neuron"]
        data = await run_in_thread(neuron_view.neuron, self._source, layer, neuron)
        text, own, problem = request.query_params.get("text", ""), None, ""
        if text and not comes_from_elsewhere(request.headers):
            try:
                own = await self._with_model(neuron_view.on_text, layer, neuron, text)
            except UserError as e:
                problem = str(e)
        about = {"data": data, "text": text, "own": own, "problem": problem}
        steer = await self.steering.box(request)
        return await run_in_thread(self._page, request, "neuron.html", **about, steer=steer)

    async def to_text(self, request: Request) -> Response:
        layer, neuron = request.path_params["layer"], request.path_params["neuron"]
        self._source.number(layer, neuron)
        text = await field(request, "text")
        return redirect_with(f"/neurons/{layer}/{neuron}", {"text": text}, "#own-text")

    async def label(self, request: Request) -> Response:
        layer, neuron = await self._set_label(request)
        return RedirectResponse(f"/neurons/{layer}/{neuron}", 303)

    async def prompt(self, request: Request) -> Response:
        text, data, problem = request.query_params.get("text", ""), None, ""
        if text and not comes_from_elsewhere(request.headers):
            try:
                data = await self._with_model(search_view.prompt, text)
            except UserError as e:
                problem = str(e)
        chosen = number(request, "token") if data and "token" in request.query_params else None
        if data and chosen is not None and chosen >= len(data["tokens"]):
            raise NotThereError(f"token {chosen}: the text has {len(data['tokens'])}, counted from 0")

        def at_link(token: int | None) -> str:
            return "/prompt?" + urlencode({"text": text} | ({} if token is None else {"token": token}))

        answer = {"text": text, "data": data, "problem": problem, "chosen": chosen, "at_link": at_link}
        token = data["tokens"][chosen] if data and chosen is not None else None
        limits = {
            "most_tokens": self._reader.most_tokens,
            "highest": search_view.highest(data) if data else {},
            "usual": search_view.usual_tokens(self._source, token) if token else {},
        }
        return await run_in_thread(
            self._page, request, "prompt.html", 400 if problem else 200, **answer, **limits
        )

    async def to_prompt(self, request: Request) -> Response:
        return redirect_with("/prompt", {"text": await field(request, "text")})

    async def search(self, request: Request) -> Response:
        asked, data, problem = request.query_params, None, ""
        if asked.get("q") and not comes_from_elsewhere(request.headers):
            try:
                data = await self._found(request)
            except UserError as e:
                problem = str(e)
        answer = {"asked": asked, "kind": asked.get("kind", "words"), "data": data, "problem": problem}
        return await run_in_thread(self._page, request, "search.html", 400 if problem else 200, **answer)

    def labels(self, request: Request) -> Response:
        return self._page(request, "labels.html", neurons=search_view.labelled(self._source))

    # Data

    def overview_json(self, request: Request) -> Response:
        return Json(overview_view.overview(self._source, self._index, self._asked(request)))

    def neuron_json(self, request: Request) -> Response:
        place = request.path_params
        return Json(neuron_view.neuron(self._source, place["layer"], place["neuron"]))

    def context_json(self, request: Request) -> Response:
        place = request.path_params
        at, size = (number(request, name) for name in ("at", "size"))
        data = neuron_view.context(self._source, place["layer"], place["neuron"], at, size)
        strongest = self._source.row(self._source.number(place["layer"], place["neuron"]), ["max_activation"])
        shaded = pages.pieces(data["tokens"], data["values"], strongest["max_activation"], data["example"])
        return Json({**data, "pieces": [dataclasses.asdict(piece) for piece in shaded]})

    async def text_json(self, request: Request) -> Response:
        layer, neuron = request.path_params["layer"], request.path_params["neuron"]
        text = await field(request, "text")
        return Json(await self._with_model(neuron_view.on_text, layer, neuron, text))

    async def label_json(self, request: Request) -> Response:
        layer, neuron = await self._set_label(request)
        return Json({"layer": layer, "neuron": neuron, "label": self._source.labels.get(layer, neuron)})

    async def prompt_json(self, request: Request) -> Response:
        return Json(await self._with_model(search_view.prompt, await field(request, "text")))

    async def search_json(self, request: Request) -> Response:
        return Json(await self._found(request))

    def labels_json(self, _request: Request) -> Response:
        return file(self._source.labels.as_json(), "application/json", "labels.json")

    def labels_csv(self, _request: Request) -> Response:
        return file(self._source.labels.as_csv(), "text/csv; charset=utf-8", "labels.csv")

    # Errors

    def mistake(self, request: Request, error: Exception) -> Response:
        return self._error(request, 404 if isinstance(error, NotThereError) else 400, str(error))

    def busy(self, request: Request, _error: Exception) -> Response:
        return self._error(request, 503, "too many are waiting for this already: try again in a moment")

    def http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = "there is no such page" if error.status_code == 404 else error.detail
        return self._error(request, error.status_code, said, dict(error.headers or {}))

    def bug(self, request: Request, _error: Exception) -> Response:
        return self._error(request, 500, "this page could not be made; the terminal says why")

    def _error(
        self, request: Request, status: int, message: str, headers: dict[str, str] | None = None
    ) -> Response:
        if request.scope["path"].startswith("/api/"):
            return Json({"error": message}, status, headers)
        answer = self._page(request, "error.html", status, message=message, code=status)
        answer.headers.update(headers or {})
        return answer

    # Shared

    def _page(self, request: Request, template: str, status: int = 200, **content: Any) -> Response:
        measured = self._source.measured
        theme = request.cookies.get("topklm_theme")
        theme = theme if theme in ("light", "dark") else ""
        about = {
            "measured": measured,
            "theme": theme,
            "page": template.removesuffix(".html"),
            "max_label": MAX_CHARACTERS,
        }
        text = self._templates.get_template(template).render({**about, **content})
        return HTMLResponse(text, status, {"cache-control": "no-store"})

    @functools.cached_property
    def _plots(self) -> dict[str, Any]:
        return {"layers": pages.layer_plots(self._source), "entropies": pages.entropy_map(self._source)}

    def _asked(self, request: Request) -> Asked:
        # Of several boxes with one name, all that are ticked.
        several = {"layer": ",".join(request.query_params.getlist("layer"))}
        return Asked.of({**dict(request.query_params), **several}, self._source.measured.layers)

    async def _found(self, request: Request) -> dict[str, Any]:
        asked = request.query_params
        text, kind = asked.get("q", ""), asked.get("kind", "words")
        if kind not in search_view.KINDS:
            raise UserError(f"kind = {kind}: must be one of {', '.join(search_view.KINDS)}")
        if kind == "words":
            return await run_in_thread(search_view.words, self._source, self._index, text)
        options = (asked.get("case") != "1", asked.get("ends") == "1")
        return await run_limited(self._regex_turn, search_view.regex, self._source, text, *options)

    async def _with_model(self, view: Callable[..., Any], *arguments: Any) -> Any:
        return await run_limited(self._model_turn, view, self._source, self._reader, *arguments)

    async def _set_label(self, request: Request) -> tuple[int, int]:
        layer, neuron = request.path_params["layer"], request.path_params["neuron"]
        self._source.number(layer, neuron)
        await run_in_thread(self._source.labels.set, layer, neuron, await field(request, "label"))
        return layer, neuron


def serve(source: NeuronData, host: str, port: int, ready: Callable[[str], None] = print) -> None:
    """Answers until Ctrl-C.

    Args:
        source: The run's neurons.
        host: Address to listen on; on others than the loopback a token is needed.
        port: 0 takes a free one.
        ready: Is told the address to open, once it can be opened.

    Raises:
        UserError: If the port is taken, or the address is none of this machine.
    """
    listening = server.listen(host, port)
    port = listening.getsockname()[1]
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    application = create(source)
    guarded = Guard(application, server.names_of(host, port) if token is None else None, token)
    address = f"http://{server.name_of(host)}:{port}/" + (f"?token={token}" if token else "")
    running = server.make_server(guarded, closing=application.state.closing)
    server.run(running, listening, lambda: ready(address))
