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
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.model import transformer
from topklm.neurons.statistics import entropy
from topklm.neurons.store import NeuronBlock, Store

N_TOKENS = 10


@dataclasses.dataclass(frozen=True)
class Concept:
    """A definition of hits; one of `token_ids` and `pattern` is given.

    Attributes:
        name: Short, for the head of a column.
        description: Its content and origin, in words.
        token_ids: Each token of a text that is one of these is a hit.
        pattern: Each place of the text that matches is a hit; matches do not overlap.
    """

    name: str
    description: str
    token_ids: tuple[int, ...] = ()
    pattern: re.Pattern[str] | None = None

    def count(self, tokens: Sequence[int], text: str) -> int:
        """Returns how many hits a text has.

        Args:
            tokens: Its token ids.
            text: Decoded from them.
        """
        if self.pattern is not None:
            return sum(1 for found in self.pattern.finditer(text) if found.group())
        return int(np.isin(np.asarray(tokens, np.int64), self.token_ids).sum())


def of_tokens(name: str, source: str, token_ids: Sequence[int], tokenizer: Tokenizer) -> Concept:
    """Returns a set of tokens, with where it comes from."""
    strings = ", ".join(f"'{token}'" for token in tokenizer.token_strings(token_ids))
    return Concept(name, f"{source}: {strings}", tuple(int(i) for i in token_ids))


def of_regex(regex: str) -> Concept:
    """Matches of a regular expression, whatever their case.

    Raises:
        UserError: If it is none.
    """
    try:
        pattern = re.compile(regex, re.IGNORECASE)
    except re.error as e:
        raise UserError(f"--concept-regex = {regex}: is no regular expression ({e}); mend it") from e
    return Concept("regex", f"matches of the regular expression {regex!r}, in any case", pattern=pattern)


def of_words(words: Sequence[str]) -> Concept:
    """Returns whole words, in any case.

    Raises:
        UserError: If there are none.
    """
    kept = sorted({word.strip() for word in words if word.strip()})
    if not kept:
        raise UserError("--concept-words: holds no word; give words with commas between, or a file of them")
    # \b would want a letter on one side, which a word such as "'s" does not begin with.
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, kept))})(?!\w)", re.IGNORECASE)
    return Concept("words", f"the words {', '.join(kept)}, in any case", pattern=pattern)


def raised_tokens(config: ModelConfig, params: transformer.Parameters, neuron: int) -> np.ndarray:
    """Returns the tokens that a neuron raises most by the identity lens, int64[`N_TOKENS`], falling.

    That lens is row `neuron` of diag(scale of the final norm) @ unembedding; see `statistics.lenses`, which
    needs no measuring. It is the same for all layers.
    """
    return np.asarray(_raised(config, params, np.int32(neuron), min(N_TOKENS, config.vocab_size)), np.int64)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _raised(config: ModelConfig, params: transformer.Parameters, neuron: jax.Array, n: int) -> jax.Array:
    model = transformer.bind(config, params)
    effects_V = model.final_norm.scale[...][neuron] * model.unembedding()[neuron, : config.vocab_size]
    return jax.lax.top_k(effects_V.astype(jnp.float32), n)[1]


SIZE = entropy.TOP_TOKENS
KINDS = ("input", "distinct", "next")
NO_TOKEN = -1

_CELLS = 1 << 22  # neurons x V that are held at once


@dataclasses.dataclass(frozen=True, eq=False)
class Concepts:
    """The concepts of the living neurons of a layer.

    Attributes:
        layer: Of the model.
        neurons: int64[N], those that are active in the text read, rising.
        tokens: int32[N, 3, M], ids by falling score, one set for each of `KINDS`; `NO_TOKEN` after the last.
        shares: float64[N, 3], the part of the neuron's strength that the tokens of a set make up; for "next",
            of the strength at tokens that another follows.
    """

    layer: int
    neurons: np.ndarray
    tokens: np.ndarray
    shares: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Concepts":
        """Returns those of some neurons, by a mask or their rows."""
        return Concepts(self.layer, self.neurons[rows], self.tokens[rows], self.shares[rows])


class ConceptReader:
    """Reads the text of a store once, and then the concepts of its layers.

    Args:
        store: Of activations.
        vocab_size: V.

    Raises:
        UserError: If the store does not hold an even and an odd document.
    """

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
        """Returns the concepts of a layer's neurons that are active in the text read.

        Args:
            layer: Of the model.
            neurons: Which of them; None: all.

        Raises:
            UserError: If the store does not have the layer, or the neuron.
        """
        d = self._store.metadata.d_model
        step = max(1, _CELLS // self._vocab_size)
        bounds = [(begin, min(begin + step, d)) for begin in range(0, d, step)]
        if neurons is not None:
            bounds = [(neuron, neuron + 1) for neuron in neurons]
        parts = [self._of_block(layer, begin, end) for begin, end in bounds]
        alive, tokens, shares = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Concepts(layer, alive, tokens, shares)

    def _of_block(self, layer: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        block = self._store.block(layer, begin, end)
        here = self._by_token(block, self._tokens)
        following = self._by_token(block, self._next)
        alive = np.flatnonzero(here.sum(axis=1) > 0)
        here, following = here[alive], following[alive]
        p_here = _normalised(here)
        scores = (p_here, self._distinctness(p_here), self._distinctness(_normalised(following)))
        strengths = here, here, following
        found = [_largest(*of_kind) for of_kind in zip(scores, strengths, strict=True)]
        tokens, shares = zip(*found, strict=True)
        return begin + alive, np.stack(tokens, axis=1), np.stack(shares, axis=1)

    def _by_token(self, block: NeuronBlock, token_ids: np.ndarray) -> np.ndarray:
        """Returns float64[n, V], as `entropy.by_group`, of the documents that are read."""
        kept = self._is_read[block.tokens] & (token_ids[block.tokens] != NO_TOKEN)
        before = np.concatenate([[0], np.cumsum(kept)])
        part = NeuronBlock(before[block.offsets], block.tokens[kept], block.values[kept])
        return entropy.by_group(part, token_ids, self._vocab_size)

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


def _largest(scores_NV: np.ndarray, strengths_NV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens with the largest scores, int32[N, M], and their share of strength, float64[N]."""
    tokens = np.full((len(scores_NV), SIZE), NO_TOKEN, np.int32)
    for row, (ids, _) in enumerate(entropy.top_tokens(np.maximum(scores_NV, 0.0), SIZE)):
        tokens[row, : len(ids)] = ids
    of_tokens = np.take_along_axis(strengths_NV, np.maximum(tokens, 0), axis=1)
    totals = strengths_NV.sum(axis=1)
    return tokens, np.where(tokens != NO_TOKEN, of_tokens, 0.0).sum(axis=1) / np.where(
        totals > 0, totals, 1.0
    )
