"""The libraries of `topklm.data.tokenizer.Tokenizer`: one class for each kind of file.

Each gives its library's own tokens. None lets text become the separator that stands between documents.
"""

import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import json
import os
import re
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers
from tokenizers import models

from topklm.config import MAX_VOCABULARY
from topklm.errors import UserError
from topklm.imports import optional_module
from topklm.storage.files import parse_json

SEPARATOR = "<|endoftext|>"

# The tokens that end a text in well-known vocabularies, or begin one where none ends it: a file that has both
# uses the end between documents. Names that only one family uses come first.
_SEPARATORS = (
    SEPARATOR,
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
    "[EOS]",
    "[SEP]",
    "<|begin_of_text|>",
    "<s>",
    "<bos>",
    "[CLS]",
    "<EOT>",
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
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Encoding(NamedTuple):
    """Facts that a .tiktoken file lacks."""

    pattern: str  # splits text into words
    separator_id: int  # in the whole vocabulary
    separator: str = SEPARATOR


# By the name of the file. From tiktoken_ext/openai_public.py of tiktoken 0.14; the last from the tokenizer.py
# that Llama 3 was published with, where 128,000 ranks are followed by <|begin_of_text|> and this.
ENCODINGS = {
    "gpt2": Encoding(_GPT2_WORDS, 50256),
    "r50k_base": Encoding(_GPT2_WORDS, 50256),
    "p50k_base": Encoding(_GPT2_WORDS, 50256),
    "cl100k_base": Encoding(_CL100K_WORDS, 100257),
    "o200k_base": Encoding(_O200K_WORDS, 199999),
    "llama3": Encoding(_LLAMA3_WORDS, 128001, "<|end_of_text|>"),
}
_CONTAINER = "topklm-tokenizer"
_CONTAINER_VERSION = 1
_GAP = 2  # cl100k leaves one id unused between its ranks and its separator
# In Hugging Face files: as above, and that of Qwen 2.
_KNOWN_SPLITS = {
    *(encoding.pattern for encoding in ENCODINGS.values()),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class Backend(Protocol):
    """Operations that `Tokenizer` needs of a library."""

    kind: str
    separator_id: int
    vocab_size: int  # largest id + 1
    # A character of this that follows one that is no white space begins a token, always; "": not known.
    cut_before: str
    is_lossless: bool  # whether every token but special ones stands for fixed bytes of the text

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the int32 ids of each text; they may hold the separator's."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids that are in the vocabulary and are not the separator's."""

    def piece(self, token_id: int) -> str | bytes | None:
        """Returns the bytes or the text of a token; None for an id that is not in use."""


def container(kind: str, model: bytes, **settings: str) -> bytes:
    """Makes our file of a model that is no tokenizer.json; `encoding` is a setting of tiktoken's."""
    content = {"format": _CONTAINER, "version": _CONTAINER_VERSION, "kind": kind, **settings}
    return json.dumps({**content, "model": base64.b64encode(model).decode()}).encode()


def open_backend(content: bytes) -> Backend:
    """Opens a tokenizer.json, or a file of `container`; ValueError, saying why, if it is none."""
    try:
        parts = parse_json(content)
    except ValueError as e:
        raise ValueError(f"it is no JSON object: {e}") from e
    if parts.get("format") != _CONTAINER:
        if not isinstance(parts.get("model"), dict):
            raise ValueError("it is JSON, but no tokenizer.json")
        return _HuggingFace(content)
    if parts.get("version") != _CONTAINER_VERSION:
        raise ValueError(f"its version is {parts.get('version')!r}, this program reads {_CONTAINER_VERSION}")
    try:
        kind, model = parts["kind"], base64.b64decode(parts["model"], validate=True)
        settings = {"encoding": parts["encoding"]} if kind == "tiktoken" else {}
        backend = {"tiktoken": _Tiktoken, "sentencepiece": _SentencePiece}[kind]
    except (KeyError, TypeError) as e:
        raise ValueError(f"it is damaged ({e!r})") from e
    return backend(model, **settings)


class _HuggingFace:
    """A tokenizer.json, ours or anybody's."""

    kind = "huggingface"

    def __init__(self, content: bytes):
        """Raises ValueError if the library refuses the file or it has no separator."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as e:  # the library raises no narrower class
            raise ValueError(str(e)) from e
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if isinstance(self._tokenizer.model, models.BPE):
            self._tokenizer.model.dropout = None  # would give other tokens every time
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._added = {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        separator = self._choose_separator(vocabulary)
        self.separator_id, self.vocab_size = vocabulary[separator], max(vocabulary.values()) + 1
        if self.vocab_size > MAX_VOCABULARY:
            raise ValueError(f"its largest token id is {self.vocab_size - 1}, above {MAX_VOCABULARY - 1}")
        if list(vocabulary.values()).count(self.separator_id) > 1:
            raise ValueError(f"another token has the id {self.separator_id} of its separator {separator}")
        if self.separator_id in self._added:
            self._tokenizer.add_special_tokens([separator])  # where it is added, but as ordinary text
        # Not part of the file format: text that spells a special token is ordinary text.
        self._tokenizer.encode_special_tokens = True
        # As the library understood it: old files leave out what newer ones say.
        parts = json.loads(self._tokenizer.to_str())
        self._speaks_bytes = any(step["type"] == "ByteLevel" for step in _pre_tokenizers(parts))
        self.is_lossless = self.separator_id in self._added and _is_lossless(parts)
        self.cut_before = _cut_before(parts) if self.is_lossless else ""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as e:  # the library raises no narrower class
            raise UserError(f"tokenizer: its library cannot encode this text: {e}") from e
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def piece(self, token_id: int) -> str | bytes | None:
        token = self._added.get(token_id) or self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._added:
            return token
        if self._speaks_bytes:
            known = all(char in _BYTE_OF_CHAR for char in token)
            return bytes(_BYTE_OF_CHAR[char] for char in token) if known else token
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ")

    def _choose_separator(self, vocabulary: dict[str, int]) -> str:
        """Chooses the first name that is a special token; else one that is added; else any that is known.

        In vocabularies with HTML tags, </s> is the end of struck-out text.
        """
        tokens = self._tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in tokens if token.special}
        for names in (special, {token.content for token in tokens}, vocabulary):
            if found := [name for name in _SEPARATORS if name in names]:
                return found[0]
        raise ValueError(f"it has no separator of documents: add one of {', '.join(_SEPARATORS)}")


class _SentencePiece:
    """A SentencePiece model; decoding gives the text as the model normalised it.

    Its end and beginning of text are control pieces: the library makes them from no text.
    """

    kind = "sentencepiece"
    cut_before = ""
    is_lossless = False

    def __init__(self, model: bytes):
        """Raises ValueError if it is no model, or has neither an end nor a beginning of text."""
        library = optional_module("sentencepiece", "sentencepiece", "this tokenizer")
        try:
            self._model = library.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise ValueError("it is no SentencePiece model, or not all of one") from e
        # The library reads one that was cut off between two of its pieces.
        if _NORMALIZER_FIELD not in _protobuf_fields(model):
            raise ValueError("it is no SentencePiece model, or not all of one")
        ends = [i for i in (self._model.eos_id(), self._model.bos_id()) if i >= 0]
        if not ends:
            raise ValueError("it has neither an end-of-text nor a beginning-of-text piece: train it with one")
        self.separator_id, self.vocab_size = ends[0], self._model.vocab_size()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._model.encode(list(texts), num_threads=_threads())]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))

    def piece(self, token_id: int) -> str | bytes | None:
        piece = self._model.id_to_piece(token_id)
        return bytes([int(piece[3:5], 16)]) if self._model.is_byte(token_id) else piece.replace("\u2581", " ")


class _Tiktoken:
    """A .tiktoken file: ranks, read with the pattern of a known encoding."""

    kind = "tiktoken"
    cut_before = " "  # see `_cut_before`
    is_lossless = True

    def __init__(self, ranks_file: bytes, encoding: str):
        """Raises ValueError for a file that is damaged or an encoding that is not known."""
        if encoding not in ENCODINGS:
            raise ValueError(
                f"the encoding {encoding!r} is not known, and the file does not say how text is split; "
                f"name the file after its encoding: {', '.join(ENCODINGS)}"
            )
        ranks = _parse_ranks(ranks_file)
        pattern, separator_id, self._separator = ENCODINGS[encoding]
        largest = max(ranks.values())
        # A smaller vocabulary for the same words has its separator right after its ranks.
        whole = separator_id not in ranks.values() and separator_id <= largest + _GAP
        self.separator_id = separator_id if whole else largest + 1
        self.vocab_size = max(largest, self.separator_id) + 1
        self._pieces = {rank: piece for piece, rank in ranks.items()}
        self._encoding = optional_module("tiktoken", "tiktoken", "this tokenizer").Encoding(
            encoding,
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={self._separator: self.separator_id},
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with ThreadPoolExecutor(min(_threads(), max(len(texts), 1))) as pool:
            return list(pool.map(self._encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._pieces.get(i, b"") for i in ids).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str | bytes | None:
        return self._separator if token_id == self.separator_id else self._pieces.get(token_id)

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except ValueError as e:
            raise UserError(
                f"tokenizer: tiktoken cannot split a text of {len(text):,} characters ({e}); shorten its "
                "longest run of white space"
            ) from e


def _threads() -> int:
    """Returns how many threads an encoding may use: as many as the library tokenizers."""
    return int(os.environ.get("RAYON_NUM_THREADS", "0")) or os.cpu_count() or 1


def looks_like_tiktoken(content: bytes) -> bool:
    """Tells whether a file begins as .tiktoken files do, whatever its name."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content) is not None


def _parse_ranks(content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = base64.b64decode(line.split()[0], validate=True), int(line.split()[1])
        except (ValueError, IndexError) as e:
            raise ValueError(f"line {number} is not a base64 token and its rank") from e
        if token in ranks:
            raise ValueError(f"line {number} repeats the token of rank {ranks[token]}")
        ranks[token] = rank
    # The library dies of a byte without a rank, and of a rank that two tokens have.
    used = set(ranks.values())
    whole = len(used) == len(ranks) and all(bytes([byte]) in ranks for byte in range(256))
    if not whole or min(used) < 0 or max(used) + 1 > len(used) + _GAP:
        raise ValueError("its ranks are not a whole vocabulary: all 256 bytes, each rank once, none left out")
    return ranks


_NORMALIZER_FIELD = 3  # of ModelProto in sentencepiece_model.proto; stands after the pieces


def _protobuf_fields(content: bytes) -> set[int]:
    """Lists the numbers of the fields of a protocol buffer that the library could read."""
    fields, at = set(), 0
    while at < len(content):
        key, at = _varint(content, at)
        fields.add(key >> 3)
        value, after = _varint(content, at)
        # Wire types: 0 number, 1 eight bytes, 2 a length and as many bytes, 5 four bytes.
        at = {0: after, 1: at + 8, 2: after + value, 5: at + 4}.get(key & 7, len(content))
    return fields


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Reads a number of seven bits a byte, lowest first; returns it and its end."""
    value = shift = 0
    for byte in content[at : at + 10]:
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            break
    return value, at


def _is_lossless(parts: dict[str, Any]) -> bool:
    """Tells whether it is a byte-level BPE that changes no text and whose tokens are all of their bytes."""
    model, steps = parts["model"], _pre_tokenizers(parts)
    plain = model["type"] == "BPE" and not any(
        model[name] for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    ordinary = all(token["special"] for token in parts["added_tokens"])
    whole = all(char in model["vocab"] for char in _BYTE_OF_CHAR)
    kept = all(
        step["type"] in ("Split", "Punctuation", "Digits", "ByteLevel")
        and step.get("behavior") != "Removed"
        and not step.get("add_prefix_space")
        for step in steps
    )
    kinds = [step["type"] for step in steps]
    last = kinds.count("ByteLevel") == 1 and kinds[-1] == "ByteLevel"
    return plain and ordinary and whole and kept and last and parts["normalizer"] is None


def _cut_before(parts: dict[str, Any]) -> str:
    r"""Finds where no token of a byte-level BPE can cross, by the pattern that splits its text.

    In the patterns of GPT-2, cl100k, o200k, Llama 3 and Qwen 2, no alternative goes on from a character that
    is no white space to a space, and GPT-2's to no white space at all; look-ahead goes from
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


# The printable characters of byte-level vocabularies, and the bytes that they stand for (from GPT-2).
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
_BYTE_OF_CHAR = {
    **{chr(byte): byte for byte in _PRINTABLE},
    **{chr(256 + rank): byte for rank, byte in enumerate(_OTHERS)},
}
