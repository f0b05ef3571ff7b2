"""Which neurons tell, at the name of a thing, whether the model knows a fact of it; over training.

After "Factual Self-Awareness in Language Models" (arXiv 2505.21399), on facts of the run's own training text:
the beginning of an article up to a word that a pattern finds, such as "Nikola Tesla was a | Serbian". A fact
is *known* to a checkpoint if the word's first token is likelier there than those of N words that other facts
of the same kind have; chance is 1 / (N + 1). Otherwise it is *forgotten*. At the last token of the name,
which the model reads before anything of the fact, the *separation* of a neuron is the share of known facts at
which it is active, less that of forgotten ones; of a layer, the mean over the five neurons with the largest.

The published way chooses the five on the facts that it scores them on. Beside it stand five chosen on one
half of the facts and scored on the other, both ways, and both figures again with the labels shuffled among
the facts of a kind: their means over 20 shuffles.

Dims: F facts, S layers, D neurons, B rows, P facts of a row, C candidates of a fact.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel
from topklm.model import transformer
from topklm.model.topk import model_topk
from topklm.neurons import documents as documents_lib
from topklm.neurons.contrast import contrast
from topklm.neurons.documents import TokenWindow

TOP = 5  # neurons of a layer
SHUFFLES = 20
LEAST = 20  # known and forgotten facts of a half
FEWEST = 4 * LEAST  # facts

_READ_CHARACTERS = 400  # of an article
_ROW_TOKENS = 256
_BATCH = 8  # rows

# The name, perhaps with a remark after it, the verb, and the rest of the line.
_SENTENCE = re.compile(
    r"(?P<name>[^.,;:()\n]{2,60}?)(?: \([^)\n]*\)|,[^.\n]{1,80},)?"
    r" (?:is|was|are|were)(?P<rest> (?:an?|the|one of the) [^\n]*)"
)
# By kind, the words from the verb up to the answer, which begins with a blank. The first that fits is taken.
_KINDS = {
    "origin": re.compile(r" (?:an?|the)(?P<answer> [A-Z][a-z]+)\b"),
    "place": re.compile(r"[^.]*? in(?: the)?(?P<answer> [A-Z][a-z]+)\b"),
    "belonging": re.compile(r"[^.]*? of(?: the)?(?P<answer> [A-Z][a-z]+)\b"),
    "year": re.compile(r".*? in(?P<answer> [12]\d{3})\b"),
    "class": re.compile(r" (?:an?|the)(?P<answer> [a-z]{3,})\b"),
}


class Fact(NamedTuple):
    """A fact of a training article."""

    kind: str
    tokens: np.ndarray  # int32[n], the article up to the answer
    name_end: int  # number of the name's last token
    answer: int  # first token of the answer


@dataclasses.dataclass(frozen=True, eq=False)
class FactSet:
    """F facts with the answers that they compete with."""

    facts: Sequence[Fact]
    kinds: np.ndarray  # str[F]
    candidates: np.ndarray  # int32[F, 1 + N], first tokens; the right one is the first


@dataclasses.dataclass(frozen=True)
class Separation:
    """Figures of one layer at one checkpoint; NaN where too few facts are known, or forgotten."""

    layer: int
    neurons: list[int]  # the five of `in_sample`
    in_sample: float  # as published: chosen and scored on all facts
    held_out: float
    in_sample_shuffled: float
    held_out_shuffled: float


@dataclasses.dataclass(frozen=True)
class Awareness:
    """A checkpoint's figures."""

    step: int
    n_known: int
    n_forgotten: int
    greedy: float  # share of facts whose answer's first token is the likeliest of all tokens
    by_kind: dict[str, float]  # share of known facts
    layers: list[Separation]


def fact_of(ids: np.ndarray, tokenizer: Tokenizer) -> Fact | None:
    """Finds a fact at the beginning of an article, int32[n]; None if no pattern does, or tokens do not fit.

    The name must end where a token ends, and a token must begin with the answer.
    """
    text = tokenizer.decode(ids)[:_READ_CHARACTERS]
    if (sentence := _SENTENCE.match(text)) is None:
        return None
    for kind, pattern in _KINDS.items():
        if found := pattern.match(text, sentence.start("rest")):
            ends = np.cumsum([len(piece) for piece in tokenizer.token_bytes(ids[:_READ_CHARACTERS])])
            name, begin = (len(text[:n].encode()) for n in (sentence.end("name"), found.start("answer")))
            name_end, before = (int(np.searchsorted(ends, n)) for n in (name, begin))
            if before + 1 >= len(ends) or (ends[name_end], ends[before]) != (name, begin):
                return None
            return Fact(kind, ids[: before + 1], name_end, int(ids[before + 1]))
    return None


