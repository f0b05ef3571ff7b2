"""A model, the engine that continues texts with it, and what both answer to one request."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
import contextlib
import functools
import time
from typing import Any

import numpy as np

from topklm.inference import scores
from topklm.inference.engine import Engine
from topklm.inference.language_model import LanguageModel
from topklm.inference.news import ClosedError, FullError, News
from topklm.inference.programs import Plan, Rows
from topklm.inference.sampling import RowSampling
from topklm.inference.scores import Scores
from topklm.inference.sizes import Sizes, of_rows
from topklm.inference.text import Text
from topklm.server import neurons
from topklm.server.choices import Choice
from topklm.server.errors import ApiError
from topklm.server.limits import Limits
from topklm.server.requests import Completion

_FAULT = "a fault of the server, which its terminal tells of"


class Service:
    """What the server's addresses stand for.

    Attributes:
        model: What answers.
        name: Under which it is asked for.
        limits: See `Limits`.
        began: Seconds since 1970.
    """

    def __init__(self, model: LanguageModel, name: str, limits: Limits, n_rows: int | None = None):
        """`n_rows`: texts that are continued at once; default as `Sizes.of`."""
        self.model, self.name, self.limits = model, name, limits
        self.began = int(time.time())
        self.sizes = Sizes.of(model.config.model, n_rows)
        self.engine = Engine(
            model.config.model,
            model.params,
            model.tokenizer.separator_id,
            sizes=self.sizes,
            most_waiting=limits.waiting,
        )
        self.closing = False
        self._listening: set[asyncio.Queue[list[News] | None]] = set()  # None: the time of grace is over

    def start(self, warm_up: Callable[[int, int], None] | None) -> None:
        """See `Engine.start`; the programs for neurons are compiled too."""
        if warm_up is not None and self.model.config.model.n_topk_layers:
            for length in self.sizes.lengths:
                neurons.active(self.model, self.sizes, [0] * length)
        self.engine.start(warm_up)

    def stop(self) -> None:
        """Takes no more texts; those that are being made are ended when the time of grace is over."""
        self.closing = True

        def end() -> None:
            for news in self._listening:
                news.put_nowait(None)

        asyncio.get_running_loop().call_later(self.limits.grace, end)

    async def pieces(self, asked: Completion) -> AsyncIterator[dict[str, Any]]:
        """Pieces of the choices of an answer as they come, each as OpenAI has it; then {"usage": ...}.

        Raises:
            ApiError: If too many wait, the time is up, or the server is being stopped.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Queue[list[News] | None]()

        def deliver(some: list[News]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(news.put_nowait, some)

        deadline = loop.time() + self.limits.timeout
        choices = {
            text: Choice(self.model.tokenizer, index, text, asked.stop)
            for index, text in enumerate(asked.texts)
        }
        going = set(choices)
        self._submit(asked.texts, deliver)
        self._listening.add(news)
        try:
            if asked.echo:
                async for echo in self._echoes(asked, choices, deadline):
                    yield echo
            while going:
                some = await self._in_time(news.get(), deadline)
                if some is None:
                    raise _stopping()
                for text, tokens, finished in some:
                    if finished == "failed":
                        raise ApiError(500, _FAULT)
                    if finished == "closed":
                        raise _stopping()
                    piece = choices[text].add(tokens, finished) if text in going else None
                    if choices[text].finish_reason and text in going:
                        going.remove(text)
                        self.engine.give_up([text])
                    if piece:
                        yield piece
        finally:
            self._listening.discard(news)
            self.engine.give_up(list(going))
        n_prompt, n_new = sum(map(len, asked.prompts)), sum(choice.n_new for choice in choices.values())
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
        yield {"usage": usage}

    async def call(self, function: Callable[[], Any]) -> Any:
        """What a function gives that uses the model, called between tokens of texts.

        Raises:
            ApiError: If the time is up, or the server is being stopped.
        """
        return await self._in_time(
            self._called(function), asyncio.get_running_loop().time() + self.limits.timeout
        )

    async def _called(self, function: Callable[[], Any]) -> Any:
        if self.closing:
            raise _stopping()
        try:
            return await asyncio.wrap_future(self.engine.call(function))
        except ClosedError as e:
            raise _stopping() from e

    def _submit(self, texts: Sequence[Text], deliver: Callable[[list[News]], None]) -> None:
        if self.closing:
            raise _stopping()
        try:
            self.engine.submit(texts, deliver)
        except FullError as e:
            most = self.limits.waiting
            raise ApiError(
                429, f"too many texts wait already (at most {most} do): try again in a moment"
            ) from e
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
        self, asked: Completion, choices: dict[Text, Choice], deadline: float
    ) -> AsyncIterator[dict[str, Any]]:
        found: Scores | None = None
        for number, text in enumerate(asked.texts):
            if asked.logprobs is not None and number % asked.n == 0 and text.n_prompt > 1:
                found = await self._in_time(
                    self._called(functools.partial(self._prompt_scores, text)), deadline
                )
            elif asked.logprobs is not None and text.n_prompt == 1:
                found = _NO_SCORES
            yield choices[text].echo(found)

    def _prompt_scores(self, text: Text) -> Scores:
        config, prompt = self.model.config.model, text.tokens[: text.n_prompt]
        tokens = np.zeros((1, self.sizes.length(len(prompt))), np.int32)
        tokens[0, : len(prompt)] = prompt
        rows = Rows(
            RowSampling.of([text.sampling]),
            np.zeros(1, np.int32),
            np.array([len(prompt)], np.int32),
            np.int32(self.model.tokenizer.separator_id),
            None if text.steer is None else of_rows(config, [(0, text.steer)], 1),
        )
        plan = Plan.of(config, self.model.params)
        return scores.of_prompt(plan, self.model.params, rows, tokens, len(prompt))


_NO_SCORES = Scores(np.zeros(0, np.float32), np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32))


def _stopping() -> ApiError:
    return ApiError(503, "the server is being stopped: try another, or later", None, "stopping")
