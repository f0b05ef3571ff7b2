"""Answers to Steer boxes: a stream of both texts, or a page with them."""

from collections.abc import Awaitable, Callable
import dataclasses
from typing import Any

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from topklm.errors import UserError
from topklm.explorer.live_model import LiveModel
from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.requests import (
    BusyError,
    check_not_busy,
    fields,
    redirect_with,
    run_in_thread,
    run_limited,
    taken,
)
from topklm.explorer.steering import COLUMNS, NAMES, SteerSettings, Writing
from topklm.explorer.views.steering import box
from topklm.web.http import Say, Stream, comes_from_elsewhere, to_json

_ANCHOR = "#steer"  # of the box on its page

Line = dict[str, Any]
SayLine = Callable[[Line], Awaitable[None]]


class SteeringAnswers:
    """One pair of texts is written at a time; between a few tokens, others have the model.

    Args:
        source: Of the neurons.
        reader: Of the model.
        model_turn: Of everybody who uses the model.
    """

    def __init__(self, source: NeuronData, reader: LiveModel, model_turn: anyio.CapacityLimiter):
        self._source, self._reader, self._model_turn = source, reader, model_turn
        self._turn = anyio.CapacityLimiter(1)
        self._closing = False

    def close(self) -> None:
        """Ends what is being written, for a server that is told to stop; the last line is then missing."""
        self._closing = True

    async def stream(self, request: Request) -> Response:
        """Streams lines of JSON: the prompt, pieces of both columns as they come, at last the end of each."""
        writing = await self._begin(request, SteerSettings.of(await fields(request)))

        async def write(say: Say) -> None:
            async def say_line(line: Line) -> None:
                await say(to_json(line) + b"\n")

            await self._write(writing, say_line)

        return Stream(write, "application/x-ndjson")

    async def to_page(self, request: Request) -> Response:
        """Sends on to the page with both texts, which has all settings in its link."""
        at = request.path_params
        self._source.number(at["layer"], at["neuron"])
        content = await fields(request)
        chosen = {name: str(content[name]) for name in NAMES if name in content}
        return redirect_with(f"/neurons/{at['layer']}/{at['neuron']}", chosen, _ANCHOR)

    async def box(self, request: Request) -> dict[str, Any]:
        """Returns the content of a page's box, with both texts if the link asks for them."""
        at, asked = request.path_params, request.query_params
        shown = await run_in_thread(box, self._source, at["layer"], at["neuron"])
        if "prompt" not in asked:
            return shown
        chosen = {name: asked[name] for name in NAMES if name in asked}
        shown["chosen"] |= chosen
        if not comes_from_elsewhere(request.headers):
            try:
                shown["written"] = await self._whole(request, SteerSettings.of(chosen))
            except UserError as e:
                shown["problem"] = str(e)
        return shown

    async def _whole(self, request: Request, settings: SteerSettings) -> Line:
        lines: list[Line] = []

        async def keep(line: Line) -> None:
            lines.append(line)

        await self._write(await self._begin(request, settings), keep)
        if "ends" not in lines[-1]:
            raise BusyError
        pieces = {name: [line for line in lines[1:-1] if line["column"] == name] for name in COLUMNS}
        return {"prompt": lines[0]["prompt"], "pieces": pieces, "ends": lines[-1]["ends"]}

    async def _begin(self, request: Request, settings: SteerSettings) -> Writing:
        check_not_busy(self._turn)
        at = request.path_params["layer"], request.path_params["neuron"]
        return await run_limited(self._model_turn, Writing, self._source, self._reader, *at, settings)

    async def _write(self, writing: Writing, say: SayLine) -> None:
        async with taken(self._turn):
            await say({"prompt": writing.prompt})
            while not writing.done:
                if self._closing:
                    return
                for piece in await self._with_model(writing.more):
                    await say(dataclasses.asdict(piece))
            ends = await self._with_model(writing.ends)
            await say({"ends": {column: dataclasses.asdict(end) for column, end in ends.items()}})

    async def _with_model(self, function: Callable[[], Any]) -> Any:
        # Who has begun may wait for the model, however many others do.
        return await anyio.to_thread.run_sync(function, limiter=self._model_turn)
