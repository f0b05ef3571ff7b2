"""Numbers, tokens, examples, effects and similar neurons as pages show them.

HTML of the things that pages show by the hundreds is written here, and not in templates, because a template
takes ten times as long for it. Whatever text comes from a corpus or a person goes through `_escaped`; numbers
that become text elsewhere do not need to.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import itertools
import math
import re
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from topklm.explorer.plots import SHADES

MISSING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"

# In the place of a token that only begins a character.
UNFINISHED = "◌"

# By the size of a number: three digits, so that columns of such numbers can be compared by eye.
_DIGITS = ((100, ",.0f"), (10, ".1f"), (1, ".2f"), (0.01, ".3f"), (0.001, ".4f"), (0, ".1e"))
# Tokens before and after an example's own that are shown until a reader asks for more.
_NEAR_BEFORE, _NEAR_AFTER = 28, 14
_SNIPPET_CHARACTERS = 28  # before its token, so that this is seen in a narrow column
_PARTS = (0, 5, 4, 3, 2, 1)  # of the examples, as they are shown
_REMEMBERED = 2**15  # tokens as HTML, and shades: a page has the same few again and again

Link = Callable[[int, int], str | None]  # the address of a neuron, or None where it has no page


def write_as(kind: str, value: float | None) -> str:
    """Returns a value as text, `kind` as in `catalog.Statistic`, a share in percent; a dash for None."""
    if value is None or not math.isfinite(value):
        return MISSING
    if kind == "count":
        return f"{int(value):,}"
    if kind == "flag":
        return "yes" if value else "no"
    if kind == "correlation":
        value = round(value, 2) + 0.0  # not -0
        return f"{value:.2f}".replace("-0.", "-.").removeprefix("0" * (abs(value) < 1)).replace("-", MINUS)
    if kind == "share":
        return f"{_three_digits(100 * value)}\N{NO-BREAK SPACE}%"
    text = f"{value:+.{4 if abs(value) < 1 else 2}f}" if kind == "effect" else _three_digits(value)
    return text.replace("-", MINUS)


def _three_digits(value: float) -> str:
    return format(value, next(form for least, form in _DIGITS if abs(value) >= least)) if value else "0"


# A store has few values: they are bfloat16.
_number = functools.lru_cache(_REMEMBERED)(functools.partial(write_as, "number"))


def chip(token: str) -> str:
    """Returns a token by itself: a space at its ends would not be seen."""
    return re.sub(r"^ +| +\Z", lambda spaces: "␣" * len(spaces[0]), token) or UNFINISHED


def level(value: float, strongest: float) -> str:
    """Returns the class of a shade: p1 to p10 for positive activations, n1 to n10 for negative ones."""
    if not value or not strongest:
        return ""
    step = min(SHADES, max(1, math.ceil(SHADES * abs(value) / strongest)))
    return f"{'p' if value > 0 else 'n'}{step}"


def shade(value: float | None) -> str:
    """Returns the class of the shade of a correlation; "" where there is none."""
    return "" if value is None or not math.isfinite(value) else level(round(value, 2), 1)


class ShadedPiece(NamedTuple):
    """A stretch of text that is drawn alike."""

    text: str
    level: str = ""  # class of its shade; empty where the neuron is not active
    value: str = ""  # the activation, written
    example: bool = False  # whether it is the token that all this is about


def pieces(
    tokens: Sequence[str], values: Sequence[float], strongest: float, example: int | None = None
) -> list[ShadedPiece]:
    """Returns text in few pieces: silent tokens joined; `strongest` is darkest, `example` the one meant."""
    found, plain = list[ShadedPiece](), ""
    for position, (token, value) in enumerate(zip(tokens, values, strict=True)):
        if not value and position != example:
            plain += token
            continue
        space, word = _word(token)
        shade = level(value, strongest) or "p0"
        found += ShadedPiece(plain + space), ShadedPiece(word, shade, _number(value), position == example)
        plain = ""
    return [piece for piece in (*found, ShadedPiece(plain)) if piece.text]


def shaded(tokens: Sequence[str], values: Sequence[float], strongest: float) -> Markup:
    """Draws text with the neuron's activations, as `pieces` has it."""
    return Markup("".join(_drawn(tokens, values, strongest)))


def _drawn(
    tokens: Sequence[str], values: Sequence[float], strongest: float, example: int | None = None
) -> list[str]:
    """Returns the HTML of each token; all together is that of the `pieces`, in a fraction of the time."""
    drawn = list(map(_escaped, tokens))
    active = itertools.compress(range(len(values)), values)
    for position in {*active, *(() if example is None else (example,))}:
        space, word = _word(tokens[position])
        mark = _mark(values[position], strongest, position == example)
        drawn[position] = f"{space}{mark}{_escaped(word)}</mark>"
    return drawn


