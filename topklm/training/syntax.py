"""Parsed sentences beside the training text, and how much attention syntactic neighbours pay to each other.

After the regulariser of "Sudden drops in the loss" (Chen et al. 2023, arXiv 2309.07311), made for BERT: for
each word and its head the largest attention weight of any layer and head, from either to the other, summed
over words. A causal model looks back only, so an arc counts from its later word alone; and ours is a mean
over arcs, so that it does not grow with sentences or their length. Dims: B sentences, T tokens, A arcs.
"""

from collections.abc import Mapping
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm import distributed
from topklm.config import Config, ModelConfig
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.layout import Layout
from topklm.model import transformer
from topklm.neurons import documents, labelled_texts
from topklm.neurons.labelled_texts import Trees, word_attention

Sentences = Mapping[str, jax.Array]  # of a batch: "tokens", "segment_ids", "words", [B, T]; "arcs", [B, A, 2]


def attention_of_neighbours(
    config: ModelConfig, params: transformer.Parameters, sentences: Sentences
) -> jax.Array:
    """Computes the mean over arcs of the largest attention weight of any layer and head, float32, 0 to 1."""
    model, arcs = transformer.bind(config, params), sentences["arcs"]

    def of_layer(weights_BHTT: jax.Array) -> jax.Array:
        return largest_of_heads(word_attention(weights_BHTT, sentences["words"]), arcs)

    of_layers = model.map_attention(of_layer, sentences["tokens"], sentences["segment_ids"])
    return mean_over_arcs(of_layers, arcs)


def largest_of_heads(attention_BHWW: jax.Array, arcs_BA2: jax.Array) -> jax.Array:
    """Returns the largest attention of any head from the later to the earlier word of each arc, [B, A]."""
    rows = jnp.arange(len(arcs_BA2))[:, None]
    return attention_BHWW[rows, :, arcs_BA2[..., 0], arcs_BA2[..., 1]].max(axis=-1)


def mean_over_arcs(largest_LBA: jax.Array, arcs_BA2: jax.Array) -> jax.Array:
    """Returns the mean over arcs of the largest of all layers, a scalar; words of -1 are no arc."""
    is_arc = arcs_BA2[..., 0] >= 0
    return jnp.where(is_arc, largest_LBA.max(axis=0), 0.0).sum() / is_arc.sum()


class NoSentences:
    """Stands in where a run reads none; `said` is how many there are, and how many were left out."""

    said = ""

    def batch(self, step: int) -> tuple[Sentences, ...]:
        """Returns the sentences of step 1, 2, ..., for the train step: in a tuple, empty without any."""
        del step
        return ()

    def facts(self) -> dict[str, str]:
        """Returns the facts that a checkpoint holds of them."""
        return {}

    def check_facts(self, facts: Mapping[str, Any]) -> None:
        """Raises UserError if a checkpoint was trained with other sentences."""


class SentenceBatches(NoSentences):
    """As many sentences for a step as it has windows; which, depends on seed and step alone.

    Each epoch is in an order of its own, and may end inside a batch.
    """

    def __init__(self, found: Trees, config: Config, layout: Layout):
        self._batch_size, self._seed = config.train.batch_size, config.train.seed
        self._name, self._layout = config.data.syntax, layout
        arrays = (found.tokens, found.segment_ids, found.words, found.arcs)
        self._arrays = dict(zip(("tokens", "segment_ids", "words", "arcs"), arrays, strict=True))
        self._epoch, self._order = -1, np.zeros(0, np.int64)
        content = b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)
        self.digest = hashlib.sha256(content).hexdigest()
        left_out = documents.described(found.left_out)
        self.said = f"{len(found.tokens):,} sentences{f'; left out: {left_out}' if left_out else ''}"

    def batch(self, step: int) -> tuple[Sentences, ...]:
        """Returns the sentences of a step, whole on every device."""
        rows = self.numbers(step)

        def put(array: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(array.shape, self._layout.replicated, lambda i: array[i])

        return ({name: put(array[rows]) for name, array in self._arrays.items()},)

    def numbers(self, step: int) -> np.ndarray:
        """Returns which sentences step 1, 2, ... reads, int64[B]."""
        n = len(self._arrays["tokens"])
        epochs, places = np.divmod((step - 1) * self._batch_size + np.arange(self._batch_size), n)
        return np.array([self._ordered(e)[p] for e, p in zip(epochs.tolist(), places.tolist(), strict=True)])

    def facts(self) -> dict[str, str]:
        """Returns the digest of the sentences as the tokenizer makes them."""
        return {"syntax_sha256": self.digest}

    def check_facts(self, facts: Mapping[str, Any]) -> None:
        """Raises UserError if the digest is another one."""
        if facts.get("syntax_sha256") != self.digest:
            raise UserError(
                f"data.syntax = {self._name}: not the sentences that this run was trained with: name the "
                "file it began with, or start a new run with --workdir"
            )

    def _ordered(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self._arrays["tokens"]))
        return self._order


def check_there(config: Config) -> None:
    """Raises UserError if the file of `data.syntax` is needed and not there."""
    if config.optim.syntax_weight and not _path(config).is_file():
        raise UserError(
            "there is no such file; check the path", field="data.syntax", value=config.data.syntax
        )


def _path(config: Config) -> Path:
    return Path(config.data.syntax).expanduser()


def open_sentences(config: Config, tokenizer: Tokenizer, layout: Layout) -> NoSentences:
    """Reads the sentences of `data.syntax`, if they count; UserError for a bad file, or others elsewhere."""
    if not config.optim.syntax_weight:
        return NoSentences()
    found = labelled_texts.read_trees(
        _path(config), tokenizer, config.model.context_length, flag="data.syntax"
    )
    batches = SentenceBatches(found, config, layout)
    if distributed.process_count() > 1 and len(set(distributed.gather("syntax", batches.digest))) > 1:
        raise UserError("data.syntax: processes have other files; give all hosts the same")
    return batches


def weight_at(config: Config, step: jax.Array) -> Any:
    """Returns the weight of the sentences in the step after so many, a scalar."""
    weight, steps = config.optim.syntax_weight, config.optim.syntax_steps
    return jnp.where(step < steps, weight, 0.0) if steps else weight
