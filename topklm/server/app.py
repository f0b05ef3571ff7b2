"""The server's addresses: JSON, or a stream of it, for each request; served on one port."""

from collections.abc import Callable
import socket
import time
from typing import Any
import uuid

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from topklm.server import fields, neurons, requests
from topklm.server.answers import WhileThere, events, whole_answer
from topklm.server.errors import ApiError, refused
from topklm.server.service import Service
from topklm.web import server as web_server
from topklm.web.client import Json
from topklm.web.security import Guard

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
    errors: dict[Any, Any] = {ApiError: _mistake, HTTPException: _http_error, Exception: _bug}
    return Starlette(routes=routes, exception_handlers=errors)


class _Api:
    """Answers requests, one method for each address."""

    def __init__(self, service: Service):
        self._service = service

    def health(self, _request: Request) -> Response:
        load = self._service.engine.load()
        busy = {"running": load.running, "waiting": load.waiting, "slots": load.most_running}
        if self._service.closing:
            return Json({"status": "stopping", **busy}, 503)
        return Json({"status": "ok", "model": self._service.name, **busy})

    def models(self, _request: Request) -> Response:
        return Json({"object": "list", "data": [self._model()]})

    def one_model(self, request: Request) -> Response:
        requests.check_model({"model": request.path_params["name"]}, self._service.name)
        return Json(self._model())

    async def completions(self, request: Request) -> Response:
        content, service = fields.json_object(await request.body()), self._service
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
            return WhileThere(lambda: whole_answer(about, asked, pieces))
        return events(about, asked, pieces, service.limits.timeout + _SENDING_SECONDS)

    async def tokenize(self, request: Request) -> Response:
        content, model = fields.json_object(await request.body()), self._service.model
        fields.refuse_unknown(content, ("model", "prompt", "add_special_tokens", "return_token_strs"))
        requests.check_model(content, self._service.name)
        text, separator = fields.text(content, "prompt"), model.tokenizer.separator_id
        ids = (await anyio.to_thread.run_sync(model.tokenizer.encode, text)).tolist()
        # Elsewhere its name is text like any other. Alone it is how clients ask for its id.
        if [text] == model.tokenizer.token_strings([separator]):
            ids = [separator]
        if fields.boolean(content, "add_special_tokens", True):
            ids = [separator, *ids]
        names = model.tokenizer.token_strings(ids)
        context = model.config.model.context_length
        return Json({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": names})

    async def detokenize(self, request: Request) -> Response:
        content, model = fields.json_object(await request.body()), self._service.model
        fields.refuse_unknown(content, ("model", "tokens"))
        requests.check_model(content, self._service.name)
        ids = requests.token_ids(content, "tokens", model.config.model.vocab_size)
        return Json({"prompt": await anyio.to_thread.run_sync(model.tokenizer.decode, ids)})

    def tokenizer_info(self, _request: Request) -> Response:
        model = self._service.model
        return Json(model.tokenizer.config(model.config.model.context_length))

    async def neurons(self, request: Request) -> Response:
        content, service = fields.json_object(await request.body()), self._service
        fields.refuse_unknown(content, ("model", "prompt", "layers", "top"))
        requests.check_model(content, service.name)
        config = service.model.config.model
        if not config.n_topk_layers:
            raise ApiError(400, f"{service.name} has no layer with TopK: its neurons are all active")
        if content.get("prompt") is None:
            raise fields.missing("prompt", "a text, or token ids")
        prompt = content["prompt"]
        ids = await anyio.to_thread.run_sync(requests.prompt_ids, service.model, prompt, service.limits)
        if len(ids) > config.context_length:
            message = (
                f"prompt has {len(ids)} tokens: must be at most {config.context_length}, the model's context"
            )
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        layers = content.get("layers")
        layers = list(range(config.n_topk_layers)) if layers is None else layers
        if not isinstance(layers, list) or any(
            type(layer) is not int or not 0 <= layer < config.n_topk_layers for layer in layers
        ):
            allowed = f"an array of integers from 0 to {config.n_topk_layers - 1}, layers with TopK"
            raise fields.wrong("layers", layers, allowed)
        most = fields.integer(content, "top", config.topk_k, 1, config.topk_k, "the k of the model")
        found = await service.call(lambda: neurons.active(service.model, service.buckets, ids))
        first = 1 if isinstance(prompt, str) else 0  # the separator is ours, not the text's
        tokens = neurons.described(service.model, ids, found, first=first, layers=layers, most=most)
        return Json({"object": "neurons", "model": service.name, "tokens": tokens})

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


def _mistake(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return ApiError(
            404, f"there is nothing at {request.scope['path']}: see /v1/models, /v1/completions"
        ).response()
    if error.status_code == 405:
        answer = ApiError(
            405, f"{request.method} is not for {request.scope['path']}: use another method"
        ).response()
        answer.headers.update(error.headers or {})
        return answer
    return ApiError(error.status_code, error.detail).response()


def _bug(_request: Request, _error: Exception) -> Response:
    return ApiError(500, "a fault of the server, which its terminal tells of").response()


def serve(
    service: Service,
    listening: socket.socket,
    host: str,
    token: str | None,
    ready: Callable[[str], None] = print,
) -> None:
    """Answers until Ctrl-C, or until the process is asked to end; then sequences have a time of grace.

    Args:
        service: It answers; its engine has been started, and is closed in the end.
        listening: From `topklm.web.server.listen`.
        host: Where it listens.
        token: Has to be sent by clients as their API key; None: they need none.
        ready: Called with the address, once it answers.
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
