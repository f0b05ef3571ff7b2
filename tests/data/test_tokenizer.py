import json
import pickle
import random
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from topklm.data import tokenizer as tokenizer_module
from topklm.data.tokenizer import SEPARATOR, Tokenizer, fast_encoder, train_bpe
from topklm.errors import UserError

TEXTS = [f"The sea, the sea! {n} ships sailed in 'twenty-{n}." for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 320)


@given(st.text())
def test_any_text_comes_back_unchanged(text):
    tokenizer = train_bpe(TEXTS, 320)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["", " leading", "a\x00b\r\n\t ", "漢字 🙂 e\u0301 \u2028", "  the  "])
def test_unusual_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_separator_is_token_zero_and_the_vocabulary_has_the_size_asked_for(tokenizer):
    assert tokenizer.separator_id == 0
    assert tokenizer.vocab_size == 320


def test_a_small_corpus_gives_fewer_tokens():
    assert train_bpe(["ab"], 4096).vocab_size == 258  # bytes, separator, "ab"


def test_text_that_spells_the_separator_is_ordinary_text(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    text = f"one{SEPARATOR} two {SEPARATOR}"
    copies = [tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")]
    copies += [pickle.loads(pickle.dumps(tokenizer)), train_bpe([text] * 50, 4096)]
    for copy in copies:
        ids = copy.encode(text)
        assert copy.separator_id not in ids
        assert copy.decode(ids) == text


def test_separators_and_unused_ids_are_decoded_to_nothing(tokenizer):
    ids = tokenizer.encode("the sea").tolist()
    assert tokenizer.decode([0, *ids, 0, 5000]) == "the sea"


def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer):
    text = "The café — naïve 海 \N{GRINNING FACE}"
    pieces = tokenizer.token_bytes(tokenizer.encode(text))
    assert b"".join(pieces) == text.encode()
    assert tokenizer.token_bytes([5000]) == [b"<unused 5000>"]


def test_token_strings_show_every_token_readably(tokenizer):
    ids = tokenizer.encode(" the sea é").tolist()
    shown = tokenizer.token_strings([0, *ids, 5000])
    assert shown[0] == SEPARATOR
    assert shown[-1] == "<unused 5000>"
    assert shown[1:3] == [" the", " sea"]
    assert shown[-3:-1] == [r"\xc3", r"\xa9"]
    assert "".join(shown[1:-3]) == " the sea "


def test_encode_batch_gives_what_encode_gives(tokenizer):
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@given(st.text(alphabet="ab'1.é漢 \n\t\u00a0\u2003\x1c\x85\u200b", max_size=60))
def test_cutting_a_text_changes_no_token(text):
    tokenizer = train_bpe(TEXTS, 320)
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PIECE_CHARS", 3)
        pieces = list(tokenizer.pieces(text))
        np.testing.assert_array_equal(tokenizer.encode(text), whole)
    assert "".join(pieces) == text


def test_a_long_text_is_cut_into_pieces(tokenizer):
    text = "word and word\n" * 50_000
    pieces = list(tokenizer.pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < (1 << 16) + 10


def test_training_gives_the_file_that_the_library_gives(tokenizer):
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(TEXTS, trainer)
    assert tokenizer.to_bytes() == theirs.to_str(pretty=True).encode()
    assert tokenizer.encode(TEXTS[0]).tolist() == theirs.encode(TEXTS[0]).ids


def test_training_twice_gives_the_same_bytes_also_in_another_process(tokenizer):
    program = (
        "from topklm.data.tokenizer import train_bpe; import sys;print(train_bpe(sys.argv[1:], 320).sha256)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *TEXTS], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == tokenizer.sha256 == train_bpe(TEXTS, 320).sha256


def test_saving_and_loading_keeps_every_byte_and_leaves_nothing_beside(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("an older file")
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == tokenizer.sha256
    np.testing.assert_array_equal(loaded.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"model": {"type": "BPE"}, "added_tokens": []}', "[" * 100_000, "1" * 5000]
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no tokenizer file"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("token_id", [1 << 24, 1 << 31, (1 << 32) - 1])
def test_a_token_id_far_above_any_vocabulary_is_refused(tokenizer, tmp_path, token_id):
    content = json.loads(tokenizer.to_bytes())
    content["model"]["vocab"]["a"] = token_id
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"its largest token id is {token_id}, above 16777215"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("part", ["a", "é", "-=", " ", "\n", "31", "字", "ACGT"])
def test_no_token_is_learnt_from_more_than_a_thousand_bytes_of_an_unbroken_word(part):
    # The library's time grows with the square of a word's length: 3 MB of one letter would take it hours.
    text = part * 20_000
    tokenizer = train_bpe([text], 400)
    assert 100 < max(tokenizer.token_bytes_lengths()) <= 1000
    ids = fast_encoder(tokenizer)([text])[0]
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.decode(ids) == text


def test_words_of_up_to_a_thousand_bytes_train_as_the_library_trains():
    texts = [" " + "".join(random.Random(seed).choices("abc", k=999)) for seed in range(3)]
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    assert train_bpe(texts, 600).to_bytes() == library.to_str(pretty=True).encode()


def test_an_error_in_the_documents_ends_training_as_itself():
    def documents():
        yield "one"
        raise UserError("a bad line")

    with pytest.raises(UserError, match="a bad line"):
        train_bpe(documents(), 300)