def example_text(example: Mapping[str, Any], strongest: float) -> str:
    """Draws an example's text; tokens far from its own are hidden until a reader asks for more."""
    at = example["example"]
    drawn = _drawn(example["tokens"], example["values"], strongest, at)
    begin, end = max(0, at - _NEAR_BEFORE), min(len(drawn), at + _NEAR_AFTER + 1)
    text = "".join(drawn[begin:end])
    if begin:
        text = f'<span class="cut"></span><span class="far">{"".join(drawn[:begin])}</span>{text}'
    if end < len(drawn):
        text = f'{text}<span class="far">{"".join(drawn[end:])}</span><span class="cut"></span>'
    return text


def by_part(found: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[Mapping[str, Any]]]]:
    """Returns the examples of each part that has any, in the order in which they are shown."""
    parts = [(part, [example for example in found if example["part"] == part]) for part in _PARTS]
    return [(part, some) for part, some in parts if some]


def examples(found: Iterable[Mapping[str, Any]], strongest: float | None, more: bool) -> Markup:
    """Draws examples, as the view of a neuron has them, as items of a list.

    A bar beside each compares with `strongest`, the neuron's largest activation; None: no bars, where all
    would be as long. With `more` each has a button that fetches more context.
    """
    drawn = []
    for example in found:
        at, document = example["at"], write_as("count", example["document"])
        drawn.append(
            f'<li class="example" data-at="{at}">\n<div class="strength">'
            f"<b>{_number(example['activation'])}</b>"
            f"{bar(example['activation'] / strongest) if strongest else ''}"
            f"{_losses(example)}"
            f'<small title="Number of the document in the store">doc {document}</small></div>\n'
            f'<p class="text">{example_text(example, strongest or example["strongest"])}</p>\n'
        )
        if more:
            drawn.append(
                '<button type="button" class="more" data-more aria-label="Show more context of the example '
                f'in document {example["document"]} at token {at}" title="Show more context">more</button>'
            )
        drawn.append("</li>\n")
    return Markup("".join(drawn))


def _losses(example: Mapping[str, Any]) -> str:
    """Draws the loss of an example's token, and of the next, on which the neuron acts."""
    losses = (example["loss"], example["next_loss"])
    if losses == (None, None):
        return ""
    written = [MISSING if loss is None else f"{loss:.2f}" for loss in losses]
    about = "Loss of this token and, after the arrow, of the next one, which the neuron has a part in; nats"
    return f'<small class="losses" title="{about}">loss {written[0]} → {written[1]}</small>'


def snippet(parts: tuple[str, str, str] | None) -> Markup:
    """Draws a token with the words before and after it, on a line of its own."""
    if parts is None:
        return Markup("")
    before, token, after = parts
    if len(before) > _SNIPPET_CHARACTERS:
        before = before[-_SNIPPET_CHARACTERS:]
        before = before.partition(" ")[2] or before
    space, word = _word(token)
    return Markup(
        f'<small class="snippet">…{_escaped(before + space)}<mark class="p6 here">{_escaped(word)}</mark>'
        f"{_escaped(after)}…</small>"
    )


