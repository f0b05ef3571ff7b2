"""Tokens of many texts, fast: a word that was met before is looked up instead of encoded again.

Text is cut where no token can cross, mostly before spaces; the piece between, a word with its space and
punctuation, comes back again and again (Zipf's law). The tokens are the library's own, to the last one.
"""

from collections.abc import Callable, Sequence
import itertools
import re
import threading

import numpy as np

from topklm.data.tokenizer import Tokenizer

MAX_WORDS = 1 << 15  # words remembered, some 250 bytes each; four times as many are no faster
_JOINED_CHARS = 1 << 16  # new words are encoded together, in pieces of about this length


Encode = Callable[[Sequence[str]], list[np.ndarray]]  # texts -> token ids of each, int32[n_i]


def fastest(tokenizer: Tokenizer) -> Encode:
    """Returns the fastest encoder with the tokenizer's own tokens: it remembers words where it can."""
    token_bytes = tokenizer.token_bytes_lengths()
    if not tokenizer.cut_before or token_bytes is None:
        return tokenizer.encode_batch
    return WordEncoder(tokenizer.encode_batch, tokenizer.cut_before, token_bytes).encode


class WordEncoder:
    """Remembers the tokens of words. Threads may share it; it serves one at a time."""

    def __init__(
        self,
        encode_batch: Encode,
        cut_before: str,
        token_bytes: np.ndarray,
        max_words: int = MAX_WORDS,
    ):
        """Takes what it knows of the tokenizer.

        Args:
            encode_batch: Texts to token ids.
            cut_before: Characters before which no token crosses, see `Tokenizer.cut_before`.
            token_bytes: int64[V], the UTF-8 bytes that each token stands for.
            max_words: Words remembered before all are forgotten.
        """
        self._encode_batch, self._cut_before, self._token_bytes = encode_batch, cut_before, token_bytes
        # White space, then everything up to the next place where a text may be cut.
        self._word = re.compile(rf"\s*\S+(?:(?![{cut_before}])\s+(?:\S+|\Z))*|\s+")
        self._max_words = max_words
        self._lock = threading.Lock()
        self._forget()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each text, int32[n_i]."""
        with self._lock:
            return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if len(self._numbers) > self._max_words:
            self._forget()
        words = [self._word.findall(text) for text in texts]
        counts = [len(part) for part in words]
        numbers = np.fromiter(
            map(self._numbers.__getitem__, itertools.chain.from_iterable(words)), np.int64, sum(counts)
        )
        self._learn()
        lengths = self._lengths[numbers]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if ends.size else 0
        # Where in the table each token of the texts is: the word's place, and how far into the word.
        places = np.repeat(self._starts[numbers] - (ends - lengths), lengths) + np.arange(total)
        tokens = self._tokens[places]
        cuts = np.concatenate([[0], ends])[np.cumsum(counts)[:-1]] if counts else []
        return np.split(tokens, cuts) if counts else []

    def _forget(self) -> None:
        self._numbers = _Numbers()
        self._tokens = np.zeros(0, np.int32)  # of all words, one after another
        self._starts = np.zeros(0, np.int64)
        self._lengths = np.zeros(0, np.int64)

    def _learn(self) -> None:
        """Encodes the words that were met for the first time."""
        words = self._numbers.take_new()
        if not words:
            return
        tokens = np.concatenate(self._encode_batch(self._joined(words)))
        # Every token stands for a fixed number of bytes, and no token crosses from one word to the next.
        byte_ends = np.cumsum(self._token_bytes[tokens])
        word_ends = np.cumsum([len(word.encode()) for word in words])
        ends = np.searchsorted(byte_ends, word_ends, side="left") + 1
        lengths = np.diff(ends, prepend=0)
        self._starts = np.concatenate([self._starts, self._tokens.size + ends - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._tokens = np.concatenate([self._tokens, tokens])

    def _joined(self, words: Sequence[str]) -> list[str]:
        """Joins words to few texts; a word that could join the one before it begins a text."""
        texts: list[list[str]] = []
        size = 0
        for word in words:
            apart = texts and word[0] in self._cut_before and not texts[-1][-1][-1].isspace()
            if not apart or size >= _JOINED_CHARS:
                texts.append([])
                size = 0
            texts[-1].append(word)
            size += len(word)
        return ["".join(text) for text in texts]


class _Numbers(dict[str, int]):
    """Numbers words in the order in which they are first asked for."""

    def __init__(self) -> None:
        self._new: list[str] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self._new.append(word)
        return number

    def take_new(self) -> list[str]:
        new, self._new = self._new, []
        return new
