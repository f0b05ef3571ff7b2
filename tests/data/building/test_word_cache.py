import base64
import functools

from helpers import tries
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from topklm.data.tokenizer import WordEncoder, fast_encoder, open_tokenizer, train_bpe

TEXTS = [f"The sea, the sea! {n} ships sailed\n\n in 'twenty-{n};\tshe'd seen them." for n in range(60)]
TEXT = st.text(alphabet="thes'd1.é漢🙂 \n\t\r\u00a0\x85\x1c\u2028/", max_size=60)


@functools.cache
def own_bpe():
    return train_bpe(TEXTS, 320)


@pytest.fixture(scope="module", params=["own", "cl100k_base", "o200k_base", "gpt2"])
def tokenizer(request, tmp_path_factory):
    if request.param == "own":
        return own_bpe()
    merges = ["th", "the", " t", " th", " the", "\n\n", ".\n", "  ", "/\n", "\u00a0".encode().decode()]
    ranks = [bytes([b]) for b in range(256)] + [merge.encode() for merge in merges]
    path = tmp_path_factory.mktemp("ranks") / f"{request.param}.tiktoken"
    path.write_bytes(b"\n".join(b"%s %d" % (base64.b64encode(t), i) for i, t in enumerate(ranks)))
    return open_tokenizer(path)


@tries(300)
@given(texts=st.lists(TEXT, max_size=8), max_words=st.sampled_from([0, 3, 1000]))
def test_remembered_words_give_the_librarys_tokens(tokenizer, texts, max_words):
    encoder = WordEncoder(
        tokenizer.encode_batch, tokenizer.cut_before, tokenizer.token_bytes_lengths(), max_words
    )
    for _ in range(2):  # the second time from memory
        for ours, text in zip(encoder.encode(texts), texts, strict=True):
            np.testing.assert_array_equal(ours, tokenizer.encode(text))


def test_real_text_gives_the_librarys_tokens(tokenizer):
    encode = fast_encoder(tokenizer)
    for ours, text in zip(encode(TEXTS), TEXTS, strict=True):
        np.testing.assert_array_equal(ours, tokenizer.encode(text))


def test_a_word_is_encoded_once():
    tokenizer, seen = own_bpe(), []

    def encode_batch(texts):
        seen.extend(texts)
        return tokenizer.encode_batch(texts)

    encoder = WordEncoder(encode_batch, tokenizer.cut_before, tokenizer.token_bytes_lengths())
    encoder.encode(["the sea the sea the sea"] * 100)
    encoder.encode([" sea the"])
    assert "".join(seen) == "the sea the"  # the first word has no space before it


def test_words_are_forgotten_when_there_are_too_many():
    tokenizer = own_bpe()
    encoder = WordEncoder(tokenizer.encode_batch, tokenizer.cut_before, tokenizer.token_bytes_lengths(), 10)
    for start in range(0, 1000, 5):
        encoder.encode([" ".join(str(n) for n in range(start, start + 5))])
        assert len(encoder._numbers) <= 20


def test_a_tokenizer_that_normalises_is_asked_for_every_text(tmp_path):
    tokenizer = own_bpe()
    text = tokenizer.to_bytes().decode().replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}')
    (tmp_path / "tokenizer.json").write_text(text)
    other = open_tokenizer(tmp_path / "tokenizer.json")
    assert other.cut_before == ""
    assert fast_encoder(other) == other.encode_batch
