"""A dictionary: other directions than its own coordinates in which a Base LM's hidden state is written.

    pre(h) = (h - centre) @ encoder + bias
    codes(h) = TopK(relu(pre)), the K largest; or, with thresholds, relu(pre) where pre > threshold
    h is about centre + codes(h) @ decoder

With several members each has its own M / members codes, one after another, and its own TopK of K / members.
Members that are sequential (boosting) read what the ones before have left of h - centre.

Each code is a neuron of the store that is harvested with it; its meaning in the hidden state is its
row of the decoder and no coordinate. Codes are never negative. How a dictionary is made is
in `topklm.neurons.fit_dictionary` and `topklm.sae`. Dims: S layers, N tokens, D d_model, M codes of a layer.
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
from topklm.neurons import DICTIONARIES, damage_is_a_user_error
from topklm.storage.files import parse_json, write_atomically

FORMAT = 4
_ONE_TOPK = 3  # and still written where there is neither a threshold nor a second member
_WITHOUT_BIAS = 2  # and still written where there is none
_WITHOUT_DIGEST = 1

_ARRAYS = ("centre", "encoder", "decoder")
_OPTIONAL = ("bias", "threshold")
_STATIC = {"static": True}
_DIGEST_BYTES = 64
# Errors of zipfile for other files, besides those of NumPy; RuntimeError: encrypted, or packed oddly.
_NO_ARCHIVE = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, MemoryError)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoder:
    """The arrays of a dictionary that `encode` reads, as an argument of `jax.jit`."""

    centre: jax.Array  # float32[S, D]
    encoder: jax.Array  # float32[S, D, M]
    bias: jax.Array  # float32[S, M]
    threshold: jax.Array | None  # float32[S, M]
    decoder: jax.Array | None  # float32[S, M, D], of sequential members
    keep: int = dataclasses.field(metadata=_STATIC)
    members: int = dataclasses.field(metadata=_STATIC)


@dataclasses.dataclass(frozen=True, eq=False)
class Dictionary:
    """One dictionary for each layer, of one kind."""

    kind: str  # one of `DICTIONARIES`
    keep: int  # K, codes kept of each token; with thresholds about as many, on average
    centre: np.ndarray  # float32[S, D], what is taken off the hidden state
    encoder: np.ndarray  # float32[S, D, M]
    decoder: np.ndarray  # float32[S, M, D], rows of unit length in those that topklm makes
    # How it was made, by name; values that JSON can hold.
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bias: np.ndarray | None = None  # float32[S, M], of the codes; None: 0
    threshold: np.ndarray | None = None  # float32[S, M], above which a code is active; None: TopK
    members: int = 1  # of an ensemble
    sequential: bool = False  # whether each member reads what the ones before have left

    @property
    def width(self) -> int:
        """M, codes of a layer."""
        return self.decoder.shape[1]

    @functools.cached_property
    def sha256(self) -> str:
        """Of its arrays."""
        return hashlib.sha256(b"".join(x.tobytes() for x in self._arrays().values())).hexdigest()

    @property
    def encoder_arrays(self) -> Encoder:
        """The arrays that `encode` takes."""
        bias = np.zeros(self.encoder.shape[::2], np.float32) if self.bias is None else self.bias
        threshold = None if self.threshold is None else jnp.asarray(self.threshold)
        decoder = jnp.asarray(self.decoder) if self.sequential else None
        centre, encoder = jnp.asarray(self.centre), jnp.asarray(self.encoder)
        return Encoder(centre, encoder, jnp.asarray(bias), threshold, decoder, self.keep, self.members)

    def _arrays(self) -> dict[str, np.ndarray]:
        optional = {name: getattr(self, name) for name in _OPTIONAL}
        there = {name: array for name, array in optional.items() if array is not None}
        return {name: getattr(self, name) for name in _ARRAYS} | there

    @property
    def description(self) -> str:
        """Its kind, how it was made and its fingerprint, in a line."""
        facts = ", ".join(f"{name.replace('_', ' ')} {_said(value)}" for name, value in self.facts.items())
        about = "" if self.threshold is None else "about "
        kept = (
            f"{about}{self.keep} of {self.width} codes" if self.keep < self.width else f"{self.width} codes"
        )
        return f"{DICTIONARIES[self.kind]}: {kept}; {facts} ({self.sha256[:12]})"

    def encode(self, h_SND: jax.Array) -> jax.Array:
        """Returns codes float32[S, ..., M] of hidden states [S, ..., D].

        At most K of a token are not 0, where there are no thresholds.
        """
        return encode(self.encoder_arrays, h_SND)

    def decode(self, codes_SNM: jax.Array) -> jax.Array:
        """Reconstructs the hidden state float32[S, ..., D] from codes [S, ..., M]."""
        decoded = _product("s...m,smd->s...d", codes_SNM, jnp.asarray(self.decoder))
        return decoded + _per_layer(jnp.asarray(self.centre), decoded)

    def save(self, path: Path) -> None:
        """Writes a NumPy archive whose comment, its end, is the SHA-256 of all before it."""
        arrays = self._arrays()
        content = {"kind": self.kind, "keep": self.keep, "facts": dict(self.facts)}
        if self.threshold is None and self.members == 1:
            content["format"] = _WITHOUT_BIAS if self.bias is None else _ONE_TOPK
        else:
            how = {"members": self.members, "sequential": self.sequential, "arrays": list(arrays)}
            content |= {"format": FORMAT, **how}
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
                names = {FORMAT: content.get("arrays", ()), _ONE_TOPK: (*_ARRAYS, "bias")}
                arrays = {name: found[name] for name in names.get(content["format"], _ARRAYS)}
            if content["format"] in (_WITHOUT_DIGEST, _WITHOUT_BIAS, _ONE_TOPK, FORMAT):
                how = {name: content[name] for name in ("members", "sequential") if name in content}
                return cls(content["kind"], content["keep"], facts=content["facts"], **arrays, **how)
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


def encode(arrays: Encoder, h_SND: jax.Array) -> jax.Array:
    """Computes `Dictionary.encode` inside `jax.jit`, of h [S, ..., D] of any float dtype."""
    h_SND = h_SND.astype(jnp.float32)
    left_SND = h_SND - _per_layer(arrays.centre, h_SND)
    width = arrays.encoder.shape[-1] // arrays.members
    # Members that are not sequential read the same, in one product.
    n_parts = 1 if arrays.decoder is None else arrays.members
    found: list[jax.Array] = []
    for part in (slice(None),) if n_parts == 1 else _parts(arrays.members, width):
        if found and arrays.decoder is not None:
            before = slice((part.start or 0) - width, part.start)
            left_SND -= _product("s...m,smd->s...d", found[-1], arrays.decoder[:, before])
        pre_SNM = _product("s...d,sdm->s...m", left_SND, arrays.encoder[:, :, part])
        pre_SNM += _per_layer(arrays.bias[:, part], pre_SNM)
        if arrays.threshold is not None:
            is_above = pre_SNM > _per_layer(arrays.threshold[:, part], pre_SNM)
            found.append(jnp.where(is_above | jnp.isnan(pre_SNM), jnp.maximum(pre_SNM, 0), 0))
        else:
            shape = (*pre_SNM.shape[:-1], -1, width)
            kept = topk(pre_SNM.reshape(shape), arrays.keep // arrays.members)
            found.append(kept.reshape(pre_SNM.shape))
    return jnp.concatenate(found, axis=-1)


def _parts(members: int, width: int) -> list[slice]:
    return [slice(begin, begin + width) for begin in range(0, members * width, width)]


def _product(dims: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(dims, a, b, precision=jax.lax.Precision.HIGHEST)


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
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return " / ".join(map(_said, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
