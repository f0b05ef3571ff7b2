"""The server's addresses: JSON, or a stream of it, for each request; served on one port."""

from collections.abc import Callable, Sequence
import socket
import time
from typing import Any
import uuid

import anyio.to_thread
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from topklm.inference.language_model import LanguageModel
from topklm.server import requests
from topklm.server.requests import FAULT, ApiError
from topklm.server.service import Service, events, whole_answer
from topklm.web import server as web_server
from topklm.web.http import Guard, Json, unless_gone

_LEAVING_SECONDS = 3  # for answers to be sent once the time of grace is over
_SENDING_SECONDS = 30.0  # beyond its time, for a client that reads slowly


def create(service: Service) -> Starlette:
    """Makes the application."""
    here = _Api(service)
    routes = [
        Route("/health", here.health),
        Route("/v1/models", here.models),
        Route("/v1/models/{name:path}", here.one_model),
        Route("/v1/completions", here.completions, methods=["POST"]),
        *(
            Route(place + name, getattr(here, name[1:]), methods=["POST"])
            for name in ("/tokenize", "/detokenize")
            for place in ("/v1", "")  # the second as in vLLM
        ),
        Route("/tokenizer_info", here.tokenizer_info),
        Route("/v1/neurons", here.neurons, methods=["POST"]),
    ]
    errors: dict[Any, Any] = {
        ApiError: lambda _, error: error.response(),
        HTTPException: _http_error,
        Exception: lambda _, error: ApiError(500, FAULT).response(),
    }
    return Starlette(routes=routes, exception_handlers=errors)


