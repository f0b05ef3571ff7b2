"""Figures of a model's language at a checkpoint: n-grams, copying, attention heads, minimal pairs.

`LanguageMeasures` is made once for a run and called with any of its checkpoints, whose parameters are
arguments of its programs. All of them compute in float32.

- `kl_unigram`, `kl_bigram`: KL(model || n-gram) in nats, the mean over held-out positions. The n-grams are
  counted on the run's training text, separators included, up to 20 million tokens: unigrams with one added to
  each count, bigrams with one pseudo-count that is spread as the unigrams are (MacKay and Peto 1995).
- `entropy`: of the model's next token there, nats.
- `copy_gain`: on random tokens of length P twice, the loss in the first copy less that in the second, nats.
- `prefix_matching`: of the best head, the mean attention on such tokens from position i of the second copy to
  i - P + 1, one after the same token (Olsson et al. 2022, "In-context learning and induction heads").
- `icl_score`: loss of a held-out document's token 500 less that of its token 50 (Olsson et al. 2022), nats;
  below 0 where context helps. Only where the model's context holds 500 tokens and eight documents have them.
- `uas`, `uas_distance`: of heads as parsers. A head's answer at a word is the earlier word that gets most of
  its attention; it hits an arc if, from the later word of the arc, that is the earlier one. After "Sudden
  drops in the loss" (Chen et al. 2023, arXiv 2309.07311), with two changes: their head of a relation is the
  best one on the sentences it is scored on, ours is chosen on one half of the sentences and scored on the
  other, both ways; and a causal model looks back only. The baseline is the best of the fixed distances 1 to
  8, chosen in the same way.
- `blimp`, `blimp_FIELD`: accuracy, the mean over paradigms.

Dims: L layers, H heads, S sentences, B of a batch, T tokens, W words.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from topklm.config import ModelConfig
from topklm.errors import UserError
from topklm.eval import scoring, tasks
from topklm.inference.language_model import LanguageModel
from topklm.layout import Layout, one_device
from topklm.model import transformer
from topklm.model.losses import token_losses
from topklm.neurons import documents as documents_lib
from topklm.neurons import labelled_texts as trees_lib
from topklm.neurons.documents import TextModel
from topklm.neurons.labelled_texts import Trees, word_attention

DISTANCES = 8
LEAST_ARCS = 100  # of a relation, in both halves together
PREFIX_MATCHING = "prefix_matching"

_BATCH_SENTENCES = 32  # sentences
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
            for begin in range(0, len(rows), _BATCH_SENTENCES):
                part = rows[begin : begin + _BATCH_SENTENCES]
                filled = np.resize(part, _BATCH_SENTENCES)  # repeats some
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


COUNTED_TOKENS = 20_000_000
SENTENCES = 500

_ROWS, _ROW_TOKENS, _ROW_POSITIONS = 32, 256, 64  # of held-out text for KL
_BATCH = 8  # of these rows
_COPY_ROWS, _COPY_TOKENS = 16, 64
_EARLY, _LATE = 50, 500  # tokens of a document, from 1, for ICL
_ICL_DOCUMENTS, _LEAST_ICL_DOCUMENTS = 64, 8
_STRETCH = 2**20  # tokens counted together


class NGrams:
    """Counts of tokens, and of tokens after some contexts; V tokens."""

    def __init__(self, stream: Iterable[np.ndarray], contexts: np.ndarray, vocab_size: int):
        """Counts token ids, int[n] of each stretch, which follow one another; of these contexts alone."""
        self.contexts = np.unique(contexts)
        number = np.full(vocab_size, -1)
        number[self.contexts] = np.arange(len(self.contexts))
        self.counts = np.zeros(vocab_size, np.int64)
        shape = len(self.contexts), vocab_size
        self.pairs = scipy.sparse.csr_array(shape, dtype=np.float64)
        last = np.zeros(0, np.int64)
        for stretch in stream:
            ids = np.concatenate([last, stretch])
            self.counts += np.bincount(stretch, minlength=vocab_size)
            rows, ones = number[ids[:-1]], np.ones(len(ids) - 1)
            known = rows >= 0
            new = scipy.sparse.coo_array((ones[known], (rows[known], ids[1:][known])), shape)
            self.pairs = self.pairs + new.tocsr()
            last = ids[-1:]

    def unigram(self) -> np.ndarray:
        """Returns float64[V], one added to each count."""
        return (self.counts + 1) / (self.counts.sum() + len(self.counts))

    def bigram(self, contexts: np.ndarray) -> np.ndarray:
        """Returns float64[n, V] of tokens that were counted as contexts, int[n]."""
        counted = self.pairs[np.searchsorted(self.contexts, contexts)].toarray()
        return (counted + self.unigram()) / (counted.sum(axis=1, keepdims=True) + 1)


@transformer.jit_in_float32
def _divergences(
    config: ModelConfig,
    params: transformer.Parameters,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    columns_BP: jax.Array,
    log_unigram_V: jax.Array,
    log_bigram_BPV: jax.Array,
) -> jax.Array:
    """Computes KL to the unigrams, to the bigrams, and the entropy, float32[3, B, P]."""
    model = transformer.bind(config, params)
    h_BTD, _ = model.hidden(tokens_BT, segment_ids_BT, positions_BT)
    log_p = jax.nn.log_softmax(model.logits(jnp.take_along_axis(h_BTD, columns_BP[..., None], axis=1)))
    p = jnp.exp(log_p)
    to_unigram, to_bigram = ((p * (log_p - log_q)).sum(axis=-1) for log_q in (log_unigram_V, log_bigram_BPV))
    return jnp.stack([to_unigram, to_bigram, -(p * log_p).sum(axis=-1)])


@transformer.jit_in_float32
def _losses(config: ModelConfig, params: transformer.Parameters, tokens_BT: jax.Array) -> jax.Array:
    """Computes the loss of every token but a row's first, float32[B, T - 1]; a row is one document."""
    model = transformer.bind(config, params)
    h_BTD, _ = model.hidden(tokens_BT[:, :-1])
    return token_losses(h_BTD, model.unembedding(), tokens_BT[:, 1:], config.vocab_size)


