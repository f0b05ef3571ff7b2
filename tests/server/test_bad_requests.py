"""What a client can send wrongly: each gets one line that says what, in OpenAI's form."""

import dataclasses
import json

import numpy as np
import pytest
from starlette.testclient import TestClient

import topklm
from topklm.config import Config, ModelConfig
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.inference.engine import ClosedError, Engine
from topklm.inference.sequence import RowSampling, draw
from topklm.server import app, requests
from topklm.server.app import Service, finite, refused
from topklm.server.requests import ApiError, Limits
from topklm.web import Guard

MODEL = ModelConfig(
    d_model=32,
    n_layers=3,
    n_heads=2,
    n_kv_heads=2,
    d_mlp=64,
    vocab_size=257,
    context_length=32,
    topk_k=8,
)
LIMITS = Limits(
    waiting=0, texts=8, prompt_tokens=64, max_tokens=100, interventions=3, body=20_000, timeout=0.05
)
TOKEN = "right-token"


def service(config=MODEL):
    """Whose engine does not run: nothing here comes as far."""
    parameters = {"none": np.zeros(1)}
    model = topklm.LanguageModel("a run", 7, Config(model=config), train_bpe([], 257), parameters)
    return Service(model, "village", LIMITS, n_slots=1)


def client_of(served, token=TOKEN):
    guarded = Guard(
        app.create(served),
        None,
        token,
        max_body=LIMITS.body,
        refuse=refused,
        by_link=False,
        where_token_is="x",
    )
    headers = {"Authorization": f"Bearer {token}"}
    return TestClient(guarded, headers=headers, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client():
    return client_of(service())


def assert_refused(answer, status, said, param=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert error["type"]
    if param is not None:
        assert error["param"] == param
    return error


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("prompt", None, "prompt is missing"),
        ("prompt", [], "prompt is empty"),
        ("prompt", [[]], "prompt is empty"),
        ("prompt", 5, "prompt = 5: must be a text, an array of token ids"),
        ("prompt", {"text": "a"}, "prompt = a JSON object: must be"),
        ("prompt", [1, "a"], "prompt = 1: must be"),
        ("prompt", ["a", 5], "prompt = 5: must be"),
        ("prompt", [1.5], "prompt = 1.5: must be"),
        ("prompt", [True], "prompt = true: must be"),
        ("prompt", [[[1]]], "prompt = a JSON array: must be"),
        ("prompt", [257], "prompt: token 257 must be from 0 to 256"),
        ("prompt", [-1], "prompt: token -1 must be from 0 to 256"),
        ("prompt", [10**400], "prompt: token a huge number must be"),
        ("prompt", "a\ud800b", "prompt: half of a surrogate pair"),
        ("prompt", "a" * 32, "prompt has 33 tokens: must be at most 32, the model's context"),
        ("prompt", [1] * 65, "prompt has 65 tokens: must be at most 64"),
        ("prompt", ["a"] * 9, "there are 9 prompts: must be at most 8"),
        ("max_tokens", -1, "max_tokens = -1: must be an integer from 0 to 100"),
        ("max_tokens", 101, "max_tokens = 101: must be an integer from 0 to 100"),
        ("max_tokens", "5", 'max_tokens = "5": must be an integer'),
        ("max_tokens", 5.5, "max_tokens = 5.5: must be an integer"),
        ("max_tokens", True, "max_tokens = true: must be an integer"),
        ("n", 0, "n = 0: must be an integer from 1 to 8"),
        ("n", 9, "n = 9: must be an integer from 1 to 8"),
        ("best_of", 2, "best_of = 2: must be an integer from 1 to 1"),
        ("temperature", -1, "temperature = -1.0: must be 0 or more"),
        ("temperature", float("nan"), "temperature = nan: must be"),
        ("temperature", 10**400, "must be a number"),
        ("temperature", 1e39, "must be 0 or more, and finite"),
        ("temperature", "hot", 'temperature = "hot": must be a number'),
        ("top_p", -0.5, "top_p = -0.5: must be above 0"),
        ("top_p", 1e-300, "top_p = 1e-300: must be above 0"),
        ("top_k", -2, "top_k = -2: must be"),
        ("top_k", "5", "top_k = '5': must be"),
        ("min_p", 2, "min_p = 2.0: must be from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty = 0.0: must be above 0"),
        ("seed", "x", "seed = 'x': must be an integer"),
        ("seed", 1.5, "seed = 1.5: must be an integer"),
        ("seed", 2**70, "must be an integer of 64 bits"),
        ("stop", "", "stop = '': must be a text"),
        ("stop", ["a", 5], "stop = 5: must be a text"),
        ("stop", {}, "stop = {}: must be a text"),
        ("stop", ["a"] * 17, "stop has 17 texts: must be at most 16"),
        ("logprobs", True, "logprobs = true: must be an integer from 0 to 20"),
        ("logprobs", 21, "logprobs = 21: must be an integer from 0 to 20"),
        ("echo", 1, "echo = 1: must be true or false"),
        ("stream", "yes", 'stream = "yes": must be true or false'),
        (
            "stream_options",
            {"include_usage": True},
            "stream_options: must be an object, and goes with stream",
        ),
        ("when_full", "wrap", 'when_full = "wrap": must be one of slide, halve, stop'),
        ("when_full", ["slide"], "when_full = a JSON array: must be one of"),
        ("frequency_penalty", 0.5, "frequency_penalty is not offered here"),
        ("logit_bias", {"5": 1}, "logit_bias is not offered here"),
        ("suffix", "b", "suffix is not offered here"),
        ("max_token", 5, "there is no field 'max_token'"),
        ("steer", 5, "steer = 5: must be an object"),
        ("steer", {"9:3": 1}, "steer: layer = 9: must be an integer from 0 to 2"),
        ("steer", {"0:32": 1}, "steer: neuron = 32: must be an integer from 0 to 31"),
        ("steer", {"0:3": float("nan")}, "steer: value = nan of layer 0, neuron 3: must be a finite number"),
        ("steer", {"0:3": float("inf")}, "must be a finite number"),
        ("steer", {"0:3": 1e39}, "must be at most"),
        ("steer", {"0:3": 10**400}, "steer: "),
        ("steer", {"0:3": "4"}, "must be a finite number"),
        ("steer", {"0:3": None}, "must be a finite number"),
        ("steer", {"three": 1}, "steer: 'three' names no neuron: must be LAYER:NEURON"),
        ("steer", {"0:1": 1, "0:2": 1, "0:3": 1, "0:4": 1}, "steer has 4 entries: must be at most 3"),
        ("steer", [{"layer": 0}], "must be an object with layer and neuron"),
        ("steer", ["0:3"], "must be an object with layer and neuron"),
        ("steer", [{"layer": 0, "neuron": 3}], "value is missing"),
        ("steer", [{"layer": 0, "neuron": 3, "value": 1, "row": 0}], "'row' is none of"),
        ("steer", [{"layer": 0, "neuron": 3, "value": 1, "mode": "wave"}], "mode = 'wave': must be one of"),
        ("steer", [{"layer": 0, "neuron": 3, "value": 1, "mode": {}}], "mode: must not be a JSON object"),
        ("steer", [{"layer": "0", "neuron": 3, "value": 1}], "layer = '0': must be an integer"),
        (
            "steer",
            [{"layer": 0, "neuron": 3, "value": 1, "positions": [3, 1]}],
            "positions = (3, 1): must be",
        ),
        ("steer", [{"layer": 0, "neuron": 3, "value": 1, "positions": [[], {}]}], "positions = "),
        ("steer", [{"layer": 0, "neuron": 3, "value": v} for v in (1, 2)], "two interventions on neuron 3"),
        ("steer_mode", "add", "steer_mode goes with steer"),
    ],
)
def test_a_field_that_is_wrong_is_named(client, field, value, said):
    # As text, since Python's client would not send some of it.
    content = {"model": "village", "prompt": "a", field: value}
    answer = client.post("/v1/completions", content=json.dumps(content).encode())
    error = assert_refused(answer, 400, said)
    assert len(error["message"]) < 400
    if field != "max_token":
        assert error["param"] in (field, "value", "prompt")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b'"text"', b"null", b"\xff\xfe", b"[" * 10_000, b'{"n": ' + b"9" * 5000 + b"}"],
    ids=lambda body: repr(body[:12]),
)
@pytest.mark.parametrize("path", ["completions", "tokenize", "detokenize", "neurons"])
def test_a_body_that_is_no_object_is_refused(client, path, body):
    assert_refused(client.post(f"/v1/{path}", content=body), 400, "the request is")


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("tokenize", {}, "prompt is missing"),
        ("tokenize", {"prompt": 5}, "prompt = 5: must be a text"),
        ("tokenize", {"prompt": "a", "add_special_tokens": "x"}, "must be true or false"),
        ("tokenize", {"text": "a"}, "there is no field 'text'"),
        ("detokenize", {}, "tokens is missing"),
        ("detokenize", {"tokens": "ab"}, 'tokens = "ab": must be an array of token ids'),
        ("detokenize", {"tokens": [300]}, "tokens: token 300 must be from 0 to 256"),
        ("detokenize", {"tokens": [10**30]}, "tokens: token a huge number"),
        ("neurons", {}, "prompt is missing"),
        ("neurons", {"prompt": []}, "prompt is empty"),
        ("neurons", {"prompt": ["a"]}, "prompt = a JSON array: must be"),
        ("neurons", {"prompt": "a" * 32}, "prompt has 33 tokens: must be at most 32"),
        (
            "neurons",
            {"prompt": "a", "layers": [2]},
            "layers = a JSON array: must be an array of integers from 0 to 1",
        ),
        ("neurons", {"prompt": "a", "layers": 0}, "layers = 0: must be"),
        ("neurons", {"prompt": "a", "top": 9}, "top = 9: must be an integer from 1 to 8, the k of the model"),
    ],
)
def test_the_other_addresses_name_what_is_wrong(client, path, content, said):
    assert_refused(client.post(f"/v1/{path}", json=content), 400, said)