class _Api:
    """Answers requests, one method for each address."""

    def __init__(self, service: Service):
        self._service = service

    def health(self, _request: Request) -> Response:
        load = self._service.engine.load()
        busy = {"running": load.running, "waiting": load.waiting, "slots": load.most_running}
        busy["to_compile"] = load.to_compile
        if self._service.closing:
            return Json({"status": "stopping", **busy}, 503)
        return Json({"status": "ok", "model": self._service.name, **busy})

    def models(self, _request: Request) -> Response:
        return Json({"object": "list", "data": [self._model()]})

    def one_model(self, request: Request) -> Response:
        requests.check_model({"model": request.path_params["name"]}, self._service.name)
        return Json(self._model())

    async def completions(self, request: Request) -> Response:
        content, service = requests.json_object(await request.body()), self._service
        asked = await anyio.to_thread.run_sync(
            requests.completion, service.model, service.name, service.limits, content
        )
        about = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": f"step-{service.model.step}",
        }
        pieces = service.pieces(asked)
        if not asked.stream:
            answer = await unless_gone(whole_answer(about, asked, pieces), request.receive)
            return answer or Response()  # to nobody
        return events(about, asked, pieces, service.limits.timeout + _SENDING_SECONDS)

    async def tokenize(self, request: Request) -> Response:
        known = ("model", "prompt", "add_special_tokens", "return_token_strs")
        content, tokenizer = await self._content(request, known), self._service.model.tokenizer
        text = requests.text(requests.required(content, "prompt", "a text"), "prompt")
        ids = (await anyio.to_thread.run_sync(tokenizer.encode, text)).tolist()
        # Elsewhere its name is text like any other. Alone it is how clients ask for its id.
        if [text] == tokenizer.token_strings([tokenizer.separator_id]):
            ids = [tokenizer.separator_id]
        if requests.boolean(content, "add_special_tokens", True):
            ids = [tokenizer.separator_id, *ids]
        context = self._service.model.config.model.context_length
        names = tokenizer.token_strings(ids)
        return Json({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": names})

    async def detokenize(self, request: Request) -> Response:
        content, model = await self._content(request, ("model", "tokens")), self._service.model
        ids = requests.token_ids(model, content, "tokens")
        return Json({"prompt": await anyio.to_thread.run_sync(model.tokenizer.decode, ids)})

    def tokenizer_info(self, _request: Request) -> Response:
        model = self._service.model
        return Json(model.tokenizer.config(model.config.model.context_length))

    async def neurons(self, request: Request) -> Response:
        content, service = await self._content(request, ("model", "prompt", "layers", "top")), self._service
        config = service.model.config.model
        if not config.n_topk_layers:
            raise ApiError(400, f"{service.name} has no layer with TopK: its neurons are all active")
        prompt = requests.required(content, "prompt", "a text, or token ids")
        most = min(service.limits.prompt_tokens, config.context_length)
        ids = await anyio.to_thread.run_sync(requests.prompt_ids, service.model, prompt, most)
        layers = content.get("layers")
        layers = list(range(config.n_topk_layers)) if layers is None else layers
        if not isinstance(layers, list) or any(
            type(layer) is not int or not 0 <= layer < config.n_topk_layers for layer in layers
        ):
            allowed = f"an array of integers from 0 to {config.n_topk_layers - 1}, layers with TopK"
            raise requests.wrong("layers", layers, allowed)
        top = requests.integer(content, "top", config.topk_k, 1, config.topk_k, "the k of the model")
        found = await service.call(lambda: service.active_neurons(ids))
        first = 1 if isinstance(prompt, str) else 0  # the separator is ours, not the text's
        tokens = _described(service.model, ids, found, layers, top)[first:]
        return Json({"object": "neurons", "model": service.name, "tokens": tokens})

    async def _content(self, request: Request, known: Sequence[str]) -> dict[str, Any]:
        content = requests.json_object(await request.body())
        requests.refuse_unknown(content, known)
        requests.check_model(content, self._service.name)
        return content

    def _model(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.name,
            "object": "model",
            "created": service.began,
            "owned_by": "topklm",
            "max_model_len": service.model.config.model.context_length,
            "step": service.model.step,
        }


def _described(
    model: LanguageModel,
    ids: Sequence[int],
    found: tuple[np.ndarray, np.ndarray],
    layers: Sequence[int],
    most: int,
) -> list[dict[str, Any]]:
    """Lists the strongest neurons of some layers, from `Service.active_neurons`, for each token."""
    indices, values = (array.tolist() for array in found)

    def of_layer(layer: int, position: int) -> dict[str, Any]:
        pairs = zip(indices[layer][position], values[layer][position], strict=True)
        kept = [(neuron, value) for neuron, value in pairs if value != 0][:most]
        return {"layer": layer, "neurons": [n for n, _ in kept], "values": [value for _, value in kept]}

    names = model.tokenizer.token_strings(ids)
    return [
        {"position": at, "id": ids[at], "token": names[at], "layers": [of_layer(i, at) for i in layers]}
        for at in range(len(ids))
    ]


def _http_error(request: Request, error: HTTPException) -> Response:
    path, text = request.scope["path"], error.detail
    if error.status_code == 404:
        text = f"there is nothing at {path}: see /v1/models, /v1/completions"
    if error.status_code == 405:
        text = f"{request.method} is not for {path}: use another method"
    answer = ApiError(error.status_code, text).response()
    answer.headers.update(error.headers or {})
    return answer


def refused(status: int, message: str) -> Response:
    """Returns the answer with which `Guard` refuses a request."""
    answer = ApiError(status, message).response()
    answer.headers["connection"] = "close"
    return answer


def serve(
    service: Service,
    listening: socket.socket,
    host: str,
    token: str | None,
    ready: Callable[[str], None] = print,
) -> None:
    """Answers until Ctrl-C, or until the process is asked to end; then sequences have a time of grace.

    The engine of the service has been started, and is closed in the end. Clients have to send the token, if
    there is one, as their API key. `ready` is called with the address, once it is answered there.
    """
    port = listening.getsockname()[1]
    guarded = Guard(
        create(service),
        web_server.names_of(host, port) if token is None else None,
        token,
        max_body=service.limits.body,
        refuse=refused,
        by_link=False,
        where_token_is="send the one that topklm serve printed as your API key (Authorization: Bearer TOKEN)",
    )
    closing_seconds = round(service.limits.grace) + _LEAVING_SECONDS
    running = web_server.make_server(guarded, closing_seconds, service.stop)
    try:
        web_server.run(running, listening, lambda: ready(f"http://{web_server.name_of(host)}:{port}/v1"))
    finally:
        service.engine.close()
