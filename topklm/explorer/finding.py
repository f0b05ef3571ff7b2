"""Searches: neurons near words, active at them, or raising them, and neurons that tell a pattern's tokens."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import re
from typing import Any
import unicodedata

import numpy as np

from topklm.errors import UserError
from topklm.explorer.index import AFTER, BEFORE, Index
from topklm.explorer.neuron_data import NeuronData, shown
from topklm.explorer.views import summary
from topklm.inference.interventions import Intervention, as_json
from topklm.neurons.dictionary import check_coordinates
from topklm.neurons.search import count_active, rank

KINDS = ("words", "regex")
LISTS = {"neurons": "", "literal": "active at", "raising": "raising"}  # and words for the name of a set
MOST_FOUND = 50
MOST_PASSAGES = 20
SHOWN = 20  # neurons of a list of a search for words
REGEX_SECONDS = 10.0
COUNTED_EVENTS = 20_000_000  # of a store that is read for each search for words, in a second or two

_LONGEST_NAME = 40  # characters of a file


def words(source: NeuronData, index: Index, text: str, literal: bool = False) -> dict[str, Any]:
    """Returns labels, neurons and passages in which words are found; UserError without words.

    `literal` says whether that is there for a store of more than `COUNTED_EVENTS`, too; it is None otherwise.
    """
    if not text.strip():
        raise UserError("search is empty: type a few words")
    labels = source.named()
    wanted = text.casefold().split()
    found = [at for at, label in labels.items() if all(word in label.casefold() for word in wanted)]
    near = index.active_at(text, MOST_FOUND)
    is_counted = literal or source.store.n_events <= COUNTED_EVENTS
    ids = _first_tokens(source, text)
    return {
        "kind": "words",
        "text": text,
        "labelled": [summary(source, source.number(*at), labels) for at in found[:MOST_FOUND]],
        "neurons": [summary(source, n, labels) | _match(source, n, text) for n in near],
        **(_literal(source, text, labels) if is_counted else {"literal": None, "occurrences": None}),
        "raised": source.texts(ids),
        "raising": [summary(source, n, labels) | more for n, more in _raising(source, ids)],
        "passages": [
            {
                "begin": passage.begin,
                "document": passage.document,
                "pieces": [{"text": shown(piece), "matched": matched} for piece, matched in passage.pieces],
                "text": source.plain_text(passage.begin, passage.begin + 64),
            }
            for passage in index.passages(text, MOST_PASSAGES)
        ],
    }


def _match(source: NeuronData, number: int, text: str) -> dict[str, Any]:
    """Returns where a neuron has the words: `near_words`, and the input tokens that they stand in."""
    tokens = source.row(number, ["top_tokens"])["top_tokens"] or ()
    patterns = _patterns(text)
    held = [token for token in tokens if any(p.search(_folded(source.texts([token])[0])) for p in patterns)]
    return {"found": near_words(source, number, text), "matched": source.texts(held)}


def _patterns(text: str) -> list[re.Pattern[str]]:
    """Compiles a pattern for each word; the last is perhaps not typed to its end."""
    parts = re.findall(r"\w+", _folded(text))
    return [re.compile(rf"\b{part}\b") for part in parts[:-1]] + [
        re.compile(rf"\b{part}\w*") for part in parts[-1:]
    ]


def near_words(source: NeuronData, number: int, text: str) -> list[tuple[str, str]] | None:
    """Returns the example of a neuron, of its strongest, that holds the most of some words.

    As pieces of its text, each with "here" for the example's token, "found" for one of the words, or "". None
    if no example holds any: the words are among the strongest tokens.
    """
    patterns = _patterns(text)
    best: tuple[int, str, list[str]] | None = None
    for at in source.strongest_examples(number):
        window = source.window(at, 2 * BEFORE)
        inside = at - window.begin
        first = max(0, inside - BEFORE)
        tokens = source.running_texts(window.ids[first : inside + AFTER + 1])
        whole = "".join(tokens)
        folded = _folded(whole)
        n = sum(pattern.search(folded) is not None for pattern in patterns)
        if not n or (best is not None and n <= best[0]):
            continue
        marks = [""] * len(whole)
        for pattern in patterns:
            for found in pattern.finditer(folded):
                marks[found.start() : found.end()] = ["found"] * len(found[0])
        begin = len("".join(tokens[: inside - first]))
        own = tokens[inside - first]
        space = len(own) - len(own.lstrip(" "))
        marks[begin + space : begin + len(own)] = ["here"] * (len(own) - space)
        best = n, whole, marks
        if n == len(patterns):
            break
    return None if best is None else _runs(best[1], best[2])


def _runs(text: str, marks: Sequence[str]) -> list[tuple[str, str]]:
    """Joins neighbouring characters with one mark."""
    borders = [0, *(at for at in range(1, len(text)) if marks[at] != marks[at - 1]), len(text)]
    return [(text[a:b], marks[a]) for a, b in itertools.pairwise(borders) if b > a]


def _folded(text: str) -> str:
    """Returns text in small letters without diacritics, as the index compares it, of the same length."""
    return "".join((unicodedata.normalize("NFD", c)[0].lower() + c)[0] for c in text)


def _literal(source: NeuronData, text: str, labels: Mapping[tuple[int, int], str]) -> dict[str, Any]:
    """Returns how often words stand in the text, and the neurons that are active at their last tokens.

    Those first that are active there the most often beyond their density: a neuron that is active everywhere
    says nothing of a word.
    """
    pattern = r"\s+".join(map(re.escape, text.split()))
    pattern = rf"(?<!\w){pattern}(?!\w)"
    matched = source.stored_text.matches(pattern, timeout_s=REGEX_SECONDS).ends
    n = int(matched.sum())
    if not n:
        return {"literal": [], "occurrences": 0}
    active = count_active(source.store, matched).ravel()
    beyond = active / n - source.column("density")
    order = [int(j) for j in np.argsort(-beyond, kind="stable")[:MOST_FOUND] if beyond[j] > 0]
    return {
        "occurrences": n,
        "literal": [
            summary(source, j, labels)
            | {"active": int(active[j]), "occurrences": n, "probability": float(active[j] / n)}
            for j in order
        ],
    }


def _first_tokens(source: NeuronData, text: str) -> list[int]:
    """Returns the token that words begin with, after a space and without, small and as they are written."""
    word = text.strip()
    forms = dict.fromkeys((f" {word}", word, f" {word.casefold()}", word.casefold()))
    encoded = [source.tokenizer.encode(form) for form in forms]
    first = [int(ids[0]) for ids in encoded if len(ids) and source.tokenizer.decode(ids[:1]).strip()]
    whole = [int(ids[0]) for ids in encoded if len(ids) == 1]
    return list(dict.fromkeys(whole or first[:1]))


def _raising(source: NeuronData, ids: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
    """Returns the neurons that have a token among those that they raise most, by its place there.

    By the Jacobian lens, or by the identity where that was not measured; of the tokens that are common in the
    text, and of all. Where the place is the same, the larger effect at the neuron's highest activation comes
    first.
    """
    highest = source.column("max_activation")
    found: list[tuple[int, dict[str, Any]]] = []
    measured = any(source.rows["jacobian_top"].is_valid().to_pylist())
    lens = "jacobian" if measured else "identity"
    for name in (f"{lens}_common_top", f"{lens}_top"):
        listed = source.rows[name].combine_chunks()
        offsets, tokens = listed.offsets.to_numpy(), listed.values.to_numpy()
        effects = source.rows[f"{name}_effects"].combine_chunks().values.to_numpy()
        for at in np.flatnonzero(np.isin(tokens, ids)).tolist():
            number = int(np.searchsorted(offsets, at, side="right")) - 1
            facts: dict[str, Any] = {"lens": lens, "effect": float(effects[at])}
            facts |= {"place": at - int(offsets[number]) + 1, "raised": source.texts([int(tokens[at])])[0]}
            found.append((number, facts))
    found.sort(key=lambda one: (one[1]["place"], -one[1]["effect"] * np.nan_to_num(highest[one[0]])))
    first: dict[int, dict[str, Any]] = {}
    for number, one in found:
        first.setdefault(number, one)
    return list(first.items())[:MOST_FOUND]


def regex(
    source: NeuronData, pattern: str, ignore_case: bool = True, only_ends: bool = False
) -> dict[str, Any]:
    """Returns neurons by how well they tell the tokens of matches from others, see `topklm.neurons.search`.

    With `only_ends`, of a match only the last token counts, where a neuron can first know of it.
    """
    found = source.stored_text.matches(pattern, ignore_case=ignore_case, timeout_s=REGEX_SECONDS)
    matched = found.ends if only_ends else found.touched
    labels = source.named()
    return {
        "kind": "regex",
        "text": pattern,
        "n_matches": found.count,
        "n_matched": int(matched.sum()),
        "n_tokens": len(matched),
        "neurons": [
            summary(source, source.number(ranked.layer, ranked.neuron), labels) | dataclasses.asdict(ranked)
            for ranked in rank(source.store, matched, MOST_FOUND)
        ],
    }


def as_set(source: NeuronData, data: Mapping[str, Any], name: str, top: int) -> tuple[str, bytes]:
    """Returns name and content of a file of the first neurons of a search, as `select --save` writes it.

    `data` is of `words` or `regex`, `name` one of `LISTS`. UserError if there is no such list, none is in it,
    or neurons are codes of a dictionary.
    """
    check_coordinates(source.measured.dictionary, "a set of interventions")
    if name not in LISTS or name not in data:
        raise UserError(f"list = {name}: must be one of {', '.join(key for key in LISTS if key in data)}")
    if not 1 <= top <= MOST_FOUND:
        raise UserError(f"top = {top}: must be from 1 to {MOST_FOUND}")
    chosen = [Intervention(n["layer"], n["neuron"], mode="ablate") for n in (data[name] or ())[:top]]
    if not chosen:
        raise UserError(f"{data['text']}: no neuron was found, so there is nothing to save")
    metadata = source.store.metadata
    model = {"run": metadata.run, "step": metadata.step, "d_model": metadata.d_model}
    model |= {"parameters": metadata.parameters} if metadata.parameters else {}
    words_of_file = re.findall(r"[a-z0-9]+", f"{LISTS[name]} {data['text']}".casefold())
    stem = "-".join(words_of_file)[:_LONGEST_NAME] or "neurons"
    return f"{stem}.json", as_json(chosen, model=model if metadata.parameters else None)