@pytest.mark.parametrize("path", ["completions", "tokenize", "detokenize", "neurons"])
def test_a_model_that_there_is_not_is_not_found(client, path):
    content = {"model": "gpt", "prompt": "a"} if path != "detokenize" else {"model": "gpt", "tokens": [1]}
    error = assert_refused(client.post(f"/v1/{path}", json=content), 404, "there is only 'village'", "model")
    assert error["code"] == "model_not_found"
    assert_refused(client.get("/v1/models/gpt"), 404, "there is only")


def test_an_address_that_there_is_not_is_not_found(client):
    assert_refused(client.get("/v1/nothing"), 404, "there is nothing at /v1/nothing")
    answer = client.get("/v1/completions")
    assert_refused(answer, 405, "GET is not for /v1/completions")
    assert answer.headers["allow"] == "POST"


def test_a_prompt_that_is_too_long_has_the_code_that_programs_look_for(client):
    answer = client.post("/v1/completions", json={"prompt": "a" * 40})
    assert assert_refused(answer, 400, "shorten it")["code"] == "context_length_exceeded"


@pytest.mark.parametrize("n", [31, 32])
def test_a_prompt_that_leaves_no_room_for_a_new_token_is_refused_if_one_is_asked_for(client, n):
    prompt, status = [1] * n, {31: 504, 32: 400}[n]  # 504: nobody makes tokens here
    answer = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 5})
    assert answer.status_code == status
    if n == 32:
        assert assert_refused(answer, 400, "there is no room")["code"] == "context_length_exceeded"
    without = requests.completion(service().model, "village", LIMITS, {"prompt": prompt, "max_tokens": 0})
    assert without.sequences[0].finished == "length"
    sliding = {"prompt": prompt, "max_tokens": 5, "when_full": "slide"}
    assert not requests.completion(service().model, "village", LIMITS, sliding).sequences[0].finished


