"""Neurons found by words, by a regular expression, or by their labels."""

import dataclasses
from typing import Any

from topklm.errors import UserError
from topklm.explorer.index import Index
from topklm.explorer.source import Source, shown
from topklm.explorer.views.neuron import summary
from topklm.neurons.find import rank

KINDS = ("words", "regex")
MOST_FOUND = 50
MOST_PASSAGES = 20
REGEX_SECONDS = 10.0


def words(source: Source, index: Index, text: str) -> dict[str, Any]:
    """Labels, neurons and passages of the store in which words are found.

    Raises:
        UserError: If there are none.
    """
    if not text.strip():
        raise UserError("search is empty: type a few words")
    labels = source.named()
    wanted = text.casefold().split()
    labelled = [place for place, label in labels.items() if all(word in label.casefold() for word in wanted)]
    return {
        "kind": "words",
        "text": text,
        "labelled": [summary(source, source.number(*place), labels) for place in labelled[:MOST_FOUND]],
        "neurons": [summary(source, number, labels) for number in index.active_at(text, MOST_FOUND)],
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


def regex(source: Source, pattern: str, ignore_case: bool = True, only_ends: bool = False) -> dict[str, Any]:
    """Neurons by how well they tell the tokens of matches from others; see `topklm.neurons.find`.

    Args:
        source: Of everything.
        pattern: A regular expression of the package `regex`.
        ignore_case: Whether capitals are small letters.
        only_ends: Whether of a match only the last token counts, where a neuron can first know of it.

    Raises:
        UserError: For a pattern that is none, or takes longer than `REGEX_SECONDS`.
    """
    found = source.stored_text.matches(pattern, ignore_case=ignore_case, timeout_s=REGEX_SECONDS)
    matched = found.ends if only_ends else found.touched
    labels, neurons = source.named(), []
    for ranked in rank(source.store, matched, MOST_FOUND):
        line = summary(source, source.number(ranked.layer, ranked.neuron), labels)
        neurons.append({**line, **dataclasses.asdict(ranked)})
    return {
        "kind": "regex",
        "text": pattern,
        "n_matches": found.count,
        "n_matched": int(matched.sum()),
        "n_tokens": len(matched),
        "neurons": neurons,
    }


def labelled(source: Source) -> list[dict[str, Any]]:
    """All neurons that have a label."""
    labels = source.named()
    return [summary(source, source.number(*place), labels) for place in labels]