def collect(
    articles: Iterable[np.ndarray],
    tokenizer: Tokenizer,
    context_length: int,
    n_facts: int,
    n_others: int,
    seed: int,
) -> FactSet:
    """Makes at most so many facts of articles, drawn from all, each with `n_others` answers to compete with.

    These are drawn from the answers of the other facts of the kind, so that common ones come more often; they
    have other first tokens, each another one.

    Raises:
        UserError: If there are fewer than `FEWEST`.
    """
    longest = min(_ROW_TOKENS, context_length) - 1
    found = [fact for ids in articles if (fact := fact_of(ids, tokenizer)) and len(fact.tokens) <= longest]
    rng = np.random.default_rng(seed)
    answers = {kind: Counter(fact.answer for fact in found if fact.kind == kind) for kind in _KINDS}
    facts, candidates = list[Fact](), list[list[int]]()
    for number in rng.permutation(len(found)):
        fact = found[number]
        others = {token: n for token, n in answers[fact.kind].items() if token != fact.answer}
        if len(others) < n_others:
            continue
        shares = np.array(list(others.values())) / sum(others.values())
        drawn = rng.choice(list(others), n_others, replace=False, p=shares)
        facts.append(fact)
        candidates.append([fact.answer, *drawn.tolist()])
        if len(facts) == n_facts:
            break
    if len(facts) < FEWEST:
        raise UserError(
            f"the run's training text has {len(facts)} facts that patterns find, such as 'Nikola Tesla was a "
            f"Serbian', and {FEWEST} are needed: choose a run on articles, such as the quickstart's"
        )
    return FactSet(facts, np.array([fact.kind for fact in facts]), np.array(candidates, np.int32))