def asked(body):
    content = requests.json_object(body if isinstance(body, bytes) else json.dumps(body).encode())
    return requests.completion(service().model, "village", LIMITS, content).sequences


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        (b'"max_tokens": 16.0', b'"max_tokens": 16'),
        (b'"n": 2.0, "seed": 3e0', b'"n": 2, "seed": 3'),
        (b'"top_k": -1', b'"top_k": 0'),
        (b'"top_k": -1.0', b'"top_k": null'),
        (b'"logprobs": 1.0', b'"logprobs": 1'),
        (b'"temperature": 1', b'"temperature": 1.0'),
    ],
)
def test_what_other_servers_take_is_taken(sent, meant):
    first, second = (asked(b'{"prompt": [1, 2.0], "seed": 5, ' + one + b"}") for one in (sent, meant))
    assert [dataclasses.asdict(text) for text in first] == [dataclasses.asdict(text) for text in second]


def test_a_top_p_of_nothing_leaves_the_most_likely_token():
    (text,) = asked({"prompt": "a", "top_p": 0})
    rows = RowSampling.of([text.sampling])
    logits = np.array([[1.0, 1.1, 0.9]], np.float32)
    none = np.zeros((1, 3), bool)
    assert {int(draw(logits, none, rows, rows.keys(), np.full(1, n))[0]) for n in range(20)} == {1}


def test_without_a_seed_each_prompt_has_its_own_and_texts_of_one_are_told_apart_by_their_index():
    texts = asked({"prompt": ["a", "a", "b"], "n": 2})
    assert len({text.sampling.seed for text in texts}) == 3
    assert [text.sampling.index for text in texts] == [0, 1] * 3
    assert {text.sampling.seed for text in asked({"prompt": ["a", "a"], "seed": 9})} == {9}


