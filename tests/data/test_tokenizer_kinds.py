import base64
import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import sys

from helpers import tries
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from topklm.data.tokenizer import Tokenizer, open_tokenizer, train_bpe
from topklm.data.tokenizer_kinds import ENCODINGS
from topklm.errors import UserError

TEXTS = [f"The sea, the sea! {n} ships sailed in 'twenty-{n}; she'd seen them." for n in range(60)]
UNUSUAL = [
    "",
    "  two  spaces ",
    "tab\tand\r\nline\n\n",
    "漢字 and 🙂 é",
    "x" * 5000,
    "a\u00a0b",
    "the sea " * 3000,
]
LLAMA3_WORDS = ENCODINGS["llama3"].pattern
TEXT = st.text(alphabet="the sa'd1.é漢🙂 \n\t\r\u00a0▁<|>/s[]SEP", max_size=80)


def tiktoken_file(folder, name="cl100k_base", merges=("th", "the", " s", " se", " sea", "\n\n")):
    ranks = [bytes([b]) for b in range(256)] + [merge.encode() for merge in merges]
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks)]
    path = folder / f"{name}.tiktoken"
    path.write_bytes(b"\n".join(lines))
    return path, {token: rank for rank, token in enumerate(ranks)}


def sentencepiece_file(folder, model_type="bpe", byte_fallback=True, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=300 if byte_fallback else 60,
        model_type=model_type, byte_fallback=byte_fallback, hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    path = folder / f"{model_type}.model"
    path.write_bytes(model.getvalue())
    return path


def hugging_face_file(folder, kind):
    special = ["[UNK]", "[SEP]"]
    if kind == "wordpiece":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    elif kind == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=special, unk_token="[UNK]", show_progress=False
        )
    elif kind == "llama3":
        tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
        split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated")
        of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, of_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    # What a file may carry for other uses must not touch our tokens.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 1)])
    path = folder / f"{kind}.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@functools.cache
def opened(path):
    return open_tokenizer(path)


KINDS = ["gpt2", "cl100k_base", "o200k_base", "sp-bpe", "sp-unigram", "wordpiece", "unigram", "bpe", "llama3"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, folder):
    if request.param in ("gpt2", "cl100k_base", "o200k_base"):
        return opened(tiktoken_file(folder, request.param)[0])
    if request.param.startswith("sp-"):
        return opened(sentencepiece_file(folder, request.param.removeprefix("sp-")))
    return opened(hugging_face_file(folder, request.param))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tiktoken_files_give_the_tokens_of_tiktoken(tmp_path, encoding):
    path, ranks = tiktoken_file(tmp_path, encoding)
    ours = open_tokenizer(path)
    assert (ours.kind, ours.separator_id, ours.vocab_size) == ("tiktoken", 262, 263)
    theirs = tiktoken.Encoding("t", pat_str=ENCODINGS[encoding][0], mergeable_ranks=ranks, special_tokens={})
    for text in [*TEXTS[:5], *UNUSUAL]:
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_models_give_the_tokens_of_sentencepiece(tmp_path, model_type, byte_fallback):
    path = sentencepiece_file(tmp_path, model_type, byte_fallback)
    ours = open_tokenizer(path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (ours.kind, ours.separator_id) == ("sentencepiece", theirs.eos_id())
    for text in [*TEXTS[:5], *UNUSUAL]:
        assert ours.encode(text).tolist() == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe", "llama3"])
def test_hugging_face_files_give_their_tokens_and_nothing_added(tmp_path, kind):
    path = hugging_face_file(tmp_path, kind)
    ours, theirs = open_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    theirs.no_truncation()
    theirs.no_padding()
    assert (ours.kind, ours.separator_id) == ("huggingface", 1)
    for text in [*TEXTS[:5], *UNUSUAL]:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids


@tries(150)
@given(text=TEXT)
def test_no_text_becomes_the_separator(tokenizer, text):
    separator = tokenizer.token_strings([tokenizer.separator_id])[0]
    for spelled in (text, f"{text}{separator}{text}", separator, f"a {separator} {separator}{text}"):
        assert tokenizer.separator_id not in tokenizer.encode(spelled)


def test_a_separator_that_is_an_ordinary_word_is_left_out_of_text(tmp_path):
    vocabulary = {"a": 0, "b": 1, "</s>": 2, "[UNK]": 3}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "words.json"))
    tokenizer = open_tokenizer(tmp_path / "words.json")
    assert tokenizer.separator_id == 2
    assert tokenizer.encode("a </s> b c").tolist() == [0, 1, 3]


