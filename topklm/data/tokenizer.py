"""Text to token ids and back: byte-level BPE trained on the corpus at hand, or a tokenizer that users bring.

Whatever the kind, it is one file, tokenizer.json, and no text becomes the separator. Knows nothing of
documents on disk, models or batches.
"""

import base64
from collections.abc import Iterable, Iterator, Sequence
import functools
import hashlib
import json
import os
from pathlib import Path
import re
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from topklm.data.tokenizer_kinds import (
    ENCODINGS,
    SEPARATOR,
    Backend,
    HuggingFace,
    SentencePiece,
    Tiktoken,
    looks_like_tiktoken,
)
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.storage.files import check_name, parse_json, write_atomically

__all__ = ["SEPARATOR", "Tokenizer", "open_tokenizer", "train_bpe"]

# Characters per piece given to the library, which needs some 100 bytes for each token of a piece.
_PIECE_CHARS = 1 << 16
# The trainer takes time in the square of a word's length, and text without spaces (DNA, or a line of dashes)
# is one word. Tokens of the few that are longer are learnt from parts of them.
_TRAINED_WORD_BYTES = 1000
_CONTAINER = "topklm-tokenizer"  # our file around a model that is no tokenizer.json
_CONTAINER_VERSION = 1


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
        """Builds from the bytes of a saved tokenizer.json; see `load`, `open_tokenizer` and `train_bpe`.

        Raises:
            ValueError: If they are none, saying why.
        """
        self._content = content
        self._backend = _backend(content)
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
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_length,
        }

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids of `text`, int32[n]; no separator is added."""
        return np.concatenate([np.zeros(0, np.int32), *self.encode_batch(list(self.pieces(text)))])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each text, int32[n_i]; uses several threads, holds all in memory.

        Where a vocabulary spells its separator so that text can become it, those tokens are left out.

        Raises:
            UserError: For a text that no UTF-8 can hold, or that the library cannot encode.
        """
        try:
            encoded = self._backend.encode_batch(texts)
        except Exception:
            for text in texts:
                _check_utf8(text)
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
        return [self._token_string(int(i)) for i in ids]

    def token_bytes(self, ids: Sequence[int] | np.ndarray) -> list[bytes]:
        """Returns the UTF-8 bytes of each token; a token may be a part of a character."""
        return [self._token_bytes(int(i)) for i in ids]

    def token_bytes_lengths(self) -> np.ndarray | None:
        """Counts the UTF-8 bytes of text of each token, int64[vocab_size], special tokens 0.

        None where a token does not stand for the same bytes everywhere.
        """
        if not self._backend.is_lossless():
            return None
        pieces = [self._backend.piece(token_id) for token_id in range(self.vocab_size)]
        return np.array([len(piece) if isinstance(piece, bytes) else 0 for piece in pieces], np.int64)

    def pieces(self, text: str) -> Iterator[str]:
        """Cuts a long text where no token can cross, so that pieces may be encoded on their own.

        The tokens of the pieces, one after another, are the tokens of the text.
        """
        start = 0
        while self.cut_before and len(text) - start > _PIECE_CHARS:
            cut = _safe_cut(self.cut_before).search(text, start + _PIECE_CHARS)
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
        """Reads a file that `save` wrote.

        Raises:
            UserError: If it is missing or is no tokenizer.
        """
        try:
            with disk_errors_are_user_errors(f"reading {path}"):
                return cls(Path(path).read_bytes())
        except FileNotFoundError as e:
            raise UserError(f"{path}: there is no tokenizer file; prepare the data again") from e
        except ValueError as e:
            raise UserError(f"{path}: not a tokenizer ({e}); prepare the data again") from e

    def _token_string(self, token_id: int) -> str:
        piece = self._piece(token_id)
        return piece if isinstance(piece, str) else piece.decode("utf-8", "backslashreplace")

    def _token_bytes(self, token_id: int) -> bytes:
        piece = self._piece(token_id)
        return piece if isinstance(piece, bytes) else piece.encode("utf-8", "surrogateescape")

    def _piece(self, token_id: int) -> str | bytes:
        piece = self._backend.piece(token_id) if 0 <= token_id < self.vocab_size else None
        return f"<unused {token_id}>" if piece is None else piece


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a user's tokenizer: a Hugging Face tokenizer.json, a SentencePiece model, a .tiktoken file.

    Raises:
        UserError: If it is missing, damaged, of none of these kinds, or has no separator; or if the library
            that it needs is not installed.
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
            return Tokenizer(_container("tiktoken", content, encoding=path.stem))
        if path.suffix == ".json":
            return Tokenizer(content)
        if looks_like_tiktoken(content):  # Llama 3 calls it tokenizer.model
            names = ", ".join(f"{name}.tiktoken" for name in ENCODINGS)
            raise ValueError(f"it is a tiktoken file, which must be called after its encoding: {names}")
        return Tokenizer(_container("sentencepiece", content))
    except ValueError as e:
        raise UserError(
            f"tokenizer = {path}: {e}; give a tokenizer.json, a SentencePiece .model, or a .tiktoken file"
        ) from e


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE; the same documents in the same order give the same tokenizer.

    Args:
        documents: Read once, never all in memory.
        vocab_size: Tokens, of which 257 are the separator (id 0) and the bytes. A corpus too small
            to fill it gives fewer.
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
    untrained = Tokenizer(_to_bytes(tokenizer))
    pieces = (piece for document in documents for piece in untrained.pieces(document))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.FixedLength(length=_TRAINED_WORD_BYTES)]
    )
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.pre_tokenizer = words
    return Tokenizer(_to_bytes(tokenizer))


def _to_bytes(tokenizer: tokenizers.Tokenizer) -> bytes:
    return tokenizer.to_str(pretty=True).encode()


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"the text holds {text[e.start]!r} at character {e.start}, half of a character or a byte that is "
            "no UTF-8: give text in UTF-8"
        ) from e


@functools.cache
def _safe_cut(cut_before: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=\S)(?=[{cut_before}])")


def _container(kind: str, model: bytes, **settings: str) -> bytes:
    content = {"format": _CONTAINER, "version": _CONTAINER_VERSION, "kind": kind, **settings}
    return json.dumps({**content, "model": base64.b64encode(model).decode()}).encode()


def _backend(content: bytes) -> Backend:
    try:
        parts = parse_json(content)
    except ValueError as e:
        raise ValueError(f"it is no JSON object: {e}") from e
    if parts.get("format") != _CONTAINER:
        if not isinstance(parts.get("model"), dict):
            raise ValueError("it is JSON, but no tokenizer.json")
        return HuggingFace(content)
    if parts.get("version") != _CONTAINER_VERSION:
        raise ValueError(f"its version is {parts.get('version')!r}, this program reads {_CONTAINER_VERSION}")
    try:
        kind, model = parts["kind"], base64.b64decode(parts["model"], validate=True)
        settings = {"encoding": parts["encoding"]} if kind == "tiktoken" else {}
        backend = {"tiktoken": Tiktoken, "sentencepiece": SentencePiece}[kind]
    except (KeyError, TypeError) as e:
        raise ValueError(f"it is damaged ({e!r})") from e
    return backend(model, **settings)