def test_the_tokenizers_addresses_are_where_other_servers_have_them(client):
    separator = {"prompt": "<|endoftext|>", "add_special_tokens": False}
    for place in ("", "/v1"):
        assert client.post(f"{place}/tokenize", json=separator).json()["tokens"] == [0]
        inside = client.post(f"{place}/tokenize", json={"prompt": "a<|endoftext|>"}).json()["tokens"]
        assert inside.count(0) == 1  # that before the text
        assert (
            client.post(f"{place}/detokenize", json={"tokens": inside}).json()["prompt"] == "a<|endoftext|>"
        )
    about = client.get("/tokenizer_info").json()
    assert (about["bos_token"], about["eos_token"]) == ("<|endoftext|>", "<|endoftext|>")
    assert about["model_max_length"] == 32


def test_a_request_that_is_too_large_is_refused(client):
    answer = client.post("/v1/completions", json={"prompt": "a" * LIMITS.body})
    assert_refused(answer, 413, "the request is larger than 19 kB")


@pytest.mark.parametrize("shown", ["", "Bearer ", "Bearer wrong", "Basic right-token"])
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/v1/models?token=right-token", "/nothing"])
def test_without_the_token_nothing_is_told(client, path, shown):
    error = assert_refused(client.get(path, headers={"Authorization": shown}), 401, "a token is needed")
    assert error["code"] == "invalid_api_key"


def test_another_sites_page_starts_nothing(client):
    answer = client.post("/v1/completions", json={"prompt": "a"}, headers={"Origin": "http://evil.example"})
    assert_refused(answer, 403, "another site's page")


def test_only_its_own_name_is_answered_without_a_token():
    guarded = Guard(app.create(service()), frozenset({"127.0.0.1:5"}), refuse=refused)
    assert_refused(TestClient(guarded).get("/health"), 421, "under that name")


def test_more_than_may_wait_are_sent_away_for_a_moment(client):
    answer = client.post("/v1/completions", json={"prompt": "a", "n": 2})
    error = assert_refused(answer, 429, "too many texts wait already")
    assert error["code"] == "rate_limit_exceeded"
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_given_up(stream):
    served = service()
    answer = client_of(served).post("/v1/completions", json={"prompt": "a", "stream": stream})
    assert_refused(answer, 504, "no whole answer in 0.05 seconds")
    assert served.engine.load().waiting == 0


@pytest.mark.parametrize("path", ["completions", "neurons"])
def test_a_server_that_is_being_stopped_takes_nothing_on(path):
    served = service()
    served.closing = True
    client = client_of(served)
    assert_refused(client.post(f"/v1/{path}", json={"prompt": "a"}), 503, "being stopped")
    assert client.get("/health").status_code == 503


def test_a_fault_of_ours_is_one_line_too(monkeypatch):
    monkeypatch.setattr(Engine, "submit", lambda *_: 1 / 0)
    served = service()
    answer = client_of(served).post("/v1/completions", json={"prompt": "a"})
    assert_refused(answer, 500, "a fault of the server")
    monkeypatch.setattr(Engine, "submit", _closed)
    assert_refused(client_of(served).post("/v1/completions", json={"prompt": "a"}), 503, "being stopped")


def _closed(*_):
    raise ClosedError


def test_a_model_without_topk_has_no_neurons_to_tell_of():
    client = client_of(service(dataclasses.replace(MODEL, n_nontopk=3)))
    assert_refused(client.post("/v1/neurons", json={"prompt": "a"}), 400, "no layer with TopK")


def test_errors_are_in_the_form_that_clients_expect():
    error = ApiError(400, "n = 0:\n must be 1", "n")
    expected = {"message": "n = 0: must be 1", "type": "invalid_request_error", "param": "n", "code": None}
    assert error.content() == {"error": expected}


def test_a_probability_that_is_none_can_be_written_as_json():
    assert [finite(x) for x in (-1.5, float("nan"), float("-inf"), -1e30)] == [
        -1.5,
        -9999.0,
        -9999.0,
        -9999.0,
    ]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"waiting": -1}, "--max-waiting = -1: must be 0 or more"),
        ({"texts": 0}, "--max-texts = 0: must be 1 or more"),
        ({"max_tokens": 0}, "--max-tokens = 0"),
        ({"prompt_tokens": 0}, "--max-prompt-tokens = 0"),
        ({"timeout": float("nan")}, "--timeout = nan"),
        ({"grace": -1.0}, "--grace = -1.0: must be 0 or more"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits, said):
    with pytest.raises(UserError, match=said):
        Limits(**limits).check()
