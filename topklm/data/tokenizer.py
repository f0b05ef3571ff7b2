"""Text to token ids and back: byte-level BPE trained on the corpus at hand, or a tokenizer that users bring.

Whatever the kind, it is one file, tokenizer.json, and no text becomes the separator. Knows nothing of
documents on disk, models or batches.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import hashlib
import itertools
import os
from pathlib import Path
import re
import threading
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from topklm.data.tokenizer_kinds import ENCODINGS, SEPARATOR, container, looks_like_tiktoken, open_backend
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.storage.files import check_name, write_atomically

# Characters per piece given to the library, which needs some 100 bytes for each token of a piece.
_PIECE_CHARS = 1 << 16
# The trainer takes time in the square of a word's length, and text without spaces (DNA, or a line of dashes)
# is one word. Tokens of the few that are longer are learnt from parts of them.
_TRAINED_WORD_BYTES = 1000
_MAX_WORDS = 1 << 15  # words remembered, some 250 bytes each; four times as many are no faster
_JOINED_CHARS = 1 << 16  # new words are encoded together, in pieces of about this length

Encode = Callable[[Sequence[str]], list[np.ndarray]]  # texts -> token ids of each, int32[n_i]


class Tokenizer:
    """A tokenizer.

    Attributes:
        kind: "huggingface" (also for those we train), "sentencepiece" or "tiktoken".
        separator_id: Id of the token that stands before documents. No text encodes to it.
        vocab_size: Largest id + 1, the separator's included.
        sha256: Hex digest of the bytes of tokenizer.json.
        cut_before: A character of this begins a token wherever it follows one that is no white space, so a
            text may be cut before it; empty where that is not known.
    """

    def __init__(self, content: bytes):
        """Builds from the bytes of a saved tokenizer.json; ValueError, saying why, if they are none."""
        self._content = content
        self._backend = open_backend(content)
        self.kind = self._backend.kind
        self.separator_id = int(self._backend.separator_id)
        self.vocab_size = int(self._backend.vocab_size)
        self.cut_before = self._backend.cut_before
        self.sha256 = hashlib.sha256(content).hexdigest()

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind}, vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"

    def __reduce__(self) -> tuple:
        return Tokenizer, (self._content,)

    def to_bytes(self) -> bytes:
        """Returns the bytes of tokenizer.json."""
        return self._content

    def config(self, context_length: int) -> dict[str, Any]:
        """Returns what tokenizer_config.json says beside it, as the library transformers reads it."""
        separator = self.token_strings([self.separator_id])[0]
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": separator,
            "eos_token": separator,
            "pad_token": separator,
            "add_bos_token": True,
            "split_special_tokens": True,  # text that spells the separator stays text
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_length,
        }

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids of `text`, int32[n]; no separator is added."""
        return np.concatenate([np.zeros(0, np.int32), *self.encode_batch(list(self.pieces(text)))])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each text, int32[n_i]; uses several threads, holds all in memory.

        Where a vocabulary spells its separator so that text can become it, those tokens are left out. A text
        that no UTF-8 can hold, or that the library cannot encode, is a UserError.
        """
        try:
            encoded = self._backend.encode_batch(texts)
        except Exception:
            for text in texts:
                try:
                    text.encode()
                except UnicodeEncodeError as e:
                    raise UserError(
                        f"the text holds {text[e.start]!r} at character {e.start}, half of a character or a "
                        "byte that is no UTF-8: give text in UTF-8"
                    ) from e
            raise
        return [ids[ids != self.separator_id] if self.separator_id in ids else ids for ids in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of the ids; separators and ids outside the vocabulary are left out.

        A tokenizer that normalises its text gives back the normalised text.
        """
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size and int(i) != self.separator_id]
        return self._backend.decode(known)

    def token_strings(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        r"""Writes each token for a reader: bytes that are no whole character as `\xe2`."""
        return [
            piece if isinstance(piece, str) else piece.decode("utf-8", "backslashreplace")
            for piece in self._pieces_of(ids)
        ]

    def token_bytes(self, ids: Sequence[int] | np.ndarray) -> list[bytes]:
        """Returns the UTF-8 bytes of each token; a token may be a part of a character."""
        return [
            piece if isinstance(piece, bytes) else piece.encode("utf-8", "surrogateescape")
            for piece in self._pieces_of(ids)
        ]

    def token_bytes_lengths(self) -> np.ndarray | None:
        """Counts the UTF-8 bytes of text of each token, int64[vocab_size], special tokens 0.

        None where a token does not stand for the same bytes everywhere.
        """
        if not self._backend.is_lossless:
            return None
        pieces = [self._backend.piece(token_id) for token_id in range(self.vocab_size)]
        return np.array([len(piece) if isinstance(piece, bytes) else 0 for piece in pieces], np.int64)

    def pieces(self, text: str) -> Iterator[str]:
        """Cuts a long text where no token can cross, so that pieces may be encoded on their own.

        The tokens of the pieces, one after another, are the tokens of the text.
        """
        start = 0
        while self.cut_before and len(text) - start > _PIECE_CHARS:
            cut = re.compile(rf"(?<=\S)(?=[{self.cut_before}])").search(text, start + _PIECE_CHARS)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.start()
        if start < len(text):
            yield text[start:]

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json, whole or not at all."""
        write_atomically(Path(path), self._content)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a file that `save` wrote; UserError if it is missing or is no tokenizer."""
        try:
            with disk_errors_are_user_errors(f"reading {path}"):
                return cls(Path(path).read_bytes())
        except FileNotFoundError as e:
            raise UserError(f"{path}: there is no tokenizer file; prepare the data again") from e
        except ValueError as e:
            raise UserError(f"{path}: not a tokenizer ({e}); prepare the data again") from e

    def _pieces_of(self, ids: Sequence[int] | np.ndarray) -> Iterator[str | bytes]:
        for i in map(int, ids):
            piece = self._backend.piece(i) if 0 <= i < self.vocab_size else None
            yield f"<unused {i}>" if piece is None else piece


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a user's tokenizer: a Hugging Face tokenizer.json, a SentencePiece model, a .tiktoken file.

    UserError if it is missing, damaged, of none of these kinds, or has no separator; or if the library that
    it needs is not installed.
    """
    check_name(os.fspath(path), "tokenizer")
    path = Path(os.path.expanduser(path))
    try:
        with disk_errors_are_user_errors(f"tokenizer = {path}"):
            content = path.read_bytes()
    except OSError as e:
        raise UserError(
            f"tokenizer = {path}: {e.strerror or e}; give a tokenizer.json, a SentencePiece .model, a "
            ".tiktoken file, or train:VOCAB"
        ) from e
    try:
        if path.suffix == ".tiktoken":
            return Tokenizer(container("tiktoken", content, encoding=path.stem))
        if path.suffix == ".json":
            return Tokenizer(content)
        if looks_like_tiktoken(content):  # Llama 3 calls it tokenizer.model
            names = ", ".join(f"{name}.tiktoken" for name in ENCODINGS)
            raise ValueError(f"it is a tiktoken file, which must be called after its encoding: {names}")
        return Tokenizer(container("sentencepiece", content))
    except ValueError as e:
        raise UserError(
            f"tokenizer = {path}: {e}; give a tokenizer.json, a SentencePiece .model, or a .tiktoken file"
        ) from e


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE; the same documents in the same order give the same tokenizer.

    The documents are read once, and never all in memory. Of the tokens 257 are the separator (id 0) and the
    bytes; a corpus too small to fill the vocabulary gives fewer than `vocab_size`.
    """
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # An untrained tokenizer of the kind knows where its texts may be cut.
    tokenizer.train_from_iterator([], trainer)
    untrained = Tokenizer(tokenizer.to_str(pretty=True).encode())
    pieces = (piece for document in documents for piece in untrained.pieces(document))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.FixedLength(length=_TRAINED_WORD_BYTES)]
    )
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.pre_tokenizer = words
    return Tokenizer(tokenizer.to_str(pretty=True).encode())


