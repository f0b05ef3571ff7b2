"""The `openai` client against a real server process; clients that go, send nonsense, or stay to the end."""

import concurrent.futures
import json
import re
import shlex
import signal
import socket
import subprocess

from helpers import ROOT
import jax
import numpy as np
import openai
import pytest
from served import MODEL, serving

import topklm
from topklm.inference.interventions import Intervention

PROMPT = "The old baker"
UNCHANGED = (Intervention(0, 3, 1.0, "scale"),)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    flags = ["--slots", "1", "--no-warm-up", "--grace", "1", "--max-waiting", "40", "--max-tokens", "1000000"]
    with serving(tmp_path_factory.mktemp("served"), *flags) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.address, api_key="any", timeout=300, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(served):
    jax.config.update("jax_disable_most_optimizations", True)
    yield topklm.load(served.run)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def expected(model):
    """The continuations that the library gives, by seed."""
    return [model.generate(PROMPT, 12, seed=seed)[len(PROMPT) :] for seed in range(3)]


def complete(client, **settings):
    return client.completions.create(**{"model": "village", "prompt": PROMPT, "max_tokens": 12, **settings})


def endless(client):
    """A stream that goes on, for the most likely tokens come round and round; the first piece has come."""
    answer = complete(client, max_tokens=10**6, stream=True, temperature=0, extra_body={"when_full": "halve"})
    return answer, next(answer)


def test_the_model_is_listed(client):
    assert [(model.id, model.owned_by) for model in client.models.list()] == [("village", "topklm")]
    assert client.models.retrieve("village").max_model_len == 32
    with pytest.raises(openai.NotFoundError, match="there is only 'village'"):
        client.models.retrieve("gpt")


def test_a_completion_is_what_the_library_gives(client, expected):
    for seed, text in enumerate(expected):
        answer = complete(client, seed=seed)
        assert answer.choices[0].text == text
        assert (answer.object, answer.model) == ("text_completion", "village")
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens == len(PROMPT) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert complete(client, temperature=0).choices[0].text == complete(client, temperature=0).choices[0].text


def test_without_a_seed_texts_differ_also_those_of_equal_prompts_in_one_request(client):
    answer = complete(client, prompt=[PROMPT] * 4, n=2)
    assert len({choice.text for choice in answer.choices}) >= 6  # two that end at once may be alike by chance
    assert len({complete(client).choices[0].text for _ in range(4)}) > 1


