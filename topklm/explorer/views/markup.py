"""HTML of the things that pages show by the hundreds: tokens, examples, effects and similar neurons.

Written here, and not in templates, because a template takes ten times as long for it. Whatever text comes
from a corpus or a person goes through `_escaped`; numbers that become text elsewhere do not need to.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any

from markupsafe import Markup, escape

from topklm.explorer import formatting

# In the place of a token that only begins a character.
UNFINISHED = "◌"

SHADES = 10  # steps of the shading of tokens

# Tokens before and after an example's own that are shown until a reader asks for more.
_NEAR_BEFORE, _NEAR_BEHIND = 28, 14
_PARTS = (0, 5, 4, 3, 2, 1)  # of the examples, as they are shown
_REMEMBERED = 2**15  # tokens as HTML, and shades: a page has the same few again and again

Link = Callable[[int, int], str | None]


def chip(token: str) -> str:
    """Returns a token by itself: a space at its ends would not be seen."""
    inside = token.strip(" ")
    if not inside:
        return "␣" * len(token) or UNFINISHED
    before, after = len(token) - len(token.lstrip(" ")), len(token) - len(token.rstrip(" "))
    return "␣" * before + inside + "␣" * after


def level(value: float, strongest: float) -> str:
    """Returns the class of a shade: p1 to p10 for positive activations, n1 to n10 for negative ones."""
    if not value or not strongest:
        return ""
    step = min(SHADES, max(1, math.ceil(SHADES * abs(value) / strongest)))
    return f"{'p' if value > 0 else 'n'}{step}"


@dataclasses.dataclass(frozen=True, slots=True)
class ShadedPiece:
    """A stretch of text that is drawn alike.

    Attributes:
        text: As it is shown.
        level: Class of its shade; empty where the neuron is not active.
        value: The activation, written.
        example: Whether it is the token that all this is about.
    """

    text: str
    level: str = ""
    value: str = ""
    example: bool = False


def pieces(
    tokens: Sequence[str], values: Sequence[float], strongest: float, example: int | None = None
) -> list[ShadedPiece]:
    """Returns text in as few pieces as can be: tokens that are not active are joined.

    Args:
        tokens: T strings.
        values: T activations.
        strongest: The activation of the darkest shade.
        example: The token that all this is about.
    """
    found, plain = list[ShadedPiece](), list[str]()
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        if not value and place != example:
            plain.append(token)
            continue
        # A space before a word is not shaded: it would be where lines break.
        word = token.lstrip(" ") or token or UNFINISHED
        plain.append(token[: max(0, len(token) - len(word))])
        if before := "".join(plain):
            found.append(ShadedPiece(before))
        plain = []
        found.append(
            ShadedPiece(word, level(value, strongest) or "p0", formatting.short(value), place == example)
        )
    if after := "".join(plain):
        found.append(ShadedPiece(after))
    return found


def shaded(parts: Sequence[ShadedPiece]) -> Markup:
    """Pieces as HTML."""
    drawn = []
    for part in parts:
        text = _escaped(part.text)
        if part.level:
            text = f"{_opened(part.level, part.value, part.example)}{text}</mark>"
        drawn.append(text)
    return Markup("".join(drawn))


def by_part(found: Iterable[Mapping[str, Any]]) -> list[tuple[int, list[Mapping[str, Any]]]]:
    """Returns the examples of each part that has any, in the order in which they are shown."""
    parts = {part: list[Mapping[str, Any]]() for part in _PARTS}
    for example in found:
        parts[example["part"]].append(example)
    return [(part, some) for part, some in parts.items() if some]


def examples(found: Iterable[Mapping[str, Any]], strongest: float, more: bool) -> Markup:
    """Examples as items of a list.

    Args:
        found: As the view of a neuron has them.
        strongest: The activation of the darkest shade.
        more: Whether each has a button that asks for more context.
    """
    drawn = []
    for example in found:
        at, document = example["at"], formatting.write_as("count", example["document"])
        drawn.append(
            f'<li class="example" data-at="{at}">\n<div class="strength">'
            f"<b>{_number(example['activation'])}</b>{_bar(example['activation'] / strongest)}"
            f'<small title="Number of the document in the store">doc {document}</small></div>\n'
            f'<p class="text">{example_text(example, strongest)}</p>\n'
        )
        if more:
            drawn.append(
                '<button type="button" class="more" data-more aria-label="Show more context of the example '
                f'in document {example["document"]} at token {at}" title="Show more context">more</button>'
            )
        drawn.append("</li>\n")
    return Markup("".join(drawn))


def chips(tokens: Iterable[str]) -> Markup:
    """Tokens by themselves, in a row."""
    return Markup(" ".join(map(_chip, tokens)))


def shares(items: Iterable[Mapping[str, Any]]) -> Markup:
    """Returns input tokens and their shares as items of a list."""
    return Markup(
        "".join(_weighed(i["token"], i["share"], formatting.write_as("share", i["share"])) for i in items)
    )


def effects(items: Sequence[Mapping[str, Any]], kind: str) -> Markup:
    """Draws output tokens and the effects on them as items of a list; the largest has the longest bar.

    Args:
        items: As the view of a neuron has them.
        kind: "up" or "down".
    """
    largest = max((abs(item["effect"]) for item in items), default=0)
    drawn = []
    for item in items:
        share, written = abs(item["effect"]) / (largest or 1), formatting.write_as("effect", item["effect"])
        drawn.append(_weighed(item["token"], share, written, kind) + "\n")
    return Markup("".join(drawn))


def similar(items: Iterable[Mapping[str, Any]], link: Link) -> Markup:
    """Returns other neurons as items of a list, each with its label or its strongest tokens.

    Args:
        items: As the view of a neuron has them.
        link: The address of a neuron, or None where it has no page.
    """
    drawn = []
    for item in items:
        tokens = "" if item["label"] else " ".join(map(_chip, item["input_tokens"]))
        drawn.append(
            f'<li>{_name(item, link)}<span class="tokens">{tokens}</span>'
            f'<span class="number" title="cosine similarity">{_number(item["similarity"])}</span></li>'
        )
    return Markup("".join(drawn))


def written(pieces: Iterable[Mapping[str, Any]]) -> Markup:
    """Draws generated text, with a neuron's input tokens marked.

    Args:
        pieces: As the steering has them.
    """
    drawn = (
        f'<mark class="found">{escape(one["text"])}</mark>' if one["input_token"] else escape(one["text"])
        for one in pieces
    )
    return Markup("".join(map(str, drawn)))


def share_bar(share: float, kind: str = "") -> Markup:
    """Returns a bar beside a number, from 0 to 1."""
    return Markup(_bar(share, kind))


def _bar(share: float, kind: str = "") -> str:
    width = 60 * min(max(share, 0), 1)
    return (
        f'<svg class="share {kind}" viewBox="0 0 60 8" aria-hidden="true"><path class="track" '
        f'd="M0 0h60v8h-60z"/><path class="fill" d="M0 0h{width:.0f}v8h-{width:.0f}z"/></svg>'
    )


def _weighed(token: str, share: float, written: str, kind: str = "") -> str:
    return f'<li>{_chip(token)}{_bar(share, kind)}<span class="number">{written}</span></li>'


def _name(item: Mapping[str, Any], link: Link) -> str:
    inside = f"<b>{item['layer']}:{item['neuron']}</b>"
    if item["label"]:
        inside += f' <span class="label">{_escaped(item["label"])}</span>'
    if address := link(item["layer"], item["neuron"]):
        return f'<a class="neuron-name" href="{_escaped(address)}">{inside}</a>'
    return f'<span class="neuron-name">{inside}</span>'


def example_text(example: Mapping[str, Any], strongest: float) -> str:
    """Draws an example's text; tokens far from its own are hidden until a reader asks for more.

    Each part is the HTML that `shaded` makes of its `pieces`.
    """
    tokens, values, at = example["tokens"], example["values"], example["example"]
    drawn = list(map(_escaped, tokens))
    for place in {at, *itertools.compress(range(len(values)), values)}:
        space, word = _word(tokens[place])
        drawn[place] = f"{space}{_mark(values[place], strongest, place == at)}{word}</mark>"
    begin, end = max(0, at - _NEAR_BEFORE), min(len(tokens), at + _NEAR_BEHIND + 1)
    text = "".join(drawn[begin:end])
    if begin:
        text = f'<span class="far">{"".join(drawn[:begin])}</span>{text}'
    if end < len(tokens):
        text = f'{text}<span class="far">{"".join(drawn[end:])}</span>'
    return text


@functools.lru_cache(_REMEMBERED)
def _mark(value: float, strongest: float, example: bool) -> str:
    return _opened(level(value, strongest) or "p0", _short(value), example)


def _opened(shade: str, value: str, example: bool) -> str:
    return f'<mark class="{shade}{" here" if example else ""}" data-v="{value}">'


_short = functools.lru_cache(_REMEMBERED)(formatting.short)  # a store has few values: they are bfloat16


@functools.lru_cache(_REMEMBERED)
def _word(token: str) -> tuple[str, str]:
    """Returns the space before a word, which is not shaded, and the word."""
    word = token.lstrip(" ") or token or UNFINISHED
    return token[: max(0, len(token) - len(word))], _escaped(word)


@functools.lru_cache(_REMEMBERED)
def _chip(token: str) -> str:
    return f'<span class="chip">{_escaped(chip(token))}</span>'


@functools.lru_cache(_REMEMBERED)
def _escaped(text: str) -> str:
    return str(escape(text))


def _number(value: float) -> str:
    return formatting.write_as("number", value)
