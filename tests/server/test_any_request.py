"""Whatever is sent to an address of the server, it answers with JSON, and never with a fault of its own."""

import concurrent.futures
import dataclasses
import json
from urllib.parse import quote

import arbitrary
from helpers import tries
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
from test_bad_requests import LIMITS, MODEL, client_of

import topklm
from topklm.config import Config
from topklm.data.tokenizer import train_bpe
from topklm.inference.engine import SequenceUpdate
from topklm.inference.sequence import Token
from topklm.inference.steps import Scores
from topklm.server import requests
from topklm.server.app import Service

FIELDS = {
    "completions": requests._KNOWN,
    "tokenize": ("prompt", "add_special_tokens", "return_token_strs", "model"),
    "detokenize": ("tokens", "model"),
    "neurons": ("prompt", "layers", "top", "model"),
}
MAKING_SENSE = st.fixed_dictionaries(
    {"prompt": st.text(max_size=4) | st.lists(st.integers(0, 256), min_size=1, max_size=4)},
    optional={
        "tokens": st.lists(st.integers(0, 256)),
        "n": st.integers(1, 2),
        "stream": st.booleans(),
        "echo": st.booleans(),
        "logprobs": st.integers(0, 3),
        "max_tokens": st.integers(0, 8),
        "stop": arbitrary.TEXTS | st.lists(arbitrary.TEXTS, max_size=3),
        "steer": st.dictionaries(st.sampled_from(["0:3", "1:31"]), arbitrary.NUMBERS, max_size=2)
        | st.lists(
            st.fixed_dictionaries(
                {"layer": st.sampled_from([0, 1]), "neuron": st.sampled_from([3, 31])},
                optional={name: arbitrary.VALUES for name in ("value", "mode", "positions")},
            ),
            max_size=2,
        ),
        "layers": st.lists(st.integers(0, 1)),
    },
)


@pytest.fixture(scope="module")
def client():
    """Of a server whose model computes nothing: all tokens, scores and activations are made up."""
    limits = dataclasses.replace(LIMITS, waiting=100, timeout=60.0)
    model = topklm.LanguageModel("a run", 7, Config(model=MODEL), train_bpe([], 257), {"none": np.zeros(1)})
    service, random = Service(model, "village", limits, n_slots=1), np.random.default_rng(0)

    def submit(sequences, on_update):
        for text in sequences:
            drawn = random.integers(0, 257, text.limit - text.n_prompt).tolist()
            ends = 0 in drawn
            tokens = [Token(i, -1.0, ((i, -1.0), (7, float("-inf")))) for i in drawn]
            tokens = tokens[: drawn.index(0) + 1] if ends else tokens
            on_update([SequenceUpdate(text, tokens, text.finished or ("stop" if ends else "length"))])

    def call(function):
        done = concurrent.futures.Future()
        done.set_result(function())
        return done

    def scored(text):
        n = text.n_prompt - 1
        return Scores(np.full(n, -2.0), np.full((n, 20), 7), np.full((n, 20), np.nan))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.engine, "submit", submit)
        patch.setattr(service.engine, "call", call)
        patch.setattr(service, "_prompt_scores", scored)
        shape = MODEL.n_topk_layers, LIMITS.prompt_tokens, MODEL.topk_k
        patch.setattr(service, "active_neurons", lambda *_: (np.ones(shape, int), np.full(shape, 1.5)))
        yield client_of(service)


def assert_answered(answer):
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    body = answer.content.decode("ascii")
    if not answer.headers["content-type"].startswith("text/event-stream"):
        content = arbitrary.read(body)
        assert answer.status_code == 200 or len(content["error"]["message"].splitlines()) == 1
        return
    assert body.splitlines() == body.split("\n")[:-1]  # no other kind of line end
    events = [event.removeprefix("data: ") for event in body.split("\n\n")[:-1]]
    assert events[-1] == "[DONE]"
    for event in events[:-1]:
        assert "error" not in arbitrary.read(event)


@given(
    content=MAKING_SENSE,
    known=st.lists(st.tuples(st.integers(0, 30), arbitrary.VALUES), max_size=1),
    unknown=st.lists(st.tuples(arbitrary.TEXTS, arbitrary.VALUES), max_size=1),
    how=st.integers(0, 9),
)
@tries(150)
@pytest.mark.parametrize("path", FIELDS)
def test_whatever_fields_hold_they_are_answered(client, path, content, known, unknown, how):
    content = {name: value for name, value in content.items() if name in FIELDS[path]}
    content |= {FIELDS[path][place % len(FIELDS[path])]: value for place, value in known}
    content |= dict(unknown if how == 9 else [])
    assert_answered(client.post(f"/v1/{path}", content=arbitrary.written(content, how)))


@given(body=st.binary(max_size=40) | st.builds(arbitrary.written, arbitrary.VALUES, st.integers(0, 9)))
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize", "/v1/neurons"])
def test_whatever_a_body_is_it_is_answered(client, path, body):
    assert_answered(client.post(path, content=body))


@given(
    path=st.sampled_from(["/", "/v1/models/", "/v1/", "/tokenizer_info", "/health/"]),
    rest=arbitrary.PATHS,
    method=st.sampled_from(["GET", "POST", "DELETE", "OPTIONS", "BREW"]),
    host=st.sampled_from(["localhost", "[", "a:b:c", "\x80", "::1]"]),
)
def test_whatever_an_address_is_it_is_answered(client, path, rest, method, host):
    answer = client.request(
        method, path + rest, headers={"Host": host.encode("latin-1")}, follow_redirects=False
    )
    if answer.status_code != 307:
        assert_answered(answer)


def test_texts_of_any_kind_come_back_as_they_went(client):
    text = "".join(map(chr, range(32))) + "\x85\u2028\u2029\U0001f600"
    tokens = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    answer = client.post("/detokenize", json={"tokens": tokens})
    assert json.loads(answer.content)["prompt"] == text
    assert answer.content.decode("ascii").splitlines() == [answer.text]
    assert client.get(f"/v1/models/{quote(text)}").status_code == 404
