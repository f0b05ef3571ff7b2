"""The display of active neurons: the right numbers, and never anything that a browser would run."""

from html.parser import HTMLParser
import re

import jax.numpy as jnp
import numpy as np
import pytest

from topklm.neurons import display
from topklm.neurons.capture import SparseActivations
from topklm.neurons.display import Activation, ActiveNeurons

TOKENS = ["<|endoftext|>", "The", " sea", "\n"]


def dense():
    """Returns [S=2, B=1, T=4, D=12]; the separator's activations dwarf the others."""
    values = np.zeros((2, 1, 4, 12), np.float32)
    values[0, 0, 0, 3] = 1000.0
    values[0, 0, 1, [7, 2]] = 1.5, 4.25
    values[1, 0, 1, 11] = 0.125
    values[1, 0, 2, :7] = np.arange(1, 8)
    return values


@pytest.fixture
def found():
    return ActiveNeurons.of(TOKENS, SparseActivations.from_dense(jnp.asarray(dense()), 8))


class Reader(HTMLParser):
    """The elements of a page with what they say; fails where tags do not match."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts, self.styles, self.titles = [], set(), [], {}, []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag != "br":
            self.open.append(tag)
        if title := dict(attrs).get("title"):
            self.titles.append(title)
            self.styles[title] = dict(attrs)["style"]
        assert not {name for name, _ in attrs} - {"style", "title", "scope"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def opacity(style):
    return float(re.search(r"background:rgba\(\d+,\d+,\d+,([\d.]+)\)", style)[1])


def test_each_token_has_its_active_neurons_layer_by_layer_the_strongest_first(found):
    assert len(found) == 4
    assert found[1] == [Activation(0, 2, 4.25), Activation(0, 7, 1.5), Activation(1, 11, 0.125)]
    assert found[2] == [Activation(1, neuron, neuron + 1.0) for neuron in range(6, -1, -1)]
    assert found[-1] == found[3] == []
    assert [len(active) for active in found] == [1, 3, 7, 0]
    with pytest.raises(IndexError):
        found[4]


def test_one_neuron_is_followed_from_token_to_token(found):
    followed = found.neuron(1, 5)
    assert followed.values.dtype == np.float32
    np.testing.assert_array_equal(followed.values, dense()[1, 0, :, 5])
    for layer, neuron in ((0, 0), (0, 3), (1, 0)):
        np.testing.assert_array_equal(found.neuron(layer, neuron).values, dense()[layer, 0, :, neuron])


@pytest.mark.parametrize(
    ("layer", "neuron", "message"),
    [
        (2, 0, "layer = 2: must be a TopK layer, from 0 to 1"),
        (-1, 0, "layer = -1"),
        (0, 12, "neuron = 12: must be from 0 to 11"),
        (0, -1, "neuron = -1"),
    ],
)
def test_a_neuron_that_does_not_exist_is_refused(found, layer, neuron, message):
    with pytest.raises(ValueError, match=message):
        found.neuron(layer, neuron)


def test_in_a_terminal_it_is_a_table(found):
    assert str(found) == repr(found)
    assert str(found).splitlines() == [
        "token          layer 0        layer 1",
        "<|endoftext|>  3:1000",
        "The            2:4.25, 7:1.5  11:0.125",
        " sea                          6:7, 5:6, 4:5, 3:4, 2:3, +2",
        r"\n",
    ]
    assert str(found.neuron(0, 7)).splitlines() == [
        "layer 0, neuron 7: active at 1 of 4 tokens, strongest 1.5",
        "<|endoftext|>",
        "The            1.5",
        " sea",
        r"\n",
    ]


def test_columns_stand_below_each_other_whatever_the_script():
    values = jnp.ones((1, 1, 2, 4))
    lines = str(ActiveNeurons.of(["海", "sea"], SparseActivations.from_dense(values, 1))).splitlines()
    assert lines[1] == "海     0:1"  # two columns of a terminal wide
    assert lines[2] == "sea    0:1"


def test_in_a_notebook_it_is_a_table_with_the_exact_values_on_hover(found):
    page = Reader(found._repr_html_())
    assert "layer 0, neuron 2: 4.25" in page.titles
    assert len(page.titles) == 1 + 3 + display.SHOWN_PER_LAYER
    assert page.tags == {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "b"}
    shown = "".join(page.texts)
    for text in ("layer 0", "layer 1", "<|endoftext|>", " sea", r"\n", "+2", "4.25"):
        assert text in shown
    assert "background:#fff;color:#1a1a1a" in found._repr_html_()


def test_the_shade_follows_the_value_and_the_separator_does_not_bleach_the_rest(found):
    shades = {title: opacity(style) for title, style in Reader(found._repr_html_()).styles.items()}
    assert shades["layer 0, neuron 2: 4.25"] == shades["layer 0, neuron 3: 1000"] == 0.55
    assert shades["layer 0, neuron 7: 1.5"] == pytest.approx(0.55 * 1.5 / 4.25, abs=0.006)
    assert shades["layer 1, neuron 11: 0.125"] == pytest.approx(0.55 * 0.125 / 7, abs=0.006)


def test_negative_activations_have_their_own_colour_and_sign():
    values = jnp.zeros((1, 1, 2, 4)).at[0, 0, 1, :2].set(jnp.array([2.0, -4.0]))
    found = ActiveNeurons.of(["a", "b"], SparseActivations.from_dense(values, 3))
    assert found[1] == [Activation(0, 1, -4.0), Activation(0, 0, 2.0)]
    styles = Reader(found._repr_html_()).styles
    assert "rgba(179,88,6,0.55)" in styles["layer 0, neuron 1: -4"]
    assert "rgba(33,102,172,0.28)" in styles["layer 0, neuron 0: 2"]
    assert "strongest -4" in str(found.neuron(0, 1))


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><b onload=x>&amp;",
    "\x1b[2J\x07\u202e",
]


def test_a_text_is_shown_and_never_executed():
    values = jnp.ones((1, 1, len(HOSTILE), 4))
    found = ActiveNeurons.of(HOSTILE, SparseActivations.from_dense(values, 2))
    for shown in (found, found.neuron(0, 1)):
        page = Reader(shown._repr_html_())
        assert page.tags <= {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "b"} | {
            "small",
            "br",
        }
        for text in HOSTILE[:3]:
            assert text in "".join(page.texts)
        for characters in (shown._repr_html_(), str(shown)):
            assert not set(characters) & set("\x1b\x07\u202e")
            assert r"\x1b[2J\x07\u202e" in characters


def test_of_a_very_long_text_the_beginning_is_shown_and_the_rest_counted():
    n_tokens = display.SHOWN_TOKENS + 7
    found = ActiveNeurons.of(
        ["word"] * n_tokens, SparseActivations.from_dense(jnp.ones((2, 1, n_tokens, 4)), 2)
    )
    for shown in (found, found.neuron(0, 0)):
        for page in (shown._repr_html_(), str(shown)):
            assert "... and 7 more tokens" in page
            assert page.count("word") == display.SHOWN_TOKENS
    assert len(found[n_tokens - 1]) == 4


def test_a_model_without_topk_has_no_active_neurons_and_says_why():
    found = ActiveNeurons.of(["a", "b"], SparseActivations.from_dense(jnp.ones((0, 1, 2, 4)), 2))
    assert list(found) == [[], []]
    for page in (found._repr_html_(), str(found)):
        assert "no layer of this model has TopK" in page
    with pytest.raises(ValueError, match="no layer has TopK"):
        found.neuron(0, 0)


def test_a_neuron_that_never_fires_is_shown_as_such(found):
    followed = found.neuron(0, 0)
    assert "active at 0 of 4 tokens" in str(followed)
    assert "rgba" not in followed._repr_html_()
