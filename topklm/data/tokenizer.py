"""Byte-level BPE: text to token ids and back without loss, trained on the corpus at hand.

Wraps Hugging Face `tokenizers` so that the separator can never come out of text. Knows nothing of
documents on disk, models or batches.
"""

from collections.abc import Iterable, Iterator, Sequence
import hashlib
import json
from pathlib import Path
import re

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from topklm.errors import UserError
from topklm.files import write_atomically

SEPARATOR = "<|endoftext|>"

# Characters per piece given to the library, which needs some 100 bytes for each token of a piece.
_PIECE_CHARS = 1 << 16
# The pre-tokenizer never joins white space to the character before it: a cut here changes no token.
_SAFE_CUT = re.compile(r"(?<=\S)(?=[ \n])")


class Tokenizer:
    """A trained tokenizer.

    Attributes:
        separator_id: Id of `<|endoftext|>`, which stands before documents. No text encodes to it.
        vocab_size: Number of tokens, the separator included.
        sha256: Hex digest of the bytes of tokenizer.json.
    """

    def __init__(self, json_bytes: bytes):
        """Builds from the bytes of a tokenizer.json; see `load` and `train_bpe`."""
        self._json_bytes = json_bytes
        self._tokenizer = tokenizers.Tokenizer.from_str(json_bytes.decode())
        # Not part of the file format: text that spells the separator is ordinary text.
        self._tokenizer.encode_special_tokens = True
        self.separator_id = int(self._tokenizer.get_vocab()[SEPARATOR])
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.sha256 = hashlib.sha256(json_bytes).hexdigest()

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"

    def __reduce__(self) -> tuple:
        return Tokenizer, (self._json_bytes,)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32[n]; no separator is added."""
        return np.concatenate([np.zeros(0, np.int32), *self.encode_batch(list(split_text(text)))])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32[n_i]; on several threads, all held in memory at once."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; separators and ids outside the vocabulary are shown as nothing."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_strings(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        r"""Each token as a reader would want it: bytes that are no whole character as `\xe2`."""
        return [self._token_string(int(i)) for i in ids]

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json, whole or not at all."""
        write_atomically(Path(path), self._json_bytes)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a file that `save` wrote.

        Raises:
            UserError: If it is missing or is no tokenizer of ours.
        """
        try:
            raw = Path(path).read_bytes()
            content = json.loads(raw)
            added = [token["content"] for token in content["added_tokens"]]
            ours = content["model"]["type"] == "BPE" and SEPARATOR in added
        except FileNotFoundError as e:
            raise UserError(f"{path}: there is no tokenizer file; prepare the data again") from e
        except (ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise UserError(f"{path}: not a tokenizer of this project; prepare the data again")
        return cls(raw)

    def _token_string(self, token_id: int) -> str:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return f"<unused {token_id}>"
        if token_id == self.separator_id:
            return token
        return bytes(_BYTE_OF_CHAR[char] for char in token).decode("utf-8", "backslashreplace")


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE; the same documents in the same order give the same tokenizer.

    Args:
        documents: Read once, never all in memory.
        vocab_size: Tokens, of which 257 are the separator (id 0) and the bytes. A corpus too small
            to fill it gives fewer.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for document in documents for piece in split_text(document))
    tokenizer.train_from_iterator(pieces, trainer)
    return Tokenizer(tokenizer.to_str(pretty=True).encode())


def split_text(text: str) -> Iterator[str]:
    """Cuts a long text where no token can cross, so that pieces may be encoded on their own.

    The tokens of the pieces, one after another, are the tokens of the text.
    """
    start = 0
    while len(text) - start > _PIECE_CHARS:
        cut = _SAFE_CUT.search(text, start + _PIECE_CHARS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    if start < len(text):
        yield text[start:]


def _byte_of_char() -> dict[str, int]:
    """The printable characters that stand for bytes inside byte-level vocabularies (from GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + rank): byte for rank, byte in enumerate(others)
    }


_BYTE_OF_CHAR = _byte_of_char()
