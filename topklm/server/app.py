"""The server: a model, the engine that decodes with it, and addresses in the form of OpenAI's."""

import asyncio
import codecs
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
import contextlib
import functools
import math
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

from topklm import web
from topklm.data.tokenizer import Tokenizer
from topklm.inference.engine import ClosedError, Engine, FullError, SequenceUpdate
from topklm.inference.language_model import LanguageModel
from topklm.inference.sequence import Sequence as TokenSequence
from topklm.inference.sequence import ServingBuckets, Token
from topklm.inference.steps import Scores, scores_of_prompt
from topklm.inference.tokens import BROKEN, TextStream
from topklm.server import requests
from topklm.server.requests import FAULT, ApiError, Completion, Limits
from topklm.web import Guard, Json, Say, Stream, to_json, unless_gone

_CONTEXT = 8  # tokens that are decoded again, for what a token's text owes to those before


class Choice:
    """A completion that is being decoded, and the pieces that it is sent in."""

    def __init__(self, tokenizer: Tokenizer, index: int, sequence: TokenSequence, stop: tuple[str, ...]):
        """Begins with nothing sent; `index` counts the completions of the answer."""
        self.sequence = sequence
        self.finish_reason: str | None = None  # "stop" or "length"
        prompt = sequence.tokens[: sequence.n_prompt]
        self._tokenizer, self._index = tokenizer, index
        self._stream = TextStream(tokenizer, prompt, stop)
        self._wants_scores = sequence.n_alternatives is not None
        self._sent = 0  # characters
        self._offsets = _Offsets(tokenizer, prompt[-_CONTEXT:])
        self._held: list[tuple[Token, int]] = []  # tokens that are not sent yet, and where they begin

    @property
    def n_new(self) -> int:
        """Tokens drawn so far, up to the one that completed a stop string."""
        return self._stream.n_tokens - self.sequence.n_prompt

    def echo(self, scores: Scores | None) -> dict[str, Any]:
        """Returns the prompt as the first piece, with the scores of its tokens but the first if asked for."""
        prompt = self.sequence.tokens[: self.sequence.n_prompt]
        said = self._tokenizer.decode(prompt)
        if scores is not None:
            self._offsets = _Offsets(self._tokenizer)
            self._hold(Token(prompt[0]))
            for row, token in enumerate(prompt[1:]):
                self._hold(Token(token, *scores.row(row, self.sequence.n_alternatives or 0)))
        self._sent = len(said)
        return self._piece(said, all_held=True)

    def add(self, tokens: list[Token], finished: str | None) -> dict[str, Any] | None:
        """Returns the next piece, None if nothing is to be sent; a stop string sets `finish_reason`."""
        n_before = self.n_new
        said = self._stream.add([token.id for token in tokens])
        for token in tokens[: self.n_new - n_before] if self._wants_scores else ():
            self._hold(token)
        if finished and not self._stream.stopped:
            said += self._stream.end()
        self.finish_reason = "stop" if self._stream.stopped else finished
        self._sent += len(said)
        if not said and not self.finish_reason:
            return None
        return self._piece(said, all_held=bool(self.finish_reason) and not self._stream.stopped)

    def _hold(self, token: Token) -> None:
        self._held.append((token, self._offsets.next(token.id)))

    def _piece(self, said: str, all_held: bool) -> dict[str, Any]:
        told = [one for one in self._held if all_held or one[1] < self._sent]
        self._held = self._held[len(told) :]
        return {
            "text": said,
            "index": self._index,
            "logprobs": self._logprobs(told) if self._wants_scores else None,
            "finish_reason": self.finish_reason,
        }

    def _logprobs(self, told: list[tuple[Token, int]]) -> dict[str, Any]:
        wanted, own = self.sequence.n_alternatives, [token.log_probability for token, _ in told]
        return {
            "tokens": self._tokenizer.token_strings(np.array([token.id for token, _ in told], int)),
            "token_logprobs": [None if value is None else finite(value) for value in own],
            "top_logprobs": [self._alternatives(token) for token, _ in told] if wanted else None,
            "text_offset": [begin for _, begin in told],
        }

    def _alternatives(self, token: Token) -> dict[str, float] | None:
        """Returns log probabilities by name, that of the token itself among them."""
        if token.log_probability is None:
            return None
        pairs = [*token.alternatives, (token.id, token.log_probability)]
        names = self._tokenizer.token_strings([one for one, _ in pairs])
        found: dict[str, float] = {}
        for name, (_, value) in zip(names, pairs, strict=True):
            found.setdefault(name, finite(value))
        return found


def finite(value: float) -> float:
    """Returns a log probability that JSON can hold; it is NaN where a model was steered out of all bounds."""
    return max(value, -9999.0) if math.isfinite(value) else -9999.0


