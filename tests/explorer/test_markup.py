"""Tokens, examples, effects and similar neurons as HTML."""

import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape
import pytest

from topklm.explorer import markup

TOKENS = st.lists(
    st.tuples(st.text(max_size=6), st.one_of(st.just(0.0), st.floats(-100, 100, allow_subnormal=False))),
    min_size=1,
)


def drawn(pieces):
    """Returns the HTML of pieces as the page's script makes it of their JSON."""
    html = ""
    for piece in pieces:
        shade = f"{piece.level} here" if piece.example else piece.level
        text = str(escape(piece.text))
        html += f'<mark class="{shade}" data-v="{piece.value}">{text}</mark>' if piece.level else text
    return html


@given(TOKENS)
def test_pieces_hold_all_of_the_text_in_order(tokens):
    texts, values = zip(*tokens, strict=True)
    expected = "".join(text or (markup.UNFINISHED if value else "") for text, value in tokens)
    assert "".join(piece.text for piece in markup.pieces(texts, values, 100.0)) == expected


@given(TOKENS)
def test_every_active_token_is_a_piece_of_its_own_and_no_other_is_shaded(tokens):
    texts, values = zip(*tokens, strict=True)
    shaded = [piece for piece in markup.pieces(texts, values, 100.0) if piece.level]
    active = [(text.lstrip(" ") or text or markup.UNFINISHED, value) for text, value in tokens if value]
    assert [(piece.text, piece.value) for piece in shaded] == [
        (t, markup.write_as("number", v)) for t, v in active
    ]
    assert all(
        piece.level[0] == ("p" if value > 0 else "n")
        for piece, (_, value) in zip(shaded, active, strict=True)
    )


def test_shades_rise_with_the_activation():
    steps = [int(markup.level(value, 10)[1:]) for value in (0.01, 1, 1.01, 5, 9.99, 10, 12)]
    assert steps == [1, 1, 2, 5, 10, 10, 10]
    assert markup.level(0, 10) == ""


def test_an_example_is_whole_and_its_token_stands_in_the_part_that_is_shown():
    tokens, values = [f"t{n} " for n in range(128)], [0.0] * 128
    values[100] = 2.0
    html = str(markup.example_text({"tokens": tokens, "values": values, "example": 100}, 2.0))
    hidden = "".join(re.findall(r'<span class="far">(.*?)</span>', html))
    assert re.sub(r"<[^>]*>", "", html) == "".join(tokens)
    assert 'class="p10 here" data-v="2.00">t100 </mark>' in html
    assert "t100 " not in hidden
    assert "t0 " in hidden
    assert "t127 " in hidden


@given(st.text())
def test_no_text_leaves_its_place_in_the_page(text):
    html = str(markup.shaded([text, text], [1.0, 0.0], 1.0))
    assert html == drawn(markup.pieces([text, text], [1.0, 0.0], 1.0))
    found = ElementTree.fromstring(f"<p>{re.sub(r'[^ -~]', '?', html)}</p>")
    assert {element.tag for element in found.iter()} <= {"p", "mark"}


@pytest.mark.parametrize(
    ("token", "seen"),
    [(" the", "␣the"), ("the", "the"), ("  ", "␣␣"), ("a ", "a␣"), ("", "◌"), (" a b", "␣a b")],
)
def test_spaces_at_the_ends_of_a_lone_token_are_seen(token, seen):
    assert markup.chip(token) == seen


@given(TOKENS, st.data())
def test_each_part_of_an_example_is_what_its_pieces_are_drawn_as(tokens, data):
    texts, values = (list(part) for part in zip(*(tokens * 20), strict=True))
    at = data.draw(st.integers(0, len(texts) - 1))
    html = str(markup.example_text({"tokens": texts, "values": values, "example": at}, 50.0))
    begin, end = max(0, at - 28), min(len(texts), at + 15)
    before, near, behind = (
        drawn(markup.pieces(texts[a:b], values[a:b], 50.0, at - a))
        for a, b in ((0, begin), (begin, end), (end, len(texts)))
    )
    far, cut = '<span class="far">', '<span class="cut"></span>'
    first = f"{cut}{far}{before}</span>" if begin else ""
    last = f"{far}{behind}</span>{cut}" if end < len(texts) else ""
    assert html == f"{first}{near}{last}"


