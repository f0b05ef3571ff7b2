"""The model run on a text that a person types, and texts that it writes."""

from collections.abc import Sequence
import dataclasses
import functools
from pathlib import Path
import threading
from typing import NamedTuple

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

EXPECTED = 5  # next tokens
# Of a Base LM, whose neurons are nearly all active, only the strongest are told.
DENSE_KEPT = 32


class Reading(NamedTuple):
    """A text as the model reads it; dims: S layers, T tokens, k neurons, n predictions."""

    indices: np.ndarray  # int32[S, T, k], active neurons, the strongest first
    values: np.ndarray  # float32[S, T, k], activations, 0 where none is
    losses: np.ndarray  # float32[T], of each token, after those before it, nats
    next_ids: np.ndarray  # int[T, n], the tokens most expected after each, the likeliest first
    next_probabilities: np.ndarray  # float32[T, n]


class LiveModel:
    """Loads the model that a store is of, when the first text comes."""

    def __init__(self, run: str, metadata: Metadata):
        self._run, self._metadata = run, metadata
        self._lock = threading.Lock()

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The model of the store's checkpoint; raises UserError if it cannot be loaded."""
        return load(self._run, step=self._metadata.step)

    @property
    def most_tokens(self) -> int:
        """How many tokens a text may have: the window that the model was trained on, less its separator."""
        return self._metadata.context_length - 1

    def ids(self, text: str, name: str = "text") -> np.ndarray:
        """Returns the tokens of typed text, int32[T]; UserError if empty, too long, or without a model."""
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

    def read(self, ids: np.ndarray) -> Reading:
        """Reads tokens int[T], at most `most_tokens`; neurons are those of the store's layers."""
        with self._lock:
            if self._metadata.kind == "topk":
                logits, cache = self.model.run_with_cache(self._after_separator(ids))
                found = cache.neurons
            else:
                wanted = [hook_name(layer, RESID_POST) for layer in self._metadata.layers]
                logits, cache = self.model.run_with_cache(self._after_separator(ids), wanted)
                hidden = jnp.stack([cache[name] for name in wanted])
                if self._dictionary is None:
                    dense, n_kept = jnp.maximum(hidden, 0), min(DENSE_KEPT, hidden.shape[-1])
                else:
                    dense, n_kept = self._dictionary.encode(hidden), self._dictionary.keep
                    if self._dictionary.threshold is not None:  # which keeps any number
                        n_kept = max(1, int((dense > 0).sum(axis=-1).max()))
                found = SparseActivations.from_dense(dense, n_kept)
            indices, values = (
                np.asarray(array)[:, 0, 1 : len(ids) + 1] for array in (found.indices, found.values)
            )
            predicted = np.asarray(logits[0, : len(ids) + 1, : self.model.tokenizer.vocab_size])
        return Reading(indices, values.astype(np.float32), *predictions(predicted, ids, EXPECTED))

    def activations(self, ids: np.ndarray, layer: int, neuron: int) -> np.ndarray:
        """Returns one neuron at tokens int[T], at most `most_tokens`: float32[T]."""
        if self._metadata.kind != "dense":
            indices, values = (array[self._metadata.layers.index(layer)] for array in self.read(ids)[:2])
            return np.where(indices == neuron, values, 0).sum(axis=-1, dtype=np.float32)
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
        """Starts sequences of one prompt, int[T] after a separator, each with its own interventions."""
        if any(interventions):
            check_coordinates(self._metadata.dictionary, "steering")
        config, separator, n = self.model.config.model, self.model.tokenizer.separator_id, len(interventions)
        rows = [dataclasses.replace(one, row=row) for row, some in enumerate(interventions) for one in some]
        try:
            return Generation(
                config,
                self.model.params,
                [[separator, *ids.tolist()]] * n,
                [sampling.check()] * n,
                max_new_tokens=[max_new_tokens] * n,
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

    @functools.cached_property
    def _dictionary(self) -> Dictionary | None:
        """The dictionary of the store's activations, if there is one; raises UserError if it is missing."""
        if not self._metadata.dictionary:
            return None
        found = Dictionary.load(NeuronsFolder(Path(self._run), self._metadata.step).dictionary)
        if found.description != self._metadata.dictionary:
            raise UserError("the store was harvested with another dictionary: delete both, and harvest again")
        return found

    def _after_separator(self, ids: np.ndarray) -> np.ndarray:
        """Returns tokens with the separator before them, int32[1, T + 1]."""
        return np.concatenate([[self.model.tokenizer.separator_id], ids]).astype(np.int32)[None]


def predictions(logits: np.ndarray, ids: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the last three of a `Reading`; logits are float32[T + 1, V], the separator's first."""
    highest = logits.max(axis=1)
    scale = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))  # log of the normaliser
    losses = scale[:-1] - logits[np.arange(len(ids)), ids]
    after, n = logits[1:], min(n, logits.shape[1])
    likeliest = np.argpartition(-after, n - 1, axis=1)[:, :n]
    order = np.argsort(-np.take_along_axis(after, likeliest, axis=1), axis=1, kind="stable")
    likeliest = np.take_along_axis(likeliest, order, axis=1)
    probabilities = np.exp(np.take_along_axis(after, likeliest, axis=1) - scale[1:, None])
    return losses, likeliest, probabilities
