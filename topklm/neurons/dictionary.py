"""A dictionary: other directions than its own coordinates in which a Base LM's hidden state is written.

    codes(h) = TopK(relu((h - centre) @ encoder + bias)), the K largest
    h is about centre + codes(h) @ decoder

Each code is a neuron of the store that is harvested with it; its meaning in the hidden state is its
row of the decoder and no coordinate. Codes are never negative. How a dictionary is made is
in `topklm.neurons.fit_dictionary`. Dims: S layers, N tokens, D d_model, M codes of a layer.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import io
import json
from pathlib import Path
import struct
from typing import Any
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from topklm.errors import UserError
from topklm.model.topk import topk
from topklm.neurons import DICTIONARIES
from topklm.neurons.paths import damage_is_a_user_error
from topklm.storage.files import parse_json, write_atomically

FORMAT = 3
_WITHOUT_BIAS = 2  # and still written where there is none
_WITHOUT_DIGEST = 1

_ARRAYS = ("centre", "encoder", "decoder")
Encoder = tuple[jax.Array, jax.Array, jax.Array]  # centre [S, D], encoder [S, D, M], bias [S, M]
_DIGEST_BYTES = 64
# Errors of zipfile for other files, besides those of NumPy; RuntimeError: encrypted, or packed oddly.
_NO_ARCHIVE = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, MemoryError)


@dataclasses.dataclass(frozen=True, eq=False)
class Dictionary:
    """One dictionary for each layer, of one kind."""

    kind: str  # one of `DICTIONARIES`
    keep: int  # K, codes kept of each token
    centre: np.ndarray  # float32[S, D], what is taken off the hidden state
    encoder: np.ndarray  # float32[S, D, M]
    decoder: np.ndarray  # float32[S, M, D], rows of unit length in those that topklm makes
    # How it was made, by name; values that JSON can hold.
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bias: np.ndarray | None = None  # float32[S, M], of the codes; None: 0

    @functools.cached_property
    def sha256(self) -> str:
        """Of its arrays."""
        return hashlib.sha256(b"".join(x.tobytes() for x in self._arrays().values())).hexdigest()

    @property
    def encoder_arrays(self) -> Encoder:
        """The arrays that `encode` takes."""
        bias = np.zeros(self.encoder.shape[::2], np.float32) if self.bias is None else self.bias
        return jnp.asarray(self.centre), jnp.asarray(self.encoder), jnp.asarray(bias)

    def _arrays(self) -> dict[str, np.ndarray]:
        bias = {} if self.bias is None else {"bias": self.bias}
        return {name: getattr(self, name) for name in _ARRAYS} | bias

    @property
    def description(self) -> str:
        """Its kind, how it was made and its fingerprint, in a line."""
        facts = ", ".join(f"{name.replace('_', ' ')} {_said(value)}" for name, value in self.facts.items())
        width = self.decoder.shape[1]
        return f"{DICTIONARIES[self.kind]}: {self.keep} of {width} codes; {facts} ({self.sha256[:12]})"

    def encode(self, h_SND: jax.Array) -> jax.Array:
        """Returns codes float32[S, ..., M] of hidden states [S, ..., D]; at most K of a token are not 0."""
        return encode(self.encoder_arrays, h_SND, self.keep)

    def decode(self, codes_SNM: jax.Array) -> jax.Array:
        """Reconstructs the hidden state float32[S, ..., D] from codes [S, ..., M]."""
        decoded = jnp.einsum("s...m,smd->s...d", codes_SNM, self.decoder, precision=jax.lax.Precision.HIGHEST)
        return decoded + _per_layer(jnp.asarray(self.centre), decoded)

    def save(self, path: Path) -> None:
        """Writes a NumPy archive whose comment, its end, is the SHA-256 of all before it."""
        version = _WITHOUT_BIAS if self.bias is None else FORMAT
        content = {"format": version, "kind": self.kind, "keep": self.keep, "facts": dict(self.facts)}
        arrays = self._arrays()
        to = io.BytesIO()
        np.savez(to, about=np.array(json.dumps(content)), **arrays)  # type: ignore[arg-type]
        with zipfile.ZipFile(to, "a") as archive:
            archive.comment = bytes(_DIGEST_BYTES)
        body = to.getvalue()[:-_DIGEST_BYTES]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, body + _digest(body))

    @classmethod
    def load(cls, path: Path) -> "Dictionary":
        """Reads what `save` has written; a UserError if it is missing, damaged, or of another version."""
        advice = "delete it and the store, and harvest again"
        with damage_is_a_user_error(path, advice, EOFError, KeyError, TypeError, *_NO_ARCHIVE):
            try:
                stored = path.read_bytes()
            except FileNotFoundError as e:
                raise UserError(f"{path} is missing: run topklm neurons harvest with --dictionary") from e
            is_whole = _digest(stored[:-_DIGEST_BYTES]) == stored[-_DIGEST_BYTES:]
            with np.load(io.BytesIO(stored), allow_pickle=False) as found:
                content = parse_json(str(found["about"]))
                if not is_whole and content["format"] != _WITHOUT_DIGEST:
                    raise ValueError("its digest differs")
                names = (*_ARRAYS, "bias") if content["format"] == FORMAT else _ARRAYS
                arrays = {name: found[name] for name in names}
            if content["format"] in (_WITHOUT_DIGEST, _WITHOUT_BIAS, FORMAT):
                return cls(content["kind"], content["keep"], facts=content["facts"], **arrays)
        raise UserError(
            f"{path}: a dictionary of format {content['format']}, this topklm reads {FORMAT}: harvest again"
        )


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def check_coordinates(description: str, action: str) -> None:
    """Raises UserError for an action ("steering") on coordinates where neurons are codes of a dictionary.

    That is said by `Metadata.dictionary` of a store or a table.
    """
    if description:
        raise UserError(
            f"{action} acts on coordinates of the hidden state, and the neurons here are codes of a "
            f"dictionary ({description.partition(':')[0]}): use the run itself, harvested without "
            "--dictionary"
        )


def encode(arrays: Encoder, h_SND: jax.Array, keep: int) -> jax.Array:
    """Computes `Dictionary.encode` inside `jax.jit`, of h [S, ..., D] of any float dtype."""
    centre_SD, encoder_SDM, bias_SM = arrays
    h_SND = h_SND.astype(jnp.float32)
    centred_SND = h_SND - _per_layer(centre_SD, h_SND)
    codes_SNM = jnp.einsum("s...d,sdm->s...m", centred_SND, encoder_SDM, precision=jax.lax.Precision.HIGHEST)
    return topk(codes_SNM + _per_layer(bias_SM, codes_SNM), keep)


def _per_layer(x_SD: jax.Array, like_SND: jax.Array) -> jax.Array:
    return x_SD.reshape(len(x_SD), *[1] * (like_SND.ndim - 2), -1)


class ExplainedVariance:
    """The share of the variance of vectors that their reconstructions hold; filled stretch by stretch.

        1 - sum of |x - its reconstruction|^2 / sum of |x - mean of all x|^2

    so that to predict the mean gives 0, and what is perfect 1. Both sums run over all vectors added, in
    float64, so the number does not depend on how they were cut up.
    """

    def __init__(self, width: int):
        self._n, self._mean = 0, np.zeros(width)
        self._error = self._scatter = 0.0

    def add(self, x_ND: np.ndarray, reconstructed_ND: np.ndarray) -> None:
        """Adds vectors, float[N, D] each."""
        if not len(x_ND):
            return
        x_ND = x_ND.astype(np.float64)
        self._error += float(np.square(x_ND - reconstructed_ND).sum())
        n, mean = len(x_ND), x_ND.mean(axis=0)
        # The scatter of two samples about their common mean: Chan, Golub and LeVeque 1979.
        between = np.square(mean - self._mean).sum() * self._n * n / (self._n + n)
        self._scatter += float(np.square(x_ND - mean).sum() + between)
        self._mean += (mean - self._mean) * n / (self._n + n)
        self._n += n

    @property
    def value(self) -> float:
        """The share; NaN where the vectors do not differ."""
        return 1 - self._error / self._scatter if self._scatter else float("nan")


def _said(value: Any) -> str:
    """Returns a fact as text."""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return " / ".join(map(_said, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