class _Offsets:
    """Where tokens begin: at the character of the text to which the first of their bytes belongs.

    Bytes that are of no character belong to the broken one that is shown for them.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """Counts from the end of the tokens `before`."""
        self._tokenizer = tokenizer
        self._ids = list(before)  # from where on text is decoded
        self._begin = -len(tokenizer.decode(self._ids))  # the character with which it begins
        self._last = 0  # returned last

    def next(self, token_id: int) -> int:
        """Returns the offset of the next token, in characters."""
        text = self._tokenizer.decode(self._ids)
        place = self._begin + len(text)
        if not text.endswith(BROKEN):
            self._ids = self._ids[-_CONTEXT:]
            self._begin = place - len(self._tokenizer.decode(self._ids))
        elif before := self._begun_in(token_id):
            own = len(self._bytes_of(self._ids[-1]))
            # Of a character in more than two tokens, some libraries show each byte as a broken one.
            place = self._last if before >= own else place - 1
        self._ids.append(token_id)
        self._last = max(place, 0)
        return self._last

    def _begun_in(self, token_id: int) -> int:
        """Counts the bytes before a token that are of the character to which its first byte belongs."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(map(self._bytes_of, self._ids[-_CONTEXT:])))
        n_before = len(decoder.getstate()[0])
        made = decoder.decode(self._bytes_of(token_id)[:1])
        n_after = len(decoder.getstate()[0])
        return n_before if n_after > n_before or (made and not n_after and len(made) == 1) else 0

    def _bytes_of(self, token_id: int) -> bytes:
        return b"" if token_id == self._tokenizer.separator_id else self._tokenizer.token_bytes([token_id])[0]


def joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins all pieces of a choice."""
    parts = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
    logprobs = None
    if parts:
        logprobs = {
            name: None if parts[-1][name] is None else [one for part in parts for one in part[name] or ()]
            for name in parts[-1]
        }
    return {**pieces[-1], "text": "".join(piece["text"] for piece in pieces), "logprobs": logprobs}


async def whole_answer(
    about: dict[str, Any], asked: Completion, pieces: AsyncIterator[dict[str, Any]]
) -> Response:
    """Returns all pieces as one JSON object; raises as `pieces` do."""
    found: list[list[dict[str, Any]]] = [[] for _ in asked.sequences]
    usage = None
    async for piece in pieces:
        if "usage" in piece:
            usage = piece["usage"]
        else:
            found[piece["index"]].append(piece)
    return Json({**about, "choices": [joined(some) for some in found], "usage": usage})


def events(
    about: dict[str, Any], asked: Completion, pieces: AsyncIterator[dict[str, Any]], seconds: float
) -> Response:
    """Returns server-sent events, one for each piece, see `Stream`; an error after the first is one too."""
    usage = {"usage": None} if asked.include_usage else {}

    async def write(say: Say) -> None:
        begun = False

        async def event(content: bytes) -> None:
            nonlocal begun
            begun = True
            await say(b"data: " + content + b"\n\n")

        async with contextlib.aclosing(pieces) as some:  # type: ignore[type-var]
            try:
                async for piece in some:
                    if "usage" not in piece:
                        await event(to_json({**about, "choices": [piece], **usage}))
                    elif asked.include_usage:
                        await event(to_json({**about, "choices": [], "usage": piece["usage"]}))
            except ApiError as e:
                if not begun:
                    raise
                await event(to_json(e.content()))
        await event(b"[DONE]")

    return Stream(write, "text/event-stream", seconds)


_NO_SCORES = Scores(np.zeros(0, np.float32), np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32))


class Service:
    """Answers the requests to a server's addresses."""

    def __init__(self, model: LanguageModel, name: str, limits: Limits, n_slots: int | None = None):
        """Makes an engine for a model, of this name in requests; `n_slots` as in `ServingBuckets.of`."""
        self.model, self.name, self.limits = model, name, limits
        self.began = int(time.time())  # seconds since 1970
        config = model.config.model
        self.buckets = ServingBuckets.of(config, n_slots)
        self.engine = Engine(
            config, model.params, model.tokenizer.separator_id, self.buckets, most_waiting=limits.waiting
        )
        self.closing = False
        self._listening: set[asyncio.Queue[list[SequenceUpdate] | None]] = set()  # None: grace is over

    def programs(self) -> list[Callable[[], Any]]:
        """Returns functions for `Engine.start`: `Engine.programs`, and those of neurons."""
        lengths = self.buckets.prompts if self.model.config.model.n_topk_layers else ()
        of_neurons = [functools.partial(self.active_neurons, [0] * length) for length in lengths]
        return [*self.engine.programs(), *of_neurons]

    def stop(self) -> None:
        """Refuses new requests, and ends sequences that have not ended when the time of grace is over."""
        self.closing = True

        def end() -> None:
            for updates in self._listening:
                updates.put_nowait(None)

        asyncio.get_running_loop().call_later(self.limits.grace, end)

    def active_neurons(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the neurons int32[S, T, k] of the TopK layers on one text, the strongest first.

        With them their activations, float32[S, T, k], 0 where none is active. Lengths are rounded up to those
        that `programs` compiles for.
        """
        padded = np.zeros((1, self.buckets.prompt(len(ids))), np.int32)
        padded[0, : len(ids)] = ids
        found = self.model.run_with_cache(padded)[1].neurons
        values = np.asarray(found.values)[:, 0, : len(ids)].astype(np.float32)
        return np.asarray(found.indices)[:, 0, : len(ids)], values

    async def pieces(self, asked: Completion) -> AsyncIterator[dict[str, Any]]:
        """Yields pieces of the choices of an answer as they come, each as OpenAI has it; then {"usage": ...}.

        ApiError if too many wait, the time is up, or the server is being stopped.
        """
        loop, updates = asyncio.get_running_loop(), asyncio.Queue[list[SequenceUpdate] | None]()

        def on_update(some: list[SequenceUpdate]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(updates.put_nowait, some)

        deadline = loop.time() + self.limits.timeout
        choices = {
            one: Choice(self.model.tokenizer, index, one, asked.stop)
            for index, one in enumerate(asked.sequences)
        }
        going = set(choices)
        try:
            with self._unless_stopping():
                self.engine.submit(asked.sequences, on_update)
        except FullError as e:
            text = f"too many texts wait already (at most {self.limits.waiting} do): try again in a moment"
            raise ApiError(429, text) from e
        self._listening.add(updates)
        try:
            if asked.echo:
                async for echo in self._echoes(asked, choices, deadline):
                    yield echo
            while going:
                some = await self._in_time(updates.get(), deadline)
                if some is None:
                    raise _stopping()
                for one, tokens, finished in some:
                    if finished == "failed":
                        raise ApiError(500, FAULT)
                    if finished == "closed":
                        raise _stopping()
                    piece = choices[one].add(tokens, finished) if one in going else None
                    if choices[one].finish_reason and one in going:
                        going.remove(one)
                        self.engine.abort([one])
                    if piece:
                        yield piece
        finally:
            self._listening.discard(updates)
            self.engine.abort(list(going))
        n_prompt = sum(one.n_prompt for one in asked.sequences[:: asked.n])
        n_new = sum(choice.n_new for choice in choices.values())
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
        yield {"usage": usage}

    async def call(self, function: Callable[[], Any], deadline: float | None = None) -> Any:
        """Returns the result of a function that is called between the engine's tokens; raises as `pieces`."""

        async def called() -> Any:
            with self._unless_stopping():
                return await asyncio.wrap_future(self.engine.call(function))

        return await self._in_time(
            called(), deadline or asyncio.get_running_loop().time() + self.limits.timeout
        )

    @contextlib.contextmanager
    def _unless_stopping(self) -> Iterator[None]:
        if self.closing:
            raise _stopping()
        try:
            yield
        except ClosedError as e:
            raise _stopping() from e

    async def _in_time(self, wanted: Awaitable[Any], deadline: float) -> Any:
        try:
            async with asyncio.timeout_at(deadline):
                return await wanted
        except TimeoutError as e:
            seconds = f"{self.limits.timeout:g} seconds"
            raise ApiError(504, f"no whole answer in {seconds}: ask for fewer tokens", None, "timeout") from e

    async def _echoes(
        self, asked: Completion, choices: dict[TokenSequence, Choice], deadline: float
    ) -> AsyncIterator[dict[str, Any]]:
        found: Scores | None = None
        for number, one in enumerate(asked.sequences):
            if asked.logprobs is not None and one.n_prompt == 1:
                found = _NO_SCORES
            elif asked.logprobs is not None and number % asked.n == 0:
                found = await self.call(functools.partial(self._prompt_scores, one), deadline)
            yield choices[one].echo(found)

    def _prompt_scores(self, sequence: TokenSequence) -> Scores:
        size = self.buckets.prompt(sequence.n_prompt)
        return scores_of_prompt(self.model.config.model, self.model.params, sequence, size)


def _stopping() -> ApiError:
    return ApiError(503, "the server is being stopped: try another, or later", None, "stopping")


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
        web.names_of(host, port) if token is None else None,
        token,
        max_body=service.limits.body,
        refuse=refused,
        by_link=False,
        where_token_is="send the one that topklm serve printed as your API key (Authorization: Bearer TOKEN)",
    )
    closing_seconds = round(service.limits.grace) + _LEAVING_SECONDS
    running = web.make_server(guarded, closing_seconds, service.stop)
    try:
        web.run(running, listening, lambda: ready(f"http://{web.name_of(host)}:{port}/v1"))
    finally:
        service.engine.close()