def near(pieces: Sequence[tuple[str, str]] | None) -> Markup:
    """Draws an example in which words were found, as `finding.near_words` gives it, on a line of its own."""
    if not pieces:
        return Markup("")
    text, first = "".join(text for text, _ in pieces), next(n for n, (_, mark) in enumerate(pieces) if mark)
    before = len("".join(text for text, _ in pieces[:first]))
    pieces = list(pieces)
    if first and before > _SNIPPET_CHARACTERS // 2 and len(text) > 2 * _SNIPPET_CHARACTERS:
        cut = pieces[0][0][-_SNIPPET_CHARACTERS // 2 :]
        pieces[0] = (cut.partition(" ")[2] or cut, "")
    classes = {"here": "p6 here", "found": "found"}
    drawn = "".join(
        f'<mark class="{classes[mark]}">{_escaped(text)}</mark>' if mark else _escaped(text)
        for text, mark in pieces
    )
    return Markup(f'<small class="snippet">…{drawn}…</small>')


def notes(items: Iterable[Mapping[str, str]]) -> Markup:
    """Draws comments on labels and who wrote them, a line each; of several labels, each with its own."""
    items = list(items)
    drawn = []
    for item in items:
        parts = [f"<b>{_escaped(item['label'])}</b>"] if len(items) > 1 else []
        parts += [_escaped(item["comment"])] if item["comment"] else []
        parts += [f'<small class="quiet">{_escaped(item["by"])}</small>'] if item["by"] else []
        drawn.append(" ".join(parts))
    return Markup("<br>".join(filter(None, drawn)))


def chips(tokens: Iterable[str]) -> Markup:
    """Draws tokens by themselves, in a row."""
    return Markup(" ".join(map(_chip, tokens)))


def shares(items: Iterable[Mapping[str, Any]]) -> Markup:
    """Draws input tokens as items of a list: share of the activation, and how often active at how many."""
    drawn = []
    for item in items:
        often = f"{write_as('count', item['occurrences'])}"
        if item["active"] is not None:
            often = f"{write_as('count', item['active'])} of {often}"
        drawn.append(_weighed(item["token"], item["share"], write_as("share", item["share"]), more=often))
    return Markup("".join(drawn))


def strip(items: Iterable[Mapping[str, Any]], link: Link) -> Markup:
    """Draws the neurons of one index in all layers in a row, each with its density and strongest tokens."""
    drawn = [
        f"<span>{name(item['layer'], item['neuron'], item['label'], link)} "
        f'<small class="number">{write_as("share", item["density"])}</small> '
        f"{chips(item['input_tokens'])}</span>"
        for item in items
    ]
    return Markup(" ".join(drawn))


def effects(items: Sequence[Mapping[str, Any]], kind: str) -> Markup:
    """Draws output tokens and the effects on them as items of a list; the largest has the longest bar."""
    largest = max((abs(item["effect"]) for item in items), default=0) or 1
    return Markup(
        "".join(
            _weighed(item["token"], abs(item["effect"]) / largest, write_as("effect", item["effect"]), kind)
            + "\n"
            for item in items
        )
    )


def similar(items: Iterable[Mapping[str, Any]], link: Link) -> Markup:
    """Draws other neurons as items of a list, each with its label or its strongest tokens."""
    drawn = []
    for item in items:
        tokens = "" if item["label"] else chips(item["input_tokens"])
        drawn.append(
            f"<li>{name(item['layer'], item['neuron'], item['label'], link)}"
            f'<span class="tokens">{tokens}</span>'
            f'<span class="number" title="cosine similarity">{_number(item["similarity"])}</span></li>'
        )
    return Markup("".join(drawn))


def name(layer: int, neuron: int, label: str, link: Link) -> Markup:
    """Draws a neuron's number and label, as a link if it has a page."""
    inside = f"<b>{layer}:{neuron}</b>"
    if label:
        inside += f' <span class="label">{_escaped(label)}</span>'
    if address := link(layer, neuron):
        return Markup(f'<a class="neuron-name" href="{_escaped(address)}">{inside}</a>')
    return Markup(f'<span class="neuron-name">{inside}</span>')


def found(pieces: Iterable[Mapping[str, Any]], key: str) -> Markup:
    """Draws pieces of text, and marks those whose `key` is true."""
    drawn = (
        f'<mark class="found">{escape(one["text"])}</mark>' if one[key] else escape(one["text"])
        for one in pieces
    )
    return Markup("".join(drawn))


def expected(token: Mapping[str, Any], actual: int | None) -> Markup:
    """Draws the tokens most expected next, with their probabilities; marks the one that came."""
    drawn = []
    for item in token["next"]:
        came = ' came" title="This is what came' if item["id"] == actual else ""
        share = round(100 * item["probability"])
        percent = f"{share or '&lt;1'}\N{NO-BREAK SPACE}%"
        drawn.append(f'<span class="guess{came}">{_chip(item["token"])} <small>{percent}</small></span>')
    return Markup(" ".join(drawn))


def cell(
    item: Mapping[str, Any],
    place: tuple[int, int],
    label: str,
    usual: Sequence[str],
    shade: str,
    by: str,
    link: Link,
) -> Markup:
    """Draws a neuron of a token's row: its number, its label or else strongest input token, and a figure."""
    layer, neuron = place
    by_share = by == "share" and item["share"] is not None
    written = f"{100 * item['share']:.0f}\N{NO-BREAK SPACE}%" if by_share else _number(item["activation"])
    named = f'<span class="label">{_escaped(label)}</span>' if label else "".join(map(_chip, usual[:1]))
    return Markup(
        f'<a class="cell {shade}" href="{_escaped(link(layer, neuron) or "")}"><small>{neuron}</small> '
        f"{named} {written}</a> "
    )


def bar(share: float, kind: str = "") -> Markup:
    """Draws a bar beside a number, from 0 to 1."""
    width = 60 * min(max(share, 0), 1)
    return Markup(
        f'<svg class="share {kind}" viewBox="0 0 60 8" aria-hidden="true"><path class="track" '
        f'd="M0 0h60v8h-60z"/><path class="fill" d="M0 0h{width:.0f}v8h-{width:.0f}z"/></svg>'
    )


def _weighed(token: str, share: float, written: str, kind: str = "", more: str = "") -> str:
    beside = f'<span class="number often">{more}</span>' if more else ""
    return f'<li>{_chip(token)}{bar(share, kind)}<span class="number">{written}</span>{beside}</li>'


@functools.lru_cache(_REMEMBERED)
def _mark(value: float, strongest: float, example: bool) -> str:
    shade = level(value, strongest) or "p0"
    return f'<mark class="{shade}{" here" if example else ""}" data-v="{_number(value)}">'


@functools.lru_cache(_REMEMBERED)
def _word(token: str) -> tuple[str, str]:
    """Returns the space before a word, which is not shaded as lines break there, and the word."""
    word = token.lstrip(" ") or token or UNFINISHED
    return token[: max(0, len(token) - len(word))], word


@functools.lru_cache(_REMEMBERED)
def _chip(token: str) -> str:
    return f'<span class="chip">{_escaped(chip(token))}</span>'


@functools.lru_cache(_REMEMBERED)
def _escaped(text: str) -> str:
    return str(escape(text))
