"""What is said of a text piece by piece is what is said of it at once."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from topklm.data.tokenizer import Tokenizer, train_bpe
from topklm.inference.sequence import Sampling, Sequence, Token
from topklm.inference.steps import Scores
from topklm.inference.tokens import first_stop
from topklm.server.app import Choice, joined

TOKENIZER = train_bpe(["the old baker ate a cake by the river \U0001f600 über"] * 20, 290)
SAID = "über the river \U0001f600!"


def choice(stop=(), n_alternatives=1, prompt="the"):
    ids = [TOKENIZER.separator_id, *TOKENIZER.encode(prompt).tolist()]
    text = Sequence(ids, len(ids), 100, Sampling(), n_alternatives=n_alternatives)
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


def offsets_by_hand(ids, first=0):
    """The character to which the first byte of each token belongs, by decoding all that comes before it."""
    pieces = [b"" if i == 0 else TOKENIZER.token_bytes([i])[0] for i in ids]
    found = []
    for n, piece in enumerate(pieces):
        before = b"".join(pieces[:n])
        with_first_byte = (before + piece[:1]).decode("utf-8", "replace")
        found.append(len(with_first_byte) - (1 if piece else 0))
    return [max(0, place - first) for place in found]


ANY_TOKENS = st.lists(st.integers(1, TOKENIZER.vocab_size - 1), max_size=14)


@given(
    prompt=ANY_TOKENS,
    said=st.text(alphabet="\u65e5\u672c\n\u00fc\U0001f600a ", max_size=4),
    ids=ANY_TOKENS,
    stop=st.lists(st.text(alphabet="\u65e5\n\u00fc ae", min_size=1, max_size=2), max_size=2),
    size=st.integers(1, 20),
    echo=st.booleans(),
    ends=st.booleans(),
)
def test_offsets_tokens_and_counts_are_those_of_the_text_however_it_comes(
    prompt, said, ids, stop, size, echo, ends
):
    ids = [*ids[:7], *TOKENIZER.encode(said).tolist(), *ids[7:], *([0] if ends else [])]
    prompt_text, prompt = TOKENIZER.decode(prompt), [TOKENIZER.separator_id, *prompt]
    made = Choice(
        TOKENIZER, 0, Sequence(list(prompt), len(prompt), 100, Sampling(), n_alternatives=0), tuple(stop)
    )
    n = len(prompt) - 1
    pieces = [made.echo(Scores(np.zeros(n), np.zeros((n, 0)), np.zeros((n, 0))))] if echo else []
    for begin in range(0, max(1, len(ids)), size):
        last = begin + size >= len(ids)
        new = [Token(token, -1.0) for token in ids[begin : begin + size]]
        if not made.finish_reason:
            pieces.append(made.add(new, ("stop" if ends else "length") if last else None))
    found = joined([piece for piece in pieces if piece])
    logprobs, before = found["logprobs"], len(prompt) if echo else 0
    text = found["text"].removeprefix(prompt_text) if echo else found["text"]

    whole = TOKENIZER.decode(prompt + ids)[len(prompt_text) :]
    n_drawn = next((n for n in range(len(ids) + 1) if stopped(prompt, ids[:n], prompt_text, stop)), None)
    stops = n_drawn is not None
    n_drawn = n_drawn if stops else len(ids)
    assert made.n_new == n_drawn
    assert text == (whole[: first_stop(whole, stop)] if stops else whole)
    assert found["finish_reason"] == ("stop" if stops or ends else "length")
    first = 0 if echo else len(prompt_text)
    expected = offsets_by_hand(prompt + ids[:n_drawn], first)
    if stops:
        expected = [
            place for place in expected[len(prompt) :] if place < len(prompt_text) - first + len(text)
        ]
        expected = offsets_by_hand(prompt, first)[:before] + expected
    else:
        expected = expected[len(prompt) - before :]
    assert logprobs["text_offset"] == expected
    ids_told = [*prompt[:before], *ids][: len(expected)]
    assert logprobs["tokens"] == TOKENIZER.token_strings(ids_told)


def stopped(prompt, ids, prompt_text, stop):
    text = TOKENIZER.decode(prompt + ids)[len(prompt_text) :]
    return any(one in text for one in stop)


def test_offsets_are_those_of_the_text_also_where_a_tokenizer_changes_it():
    names = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581a", "b"]
    of_library = tokenizers.Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True)
    )
    of_library.add_special_tokens(["</s>"])
    of_library.pre_tokenizer = pre_tokenizers.Metaspace()
    of_library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = Tokenizer(of_library.to_str().encode())
    emoji, broken = [1 + byte for byte in "\U0001f600".encode()], 1 + 0x97
    ids = [0, 258, *emoji, 258, 259, broken, 259, 258]
    assert tokenizer.decode(ids) == "a\U0001f600 ab\ufffdb a"  # the first space is left out
    text = Sequence(list(ids), len(ids), 100, Sampling(), n_alternatives=0)
    n = len(ids) - 1
    scores = Scores(np.zeros(n), np.zeros((n, 0)), np.zeros((n, 0)))
    found = Choice(tokenizer, 0, text, ()).echo(scores)
    assert found["text"] == tokenizer.decode(ids)
    assert found["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 1, 2, 4, 5, 6, 7]


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
    n = made.sequence.n_prompt - 1
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
