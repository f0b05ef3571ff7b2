"""The meaning of a neuron as sets of tokens, and what a steered text is searched for.

A `Concept` counts hits in text: a set of tokens, a regular expression, or a list of words. The concepts of
many neurons are sets of tokens read off a store; no output of the model goes into them.

The definitions are ours. Let a[n, j] be the strength of neuron j at token n of the store, v(n) the token
there, w(n) the one that follows in the document, and q(v) the share of token v in the text. A concept has at
most `SIZE` tokens, those with the largest score above 0; equal ones by rising id:

    input      p(v | j) = sum of a[n, j] over v(n) = v / sum of a[n, j]: the input tokens that it is active at
    distinct   p(v | j) ln(p(v | j) / q(v)): of these, the ones that tell the neuron from the text as a whole,
               so that a neuron which is active nearly everywhere does not just stand for frequent tokens
    next       the same score for the tokens that follow, w(n) in place of v(n)

Only documents of even number are read. Everything measured with a concept is measured in the odd ones, so no
text is used twice. Dims: N neurons, M tokens of a concept, V vocabulary.
"""

from collections.abc import Sequence
import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel
from topklm.model import transformer
from topklm.neurons import NeuronsFolder
from topklm.neurons.dictionary import check_coordinates
from topklm.neurons.statistics import selectivity
from topklm.neurons.store import NeuronBlock, Store

SIZE = selectivity.TOP_TOKENS
KINDS = ("input", "distinct", "next")
NO_TOKEN = -1

_CELLS = 1 << 22  # neurons x V that are held at once


@dataclasses.dataclass(frozen=True)
class Concept:
    """A definition of hits; one of `token_ids` and `pattern` is given."""

    name: str  # short, for the head of a column
    description: str  # its content and origin, in words
    token_ids: tuple[int, ...] = ()  # each token of a text that is one of these is a hit
    # each place of the text that matches is a hit; matches do not overlap
    pattern: re.Pattern[str] | None = None

    def count(self, tokens: Sequence[int], text: str) -> int:
        """Returns how many hits a text has, given its token ids and the text decoded from them."""
        if self.pattern is not None:
            return sum(1 for found in self.pattern.finditer(text) if found.group())
        return int(np.isin(np.asarray(tokens, np.int64), self.token_ids).sum())


def of_tokens(name: str, source: str, token_ids: Sequence[int], tokenizer: Tokenizer) -> Concept:
    """Returns a set of tokens, with where it comes from."""
    strings = ", ".join(f"'{token}'" for token in tokenizer.token_strings(token_ids))
    return Concept(name, f"{source}: {strings}", tuple(int(i) for i in token_ids))


def of_regex(regex: str, flag: str = "--concept-regex") -> Concept:
    """Returns matches of a regular expression in any case; UserError if it is none, named as by the flag."""
    try:
        pattern = re.compile(regex, re.IGNORECASE)
    except re.error as e:
        raise UserError(f"{flag} = {regex}: is no regular expression ({e}); mend it") from e
    return Concept("regex", f"matches of the regular expression {regex!r}, in any case", pattern=pattern)


def of_words(words: Sequence[str]) -> Concept:
    """Returns whole words, in any case; UserError if there are none."""
    kept = sorted({word.strip() for word in words if word.strip()})
    if not kept:
        raise UserError("--concept-words: holds no word; give words with commas between, or a file of them")
    # \b would want a letter on one side, which a word such as "'s" does not begin with.
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, kept))})(?!\w)", re.IGNORECASE)
    return Concept("words", f"the words {', '.join(kept)}, in any case", pattern=pattern)


def raised_tokens(config: ModelConfig, params: transformer.Parameters, neuron: int) -> np.ndarray:
    """Returns the tokens that a neuron raises most by the identity lens, of any layer, int64[`SIZE`]."""
    model = transformer.bind(config, params)
    effects_V = model.final_norm.scale[...][neuron] * model.unembedding()[neuron, : config.vocab_size]
    tokens = jax.lax.top_k(effects_V.astype(jnp.float32), min(SIZE, config.vocab_size))[1]
    return np.asarray(tokens, np.int64)


@dataclasses.dataclass(frozen=True)
class NeuronFacts:
    """Facts of one neuron from a run's folder, where it has been harvested and measured."""

    n_active: int  # tokens at which it is active
    n_tokens: int  # on which it was measured
    max_activation: float | None  # None for a dead neuron
    input_tokens: tuple[int, ...]  # that make up most of its activation, the first most
    raised_tokens: tuple[int, ...]  # that it raises most by the averaged Jacobian lens


def read_facts(folder: NeuronsFolder, layer: int, neuron: int) -> NeuronFacts | None:
    """Reads what is known; None if the layer was not measured, or the extra that reads it is not installed.

    UserError if the file is damaged, or was measured on another store than lies beside it.
    """
    if not folder.table.exists() or importlib.util.find_spec("pyarrow") is None:
        return None
    # Parquet needs a package of the extra.
    from topklm.neurons.statistics import table  # noqa: PLC0415

    rows, measured = table.read(folder.table)
    if folder.store.exists():
        table.check_same(folder.table, measured, Store(folder.store))
    check_coordinates(measured.dictionary, "steer")
    if layer not in measured.layers:
        return None
    # Sorted by layer and neuron.
    row = rows.slice(measured.layers.index(layer) * measured.d_model + neuron, 1).to_pylist()[0]
    return NeuronFacts(
        row["n_active"],
        measured.n_tokens,
        row["max_activation"],
        tuple(row["top_tokens"] or ()),
        tuple(row["jacobian_top"] or ()),
    )


