"""A model, the engine that decodes with it, and their answer to one request."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
import contextlib
import functools
import time
from typing import Any

import numpy as np

from topklm.inference.engine import ClosedError, Engine, FullError, SequenceUpdate
from topklm.inference.language_model import LanguageModel
from topklm.inference.sequence import Sequence as TokenSequence
from topklm.inference.sequence import ServingBuckets
from topklm.inference.steps import Scores, scores_of_prompt
from topklm.server.answers import Choice
from topklm.server.requests import FAULT, ApiError, Completion, Limits

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

    def start(self, warm_up: Callable[[int, int], None] | None) -> None:
        """Starts the engine, see `Engine.start`; the programs for neurons are compiled too."""
        if warm_up is not None and self.model.config.model.n_topk_layers:
            for length in self.buckets.prompts:
                self.active_neurons([0] * length)
        self.engine.start(warm_up)

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
        that `start` has compiled programs for.
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