def test_pieces_of_a_stream_are_the_text(client, expected):
    pieces = list(complete(client, seed=1, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == expected[1]
    assert len(pieces) > 2
    assert pieces[-2].choices[0].finish_reason
    assert pieces[-1].choices == []
    assert pieces[-1].usage.prompt_tokens == len(PROMPT) + 1
    assert len({piece.id for piece in pieces}) == 1


def test_several_prompts_and_texts_of_each_come_in_order(client, model, expected):
    ids = np.asarray(model.to_tokens(PROMPT))[0].tolist()
    answer = complete(client, prompt=[PROMPT, "x"], n=2, seed=2, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == PROMPT + expected[2]
    assert answer.choices[1].text.startswith(PROMPT)
    assert answer.choices[1].text != answer.choices[0].text
    assert answer.choices[2].text == model.generate("x", 12, seed=2)
    assert complete(client, prompt=ids, seed=2).choices[0].text == expected[2]
    assert complete(client, prompt=[ids], seed=2).choices[0].text == expected[2]


def test_limits_of_sampling_are_passed_on(client, model):
    settings = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.4}
    text = model.generate(PROMPT, 12, 0.7, 5, top_p=0.9, **settings)[len(PROMPT) :]
    assert complete(client, temperature=0.7, top_p=0.9, seed=5, extra_body=settings).choices[0].text == text


def test_a_text_ends_before_a_stop_string(client, expected):
    stop = expected[0][5:7]
    for settings in ({}, {"logprobs": 1}):
        answer = complete(client, seed=0, stop=[stop, "never seen"], **settings).choices[0]
        assert answer.text == expected[0][: expected[0].index(stop)]
        assert answer.finish_reason == "stop"
    assert len(answer.logprobs.tokens) < 12


def logits_of(model, ids, steer=UNCHANGED):
    """Of one shape and always steered, so that it is compiled once."""
    padded = np.array([ids + [0] * (MODEL.context_length - len(ids))])
    return np.asarray(model(padded, steer=steer))[0, : len(ids)]


def greedy(model, n, steer):
    """The most likely tokens after the prompt, one by one, each from all of the text before."""
    ids = np.asarray(model.to_tokens(PROMPT))[0].tolist()
    for _ in range(n):
        ids.append(int(np.argmax(logits_of(model, ids, steer)[-1])))
    return model.tokenizer.decode(ids)[len(PROMPT) :]


def test_a_steered_text_is_what_the_library_gives_and_others_are_unharmed(client, model, expected):
    entries = [{"layer": 0, "neuron": 3, "value": 9.0, "mode": "add", "positions": [10, 32]}]
    steered = greedy(model, 12, {(0, 3): 6.0, (1, 5): 4.0})
    added = greedy(model, 12, [Intervention(0, 3, 9.0, "add", (10, 32))])
    none = greedy(model, 12, UNCHANGED)
    assert len({steered, added, none}) == 3
    asked = [{}, {"steer": {"0:3": 6.0, "1:5": 4.0}, "steer_mode": "clamp"}, {"steer": entries}]

    def text(body):
        return complete(client, temperature=0, extra_body=body).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(text, asked * 2))
    assert found == [none, steered, added] * 2
    assert complete(client, seed=0).choices[0].text == expected[0]


def test_probabilities_are_those_of_the_model(client, model):
    answer = complete(client, seed=1, logprobs=2, echo=True, max_tokens=6, temperature=0.5).choices[0]
    found, ids = answer.logprobs, client.post("/tokenize", body={"prompt": PROMPT}, cast_to=object)["tokens"]
    assert found.token_logprobs[0] is None
    assert found.tokens[1 : len(ids)] == list(PROMPT)  # a token for each byte
    assert found.text_offset[1 : len(ids)] == list(range(len(PROMPT)))
    ids += [_id(model, name) for name in found.tokens[len(ids) :]]
    reference = np.asarray(jax.nn.log_softmax(logits_of(model, ids)))
    for place in range(1, len(ids)):
        np.testing.assert_allclose(found.token_logprobs[place], reference[place - 1, ids[place]], atol=1e-3)
        best = np.sort(reference[place - 1])[-2:]
        np.testing.assert_allclose(sorted(found.top_logprobs[place].values())[-2:], best, atol=1e-3)
        assert found.tokens[place] in found.top_logprobs[place]


def test_a_stop_token_is_counted_and_its_probability_listed_whole_and_streamed(client, model):
    # As a program that scores texts asks: the last token listed is never one of the prompt.
    settings = {"logprobs": 1, "echo": True, "max_tokens": 18}
    several = (complete(client, seed=seed, n=20, **settings).choices for seed in range(20))
    (choice, seed) = next(
        (choice, seed)
        for seed, choices in enumerate(several)
        for choice in choices
        if choice.finish_reason == "stop"
    )
    found, n = choice.logprobs, len(PROMPT) + 1
    assert found.tokens[-1] == "<|endoftext|>"
    assert "<|endoftext|>" not in choice.text
    assert found.text_offset[-1] == len(choice.text)
    ids = [_id(model, name) for name in found.tokens[:-1]]
    assert model.tokenizer.decode(ids) == choice.text
    reference = np.asarray(jax.nn.log_softmax(logits_of(model, ids)))[-1]
    np.testing.assert_allclose(found.token_logprobs[-1], reference[0], atol=1e-3)
    # Scored as a prompt, the same tokens have the same probabilities, up to what an evaluation cuts off.
    scored = complete(client, prompt=ids, temperature=0, max_tokens=1, logprobs=1, echo=True)
    assert scored.choices[0].logprobs.token_logprobs[n:-1] == pytest.approx(
        found.token_logprobs[n:-1], abs=1e-3
    )
    assert len(scored.choices[0].logprobs.tokens) == len(ids) + 1
    assert scored.usage.completion_tokens == 1
    whole = complete(client, seed=seed, n=20, max_tokens=18, logprobs=1)
    listed = sum(len(one.logprobs.tokens) for one in whole.choices)
    assert whole.usage.completion_tokens == listed
    pieces = list(complete(client, seed=seed, n=20, max_tokens=18, logprobs=1, stream=True))
    ours = [one for piece in pieces for one in piece.choices if one.index == choice.index]
    told = [name for one in ours for name in one.logprobs.tokens]
    assert told == whole.choices[choice.index].logprobs.tokens


def test_counts_depend_neither_on_load_nor_on_what_is_told_beside(client, expected):
    stop = expected[0][5:7]

    def count(settings):
        return complete(client, seed=0, stop=[stop], **settings).usage.completion_tokens

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = set(pool.map(count, [{}, {"logprobs": 0}, {"echo": True}, {}] * 4))
    assert len(found) == 1
    assert found.pop() < 12


def _id(model, name):
    names = model.tokenizer.token_strings(range(MODEL.vocab_size))
    return names.index(name)


def test_a_prompt_can_be_scored_without_any_new_token(client):
    both = complete(client, logprobs=0, echo=True, max_tokens=6, seed=1).choices[0]
    alone = complete(client, logprobs=0, echo=True, max_tokens=0).choices[0]
    assert alone.text == PROMPT
    assert alone.logprobs.token_logprobs == both.logprobs.token_logprobs[: len(PROMPT) + 1]
    assert alone.finish_reason == "length"


def test_the_active_neurons_of_a_text_are_told(served, model):
    _, answer = served.ask("/v1/neurons", {"prompt": PROMPT})
    _, cache = model.run_with_cache(PROMPT)
    dense = np.asarray(cache.neurons.dense())[:, 0]
    assert [token["token"] for token in answer["tokens"]] == list(PROMPT)
    for token in answer["tokens"]:
        for layer in token["layers"]:
            row = dense[layer["layer"], token["position"]]
            assert sorted(layer["neurons"]) == np.flatnonzero(row).tolist()
            np.testing.assert_allclose(layer["values"], row[layer["neurons"]], rtol=1e-4)
            assert layer["values"] == sorted(layer["values"], reverse=True)
    _, fewer = served.ask("/v1/neurons", {"prompt": PROMPT, "layers": [0], "top": 2})
    whole = [token["layers"][0] for token in answer["tokens"]]
    for token, one in zip(fewer["tokens"], whole, strict=True):
        assert token["layers"] == [{"layer": 0, "neurons": one["neurons"][:2], "values": one["values"][:2]}]


def test_text_becomes_tokens_and_tokens_text(served, model):
    text = "über \U0001f600"
    _, answer = served.ask("/v1/tokenize", {"prompt": text})
    assert answer["tokens"] == np.asarray(model.to_tokens(text))[0].tolist()
    assert answer["token_strs"] == model.to_str_tokens(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 32)
    assert served.ask("/v1/tokenize", {"prompt": text, "add_special_tokens": False})[1]["count"] == 10
    assert served.ask("/v1/detokenize", {"tokens": answer["tokens"]}) == (200, {"prompt": text})


def test_a_prompt_longer_than_the_context_slides_if_it_may(client, model):
    long = "a longer text than the context is " * 2
    with pytest.raises(openai.BadRequestError, match="at most 32, the model's context"):
        complete(client, prompt=long)
    answer = complete(client, prompt=long, seed=4, max_tokens=6, extra_body={"when_full": "slide"})
    assert answer.choices[0].text == model.generate(long, 6, seed=4)[len(long) :]


def test_a_client_that_goes_frees_its_slot_for_the_next(served, client, expected):
    request = json.dumps({"prompt": "x", "max_tokens": 10**6, "when_full": "halve", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
    head += f"Content-Length: {len(request)}\r\n\r\n"
    for body in (request, request.replace(b"true", b"null")):
        with socket.create_connection(("127.0.0.1", served.port), timeout=300) as gone:
            gone.sendall(head.encode() + body)
            if b"true" in body:
                assert b"200 OK" in gone.recv(10_000)
        # There is one slot: who went has given it up.
        assert complete(client, seed=0).choices[0].text == expected[0]
    load = {"running": 0, "waiting": 0, "slots": 1, "to_compile": 0}
    assert served.ask("/health") == (200, {"status": "ok", "model": "village", **load})


def test_nonsense_beside_a_stream_does_not_harm_it(served, client):
    going, _ = endless(client)
    for body in (b"{", b'{"prompt": []}', b'{"prompt": "a", "steer": {"0:3": NaN}}'):
        assert served.ask("/v1/completions", body)[0] == 400
    next(going)
    going.close()


def test_what_the_documentation_says_works(served, capsys):
    text = (ROOT / "docs" / "serving.md").read_text().replace(":8766", f":{served.port}")
    text = text.replace('model="small"', 'model="village"')
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    lines = [line for kind, block in blocks if kind == "bash" for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("curl")]
    assert len(commands) == 7
    for command in commands:
        answer = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True)
        assert "error" not in json.loads(answer.stdout)
    exec("\n".join(block for kind, block in blocks if kind == "python"), {})
    assert capsys.readouterr().out


def test_told_to_stop_it_ends_streams_and_ends_well(served, client):
    going, _ = endless(client)
    served.process.signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server is being stopped"):
        for _ in going:
            pass
    assert served.process.finish() == 0
    assert "Traceback" not in served.process.errors
