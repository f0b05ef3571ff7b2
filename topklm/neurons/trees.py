"""Parsed sentences as tokens, and how much attention their words pay to each other.

A causal model looks back, so an arc between two words is looked for from the later one; its name says which
of the two that is: "obj/dependent" where the dependent looks back at its head, "nsubj/head" where the head
looks back at its dependent. Dims: S sentences, B of a batch, T tokens, W words, A arcs, H heads.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.neurons.labelled_texts import ParsedWord, parsed

LONGEST = 96  # tokens of a sentence, its separator included; attention takes the square

_NO_ARC = ("punct", "root")
_TOO_LONG, _TOO_SHORT = "longer than {} tokens", "without an arc"
_NOT_SPELLED = "whose words are not found in their text"


@dataclasses.dataclass(frozen=True, eq=False)
class Trees:
    """Sentences in rows of T tokens, a separator first, filled up with separators."""

    tokens: np.ndarray  # int32[S, T]
    segment_ids: np.ndarray  # int32[S, T], 1 in the sentence and at its separator, 0 after it
    words: np.ndarray  # int32[S, T], which word a token belongs to; -1: none
    arcs: np.ndarray  # int32[S, A, 2], the later and the earlier word of each arc; -1: no arc
    relations: np.ndarray  # str[S, A], universal relation with the later word; "" for no arc
    left_out: Mapping[str, int]  # sentences and arcs that a model cannot be asked about, by reason


def read(
    path: Path, tokenizer: Tokenizer, context_length: int, most: int | None = None, flag: str = "--conllu"
) -> Trees:
    """Reads the sentences of a CoNLL-U file that fit into the context, and into `LONGEST` tokens.

    At most the first `most` of them. Relations lose their subtypes; punctuation and roots are no arcs. A word
    is the tokens whose last byte is in it, and an arc of a word without any is left out.

    Raises:
        UserError: If the file cannot be read, has no heads, or no sentence is left.
    """
    length, left_out = min(LONGEST, context_length), Counter[str]()
    too_long = _TOO_LONG.format(length)
    rows = list[tuple[np.ndarray, np.ndarray, list[tuple[int, int, str]]]]()
    for text, words in parsed(path, flag):
        if any(word.head is None or not 0 <= word.head <= len(words) for word in words):
            sentence = f"{text[:40]!r}"
            advice = "give a treebank with the column HEAD, such as one of Universal Dependencies"
            why = f"the sentence {sentence} has no heads: {advice}"
            raise UserError(why, field=flag, value=str(path))
        arcs = _arcs(words)
        if not arcs:
            left_out[_TOO_SHORT] += 1
            continue
        ids = tokenizer.encode(text)
        if len(ids) + 1 > length:
            left_out[too_long] += 1
            continue
        of_words = _words_of_tokens(text, words, tokenizer.token_bytes(ids))
        if of_words is None:
            left_out[_NOT_SPELLED] += 1
            continue
        there = set(of_words.tolist())
        kept = [arc for arc in arcs if arc[0] in there and arc[1] in there]
        if len(kept) < len(arcs):
            left_out["arcs of words that share a token with the next"] += len(arcs) - len(kept)
        if kept:
            rows.append((ids, of_words, kept))
        if len(rows) == most:
            break
    if not rows:
        why = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
        advice = "must be CoNLL-U with '# text = ' before each sentence, and sentences that fit"
        raise UserError(
            f"no sentence is left{f' ({why})' if why else ''}", field=flag, value=str(path), advice=advice
        )
    return _in_rows(rows, tokenizer.separator_id, left_out)


def _arcs(words: Sequence[ParsedWord]) -> list[tuple[int, int, str]]:
    """Lists later word, earlier word and relation of each arc; words are counted from 0."""
    arcs = []
    for dependent, word in enumerate(words):
        relation = word.relation.partition(":")[0]
        if not word.head or relation in _NO_ARC or (head := word.head - 1) == dependent:
            continue
        later = "dependent" if dependent > head else "head"
        arcs.append((max(head, dependent), min(head, dependent), f"{relation}/{later}"))
    return arcs


def _words_of_tokens(text: str, words: Sequence[ParsedWord], pieces: Sequence[bytes]) -> np.ndarray | None:
    """Returns which word the last byte of each token is in, int32[tokens]; -1: in none; None: not known."""
    encoded, ends, starts, at = text.encode(), [], [], 0
    if b"".join(pieces) != encoded:  # other tokenizers change the text
        return None
    for word in words:
        form = word.form.encode()
        if (found := encoded.find(form, at)) < 0:
            return None
        at = found + len(form)
        starts.append(found)
        ends.append(at)
    last = np.cumsum([len(piece) for piece in pieces]) - 1
    word_of = np.searchsorted(ends, last, side="right")
    inside = (word_of < len(words)) & (last >= np.append(starts, len(encoded))[word_of])
    return np.where(inside, word_of, -1).astype(np.int32)


def _in_rows(
    rows: Sequence[tuple[np.ndarray, np.ndarray, list]], separator_id: int, left_out: Mapping[str, int]
) -> Trees:
    length = 1 + max(len(ids) for ids, _, _ in rows)
    n_arcs = max(len(arcs) for _, _, arcs in rows)
    tokens = np.full((len(rows), length), separator_id, np.int32)
    segment_ids, words = np.zeros(tokens.shape, np.int32), np.full(tokens.shape, -1, np.int32)
    arcs = np.full((len(rows), n_arcs, 2), -1, np.int32)
    relations = np.full((len(rows), n_arcs), "", object)
    for row, (ids, of_words, of_row) in enumerate(rows):
        stop = 1 + len(ids)
        tokens[row, 1:stop], words[row, 1:stop], segment_ids[row, :stop] = ids, of_words, 1
        for n, (later, earlier, relation) in enumerate(of_row):
            arcs[row, n], relations[row, n] = (later, earlier), relation
    return Trees(tokens, segment_ids, words, arcs, relations.astype(str), dict(left_out))


def word_attention(weights_BHTT: jax.Array, words_BT: jax.Array) -> jax.Array:
    """Computes the attention of words to words, float32[B, H, W, W], with W = T, of weights from heads.

    That of a word to another is the sum over the other's tokens, averaged over its own; 0 where there is no
    such word.
    """
    length = words_BT.shape[1]
    belongs_BTW = (words_BT[..., None] == jnp.arange(length)).astype(weights_BHTT.dtype)
    n_tokens_BW = jnp.maximum(belongs_BTW.sum(axis=1), 1)
    to_words = jnp.einsum("bhts,bsw->bhtw", weights_BHTT, belongs_BTW)
    of_words = jnp.einsum("bhtw,btv->bhvw", to_words, belongs_BTW)
    return of_words / n_tokens_BW[:, None, :, None]
