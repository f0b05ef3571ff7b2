"""One text of an answer: what of it has been said, in the form that OpenAI gives to it."""

from typing import Any

import numpy as np

from topklm.data.tokenizer import Tokenizer
from topklm.inference.scores import Scores
from topklm.inference.streaming import TextStream
from topklm.inference.text import Text, Token
from topklm.server.errors import number


class Choice:
    """A text that is being made, and the pieces that it is told in.

    Attributes:
        text: In the engine.
        finish_reason: "stop" or "length"; None while it goes on.
        n_new: Tokens made so far.
    """

    def __init__(self, tokenizer: Tokenizer, index: int, text: Text, stop: tuple[str, ...]):
        """`index` is its place among all of the answer."""
        self.text, self.n_new = text, 0
        self.finish_reason: str | None = None
        self._tokenizer, self._index = tokenizer, index
        self._stream = TextStream(tokenizer, text.tokens[: text.n_prompt], stop)
        self._wants_scores = text.n_alternatives is not None
        self._told = 0  # characters
        self._begun = 0  # of the characters of all tokens so far
        self._held: list[tuple[Token, int]] = []  # tokens that are not told yet, and where they begin

    def echo(self, scores: Scores | None) -> dict[str, Any]:
        """The prompt as the first piece.

        Args:
            scores: Of its tokens but the first, where they are asked for.
        """
        prompt = self.text.tokens[: self.text.n_prompt]
        said = self._tokenizer.decode(prompt)
        if scores is not None:
            self._hold(Token(prompt[0]))
            for place, token in enumerate(prompt[1:]):
                self._hold(Token(token, *scores.row(place, self.text.n_alternatives or 0)))
        self._begun = self._told = len(said)
        return self._piece(said, all_held=True)

    def add(self, tokens: list[Token], finished: str | None) -> dict[str, Any] | None:
        """The next piece; None if there is nothing to be said yet.

        A stop string that comes up ends the text: see `finish_reason`.
        """
        self.n_new += len(tokens)
        for token in tokens if self._wants_scores else ():
            self._hold(token)
        said = self._stream.add([token.id for token in tokens])
        if finished and not self._stream.stopped:
            said += self._stream.end()
        self.finish_reason = "stop" if self._stream.stopped else finished
        self._told += len(said)
        if not said and not self.finish_reason:
            return None
        return self._piece(said, all_held=bool(self.finish_reason) and not self._stream.stopped)

    def _hold(self, token: Token) -> None:
        self._held.append((token, self._begun))
        # Of a character in parts, the first part makes it begin.
        piece = (
            self._tokenizer.token_bytes([token.id])[0] if token.id != self._tokenizer.separator_id else b""
        )
        self._begun += sum(byte & 0xC0 != 0x80 for byte in piece)

    def _piece(self, said: str, all_held: bool) -> dict[str, Any]:
        told = [one for one in self._held if all_held or one[1] < self._told]
        self._held = self._held[len(told) :]
        return {
            "text": said,
            "index": self._index,
            "logprobs": self._logprobs(told) if self._wants_scores else None,
            "finish_reason": self.finish_reason,
        }

    def _logprobs(self, told: list[tuple[Token, int]]) -> dict[str, Any]:
        wanted = self.text.n_alternatives
        names = self._tokenizer.token_strings(np.array([token.id for token, _ in told], int))
        return {
            "tokens": names,
            "token_logprobs": [
                None if token.log_probability is None else number(token.log_probability) for token, _ in told
            ],
            "top_logprobs": [self._alternatives(token) for token, _ in told] if wanted else None,
            "text_offset": [begin for _, begin in told],
        }

    def _alternatives(self, token: Token) -> dict[str, float] | None:
        """By name, the token itself among them."""
        if token.log_probability is None:
            return None
        pairs = [*token.alternatives, (token.id, token.log_probability)]
        names = self._tokenizer.token_strings([one for one, _ in pairs])
        found: dict[str, float] = {}
        for name, (_, value) in zip(names, pairs, strict=True):
            found.setdefault(name, number(value))
        return found


def joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """All pieces of a choice as one."""
    parts = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
    logprobs = None
    if parts:
        logprobs = {
            name: None if parts[-1][name] is None else [one for part in parts for one in part[name] or ()]
            for name in parts[-1]
        }
    return {**pieces[-1], "text": "".join(piece["text"] for piece in pieces), "logprobs": logprobs}