def words_file(folder, vocabulary, added=(), special=(), **changes):
    """A tokenizer.json of whole words."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(list(added))
    tokenizer.add_special_tokens(list(special))
    path = folder / "words.json"
    path.write_text(json.dumps({**json.loads(tokenizer.to_str()), **changes}))
    return path


def byte_level_file(folder, change):
    """A tokenizer.json of ours after `change`."""
    parts = json.loads(train_bpe(TEXTS, 300).to_bytes())
    change(parts)
    path = folder / "bytes.json"
    path.write_text(json.dumps(parts))
    return path


def test_a_special_token_is_the_separator_before_a_word_that_looks_like_one(tmp_path):
    vocabulary = {"[UNK]": 0, "a": 1, "</s>": 2, "<eos>": 3}  # </s> ends struck-out text, as in HTML
    tokenizer = open_tokenizer(words_file(tmp_path, vocabulary, added=["</s>"], special=["<eos>"]))
    assert tokenizer.separator_id == 3
    assert tokenizer.encode("a </s> a").tolist() == [1, 2, 1]


def test_a_separator_that_is_added_as_ordinary_text_is_not_made_from_text(tmp_path):
    tokenizer = open_tokenizer(words_file(tmp_path, {"[UNK]": 0, "a": 1}, added=["</s>"]))
    assert tokenizer.separator_id == 2
    assert tokenizer.encode("a </s> a").tolist() == [1, 0, 1]


def test_a_separator_that_shares_its_id_is_refused(tmp_path):
    added = json.loads(words_file(tmp_path, {"[UNK]": 0}, special=["</s>"]).read_text())["added_tokens"]
    path = words_file(tmp_path, {"[UNK]": 0, "a": 2, "x": 3}, added_tokens=[{**added[0], "id": 9}])
    with pytest.raises(UserError, match="another token has the id 3 of its separator </s>"):
        open_tokenizer(path)


def test_ids_may_have_holes(tmp_path):
    vocabulary = {"[UNK]": 0, "a": 7, "</s>": 5}
    tokenizer = open_tokenizer(words_file(tmp_path, vocabulary, special=["</s>"]))
    assert (tokenizer.separator_id, tokenizer.vocab_size) == (5, 8)
    assert tokenizer.token_strings([5, 6, 7]) == ["</s>", "<unused 6>", "a"]
    assert tokenizer.decode([7, 6, 5]) == "a"


def test_files_from_before_models_named_their_type_are_read(tmp_path):
    tokenizer = open_tokenizer(byte_level_file(tmp_path, lambda parts: parts["model"].pop("type")))
    whole = train_bpe(TEXTS, 300)
    np.testing.assert_array_equal(tokenizer.encode(TEXTS[0]), whole.encode(TEXTS[0]))
    np.testing.assert_array_equal(tokenizer.token_bytes_lengths(), whole.token_bytes_lengths())
    assert tokenizer.cut_before == whole.cut_before == " \n"


def test_dropout_is_switched_off(tmp_path):
    tokenizer = open_tokenizer(byte_level_file(tmp_path, lambda parts: parts["model"].update(dropout=0.5)))
    expected = train_bpe(TEXTS, 300).encode(TEXTS[0]).tolist()
    assert all(tokenizer.encode(TEXTS[0]).tolist() == expected for _ in range(20))


def changes_unicode(parts):
    parts["normalizer"] = {"type": "NFC"}


def adds_ordinary_text(parts):
    parts["added_tokens"].append({**parts["added_tokens"][0], "id": 300, "content": "<x>", "special": False})


def drops_white_space(parts):
    steps = [{"type": "WhitespaceSplit"}, parts["pre_tokenizer"]]
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def adds_a_space(parts):
    parts["pre_tokenizer"]["add_prefix_space"] = True


def does_not_add_its_separator(parts):
    parts["added_tokens"] = []


@pytest.mark.parametrize(
    "change",
    [changes_unicode, adds_ordinary_text, drops_white_space, adds_a_space, does_not_add_its_separator],
)
def test_bytes_are_not_counted_where_a_file_may_change_the_text(tmp_path, change):
    tokenizer = open_tokenizer(byte_level_file(tmp_path, change))
    assert tokenizer.token_bytes_lengths() is None
    assert tokenizer.cut_before == ""
    # The tokens are shown in letters all the same.
    shown = tokenizer.token_strings(tokenizer.encode("the sea é"))
    assert "".join(shown).replace(" ", "") == r"thesea\xc3\xa9"


@pytest.mark.parametrize(
    "change", [lambda parts: None, lambda parts: parts["model"]["vocab"].update({"漢": 300})]
)
def test_bytes_are_counted_for_every_token_of_a_byte_level_file(tmp_path, change):
    tokenizer = open_tokenizer(byte_level_file(tmp_path, change))
    lengths = tokenizer.token_bytes_lengths()
    assert lengths.dtype == np.int64
    assert lengths[tokenizer.separator_id] == 0
    text = "the sea, 漢字 🙂 é\n"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_tokens_of_llama3_files_are_counted_and_cut(folder):
    tokenizer = opened(hugging_face_file(folder, "llama3"))
    assert tokenizer.cut_before == " "
    assert tokenizer.token_bytes_lengths() is not None


def test_a_text_that_the_library_cannot_encode_is_a_user_error(tmp_path):
    path = words_file(tmp_path, {"a": 0}, special=["</s>"])
    with pytest.raises(UserError, match="cannot encode this text: WordLevel error"):
        open_tokenizer(path).encode("b")
    ranked = open_tokenizer(tiktoken_file(tmp_path)[0])
    with pytest.raises(UserError, match=r"2,000,001 characters .* run of white space"):
        ranked.encode(" " * 2_000_000 + "x")


def test_every_kind_is_saved_as_one_file_and_comes_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    copies = [Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))]
    for copy in copies:
        assert copy.sha256 == tokenizer.sha256
        assert (copy.kind, copy.separator_id, copy.vocab_size) == (
            tokenizer.kind,
            tokenizer.separator_id,
            tokenizer.vocab_size,
        )
        for text in UNUSUAL:
            np.testing.assert_array_equal(copy.encode(text), tokenizer.encode(text))


@tries(100)
@given(text=TEXT)
def test_cutting_a_long_text_changes_no_token(tokenizer, text):
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("topklm.data.tokenizer._PIECE_CHARS", 2)
        pieces = list(tokenizer.pieces(text))
    assert "".join(pieces) == text
    parts = [np.zeros(0, np.int32), *tokenizer.encode_batch(pieces)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@tries(100)
@given(text=TEXT)
def test_the_bytes_of_the_tokens_are_those_of_the_text(tokenizer, text):
    lengths = tokenizer.token_bytes_lengths()
    if lengths is None:
        assert tokenizer.kind != "tiktoken"
    else:
        assert lengths.shape == (tokenizer.vocab_size,)
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_ids_outside_the_vocabulary_are_decoded_to_nothing(tokenizer):
    ids = tokenizer.encode("the sea").tolist()
    there = tokenizer.decode(ids)
    assert tokenizer.decode([tokenizer.separator_id, *ids, tokenizer.vocab_size, 10**6, -1]) == there
    assert tokenizer.token_strings([10**6]) == ["<unused 1000000>"]


def test_tokens_are_shown_as_a_reader_wants_them(folder):
    of_bytes = opened(sentencepiece_file(folder))
    shown = of_bytes.token_strings(of_bytes.encode("the sea 漢"))
    assert "".join(shown[:-3]).split() == ["the", "sea"]
    assert shown[-3:] == [r"\xe6", r"\xbc", r"\xa2"]
    ranked = opened(tiktoken_file(folder)[0])
    assert ranked.token_strings(ranked.encode("the sea")) == ["the", " sea"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.json", b"{", "no JSON"),
        ("x.json", b"[]", "no JSON object"),
        ("x.json", b'{"a": 1}', "no tokenizer.json"),
        ("x.json", b'{"model": {"type": "Nonsense"}}', "x.json"),
        ("x.model", b"not a model", "x.model"),
        ("cl100k_base.tiktoken", b"aGk= 0\nnothing", "line 2"),
        ("cl100k_base.tiktoken", b"aGk= 0\naG8= 0", "each rank once"),
        ("cl100k_base.tiktoken", b"aGk= 0\naGk= 1", "line 2 repeats the token of rank 0"),
        ("cl100k_base.tiktoken", b"", "all 256 bytes"),
        (
            "tokenizer.model",
            b"IQ== 0\nIg== 1\n",
            "is a tiktoken file, which must be called after its encoding",
        ),
        ("x.json", b'{"format": "topklm-tokenizer"}', "its version is None"),
        ("x.json", b'{"format": "topklm-tokenizer", "version": 1}', "damaged"),
        ("x.json", b'{"format": "topklm-tokenizer", "version": 1, "kind": "x", "model": ""}', "damaged"),
        (
            "x.json",
            b'{"format": "topklm-tokenizer", "version": 1, "kind": "tiktoken", "model": 5}',
            "damaged",
        ),
        ("x.model", b"", "no SentencePiece model"),
        ("mine.tiktoken", b"aGk= 0", "cl100k_base"),
        ("absent.json", None, "No such file"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_tokenizer(tmp_path / name)
    assert says in str(caught.value)
    assert name in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("lost", [b"a", b"\x00"])
@pytest.mark.parametrize("rank", [-1, 97, 300, 10**10])
def test_ranks_that_tiktoken_would_die_of_are_refused(tmp_path, lost, rank):
    path, ranks = tiktoken_file(tmp_path)
    ranks[lost] = rank
    if rank == 97:
        del ranks[lost]
    lines = [b"%s %d" % (base64.b64encode(token), n) for token, n in ranks.items()]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"cl100k_base\.tiktoken: its ranks are not a whole vocabulary"):
        open_tokenizer(path)


def test_a_sentencepiece_model_cut_anywhere_in_its_pieces_is_refused(tmp_path):
    path = sentencepiece_file(tmp_path, byte_fallback=False)
    content = path.read_bytes()
    readable = 0
    for size in range(700):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="no SentencePiece model, or not all of one"):
            open_tokenizer(path)
        with contextlib.suppress(RuntimeError):
            readable += sentencepiece.SentencePieceProcessor(model_proto=content[:size]).vocab_size() > 0
    assert readable > 10  # the library takes these for whole
    path.write_bytes(content)
    assert open_tokenizer(path).vocab_size == 60


@pytest.mark.parametrize("text", [os.fsdecode(b"a\xff"), "\ud83d", "fine until \udc80 here"])
def test_text_that_no_utf8_can_hold_is_refused_in_a_line_that_says_so(tmp_path, text):
    kinds = [
        train_bpe(["a b"], 260),
        opened(tiktoken_file(tmp_path)[0]),
        opened(sentencepiece_file(tmp_path)),
    ]
    for tokenizer in kinds:
        with pytest.raises(UserError, match=r"the text holds '.*' at character .* give text in UTF-8"):
            tokenizer.encode(text)
        with pytest.raises(UserError, match="give text in UTF-8"):
            tokenizer.encode_batch(["fine", text])


def test_the_separator_of_a_vocabulary_may_be_called_eot(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.add_special_tokens(["<META>", "<EOT>"])
    tokenizer.save(str(tmp_path / "words.json"))
    assert open_tokenizer(tmp_path / "words.json").separator_id == 2


def test_a_vocabulary_without_a_separator_is_refused(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match="no separator of documents: add one of"):
        open_tokenizer(tmp_path / "words.json")
    path = sentencepiece_file(tmp_path, eos_id=-1, bos_id=-1)
    with pytest.raises(UserError, match="neither an end-of-text"):
        open_tokenizer(path)


def test_the_whole_cl100k_has_its_separator_where_openai_put_it(tmp_path):
    path = tmp_path / "cl100k_base.tiktoken"
    tokens = [bytes([b]) for b in range(256)] + [f"{n:06d}".encode() for n in range(100_000)]
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    path.write_bytes(b"\n".join(lines))
    assert open_tokenizer(path).separator_id == 100_257


def test_the_whole_llama3_has_its_separator_where_meta_put_it(tmp_path):
    path = tmp_path / "llama3.tiktoken"
    tokens = [bytes([b]) for b in range(256)] + [f"{n:06d}".encode() for n in range(127_744)]
    path.write_bytes(b"\n".join(b"%s %d" % (base64.b64encode(t), n) for n, t in enumerate(tokens)))
    tokenizer = open_tokenizer(path)
    assert tokenizer.separator_id == 128_001
    assert tokenizer.token_strings([128_000, 128_001]) == ["<unused 128000>", "<|end_of_text|>"]


@pytest.mark.parametrize("library", ["tiktoken", "sentencepiece"])
def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, library):
    path = tiktoken_file(tmp_path)[0] if library == "tiktoken" else sentencepiece_file(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"pip install 'topklm\[{library}\]'"):
        open_tokenizer(path)


def test_a_hugging_face_file_is_kept_as_it_is(tmp_path):
    path = hugging_face_file(tmp_path, "wordpiece")
    tokenizer = open_tokenizer(path)
    assert tokenizer.to_bytes() == path.read_bytes()
    assert tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("make", [lambda folder: tiktoken_file(folder)[0], sentencepiece_file])
def test_the_same_file_gives_the_same_container_and_holds_it_unchanged(tmp_path, make):
    path = make(tmp_path)
    tokenizer = open_tokenizer(path)
    assert tokenizer.sha256 == open_tokenizer(path).sha256
    assert base64.b64decode(json.loads(tokenizer.to_bytes())["model"]) == path.read_bytes()
    tokenizer.save(tmp_path / "tokenizer.json")
    assert open_tokenizer(tmp_path / "tokenizer.json").sha256 == tokenizer.sha256


def test_the_container_says_what_it_is(tmp_path):
    content = json.loads(open_tokenizer(tiktoken_file(tmp_path)[0]).to_bytes())
    assert (content["format"], content["version"], content["kind"]) == ("topklm-tokenizer", 1, "tiktoken")
    assert content["encoding"] == "cl100k_base"