@transformer.jit_in_float32
def _read(
    config: ModelConfig,
    params: transformer.Parameters,
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    name_ends_BP: jax.Array,
    ends_BP: jax.Array,
    candidates_BPC: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes active bool[S, B, P, D] at names; known and greedy, bool[B, P].

    A coordinate of a Base LM counts as active where TopK would keep it; then S are all layers.
    """
    model = transformer.bind(config, params)

    def at_names(h: jax.Array, u: jax.Array, h_next: jax.Array) -> jax.Array:
        at = jnp.take_along_axis(h_next, name_ends_BP[..., None], axis=1)
        return model_topk(config, at) != 0

    h_BTD, active = model.hidden(*inputs, capture=at_names)
    logits_BPV = model.logits(jnp.take_along_axis(h_BTD, ends_BP[..., None], axis=1))
    of_candidates = jnp.take_along_axis(logits_BPV, candidates_BPC, axis=-1)
    known = of_candidates[..., 0] > of_candidates[..., 1:].max(axis=-1)
    greedy = of_candidates[..., 0] >= logits_BPV.max(axis=-1)
    return active[: config.n_topk_layers or config.n_layers], known, greedy


class FactReader:
    """Facts in rows of tokens, which any checkpoint of a run can read."""

    def __init__(self, model: LanguageModel, facts: FactSet):
        self._config, self.facts = model.config.model, facts
        separator_id = model.tokenizer.separator_id
        windows = [
            TokenWindow(n, np.concatenate([[separator_id], fact.tokens]).astype(np.int32), 1)
            for n, fact in enumerate(facts.facts)
        ]
        length = min(_ROW_TOKENS, self._config.context_length)
        packed = documents_lib.pack(windows, length, _BATCH, separator_id)
        self._inputs = packed.inputs, packed.segment_ids, packed.positions
        places = packed.places.reshape(-1)
        where = np.empty(len(packed.tokens), np.int64)
        where[places[places >= 0]] = np.flatnonzero(places >= 0)
        lengths = np.array([len(fact.tokens) for fact in facts.facts])
        first = np.cumsum(lengths) - lengths
        self._rows, name_ends = np.divmod(where[first + [fact.name_end for fact in facts.facts]], length)
        ends = where[first + lengths - 1] % length
        # The number of each fact in its row.
        order = np.argsort(self._rows, kind="stable")
        counts = np.bincount(self._rows, minlength=len(packed.inputs))
        self._slots = np.empty(len(order), np.int64)
        self._slots[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        shape = len(packed.inputs), int(counts.max())
        self._name_ends, self._ends = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self._candidates = np.zeros((*shape, facts.candidates.shape[1]), np.int32)
        at = self._rows, self._slots
        self._name_ends[at], self._ends[at], self._candidates[at] = name_ends, ends, facts.candidates

    def read(
        self, params: transformer.Parameters, report: Callable[[int], None] = lambda rows: None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns active bool[F, S, D] at names, and known and greedy bool[F]; `report` is told of rows."""
        parts = []
        for begin in range(0, len(self._ends), _BATCH):
            rows = slice(begin, begin + _BATCH)
            inputs = tuple(x[rows] for x in self._inputs)
            given = self._name_ends[rows], self._ends[rows], self._candidates[rows]
            parts.append(jax.device_get(_read(self._config, params, inputs, *given)))
            report(_BATCH)
        active = np.concatenate([np.moveaxis(part[0], 0, 2) for part in parts])  # [B, P, S, D]
        known, greedy = (np.concatenate([part[n] for part in parts]) for n in (1, 2))
        at = self._rows, self._slots
        return active[at], known[at], greedy[at]

    def measure(self, step: int, params: transformer.Parameters, seed: int = 0, **options: Any) -> Awareness:
        """Measures a checkpoint; options are those of `read`."""
        active, known, greedy = self.read(params, **options)
        kinds = self.facts.kinds
        return Awareness(
            step=step,
            n_known=int(known.sum()),
            n_forgotten=int((~known).sum()),
            greedy=float(greedy.mean()),
            by_kind={kind: float(known[kinds == kind].mean()) for kind in np.unique(kinds).tolist()},
            layers=separations(active, known, kinds, seed),
        )


def separations(
    active_FSD: np.ndarray, known_F: np.ndarray, kinds_F: np.ndarray, seed: int = 0
) -> list[Separation]:
    """Computes the figures of each layer; facts with even numbers are one half, the others the other."""
    rng = np.random.default_rng(seed)
    half = np.arange(len(known_F)) % 2
    smallest = min(int((known_F[half == h] == label).sum()) for h in (0, 1) for label in (True, False))
    n_layers = active_FSD.shape[1]
    if smallest < LEAST:
        return [Separation(layer, [], *[math.nan] * 4) for layer in range(n_layers)]
    in_sample, held_out, best = _figures(active_FSD, known_F, half)
    shuffled = np.empty((SHUFFLES, 2, n_layers))
    for number in range(SHUFFLES):
        labels = known_F.copy()
        for kind in np.unique(kinds_F):
            labels[kinds_F == kind] = rng.permutation(labels[kinds_F == kind])
        shuffled[number] = _figures(active_FSD, labels, half)[:2]
    null = shuffled.mean(axis=0)
    found = []
    for layer in range(n_layers):
        real, null_of_layer = (float(in_sample[layer]), float(held_out[layer])), null[:, layer].tolist()
        found.append(Separation(layer, best[layer].tolist(), *real, *null_of_layer))
    return found


def _figures(
    active_FSD: np.ndarray, known_F: np.ndarray, half_F: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns in-sample and held-out separation, float64[S] each, and the five neurons of the former."""

    def difference(chosen_F: np.ndarray) -> np.ndarray:
        ones = np.ones(int(chosen_F.sum()), np.int64)
        return contrast(active_FSD[chosen_F], ones, known_F[chosen_F], permutations=1).difference

    def best(difference_SD: np.ndarray) -> np.ndarray:
        return np.argsort(-difference_SD, axis=-1, kind="stable")[:, :TOP]

    def mean_at(difference_SD: np.ndarray, neurons_SK: np.ndarray) -> np.ndarray:
        return np.take_along_axis(difference_SD, neurons_SK, axis=-1).mean(axis=-1)

    whole = difference(np.ones(len(known_F), bool))
    first, second = difference(half_F == 0), difference(half_F == 1)
    held_out = (mean_at(second, best(first)) + mean_at(first, best(second))) / 2
    return mean_at(whole, best(whole)), held_out, best(whole)