def own_concepts(
    model: LanguageModel, folder: NeuronsFolder | None, facts: NeuronFacts | None, layer: int, neuron: int
) -> list[Concept]:
    """Returns the neuron's own tokens, of each kind that there is something to read from.

    "input", its top input tokens, if it has been measured; "next", the tokens that follow it more than they
    do elsewhere, if it has been harvested (into the folder, if there is one); "raised", those that it raises
    most, by the averaged Jacobian lens if it has been measured, else by the identity lens, which the
    parameters suffice for. Only the last kind says what the neuron does by construction: it is no evidence
    that steering works.
    """
    kinds: list[tuple[str, str, Sequence[int]]] = []
    if facts and facts.input_tokens:
        source = f"its top input tokens on {facts.n_tokens:,} measured tokens"
        kinds.append(("input", source, facts.input_tokens))
    if following := _following(model, folder, layer, neuron):
        source = "the tokens that follow it more than they do elsewhere in the harvested text"
        kinds.append(("next", source, following))
    if facts and facts.raised_tokens:
        lens, raised = "averaged Jacobian lens", facts.raised_tokens
    else:
        lens = "identity lens (it has not been measured)"
        raised = tuple(raised_tokens(model.cfg, model.params, neuron).tolist())
    kinds.append(("raised", f"the tokens that it raises most by the {lens}", raised))
    return [of_tokens(*kind, model.tokenizer) for kind in kinds]


def _following(model: LanguageModel, folder: NeuronsFolder | None, layer: int, neuron: int) -> Sequence[int]:
    if folder is None or not folder.store.exists():
        return ()
    store = Store(folder.store)
    if store.metadata.tokenizer_sha256 != model.tokenizer.sha256 or layer not in store.metadata.layers:
        return []
    found = ConceptReader(store, model.cfg.vocab_size).read(layer, [neuron])
    return token_sets(found, "next")[0].tolist() if len(found.neurons) else []


@dataclasses.dataclass(frozen=True, eq=False)
class Concepts:
    """The concepts of the living neurons of a layer."""

    layer: int  # its number
    neurons: np.ndarray  # int64[N], those that are active in the text read, rising
    # int32[N, 3, M], ids by falling score, one set for each of `KINDS`; `NO_TOKEN` after the last
    tokens: np.ndarray


class ConceptReader:
    """Reads a store's text once, then concepts of its layers; UserError without an even and odd document."""

    def __init__(self, store: Store, vocab_size: int):
        self._store, self._vocab_size = store, vocab_size
        self._tokens = store.tokens(0, store.n_tokens).astype(np.int64)
        documents = store.documents(0, store.n_tokens)
        self._is_read = documents % 2 == 0
        if not self._is_read.any() or self._is_read.all():
            raise UserError(
                f"{store.folder}: a survey reads concepts in half of the documents and measures in the "
                "others, and there is only one: harvest more text"
            )
        goes_on = np.append(documents[1:] == documents[:-1], False)
        self._next = np.where(goes_on, np.append(self._tokens[1:], 0), NO_TOKEN)
        counts = np.bincount(self._tokens[self._is_read], minlength=vocab_size)
        self._shares = counts / counts.sum()

    def read(self, layer: int, neurons: Sequence[int] | None = None) -> Concepts:
        """Returns concepts of a layer's neurons (None: all) active in the text; UserError if not stored."""
        d = self._store.metadata.d_model
        step = max(1, _CELLS // self._vocab_size)
        bounds = [(begin, min(begin + step, d)) for begin in range(0, d, step)]
        if neurons is not None:
            bounds = [(neuron, neuron + 1) for neuron in neurons]
        parts = [self._of_block(layer, begin, end) for begin, end in bounds]
        return Concepts(layer, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _of_block(self, layer: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        block = self._store.block(layer, begin, end)
        here, following = (self._by_token(block, ids) for ids in (self._tokens, self._next))
        alive = np.flatnonzero(here.sum(axis=1) > 0)
        p_here, p_next = _normalised(here[alive]), _normalised(following[alive])
        scores = (p_here, self._distinctness(p_here), self._distinctness(p_next))
        return begin + alive, np.stack([_largest(of_kind) for of_kind in scores], axis=1)

    def _by_token(self, block: NeuronBlock, token_ids: np.ndarray) -> np.ndarray:
        """Returns float64[n, V], as `selectivity.by_group`, of the documents that are read."""
        kept = self._is_read[block.tokens] & (token_ids[block.tokens] != NO_TOKEN)
        before = np.concatenate([[0], np.cumsum(kept)])
        part = NeuronBlock(before[block.offsets], block.tokens[kept], block.values[kept])
        return selectivity.by_group(part, token_ids, self._vocab_size)

    def _distinctness(self, p_NV: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            score = p_NV * np.log(p_NV / self._shares)
        # A token that follows may be the first of the text's other half's: it has no share to compare with.
        return np.where(np.isfinite(score), score, 0.0)


def token_sets(concepts: Concepts, kind: str) -> Sequence[np.ndarray]:
    """Returns the ids of each neuron's concept of a kind, by falling score, without filling."""
    of_kind = concepts.tokens[:, KINDS.index(kind)]
    return [ids[ids != NO_TOKEN] for ids in of_kind]


def _normalised(strengths_NV: np.ndarray) -> np.ndarray:
    totals = strengths_NV.sum(axis=1, keepdims=True)
    return strengths_NV / np.where(totals > 0, totals, 1.0)


def _largest(scores_NV: np.ndarray) -> np.ndarray:
    """Returns the tokens with the largest scores above 0, int32[N, M], then `NO_TOKEN`."""
    tokens = np.full((len(scores_NV), SIZE), NO_TOKEN, np.int32)
    for row, (ids, _) in enumerate(selectivity.top_tokens(np.maximum(scores_NV, 0.0), SIZE)):
        tokens[row, : len(ids)] = ids
    return tokens
