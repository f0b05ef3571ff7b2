"""Text piece by piece is the text at once, and ends where a stop string begins."""

from hypothesis import given
from hypothesis import strategies as st
import pytest

from topklm.data.tokenizer import train_bpe
from topklm.inference.tokens import (
    TextStream,
    check_stop,
    first_stop,
    split_at_character,
)

TOKENIZER = train_bpe(["the old baker ate a cake by the river \U0001f600 über"] * 20, 290)
BYTES = train_bpe([], 257)  # a token for every byte
TEXTS = st.text(alphabet="ab \n\u00fc\u4e2d\U0001f600\ufffd", max_size=12)


def pieces_of(tokenizer, ids, cuts, stop=(), prompt=()):
    """What comes when the tokens come in chunks."""
    stream, pieces, begin = TextStream(tokenizer, prompt, stop), [], 0
    for end in [*sorted(min(cut, len(ids)) for cut in cuts), len(ids)]:
        pieces.append(stream.add(ids[begin:end]))
        begin = end
    return [*pieces, stream.end()], stream


@given(text=TEXTS, cuts=st.lists(st.integers(0, 40), max_size=8), prompt=TEXTS)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, BYTES])
def test_pieces_are_the_text_and_none_ends_inside_a_character(tokenizer, text, cuts, prompt):
    pieces, _ = pieces_of(tokenizer, tokenizer.encode(text), cuts, prompt=tokenizer.encode(prompt).tolist())
    assert "".join(pieces) == text
    for piece in pieces:
        assert piece.count("\ufffd") <= text.count("\ufffd")


@given(ids=st.lists(st.integers(0, 256), max_size=20), cuts=st.lists(st.integers(0, 20), max_size=6))
def test_bytes_that_are_no_text_come_out_as_they_do_at_once(ids, cuts):
    pieces, _ = pieces_of(BYTES, ids, cuts)
    assert "".join(pieces) == BYTES.decode(ids)


def test_a_character_waits_for_its_last_byte_and_what_stands_before_it_does_not():
    stream = TextStream(BYTES)
    ids = BYTES.encode("ab\U0001f600c").tolist()
    assert stream.add(ids[:3]) == "ab"
    assert [stream.add(ids[i : i + 1]) for i in (3, 4, 5, 6)] == ["", "", "\U0001f600", "c"]


@given(ids=st.lists(st.integers(0, 256), max_size=12), cut=st.integers(0, 12))
@pytest.mark.parametrize("tokenizer", [TOKENIZER, BYTES])
def test_a_text_that_goes_on_anywhere_is_the_text_at_once(tokenizer, ids, cut):
    whole, begun = split_at_character(tokenizer, ids[:cut])
    stream = TextStream(tokenizer, ids[: len(ids[:cut]) - len(begun)])
    rest = [stream.add(tokens) for tokens in (begun, ids[cut:])]
    assert "".join([whole, *rest, stream.end()]) == tokenizer.decode(ids)


@given(text=TEXTS, cut=st.integers(0, 40))
def test_only_a_character_that_is_not_whole_is_split_off(text, cut):
    ids = BYTES.encode(text.replace("\ufffd", "")).tolist()
    whole, begun = split_at_character(BYTES, ids[:cut])
    assert text.replace("\ufffd", "").startswith(whole)
    assert len(whole.encode()) + len(begun) == len(ids[:cut])
    assert not begun or "\ufffd" in BYTES.decode(begun)


@pytest.mark.parametrize("stop", [(), ("b",), ("zz", "\u00fc")])
def test_the_token_that_completes_a_stop_string_is_the_last_one_that_counts(stop):
    ids = BYTES.encode("xa\u00fcb\u00fc").tolist()
    stream = TextStream(BYTES, ids[:1], stop)
    stream.add(ids[1:])
    assert BYTES.decode(ids[: stream.n_tokens]) == {(): "xa\u00fcb\u00fc", ("b",): "xa\u00fcb"}.get(
        stop, "xa\u00fc"
    )


def test_half_a_character_at_the_end_is_shown_as_broken():
    stream = TextStream(BYTES)
    assert stream.add(BYTES.encode("a\u4e2d")[:2].tolist()) == "a"
    assert stream.end() == "\ufffd"


def test_long_runs_of_broken_bytes_are_decoded_no_more_often_than_other_text(monkeypatch):
    calls, decode = [], BYTES.decode
    monkeypatch.setattr(BYTES, "decode", lambda ids: calls.append(len(ids)) or decode(ids))
    ids = BYTES.token_strings(range(257)).index("\\x97")
    stream = TextStream(BYTES)
    pieces = [stream.add([ids]) for _ in range(200)]
    assert "".join([*pieces, stream.end()]) == "\ufffd" * 200
    assert len(calls) <= 3 * 201


def cut_by_hand(text, stop):
    """Character by character: the first moment at which the text ends with a stop string."""
    for end in range(len(text) + 1):
        ending = [one for one in stop if text[:end].endswith(one)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(
    text=st.text(alphabet="abc", max_size=20),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_the_text_is_cut_before_the_first_stop_string_however_its_tokens_come(text, stop, cuts):
    pieces, stream = pieces_of(BYTES, BYTES.encode(text), cuts, stop)
    assert "".join(pieces) == cut_by_hand(text, stop)
    assert stream.stopped == (cut_by_hand(text, stop) != text or any(one in text for one in stop))


def test_a_stop_string_may_begin_in_one_token_and_end_in_another():
    ids = TOKENIZER.encode("the old baker ate").tolist()
    words = TOKENIZER.token_strings(ids)
    stop = "d bak"
    assert not any(stop in word for word in words)
    pieces, stream = pieces_of(TOKENIZER, ids, range(len(ids)), [stop])
    assert "".join(pieces) == "the ol"
    assert stream.stopped
    assert stream.add(ids) == stream.end() == ""


def test_what_may_begin_a_stop_string_waits():
    stream = TextStream(BYTES, stop=["abc"])
    assert stream.add(BYTES.encode("xab").tolist()) == "x"
    assert stream.add(BYTES.encode("ab").tolist()) == "ab"
    assert stream.end() == "ab"


def test_a_stop_string_of_the_prompt_stops_nothing():
    stream = TextStream(BYTES, BYTES.encode("ab").tolist(), ["abc", "b"])
    assert stream.add(BYTES.encode("cd").tolist()) == "cd"


def test_of_stop_strings_that_end_together_the_longest_counts():
    assert first_stop("xabc", ["bc", "abc", "c"]) == 1
    assert first_stop("xabc", ["abc", "b"]) == 2
    assert first_stop("xabc", ["d"]) is None


@pytest.mark.parametrize("stop", ["", [""], ["a", 1], 3.5])
def test_what_is_no_stop_string_is_refused(stop):
    with pytest.raises(ValueError, match=r"stop = .*: must be a text that is not empty, or several"):
        check_stop(stop)
