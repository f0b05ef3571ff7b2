"""Answers that take long, in the form that OpenAI gives to them: whole, or piece by piece."""

import codecs
from collections.abc import AsyncIterator, Sequence
import contextlib
import math
from typing import Any

import numpy as np
from starlette.responses import Response

from topklm.data.tokenizer import Tokenizer
from topklm.inference.sequence import Sequence as TokenSequence
from topklm.inference.sequence import Token
from topklm.inference.steps import Scores
from topklm.inference.tokens import BROKEN, TextStream
from topklm.server.requests import ApiError, Completion
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
        """Returns the next piece; None if there is nothing to be sent yet.

        A stop string that comes up ends the completion: see `finish_reason`.
        """
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
