"""The libraries behind `topklm.data.tokenizer.Tokenizer`: one class for each kind of file.

Each gives its library's own tokens. None lets text become the separator that stands between documents.
"""

import base64
from collections.abc import Sequence
import importlib
import json
import os
import re
from typing import Any, Protocol

import numpy as np
import tokenizers

from topklm.errors import UserError

SEPARATOR = "<|endoftext|>"

# What ends a text in well-known vocabularies, and what begins one where nothing ends it.
_SEPARATORS = (
    SEPARATOR,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "[SEP]",
    "<|begin_of_text|>",
    "<s>",
    "<bos>",
    "[CLS]",
)
_GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K_WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A .tiktoken file holds no pattern: name of the encoding -> pattern, id of the separator. From
# tiktoken_ext/openai_public.py, tiktoken 0.14.
ENCODINGS: dict[str, tuple[str, int]] = {
    "gpt2": (_GPT2_WORDS, 50256),
    "r50k_base": (_GPT2_WORDS, 50256),
    "p50k_base": (_GPT2_WORDS, 50256),
    "cl100k_base": (_CL100K_WORDS, 100257),
    "o200k_base": (_O200K_WORDS, 199999),
}
_GAP = 2  # cl100k leaves one id unused between its ranks and its separator
# In Hugging Face files: as above, and those of Llama 3 and Qwen 2.
_KNOWN_SPLITS = {
    _GPT2_WORDS,
    _CL100K_WORDS,
    _O200K_WORDS,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class Backend(Protocol):
    """What `Tokenizer` needs of a library."""

    kind: str
    separator_id: int
    vocab_size: int  # largest id + 1
    # A character of this that follows one that is no white space begins a token, always; "": not known.
    cut_before: str

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text; may hold the separator's."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids that are in the vocabulary and are not the separator's."""

    def piece(self, token_id: int) -> str | bytes | None:
        """What a token stands for; None for an id that is not in use."""

    def is_lossless(self) -> bool:
        """Whether every token but special ones stands for fixed bytes of the text."""


class HuggingFace:
    """A tokenizer.json, ours or anybody's."""

    kind = "huggingface"

    def __init__(self, content: bytes):
        """Raises ValueError if the library refuses the file or it has no separator."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as e:
            raise ValueError(str(e)) from e
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Not part of the file format: text that spells a special token is ordinary text.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        names = [name for name in _SEPARATORS if name in vocabulary]
        if not names:
            raise ValueError(f"it has no separator of documents: add one of {', '.join(_SEPARATORS)}")
        self.separator_id = vocabulary[names[0]]
        self.vocab_size = max(vocabulary.values()) + 1
        parts = json.loads(content)
        self._byte_level = _is_byte_level(parts)
        self.cut_before = _cut_before(parts) if self._byte_level else ""
        self._special = {token["id"] for token in parts.get("added_tokens", []) if token["special"]}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Backend`."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Backend`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def piece(self, token_id: int) -> str | bytes | None:
        """See `Backend`."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special:
            return token
        if self._byte_level:
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        return _readable(token)

    def is_lossless(self) -> bool:
        """See `Backend`."""
        return self._byte_level


class SentencePiece:
    """A SentencePiece model; decoding gives the text as the model normalised it."""

    kind = "sentencepiece"
    cut_before = ""

    def __init__(self, model: bytes):
        """Raises ValueError if it is no model, or has neither an end nor a beginning of text."""
        library = _library("sentencepiece")
        try:
            self._model = library.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise ValueError(str(e)) from e
        self.separator_id = max(self._model.eos_id(), -1)
        if self.separator_id < 0:
            self.separator_id = self._model.bos_id()
        if self.separator_id < 0:
            raise ValueError("it has neither an end-of-text nor a beginning-of-text piece: train it with one")
        self.vocab_size = self._model.vocab_size()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Backend`."""
        threads = int(os.environ.get("RAYON_NUM_THREADS", "0")) or -1
        return [np.array(ids, np.int32) for ids in self._model.encode(list(texts), num_threads=threads)]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Backend`."""
        return self._model.decode(list(ids))

    def piece(self, token_id: int) -> str | bytes | None:
        """See `Backend`."""
        return _readable(self._model.id_to_piece(token_id)) if token_id < self.vocab_size else None

    def is_lossless(self) -> bool:
        """See `Backend`."""
        return False


class Tiktoken:
    """A .tiktoken file: ranks, read with the pattern of a known encoding."""

    kind = "tiktoken"
    cut_before = " "  # see `_cut_before`

    def __init__(self, ranks_file: bytes, encoding: str):
        """Raises ValueError for a file that is damaged or an encoding that is not known."""
        if encoding not in ENCODINGS:
            raise ValueError(
                f"the encoding {encoding!r} is not known, and the file does not say how text is split; "
                f"name the file after its encoding: {', '.join(ENCODINGS)}"
            )
        ranks = _parse_ranks(ranks_file)
        pattern, separator_id = ENCODINGS[encoding]
        largest = max(ranks.values())
        largest = max(ranks.values())
        # A vocabulary that was cut short has its separator right after its ranks.
        whole = separator_id not in ranks.values() and separator_id <= largest + _GAP
        self.separator_id = separator_id if whole else largest + 1
        self.vocab_size = max(largest, self.separator_id) + 1
        self._pieces = {rank: piece for piece, rank in ranks.items()}
        self._encoding = _library("tiktoken").Encoding(
            encoding, pat_str=pattern, mergeable_ranks=ranks, special_tokens={SEPARATOR: self.separator_id}
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Backend`."""
        threads = int(os.environ.get("RAYON_NUM_THREADS", "0")) or os.cpu_count() or 1
        encoded = self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)
        return [np.array(ids, np.int32) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Backend`."""
        return b"".join(self._pieces.get(i, b"") for i in ids).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str | bytes | None:
        """See `Backend`."""
        return SEPARATOR if token_id == self.separator_id else self._pieces.get(token_id)

    def is_lossless(self) -> bool:
        """See `Backend`."""
        return True


def _parse_ranks(content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as e:
            raise ValueError(f"line {number} is not a base64 token and its rank") from e
    if len(set(ranks.values())) != len(ranks) or len(ranks) < 256:
        raise ValueError("its ranks are not a whole vocabulary, each rank once")
    return ranks


def _is_byte_level(parts: dict[str, Any]) -> bool:
    """Whether the file is a byte-level BPE that changes no text and whose tokens are all of their bytes."""
    model = parts["model"]
    plain = model["type"] == "BPE" and not any(
        model.get(name)
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    added = all(token["special"] for token in parts.get("added_tokens", []))
    whole = all(char in model.get("vocab", {}) for char in _BYTE_OF_CHAR)
    last = _pre_tokenizers(parts)[-1:]
    return (
        plain
        and added
        and whole
        and parts.get("normalizer") is None
        and bool(last)
        and last[0]["type"] == "ByteLevel"
        and not last[0]["add_prefix_space"]
    )


def _cut_before(parts: dict[str, Any]) -> str:
    r"""Where no token of a byte-level BPE can cross, by the pattern that splits its text.

    In the patterns of GPT-2, cl100k, o200k, Llama 3 and Qwen 2, no alternative goes on from a character that
    is no white space to a space, and GPT-2's to no white space at all; what looks ahead does so from
    white space only. So words end there, and are split the same way when they stand alone.
    """
    steps = _pre_tokenizers(parts)
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return " \n"
    if len(steps) == 2 and steps[0]["type"] == "Split" and not steps[1].get("use_regex", True):
        split = steps[0]
        known = split["pattern"].get("Regex") in _KNOWN_SPLITS
        return " " if known and split["behavior"] == "Isolated" and not split["invert"] else ""
    return ""


def _pre_tokenizers(parts: dict[str, Any]) -> list[dict[str, Any]]:
    pre_tokenizer = parts.get("pre_tokenizer") or {"type": "None"}
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _readable(piece: str) -> str | bytes:
    """A piece of a vocabulary that marks spaces with U+2581 and may name single bytes."""
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes([int(byte[1], 16)])
    return piece.replace("\u2581", " ")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"this tokenizer needs {name}; run: pip install 'topklm[{name}]'") from e


def _byte_of_char() -> dict[str, int]:
    """The printable characters that stand for bytes inside byte-level vocabularies (from GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + rank): byte for rank, byte in enumerate(others)
    }


_BYTE_OF_CHAR = _byte_of_char()
