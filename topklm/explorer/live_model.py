"""The model run on a text that a person types, and texts that it writes."""

from collections.abc import Sequence
import dataclasses
import functools
from pathlib import Path
import threading

import jax
import jax.numpy as jnp
import numpy as np

from topklm.errors import UserError
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.interventions import Intervention
from topklm.inference.language_model import LanguageModel
from topklm.inference.load import load
from topklm.inference.sampling import Sampling
from topklm.inference.scheduler import Generation
from topklm.neurons.capture import RESID_POST, SparseActivations, hook_name
from topklm.neurons.dictionary import Dictionary, check_coordinates
from topklm.neurons.paths import NeuronsFolder
from topklm.neurons.store import Metadata

# Of a Base LM, whose neurons are nearly all active, only the strongest are told.
DENSE_KEPT = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Activations:
    """The neurons' activations on a text; the separator before it is left out.

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


class LiveModel:
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

    def read(self, text: str) -> Activations:
        """Returns all neurons on a text.

        Raises:
            UserError: If it is empty or too long, or the model cannot be loaded.
        """
        return self._reading(self.ids(text))

    def neuron(self, text: str, layer: int, neuron: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns one neuron on a text: ids int32[T] and values float32[T].

        Raises:
            UserError: As `read`.
        """
        ids = self.ids(text)
        return ids, self.activations(ids, layer, neuron)

    def activations(self, ids: np.ndarray, layer: int, neuron: int) -> np.ndarray:
        """Returns one neuron on tokens int[T], of which there are at most `most_tokens`: float32[T]."""
        if self._is_topk or self._dictionary is not None:
            reading = self._reading(ids)
            place = reading.layers.index(layer)
            found = np.where(reading.indices[place] == neuron, reading.values[place], 0)
            return found.sum(axis=-1, dtype=np.float32)
        name = hook_name(layer, RESID_POST)
        with self._lock:
            _, cache = self.model.run_with_cache(self._after_separator(ids), name)
            values = np.asarray(cache[name][0, 1 : len(ids) + 1, neuron]).astype(np.float32)
        return np.maximum(values, 0)

    def generation(
        self,
        ids: np.ndarray,
        sampling: Sampling,
        max_new_tokens: int,
        interventions: Sequence[Sequence[Intervention]],
    ) -> Generation:
        """Starts sequences with one prompt, int[T] after a separator, each with its own interventions.

        Raises:
            UserError: For what the model cannot do.
        """
        if any(interventions):
            check_coordinates(self._metadata.dictionary, "steering")
        config, separator = self.model.config.model, self.model.tokenizer.separator_id
        rows = [dataclasses.replace(one, row=row) for row, some in enumerate(interventions) for one in some]
        try:
            return Generation(
                config,
                self.model.params,
                [[separator, *ids.tolist()]] * len(interventions),
                [sampling.check()] * len(interventions),
                max_new_tokens=[max_new_tokens] * len(interventions),
                stop_token=separator,
                interventions=InterventionBatch.of(config, rows),
                layers=self.model.decode_layers,
            )
        except ValueError as e:
            raise UserError(str(e)) from e

    def advance(self, generation: Generation, steps: int) -> list[list[int]]:
        """Returns some more tokens of each of its texts; the model is held no longer than they take."""
        with self._lock:
            return generation.advance(steps)

    def ids(self, text: str, name: str = "text") -> np.ndarray:
        """Returns the tokens of a text, int32[T].

        Args:
            text: As typed.
            name: Of the field that it was typed into.

        Raises:
            UserError: If it is empty or too long, or the model cannot be loaded.
        """
        # JSON may hold halves of surrogate pairs, which are no text.
        text = text.encode("utf-8", "replace").decode()
        if not text.strip():
            raise UserError(f"{name} is empty: type a few words")
        ids = self.model.tokenizer.encode(text)
        if len(ids) > self.most_tokens:
            raise UserError(
                f"{name} has {len(ids):,} tokens: at most {self.most_tokens:,}, the model's context length "
                "less one; shorten it"
            )
        return ids

    @property
    def _is_topk(self) -> bool:
        return self._metadata.kind == "topk"

    @functools.cached_property
    def _dictionary(self) -> Dictionary | None:
        """The dictionary that the store's activations are written in, if there is one.

        Raises:
            UserError: If it is missing, or another.
        """
        if not self._metadata.dictionary:
            return None
        found = Dictionary.load(NeuronsFolder(Path(self._run), self._metadata.step).dictionary)
        if found.description != self._metadata.dictionary:
            raise UserError("the store was harvested with another dictionary: delete both, and harvest again")
        return found

    def _codes(self, hidden: list[jax.Array]) -> SparseActivations:
        """Returns all codes of [1, B, T, D] of each layer."""
        assert self._dictionary is not None
        codes = self._dictionary.encode(jnp.concatenate(hidden))
        return SparseActivations.from_dense(codes, self._dictionary.keep)

    def _reading(self, ids: np.ndarray) -> Activations:
        layers, n = self._metadata.layers, len(ids)
        with self._lock:
            if self._is_topk:
                _, cache = self.model.run_with_cache(self._after_separator(ids))
                found = [cache.neurons]
            else:
                wanted = [hook_name(layer, RESID_POST) for layer in layers]
                _, cache = self.model.run_with_cache(self._after_separator(ids), wanted)
                hidden = [cache[name][None] for name in wanted]
                found = [_strongest(h) for h in hidden] if self._dictionary is None else [self._codes(hidden)]
            indices, values = (
                np.concatenate([np.asarray(getattr(part, name)) for part in found])[:, 0, 1 : n + 1]
                for name in ("indices", "values")
            )
        return Activations(ids, layers, indices, values.astype(np.float32))

    def _after_separator(self, ids: np.ndarray) -> np.ndarray:
        """Returns tokens with the separator before them, int32[1, T + 1]."""
        return np.concatenate([[self.model.tokenizer.separator_id], ids]).astype(np.int32)[None]


def _strongest(hidden: jax.Array) -> SparseActivations:
    """Keeps the strongest of the positive part of [S, B, T, D]."""
    return SparseActivations.from_dense(jnp.maximum(hidden, 0), min(DENSE_KEPT, hidden.shape[-1]))
