"""What is said of a text piece by piece is what is said of it at once."""

import numpy as np
import pytest

from topklm.data.tokenizer import train_bpe
from topklm.inference.sampling import Sampling
from topklm.inference.scores import Scores
from topklm.inference.text import Text, Token
from topklm.server.choices import Choice, joined

TOKENIZER = train_bpe(["the old baker ate a cake by the river \U0001f600 über"] * 20, 290)
SAID = "über the river \U0001f600!"


def choice(stop=(), n_alternatives=1, prompt="the"):
    ids = [TOKENIZER.separator_id, *TOKENIZER.encode(prompt).tolist()]
    text = Text(ids, len(ids), 100, Sampling(), n_alternatives=n_alternatives)
    return Choice(TOKENIZER, 3, text, stop)


def tokens_of(said):
    return [
        Token(token, -0.5 - i, ((token, -0.5 - i), (7, -9.0)))
        for i, token in enumerate(TOKENIZER.encode(said).tolist())
    ]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_pieces_joined_are_the_whole(size):
    made, tokens, pieces = choice(), tokens_of(SAID), []
    for begin in range(0, len(tokens), size):
        last = begin + size >= len(tokens)
        pieces.append(made.add(tokens[begin : begin + size], "length" if last else None))
    found = joined([piece for piece in pieces if piece])
    assert (found["text"], found["index"], found["finish_reason"]) == (SAID, 3, "length")
    logprobs = found["logprobs"]
    assert logprobs["tokens"] == TOKENIZER.token_strings([token.id for token in tokens])
    assert logprobs["token_logprobs"] == [token.log_probability for token in tokens]
    # Each token begins where the text before it ends, as far as that is whole characters.
    ends = [TOKENIZER.decode([t.id for t in tokens[:n]]).rstrip("\ufffd") for n in range(len(tokens))]
    assert logprobs["text_offset"][0] == 0
    for place, end in zip(logprobs["text_offset"], ends, strict=True):
        assert 0 <= place - len(end) <= 1
    assert made.n_new == len(tokens)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_nothing_is_told_of_tokens_behind_a_stop_string(size):
    made, tokens, pieces = choice(stop=("river",)), tokens_of(SAID), []
    for begin in range(0, len(tokens), size):
        if not made.finish_reason:
            pieces.append(made.add(tokens[begin : begin + size], None))
    found = joined([piece for piece in pieces if piece])
    assert (found["text"], found["finish_reason"]) == (SAID[: SAID.index("river")], "stop")
    told = found["logprobs"]["tokens"]
    assert "".join(SAID).startswith(found["text"])
    assert len(told) < len(tokens)
    assert max(found["logprobs"]["text_offset"]) < len(found["text"])


def test_a_piece_without_text_waits_and_an_end_without_text_does_not():
    half = TOKENIZER.encode("\U0001f600").tolist()[:1]
    assert TOKENIZER.decode(half) == "\ufffd"
    made = choice(n_alternatives=None)
    assert made.add([Token(half[0])], None) is None
    assert made.add([], "length") == {
        "text": "\ufffd",
        "index": 3,
        "logprobs": None,
        "finish_reason": "length",
    }


def test_alternatives_hold_the_token_itself():
    token = Token(5, -3.0, ((7, -0.1), (8, -0.2)))
    found = choice(n_alternatives=2).add([token], "length")["logprobs"]["top_logprobs"]
    names = TOKENIZER.token_strings([7, 8, 5])
    assert found == [dict(zip(names, (-0.1, -0.2, -3.0), strict=True))]
    assert choice(n_alternatives=0).add([Token(5, -3.0)], "length")["logprobs"]["top_logprobs"] is None


def test_an_echo_is_the_prompt_with_what_is_known_of_it():
    made = choice(prompt="the old")
    n = made.text.n_prompt - 1
    scores = Scores(np.arange(n, dtype=np.float32), np.full((n, 1), 7), np.full((n, 1), -0.25, np.float32))
    found = made.echo(scores)
    assert found["text"] == "the old"
    logprobs = found["logprobs"]
    assert len(logprobs["tokens"]) == n + 1
    assert logprobs["token_logprobs"] == [None, *map(float, range(n))]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"][:2] == [0, 0]
    follow = made.add(tokens_of(" baker"), "length")
    assert follow["logprobs"]["text_offset"][0] == len("the old")
    assert follow["text"] == " baker"