class LanguageMeasures:
    """Text and tables for the figures of a run, made once and called with one checkpoint after another.

    Attributes:
        notes: What a reader of the figures should know, such as sentences left out.
    """

    def __init__(
        self,
        model: LanguageModel,
        layout: Layout | None = None,
        *,
        blimp: int = 0,
        conllu: str | Path | None = None,
    ):
        """Prepares the figures of a run: of any checkpoint with this config and tokenizer.

        Args:
            model: Of the run.
            layout: Where its parameters lie; default one device.
            blimp: Pairs of each paradigm of BLiMP; 0: none.
            conllu: A file with parsed sentences, of which the first 500 that fit are used.

        Raises:
            UserError: If the file is no treebank, or the run's data cannot be opened.
        """
        self.notes = list[str]()
        config, tokenizer = model.config.model, model.tokenizer
        self._config = config
        text_model = TextModel(config, {}, layout or one_device(), tokenizer.separator_id)
        # Small things that can be wrong come before the counts, which take seconds.
        self._parsing = self._blimp = None
        if conllu is not None:
            self._parsing = Parsing(self._trees(Path(conllu), model))
        if blimp:
            task = tasks.find("blimp", limit=blimp, field="--blimp")
            self._blimp = tasks.tokenize(task, text_model, tokenizer)
            self._program = scoring.make_program(config, text_model.layout, in_float32=True)
        self._text_model = text_model
        heldout = documents_lib.open_documents(tokenizer, model.config.data)
        self._windows(heldout, text_model)
        self._ngrams = NGrams(self._stream(model), self._contexts, config.vocab_size)
        period = min(_COPY_TOKENS, (config.context_length - 1) // 2)
        self._copies = _copies(period, tokenizer.separator_id, config.vocab_size) if period > 2 else None
        self._long = self._long_documents(heldout, tokenizer.separator_id)

    def describe(self) -> dict[str, Any]:
        """Returns what decides the figures besides the run: resuming with another is refused."""
        trees = self._parsing.digest if self._parsing is not None else ""
        pairs = self._blimp.task.sha256 if self._blimp is not None else ""
        return {"conllu": trees, "blimp": pairs}

    def __call__(self, model: LanguageModel) -> tuple[dict[str, float], list[Row]]:
        """Measures a checkpoint of the run: its values, of the same names at each, and rows of its heads."""
        config, params = self._config, model.params
        unigram, bigram, entropy = self._divergences(params)
        values = {"kl_unigram": unigram, "kl_bigram": bigram, "entropy": entropy}
        rows = list[Row]()
        if self._copies is not None:
            losses = np.asarray(_losses(config, params, self._copies), np.float64)
            period = losses.shape[1] // 2
            # The first token of a copy cannot be known.
            first, second = losses[:, 1:period], losses[:, period + 1 :]
            values["copy_gain"] = float(first.mean() - second.mean())
            scores = np.asarray(prefix_matching(config, params, self._copies))
            values[PREFIX_MATCHING] = float(scores.max())
            rows += prefix_rows(scores, len(self._copies) * (period - 1))
        if self._long is not None:
            losses = np.asarray(_losses(config, params, self._long), np.float64)
            values["icl_score"] = float((losses[:, _LATE - 1] - losses[:, _EARLY - 1]).mean())
        if self._parsing is not None:
            of_arcs = self._parsing.rows(config, params)
            values |= over_relations(attachment(of_arcs))
            rows += of_arcs
        if self._blimp is not None:
            values |= self._accuracies(params)
        return values, rows

    def _trees(self, path: Path, model: LanguageModel) -> trees_lib.Trees:
        found = trees_lib.read_trees(path, model.tokenizer, model.cfg.context_length, SENTENCES)
        left_out = documents_lib.described(found.left_out)
        self.notes.append(
            f"{path.name}: {len(found.tokens):,} sentences{f'; left out: {left_out}' if left_out else ''}"
        )
        if not Parsing(found).relations:
            advice = f"no relation has {LEAST_ARCS} arcs in its sentences; give more sentences"
            raise UserError(advice, field="--conllu", value=str(path))
        return found

    def _windows(self, heldout: documents_lib.Documents, text_model: TextModel) -> None:
        """Draws the held-out positions: the first rows, as many positions of each, evenly spread."""
        length = min(_ROW_TOKENS, self._config.context_length)
        windows = list[documents_lib.TokenWindow]()
        n_tokens = 0
        for number, ids in enumerate(heldout):
            for window in documents_lib.windows_of(number, ids, text_model.separator_id, length):
                windows.append(window)
                n_tokens += len(window.inputs)
            if n_tokens >= _ROWS * length:
                break
        packed = documents_lib.pack(windows, length, _BATCH, text_model.separator_id)
        read = [np.flatnonzero(row >= 0) for row in packed.places]
        n = min(_ROW_POSITIONS, max(map(len, read)))
        full = [row for row, places in enumerate(read) if len(places) >= n][:_ROWS]
        self._columns = np.stack(
            [read[row][np.linspace(0, len(read[row]) - 1, n).round().astype(int)] for row in full]
        )
        self._inputs = tuple(x[full] for x in (packed.inputs, packed.segment_ids, packed.positions))
        self._contexts = np.take_along_axis(self._inputs[0], self._columns, axis=1)

    def _divergences(self, params: transformer.Parameters) -> list[float]:
        log_unigram = np.log(self._ngrams.unigram()).astype(np.float32)
        n, sums = len(self._columns), np.zeros(3)
        for begin in range(0, n, _BATCH):
            rows = np.arange(begin, begin + _BATCH) % n
            contexts = self._contexts[rows]
            bigram = np.log(self._ngrams.bigram(contexts.reshape(-1))).astype(np.float32)
            found = _divergences(
                self._config,
                params,
                *(x[rows] for x in self._inputs),
                self._columns[rows],
                log_unigram,
                bigram.reshape(*contexts.shape, -1),
            )
            # Rows that fill the last batch up are not counted.
            sums += np.asarray(found, np.float64)[:, : n - begin].sum(axis=(1, 2))
        return (sums / self._columns.size).tolist()

    def _stream(self, model: LanguageModel) -> Iterator[np.ndarray]:
        """Yields the tokens of the training text with their separators, in stretches."""
        train = documents_lib.open_documents(model.tokenizer, model.config.data, split="train")
        separator = np.array([model.tokenizer.separator_id], np.int64)
        parts, n, done = list[np.ndarray](), 0, 0
        for ids in train:
            parts += [separator, ids]
            n += 1 + len(ids)
            if n >= _STRETCH:
                yield np.concatenate(parts)
                parts, n, done = [], 0, done + n
                if done >= COUNTED_TOKENS:
                    self.notes.append(f"n-grams: the first {done:,} tokens of the training text")
                    return
        yield np.concatenate([*parts, separator])

    def _long_documents(self, heldout: documents_lib.Documents, separator_id: int) -> np.ndarray | None:
        """Returns the separator and the first 500 tokens of documents that have them, int32[B, 501]."""
        if self._config.context_length < _LATE:
            return None
        long = itertools.islice((ids[:_LATE] for ids in heldout if len(ids) >= _LATE), _ICL_DOCUMENTS)
        rows = [np.concatenate([[separator_id], ids]) for ids in long]
        return np.stack(rows).astype(np.int32) if len(rows) >= _LEAST_ICL_DOCUMENTS else None

    def _accuracies(self, params: transformer.Parameters) -> dict[str, float]:
        assert self._blimp is not None
        model = dataclasses.replace(self._text_model, params=params)
        outcome = self._blimp.evaluate(model, program=self._program)
        assert outcome is not None
        return {
            f"blimp_{figure.part}" if figure.part else "blimp": float(
                figure.sums.sum() / figure.weights.sum()
            )
            for figure in tasks.figures_of(outcome)
            if figure.measure == "acc"
        }


def _copies(period: int, separator_id: int, vocab_size: int) -> np.ndarray:
    """Draws rows of a separator and twice the same P random tokens, int32[B, 2 P + 1]; always the same."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, vocab_size - 1, (_COPY_ROWS, period))
    drawn += drawn >= separator_id
    return np.concatenate([np.full((_COPY_ROWS, 1), separator_id), drawn, drawn], axis=1).astype(np.int32)
