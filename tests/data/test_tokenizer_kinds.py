import base64
import functools
import io
import json
import pickle

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from topklm.data.tokenizer import Tokenizer, open_tokenizer
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
TEXT = st.text(alphabet="the sa'd1.é漢🙂 \n\t\r\u00a0▁<|>/s[]SEP", max_size=80)


def tiktoken_file(folder, name="cl100k_base", merges=("th", "the", " s", " se", " sea", "\n\n")):
    ranks = [bytes([b]) for b in range(256)] + [merge.encode() for merge in merges]
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks)]
    path = folder / f"{name}.tiktoken"
    path.write_bytes(b"\n".join(lines))
    return path, {token: rank for rank, token in enumerate(ranks)}


def sentencepiece_file(folder, model_type="bpe", **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=300, model_type=model_type,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **options,
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


@pytest.fixture(scope="module", params=["tiktoken", "sp-bpe", "sp-unigram", "wordpiece", "unigram", "bpe"])
def tokenizer(request, folder):
    if request.param == "tiktoken":
        return opened(tiktoken_file(folder)[0])
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


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_models_give_the_tokens_of_sentencepiece(tmp_path, model_type):
    path = sentencepiece_file(tmp_path, model_type)
    ours = open_tokenizer(path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (ours.kind, ours.separator_id) == ("sentencepiece", theirs.eos_id())
    for text in [*TEXTS[:5], *UNUSUAL]:
        assert ours.encode(text).tolist() == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_hugging_face_files_give_their_tokens_and_nothing_added(tmp_path, kind):
    path = hugging_face_file(tmp_path, kind)
    ours, theirs = open_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    theirs.no_truncation()
    theirs.no_padding()
    assert (ours.kind, ours.separator_id) == ("huggingface", 1)
    for text in [*TEXTS[:5], *UNUSUAL]:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids


@settings(max_examples=150)
@given(text=TEXT)
def test_no_text_becomes_the_separator(tokenizer, text):
    for spelled in (text, f"{text}</s>{text}", f"[SEP]{text}[SEP]", f"{text}<|endoftext|>"):
        assert tokenizer.separator_id not in tokenizer.encode(spelled)


def test_a_separator_that_is_an_ordinary_word_is_left_out_of_text(tmp_path):
    vocabulary = {"a": 0, "b": 1, "</s>": 2, "[UNK]": 3}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "words.json"))
    tokenizer = open_tokenizer(tmp_path / "words.json")
    assert tokenizer.separator_id == 2
    assert tokenizer.encode("a </s> b c").tolist() == [0, 1, 3]


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


@settings(max_examples=100)
@given(text=TEXT)
def test_cutting_a_long_text_changes_no_token(tokenizer, text):
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("topklm.data.tokenizer._PIECE_CHARS", 2)
        pieces = list(tokenizer.pieces(text))
    assert "".join(pieces) == text
    parts = [np.zeros(0, np.int32), *tokenizer.encode_batch(pieces)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@settings(max_examples=100)
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


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    path, _ = tiktoken_file(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"pip install 'topklm\[tiktoken\]'"):
        open_tokenizer(path)


def test_the_container_says_what_it_is(tmp_path):
    content = json.loads(open_tokenizer(tiktoken_file(tmp_path)[0]).to_bytes())
    assert (content["format"], content["version"], content["kind"]) == ("topklm-tokenizer", 1, "tiktoken")
    assert content["encoding"] == "cl100k_base"
