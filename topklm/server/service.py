"""A model, the engine that decodes with it, and their answer to one request, in the form of OpenAI's."""

import asyncio
import codecs
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
import contextlib
import functools
import math
import time
from typing import Any

import numpy as np
from starlette.responses import Response

from topklm.data.tokenizer import Tokenizer
from topklm.inference.engine import ClosedError, Engine, FullError, SequenceUpdate
from topklm.inference.language_model import LanguageModel
from topklm.inference.sequence import Sequence as TokenSequence
from topklm.inference.sequence import ServingBuckets, Token
from topklm.inference.steps import Scores, scores_of_prompt
from topklm.inference.tokens import BROKEN, TextStream
from topklm.server.requests import FAULT, ApiError, Completion, Limits
from topklm.web.http import Json, Say, Stream, to_json

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