def test_the_token_of_a_snippet_is_never_far_to_the_right():
    drawn = markup.snippet(("far off, some words that nobody needs here, and", " <so>", " on"))
    assert re.sub(r"<[^>]*>", "", drawn) == "…that nobody needs here, and &lt;so&gt; on…"
    assert len(re.sub(r"<[^>]*>", "", markup.snippet(("x" * 100, "y", "")))) == 1 + 28 + 1 + 1
    assert markup.snippet(None) == ""


def parsed(html):
    html = str(html).replace(" data-more ", " ")  # XML has no attribute without a value
    return ElementTree.fromstring(f"<p>{re.sub(r'[^ -~]', '?', html)}</p>")


@given(st.text(), st.text())
def test_hostile_tokens_and_labels_stay_text_wherever_they_stand(token, label):
    other = {"layer": 1, "neuron": 2, "label": label, "input_tokens": [token], "similarity": 0.5}
    example = {
        "at": 7,
        "loss": None,
        "next_loss": 0.1,
        "document": 1,
        "activation": 1.0,
        "example": 0,
        "tokens": [token] * 2,
    }
    made = [
        markup.chips([token, token]),
        markup.shares([{"token": token, "share": 0.5, "active": 1, "occurrences": 2}]),
        markup.effects([{"token": token, "effect": -0.5}], "up"),
        markup.similar([other], lambda layer, neuron: f"#{label}"),
        markup.similar([other], lambda layer, neuron: None),
        markup.examples([{**example, "values": [1.0, 0.0]}], 1.0, True),
    ]
    allowed = {"p", "li", "span", "svg", "path", "a", "b", "mark", "div", "small", "button"}
    for html in made:
        elements = list(parsed(html).iter())
        assert {element.tag for element in elements} <= allowed
        assert not any(name.startswith("on") for element in elements for name in element.attrib)


def test_markup_in_a_token_is_written_out():
    hostile = "<script>alert('1')</script>&\""
    safe = "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&amp;&#34;"
    assert str(markup.chips([hostile])) == f'<span class="chip">{safe}</span>'
    assert safe in markup.similar(
        [{"layer": 0, "neuron": 1, "label": hostile, "input_tokens": [], "similarity": 1.0}], lambda *_: None
    )
    example = {"at": 0, "document": 0, "activation": 1.0, "example": 0, "tokens": [hostile], "values": [1.0]}
    example |= {"loss": 0.5, "next_loss": None}
    assert f'data-v="1.00">{safe}</mark>' in markup.examples([example], 1.0, False)


def test_similar_neurons_have_a_link_where_there_is_a_page_and_tokens_where_there_is_no_label():
    items = [
        {"layer": 0, "neuron": 3, "label": "sea", "input_tokens": ["x"], "similarity": 0.5},
        {"layer": 0, "neuron": 4, "label": "", "input_tokens": [" a", "b"], "similarity": -0.25},
    ]
    first, second = parsed(markup.similar(items, lambda _, neuron: "#/3" if neuron == 3 else None))
    assert first.find("a").attrib["href"] == "#/3"
    assert "".join(first.itertext()) == "0:3 sea0.500"
    assert second.find("a") is None
    assert [chip.text for chip in second.iter() if chip.get("class") == "chip"] == ["?a", "b"]


def test_the_bar_of_the_largest_effect_is_the_longest_whatever_its_sign():
    items = [{"token": "a", "effect": -2.0}, {"token": "b", "effect": 1.0}, {"token": "c", "effect": 0.0}]
    bars = re.findall(r'class="fill" d="M0 0h(\d+)v', markup.effects(items, "down"))
    assert bars == ["60", "30", "0"]
    assert re.findall(r'class="fill" d="M0 0h(\d+)v', markup.effects(items[2:], "down")) == ["0"]
    assert str(markup.effects([], "up")) == ""


def test_examples_are_grouped_by_part_the_strongest_first():
    found = [{"part": part, "at": n} for n, part in enumerate((0, 0, 1, 2, 2, 5))]
    groups = [(part, [example["at"] for example in some]) for part, some in markup.by_part(found)]
    assert groups == [(0, [0, 1]), (5, [5]), (2, [3, 4]), (1, [2])]