def fast_encoder(tokenizer: Tokenizer) -> Encode:
    """Returns the fastest encoder with the tokenizer's own tokens: it remembers words where it can."""
    token_bytes = tokenizer.token_bytes_lengths()
    if not tokenizer.cut_before or token_bytes is None:
        return tokenizer.encode_batch
    return WordEncoder(tokenizer.encode_batch, tokenizer.cut_before, token_bytes).encode


class WordEncoder:
    """Remembers the tokens of words. Threads may share it; it serves one at a time.

    Text is cut where no token can cross, mostly before spaces; the piece between, a word with its space and
    punctuation, comes back again and again (Zipf's law).
    """

    def __init__(
        self, encode_batch: Encode, cut_before: str, token_bytes: np.ndarray, max_words: int = _MAX_WORDS
    ):
        """Takes facts of a tokenizer, and how many words are remembered before all are forgotten."""
        self._encode_batch, self._cut_before, self._token_bytes = encode_batch, cut_before, token_bytes
        # White space, then everything up to the next place where a text may be cut.
        self._word = re.compile(rf"\s*\S+(?:(?![{cut_before}])\s+(?:\S+|\Z))*|\s+")
        self._max_words = max_words
        self._lock = threading.Lock()
        self._forget()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each text, int32[n_i]; those of the library, to the last one."""
        words = [self._word.findall(text) for text in texts]
        counts = [len(part) for part in words]
        with self._lock:
            if len(self._numbers) > self._max_words:
                self._forget()
            numbers = np.fromiter(
                map(self._numbers.__getitem__, itertools.chain.from_iterable(words)), np.int64, sum(counts)
            )
            self._learn()
            lengths = self._lengths[numbers]
            ends = np.cumsum(lengths)
            # Of each token of the texts the index in the table: where its word begins, and how far into it.
            begins = np.repeat(self._starts[numbers] - (ends - lengths), lengths)
            tokens = self._tokens[begins + np.arange(begins.size)]
        cuts = np.concatenate([[0], ends])[np.cumsum(counts, dtype=np.int64)]
        return np.split(tokens, cuts)[: len(texts)]

    def _forget(self) -> None:
        self._numbers = _Numbers()
        self._tokens = np.zeros(0, np.int32)  # of all words, one after another
        self._starts = np.zeros(0, np.int64)
        self._lengths = np.zeros(0, np.int64)

    def _learn(self) -> None:
        """Encodes the words that were met for the first time."""
        words = list(itertools.islice(self._numbers, self._lengths.size, None))
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

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number
