"""Attention heads as parsers, and as copiers.

A head's answer at a word is the earlier word that gets most of its attention; it hits an arc if, from the
later word of the arc, that is the earlier one. After "Sudden drops in the loss" (Chen et al. 2023, arXiv
2309.07311), with two changes: their head of a relation is the best one on the sentences it is scored on, ours
is chosen on one half of the sentences and scored on the other, both ways; and a causal model looks back only.
The baseline is the best of the fixed distances 1 to 8, chosen in the same way.

Prefix matching (Olsson et al. 2022, "In-context learning and induction heads"): random tokens of length P
twice, and the mean attention from position i of the second copy to i - P + 1, one after the same token.
Dims: L layers, H heads, S sentences, B of a batch, T tokens, W words.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.neurons.labelled_texts import Trees, word_attention

DISTANCES = 8
LEAST_ARCS = 100  # of a relation, in both halves together
PREFIX_MATCHING = "prefix_matching"

_BATCH = 32  # sentences
_SHORT = 32  # tokens; most sentences have fewer, and attention takes the square

# A row of a head's figures: layer, head, relation, half, hits, n, score. A layer of -1 is the baseline, whose
# `head` is the distance. Half and hits are -1 where there are none.
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Relation:
    """How well one head finds the arcs of a relation; shares of arcs."""

    relation: str
    n: int  # arcs
    uas: float  # of the head chosen on the other half
    distance: float  # of the fixed distance chosen on the other half
    layer: int  # of the head with most hits in both halves
    head: int


@transformer.jit_in_float32
def _answers(
    config: ModelConfig,
    params: transformer.Parameters,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    words_BT: jax.Array,
) -> jax.Array:
    """Computes the answer of each head at each word, int32[L, B, H, W]."""
    model = transformer.bind(config, params)

    def of_layer(weights_BHTT: jax.Array) -> jax.Array:
        return answers_of(word_attention(weights_BHTT, words_BT))

    return model.map_attention(of_layer, tokens_BT, segment_ids_BT)


def answers_of(attention_BHWW: jax.Array) -> jax.Array:
    """Returns the earlier word with most attention, int32[B, H, W]; the first of equal ones."""
    length = attention_BHWW.shape[-1]
    earlier = jnp.tril(jnp.ones((length, length), bool), -1)
    return jnp.where(earlier, attention_BHWW, -1.0).argmax(axis=-1).astype(jnp.int32)


class Parsing:
    """Sentences whose arcs the heads of any checkpoint are scored on."""

    def __init__(self, trees: Trees):
        self._trees = trees
        sentence, arc = np.nonzero(trees.arcs[..., 0] >= 0)
        self._sentence, self._half = sentence, sentence % 2
        self._later, self._earlier = trees.arcs[sentence, arc].T
        names, self._relation, counts = np.unique(
            trees.relations[sentence, arc], return_inverse=True, return_counts=True
        )
        self._kept = [(number, str(names[number])) for number in np.flatnonzero(counts >= LEAST_ARCS)]

    @property
    def digest(self) -> str:
        """Hex digest of tokens and arcs."""
        trees = self._trees
        parts = (trees.tokens, trees.words, trees.arcs, trees.relations)
        return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in parts)).hexdigest()

    @property
    def relations(self) -> list[str]:
        """Names of the relations with enough arcs."""
        return [name for _, name in self._kept]

    def rows(self, config: ModelConfig, params: transformer.Parameters) -> list[Row]:
        """Scores the heads of a checkpoint, and the fixed distances."""
        trees = self._trees
        n_sentences, length = trees.tokens.shape
        answers = np.zeros((config.n_layers, n_sentences, config.n_heads, length), np.int32)
        is_short = trees.segment_ids.sum(axis=1) <= _SHORT
        for columns, rows in ((_SHORT, np.flatnonzero(is_short)), (length, np.flatnonzero(~is_short))):
            for begin in range(0, len(rows), _BATCH):
                part = rows[begin : begin + _BATCH]
                filled = np.resize(part, _BATCH)  # repeats some
                given = (x[filled, :columns] for x in (trees.tokens, trees.segment_ids, trees.words))
                found = np.asarray(_answers(config, params, *given))
                answers[:, part, :, : found.shape[-1]] = found[:, : len(part)]
        return self.rows_of(answers)

    def rows_of(self, answers_LSHW: np.ndarray) -> list[Row]:
        """Counts the hits of answers, int[L, S, H, W]."""
        # Advanced indices come first: [arcs, L, H].
        hit = answers_LSHW[:, self._sentence, :, self._later] == self._earlier[:, None, None]
        near = (self._later - self._earlier)[:, None] == np.arange(1, DISTANCES + 1)
        rows = []
        for number, name in self._kept:
            for half in (0, 1):
                chosen = (self._relation == number) & (self._half == half)
                n, of_heads = int(chosen.sum()), hit[chosen].sum(axis=0)
                for (layer, head), hits in np.ndenumerate(of_heads):
                    rows.append(_row(layer, head, int(hits), name, half, n))
                for distance, hits in enumerate(near[chosen].sum(axis=0).tolist(), 1):
                    rows.append(_row(-1, distance, hits, name, half, n))
        return rows


def attachment(rows: Sequence[Mapping[str, Any]]) -> list[Relation]:
    """Returns the score of each relation, by the rows of one checkpoint; the head is chosen held out."""
    found = []
    for name in dict.fromkeys(row["relation"] for row in rows if row["half"] >= 0):
        tables: dict[bool, tuple[dict, dict]] = {True: ({}, {}), False: ({}, {})}
        n = [0, 0]
        for row in rows:
            if row["relation"] == name:
                n[row["half"]] = row["n"]
                tables[row["layer"] < 0][row["half"]][row["layer"], row["head"]] = row["hits"]
        if min(n) == 0:
            continue

        def share(halves: tuple[dict, dict], n: Sequence[int] = n) -> float:
            best = [max(half, key=half.__getitem__) for half in halves]
            return (halves[1][best[0]] + halves[0][best[1]]) / sum(n)

        heads = tables[False]
        layer, head = max(heads[0], key=lambda key: heads[0][key] + heads[1][key])
        found.append(Relation(name, sum(n), share(heads), share(tables[True]), layer, head))
    return found


def over_relations(found: Sequence[Relation]) -> dict[str, float]:
    """Returns `uas` and `uas_distance`, shares of all arcs of these relations; NaN where there is none."""
    n = sum(one.n for one in found)
    return {
        "uas": sum(one.uas * one.n for one in found) / n if n else float("nan"),
        "uas_distance": sum(one.distance * one.n for one in found) / n if n else float("nan"),
    }


@transformer.jit_in_float32
def prefix_matching(config: ModelConfig, params: transformer.Parameters, tokens_BT: jax.Array) -> jax.Array:
    """Computes the score of each head, float32[L, H], on rows of a separator and two copies of P tokens."""
    model = transformer.bind(config, params)
    return model.map_attention(prefix_scores, tokens_BT)


def prefix_scores(weights_BHTT: jax.Array) -> jax.Array:
    """Computes the score of each head, [H], of its attention to a separator and two copies of P tokens."""
    period = weights_BHTT.shape[-1] // 2
    second = np.arange(period + 1, 2 * period)  # the last token would look at the second copy
    return weights_BHTT[:, :, second, second - period + 1].mean(axis=(0, 2))


def prefix_rows(scores_LH: np.ndarray, n: int) -> list[Row]:
    """Returns the rows of `prefix_matching` of n positions."""
    return [
        {**_row(layer, head, -1, PREFIX_MATCHING, -1, n), "score": float(score)}
        for (layer, head), score in np.ndenumerate(scores_LH)
    ]


def _row(layer: int, head: int, hits: int, relation: str, half: int, n: int) -> Row:
    score = hits / n if n else 0.0
    where = {"layer": layer, "head": head, "relation": relation, "half": half}
    return {**where, "hits": hits, "n": n, "score": score}
