"""The model run on a text that a person types."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np

from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel
from topklm.inference.load import load
from topklm.neurons import names
from topklm.neurons.activations import SparseActivations
from topklm.neurons.store import Metadata

# Of a Base LM, whose neurons are nearly all active, only the strongest are told.
DENSE_KEPT = 32

_SHORTEST = 32  # programs are compiled for lengths that are powers of two from here on


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What the neurons do on a text; the separator before it is left out.

    Attributes:
        ids: int32[T].
        layers: The model's layers, S of them.
        indices: int32[S, T, k], neurons, the strongest first.
        values: float32[S, T, k]; 0 where none is active.
    """

    ids: np.ndarray
    layers: tuple[int, ...]
    indices: np.ndarray
    values: np.ndarray


class Reader:
    """Loads the model when the first text comes.

    Args:
        run: The run folder.
        metadata: Of the store, whose model it is.
    """

    def __init__(self, run: str, metadata: Metadata):
        self._run, self._metadata = run, metadata
        self._lock = threading.Lock()

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The model of the store's checkpoint.

        Raises:
            UserError: If it cannot be loaded.
        """
        return load(self._run, step=self._metadata.step)

    @property
    def most_tokens(self) -> int:
        """How many tokens a text may have: the window that the model was trained on, less its separator."""
        return self._metadata.context_length - 1

    def read(self, text: str) -> Reading:
        """All neurons on a text.

        Raises:
            UserError: If it is empty or too long, or the model cannot be loaded.
        """
        ids = self._ids(text)
        layers, n = self._metadata.layers, len(ids)
        with self._lock:
            if self._is_topk:
                _, cache = self.model.run_with_cache(self._padded(ids))
                found = [cache.neurons]
            else:
                wanted = [names.of(layer, names.RESID_POST) for layer in layers]
                _, cache = self.model.run_with_cache(self._padded(ids), wanted)
                found = [_strongest(cache[name][None]) for name in wanted]
            indices, values = (
                np.concatenate([np.asarray(getattr(part, name)) for part in found])[:, 0, 1 : n + 1]
                for name in ("indices", "values")
            )
        return Reading(ids, layers, indices, values.astype(np.float32))

    def neuron(self, text: str, layer: int, neuron: int) -> tuple[np.ndarray, np.ndarray]:
        """One neuron on a text: ids int32[T] and values float32[T].

        Raises:
            UserError: As `read`.
        """
        if self._is_topk:
            reading = self.read(text)
            place = reading.layers.index(layer)
            found = np.where(reading.indices[place] == neuron, reading.values[place], 0)
            return reading.ids, found.sum(axis=-1, dtype=np.float32)
        ids, name = self._ids(text), names.of(layer, names.RESID_POST)
        with self._lock:
            _, cache = self.model.run_with_cache(self._padded(ids), name)
            values = np.asarray(cache[name][0, 1 : len(ids) + 1, neuron]).astype(np.float32)
        return ids, np.maximum(values, 0)

    @property
    def _is_topk(self) -> bool:
        return self._metadata.kind == "topk"

    def _padded(self, ids: np.ndarray) -> np.ndarray:
        """int32[1, T'], the separator and the text; what stands behind it changes nothing before it."""
        n = len(ids) + 1
        length = min(max(_SHORTEST, 1 << (n - 1).bit_length()), self._metadata.context_length)
        padded = np.full((1, length), self.model.tokenizer.separator_id, np.int32)
        padded[0, 1:n] = ids
        return padded

    def _ids(self, text: str) -> np.ndarray:
        # JSON may hold halves of surrogate pairs, which are no text.
        text = text.encode("utf-8", "replace").decode()
        if not text.strip():
            raise UserError("text is empty: type a few words")
        ids = self.model.tokenizer.encode(text)
        if len(ids) > self.most_tokens:
            raise UserError(
                f"text has {len(ids):,} tokens: at most {self.most_tokens:,}, the model's context length "
                "less one; shorten it"
            )
        return ids


def _strongest(hidden: jax.Array) -> SparseActivations:
    """Of the positive part of [S, B, T, D]."""
    return SparseActivations.from_dense(jnp.maximum(hidden, 0), min(DENSE_KEPT, hidden.shape[-1]))
