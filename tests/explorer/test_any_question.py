"""Whatever is asked of the explorer, by link, form or JSON, it answers, and never with a fault of its own."""

import json
from urllib.parse import urlencode

import arbitrary
from helpers import tries
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from topklm.explorer import finding
from topklm.explorer.steering import NAMES, LiveModel, Reading

SHOWN = ("/", "/go", "/prompt", "/search", "/labels", "/labels/next", "/neurons/0/3")
TOLD = ("/overview", "/search", "/set", "/neurons/0/3", "/neurons/0/3/context", "/labels.json", "/labels.csv")
PARAMETERS = [
    "sort",
    "order",
    "layer",
    "labelled",
    "columns",
    "page",
    "density.min",
    "density.max",
    "neuron",
    "text",
    "token",
    "q",
    "kind",
    "case",
    "ends",
    "at",
    "size",
    "by",
    "list",
    "top",
    "after",
    "literal",
]
CHANGED = ("/prompt", "/labels", "/neurons/0/3/text", "/neurons/0/3/label", "/neurons/0/3/steer")
TEXTS = arbitrary.TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=6)
MAKING_SENSE = {
    "sort": ["density", "readable"], "layer": ["0", "0,1"], "page": ["1", "2", "10000000000"],
    "labelled": ["1"], "density.min": ["0.1", "1e400"], "neuron": ["0:3", "1/9"], "text": ["the old baker"],
    "token": ["0", "999999999999999"], "q": ["the", "a+", "\\w{3}", "baker AND"], "kind": ["regex", "words"],
    "at": ["5", "99999999999999999"], "size": ["0", "7", "999999999999999"], "prompt": ["The baker"],
    "value": ["3", "1e39"], "mode": ["add", "ban"], "seed": ["5", "9" * 40], "max_new_tokens": ["3"],
    "by": ["share"], "list": ["literal", "raising"], "top": ["3", "99"], "after": ["0:3", "9:9"],
    "literal": ["1"], "positions": ["generated"], "temperature": ["0", "1e-300"],
}  # fmt: skip


@pytest.fixture(scope="module")
def asked(site):
    """Yields the site, whose model computes nothing: activations and tokens are made up."""

    def read(self, ids):
        shape = len(self._metadata.layers), len(ids), 2
        neurons = np.ones(shape, np.int32), np.ones(shape, np.float32)
        following = np.ones((len(ids), 5), np.int32), np.full((len(ids), 5), 0.2, np.float32)
        return Reading(*neurons, np.ones(len(ids), np.float32), *following)

    def advance(_self, generation, _steps):
        for row, text in enumerate(generation.texts):
            text += [5, 0xE6]
            generation.end(row)
        return [[5, 0xE6] for _ in generation.texts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveModel, "read", read)
        patch.setattr(LiveModel, "advance", advance)
        patch.setattr(finding, "REGEX_SECONDS", 0.2)
        yield site
    for place in ("0/3", "1/9"):
        site.ask(f"/neurons/{place}/label", form={"label": ""})


def assert_answered(answer):
    assert answer.status in (200, 303) or 400 <= answer.status < 500, answer.text
    kind = answer.headers.get("content-type", "")
    if "json" in kind:
        for line in answer.text.split("\n") if "ndjson" in kind else [answer.text]:
            assert not line or arbitrary.read(line) is not None
        assert answer.status == 200 or answer.json["error"].isprintable()
    else:
        answer.body.decode()


def values(names):
    """Returns some parameters: values that make sense for all, or anything."""
    sensible = {
        name: st.sampled_from(MAKING_SENSE[name]).map(str.encode) for name in names if name in MAKING_SENSE
    }
    return st.builds(
        lambda some, other: {**some, **other},
        st.fixed_dictionaries({}, optional=sensible),
        st.dictionaries(st.sampled_from(sorted(names)), TEXTS, max_size=1),
    )


@given(
    path=st.sampled_from([*SHOWN, *(f"/api{path}" for path in TOLD)]),
    asked_for=values({*PARAMETERS, *NAMES}),
)
@tries(300)
def test_whatever_a_link_asks_for_it_is_answered(asked, path, asked_for):
    assert_answered(asked.ask(f"{path}?{urlencode(asked_for)}"))


@given(path=st.sampled_from(["/", "/neurons/", "/api/neurons/0/", "/static/", "/api/"]), rest=arbitrary.PATHS)
@tries(150)
@pytest.mark.parametrize("behind", ["", "/text"])
def test_whatever_an_address_is_it_is_answered(asked, path, rest, behind):
    answer = asked.ask(path + rest + behind)
    if answer.status != 307:
        assert_answered(answer)


@pytest.mark.parametrize("digits", [10, 4299, 4301, 20_000])
@pytest.mark.parametrize(
    "place", ["/neurons/0/{}", "/api/neurons/{}/3", "/?layer={}", "/?page={}", "/go?neuron=0:{}"]
)
def test_numbers_of_any_length_are_read_or_refused(asked, place, digits):
    assert 400 <= asked.ask(place.format("9" * digits)).status < 500
    number = {"token": 0, "prompt": "a", "value": 1, "seed": int("9" * min(digits, 4299))}
    body = json.dumps({**number, "text": "the"}).encode().replace(b"999", b"9" * 999, 1)
    for path in CHANGED[:1] + CHANGED[3:]:
        assert_answered(asked.ask(f"/api{path}", "POST", {"Content-Type": "application/json"}, body))


@given(path=st.sampled_from(CHANGED), form=values({"text", "label", *NAMES}), raw=st.binary(max_size=5))
@tries(150)
def test_whatever_a_form_holds_it_is_answered(asked, path, form, raw):
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert_answered(asked.ask(path, "POST", headers, urlencode(form).encode() + raw))


@given(
    path=st.sampled_from(CHANGED),
    sensible=values({"text", "label", *NAMES}),
    other=st.dictionaries(
        st.sampled_from(["text", "label", *NAMES]) | arbitrary.TEXTS, arbitrary.VALUES, max_size=2
    ),
    how=st.integers(0, 9),
)
@tries(300)
@pytest.mark.parametrize("api", ["", "/api"])
def test_whatever_json_holds_it_is_answered(asked, api, path, sensible, other, how):
    content = {name: value.decode("utf-8", "surrogateescape") for name, value in sensible.items()} | other
    headers = {"Content-Type": "application/json"}
    assert_answered(asked.ask(api + path, "POST", headers, arbitrary.written(content, how)))


def test_a_text_comes_back_in_json_as_it_went(asked):
    text = "the \ud800 \u2028 \x85 end"
    answer = asked.ask(
        "/api/prompt", "POST", {"Content-Type": "application/json"}, json.dumps({"text": text}).encode()
    )
    assert answer.status == 200
    assert answer.json["text"] == text
    assert answer.body.isascii()
