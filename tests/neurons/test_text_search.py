"""Patterns found in a store's text, against a search of each whole document, byte by byte."""

import json
import tracemalloc

import numpy as np
import pytest
import regex

from topklm.data.tokenizer import Tokenizer, train_bpe
from topklm.errors import UserError
from topklm.neurons import search as matches_lib
from topklm.neurons import segment as segment_lib
from topklm.neurons.search import StoredText
from topklm.neurons.store import Metadata, Store, StoreWriter

TEXTS = [
    "The sea was calm, and the Sea was grey.",
    "über das Meer 🌊🌊 zur See, naïve café",
    "a",
    "",
    "no ships. \n\nseaside towns see the seasons\n",
    "海は広いな大きいな 海 \x00\x1b <b>sea</b>",
]


@pytest.fixture(scope="module")
def bpe():
    """Its tokens are words, parts of words, and single bytes of rare characters."""
    return train_bpe(["the sea was calm and grey, towns see the seasons " * 20, "das Meer zur See über"], 330)


def make_store(folder, tokenizer, documents, cut=97):
    """Returns a store of documents of token ids, no neurons; segments are cut anywhere."""
    ids = np.concatenate([np.asarray(d, np.int64) for d in documents])
    numbers = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    metadata = Metadata(
        run="village",
        step=24,
        tokenizer_sha256=tokenizer.sha256,
        source="made up",
        kind="topk",
        layers=(0,),
        d_model=2,
        topk_k=1,
        topk_activation="relu",
        context_length=64,
    )
    writer = StoreWriter(folder, metadata)
    for begin in range(0, len(ids), cut):
        part = slice(begin, min(begin + cut, len(ids)))
        n = part.stop - part.start
        losses = np.zeros(n)
        writer.append(segment_lib.from_dense(ids[part], numbers[part], losses, [np.zeros((n, 2))]))
    return Store(folder)


def whole(tokenizer, documents, pattern, flags=regex.IGNORECASE):
    """Returns count, touched and ends by a search of each whole document; only for tokens of whole bytes."""
    count, touched, ends = 0, [], []
    for ids in documents:
        pieces = tokenizer.token_bytes(ids)
        text = b"".join(pieces).decode("utf-8", "surrogateescape")
        of_byte = [place for place, piece in enumerate(pieces) for _ in piece]
        hit, end = [False] * len(pieces), [False] * len(pieces)
        for match in regex.finditer(pattern, text, flags):
            first = len(text[: match.start()].encode("utf-8", "surrogateescape"))
            behind = len(text[: match.end()].encode("utf-8", "surrogateescape"))
            for byte in range(first, behind):
                hit[of_byte[byte]] = True
            end[of_byte[behind - 1]] = True
            count += 1
        touched += hit
        ends += end
    return count, np.array(touched), np.array(ends)


def assert_as_whole(found, reference):
    assert found.count == reference[0]
    np.testing.assert_array_equal(found.touched, reference[1])
    np.testing.assert_array_equal(found.ends, reference[2])


PATTERNS = [
    "sea",
    r"\bsea\b",
    "^the",
    r"\.$",
    r"(?<=the )sea",
    r"sea(?=s)",
    "[🌊海]",
    "ü|é|ï",
    r"\s+",
    r"\w+ \w+",
    "(?s).+",
    r"^.",
    r".$",
    r"\x00",
    "<b>",
    r"\p{Han}+",
    "(?:calm){e<=1}",
    r"the \Ksea",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_of_matches_are_those_of_a_search_of_each_document(tmp_path, bpe, pattern):
    documents = [ids for text in TEXTS if len(ids := bpe.encode(text))]
    text = StoredText(make_store(tmp_path / "store", bpe, documents), bpe)
    reference = whole(bpe, documents, pattern)
    assert_as_whole(text.matches(pattern), reference)


def test_the_patterns_are_not_found_nowhere(bpe):
    documents = [bpe.encode(text) for text in TEXTS]
    for pattern in PATTERNS:
        assert whole(bpe, documents, pattern)[0] > 0, pattern


def test_the_tokens_of_a_known_match_are_these(tmp_path):
    letters = train_bpe([], 257)
    documents = [letters.encode("a 🌊 sea"), letters.encode("Sea")]
    text = StoredText(make_store(tmp_path / "store", letters, documents), letters)
    found = text.matches("sea")
    assert found.count == 2
    assert np.flatnonzero(found.touched).tolist() == [7, 8, 9, 10, 11, 12]
    assert np.flatnonzero(found.ends).tolist() == [9, 12]
    assert np.flatnonzero(text.matches("sea", ignore_case=False).touched).tolist() == [7, 8, 9]
    wave = text.matches("🌊")  # one character of four tokens
    assert np.flatnonzero(wave.touched).tolist() == [2, 3, 4, 5]
    assert np.flatnonzero(wave.ends).tolist() == [5]


def test_a_pattern_does_not_match_from_one_document_into_the_next(tmp_path, bpe):
    documents = [bpe.encode("the s"), bpe.encode("ea"), bpe.encode("the sea")]
    text = StoredText(make_store(tmp_path / "store", bpe, documents, cut=2), bpe)
    assert text.matches("sea").count == 1
    assert text.matches("^the").count == 2
    assert text.matches("a$").count == 2


def small_stretches(monkeypatch):
    monkeypatch.setattr(matches_lib, "_STRETCH", 16)
    monkeypatch.setattr(matches_lib, "OVERLAP", 12)
    monkeypatch.setattr(matches_lib, "_READ", 50)


@pytest.mark.parametrize("letters", [True, False])
def test_a_match_across_a_cut_is_found_once_wherever_it_stands(tmp_path, bpe, monkeypatch, letters):
    small_stretches(monkeypatch)
    tokenizer = train_bpe([], 257) if letters else bpe
    documents = [tokenizer.encode("é" * n + "xyzéxyz" + "-" * 40) for n in range(20)]
    text = StoredText(make_store(tmp_path / "store", tokenizer, documents), tokenizer)
    for pattern in ("xyz", "éxyz", "zéx", r"(?<=xy)z(?!-)", r"x.z(?=\W)", "-"):
        reference = whole(tokenizer, documents, pattern)
        assert reference[0] >= 19
        assert_as_whole(text.matches(pattern), reference)


def test_matches_that_follow_one_another_do_not_overlap_across_cuts(tmp_path, monkeypatch):
    small_stretches(monkeypatch)
    letters = train_bpe([], 257)
    documents = [letters.encode("ab" * 50), letters.encode("aaaaaaa" * 13), letters.encode("éà" * 33)]
    text = StoredText(make_store(tmp_path / "store", letters, documents), letters)
    for pattern in ("aba", "aaaaa", "abab|ba", "éàé", "(?:ab){1,3}", "^a", "[ab]$", "^é|à$"):
        assert_as_whole(text.matches(pattern), whole(letters, documents, pattern))


def test_random_bytes_and_cuts_give_what_whole_documents_give(tmp_path, bpe, monkeypatch):
    small_stretches(monkeypatch)
    rng = np.random.default_rng(5)
    letters = train_bpe([], 257)
    ordinary = np.array([i for i in range(257) if i != letters.separator_id])
    bytes_of = {letters.token_strings([i])[0]: i for i in ordinary}
    some = [bytes_of["a"], bytes_of["b"], *letters.encode("é海"), *rng.choice(ordinary, 3)]
    documents = [rng.choice(some, size=rng.integers(1, 90)) for _ in range(60)]
    text = StoredText(make_store(tmp_path / "store", letters, documents), letters)
    for pattern in ("a", "ab", "é", "海|é", "b.a", "(?<=b)a", "a(?!b)", r"[^\x00-\x7f]", ".{2,4}b"):
        assert_as_whole(text.matches(pattern), whole(letters, documents, pattern))


def test_of_a_match_longer_than_the_overlap_parts_may_be_found(tmp_path, monkeypatch):
    small_stretches(monkeypatch)
    letters = train_bpe([], 257)
    text = StoredText(make_store(tmp_path / "store", letters, [letters.encode("a" * 200)]), letters)
    assert text.matches("a+").touched.all()
    assert text.matches("a{100}").count == 0


def test_a_tokenizer_whose_text_is_not_its_bytes_is_searched_as_its_tokens_read(tmp_path):
    separator = {"id": 0, "content": "</s>", "special": True, "normalized": False}
    separator |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    vocabulary = {"</s>": 0, "sea": 1, "meer": 2, "<unk>": 3}
    content = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "post_processor", "decoder")),
        "added_tokens": [separator],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    words = Tokenizer(json.dumps(content).encode())
    assert words.token_bytes_lengths() is None
    store = make_store(tmp_path / "store", words, [words.encode("Meer SEA sea what"), words.encode("sea")])
    text = StoredText(store, words)
    assert text.matches("sea").touched.tolist() == [False, True, True, False, True]
    assert text.matches("rs").touched.tolist() == [True, True, False, False, False]
    assert text.matches("<unk>").touched.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "regex is empty"),
        ("x" * 1001, "regex has 1,001 characters: at most 1,000"),
        ("(sea", r"regex = \(sea: is no regular expression \(.*position"),
        ("[", "is no regular expression"),
        ("a*", r"regex = a\*: matches the empty text"),
        ("^", "matches the empty text"),
        (r"\b", "matches the empty text"),
        ("(?=sea)", "matches the empty text"),
        ("calm|(?<=the )", "matches the empty text"),
        ("(?r)sea", "searches backwards"),
        ("(?:(?R)a|b)", "calls itself or a group of it"),
        ("(a(?1)?b)", "calls itself or a group of it"),
        ("(?<x>a(?&x)?b)", "calls itself or a group of it"),
        ("(" * 450 + "a" + ")" * 450, "nested too deeply"),
        ("(((a{1000}){1000}){1000}){1000}", "repeats too much"),
        ("(?x)((a{ 1000 , }){1 000}){1000}", "repeats too much"),
        ("(?x)((a{#[\n1000}){1000}){1000}", "repeats too much"),
        ("x{9999999999}", "repeats too much"),
        ("(a+)+\x1b[2J" + "y" * 90, r"regex = \(a\+\)\+\\x1b\[2Jy+\.\.\.: is no regular"),
    ],
)
def test_a_pattern_that_is_of_no_use_is_refused_in_one_line(tmp_path, bpe, pattern, message):
    text = StoredText(make_store(tmp_path / "store", bpe, [bpe.encode(TEXTS[0])]), bpe)
    with pytest.raises(UserError, match=message) as caught:
        text.matches(pattern)
    assert str(caught.value).isprintable()


def test_useful_repetitions_are_not_refused(tmp_path, bpe):
    text = StoredText(make_store(tmp_path / "store", bpe, [bpe.encode(TEXTS[0])]), bpe)
    for pattern in (r"\d{4}-\d{2}-\d{2}", r"(?:\p{L}+\W+){5,500}calm", r"\w{20,}", "(?:sea|see){1,1000}"):
        text.matches(pattern)


def test_a_pattern_that_would_run_for_ever_ends_in_time(tmp_path, monkeypatch):
    letters = train_bpe([], 257)
    text = StoredText(
        make_store(tmp_path / "store", letters, [letters.encode("x" * 30_000)], 40_000), letters
    )
    with pytest.raises(UserError, match=r"regex = \(x\+x\+\)\+y: not done within 0.2 s; make it simpler"):
        text.matches("(x+x+)+y", timeout_s=0.2)


class Machine:
    """A clock, and the processor time that this process gets of it, as a search uses them."""

    def __init__(self, monkeypatch, rate, needs):
        """Pretends `rate` processor seconds for each second of the clock, and `needs` for the search."""
        self.now, self._rate, self._needs = 1000.0, rate, needs
        monkeypatch.setattr(matches_lib.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(matches_lib.time, "process_time", lambda: self.now * rate)

    def finditer(self, text, first, timeout, concurrent):
        assert concurrent
        self.now += min(timeout, self._needs) / self._rate
        if timeout < self._needs:
            raise TimeoutError
        return regex.finditer("b", text, pos=first)


@pytest.mark.parametrize("rate", [0.03, 0.1, 0.5, 1.0, 4.0, 60.0])
def test_a_search_ends_by_the_clock_however_much_the_processor_has_to_do(monkeypatch, rate):
    machine = Machine(monkeypatch, rate, needs=1e9)
    with pytest.raises(TimeoutError):
        matches_lib._Patience(10).spans(machine, "abab", 0, 4)
    assert 10 <= machine.now - 1000 < 11


@pytest.mark.parametrize("rate", [0.1, 1.0, 4.0, 60.0])
def test_a_search_that_needs_a_third_of_its_time_is_done(monkeypatch, rate):
    machine = Machine(monkeypatch, rate, needs=3 * rate)
    assert matches_lib._Patience(10).spans(machine, "abab", 0, 4) == [(1, 2), (3, 4)]
    assert machine.now - 1000 < 10


def test_what_was_found_before_a_try_ended_is_found_once(monkeypatch):
    class Interrupted:
        tries = 0

        def finditer(self, text, first, **_):
            self.tries += 1
            for n, match in enumerate(regex.finditer("[ab]", text, pos=first)):
                if n == 2 and self.tries < 4:
                    raise TimeoutError
                yield match

    text, search = "xabaabbax", Interrupted()
    spans = matches_lib._Patience(1000).spans(search, text, 0, 8)
    assert spans == [match.span() for match in regex.finditer("[ab]", text)]
    assert search.tries == 4


def test_the_time_is_for_the_whole_search_not_for_each_document(tmp_path, bpe, monkeypatch):
    documents = [bpe.encode("the sea")] * 50
    text = StoredText(make_store(tmp_path / "store", bpe, documents, 1000), bpe)
    now = iter(range(1000))  # a second passes with each look at the clock
    monkeypatch.setattr(matches_lib.time, "monotonic", lambda: float(next(now)))
    with pytest.raises(UserError, match="not done within 30 s"):
        text.matches("sea", timeout_s=30)
    assert text.matches("sea", timeout_s=60).count == 50


def test_a_search_that_needs_too_much_memory_is_named(tmp_path, bpe, monkeypatch):
    text = StoredText(make_store(tmp_path / "store", bpe, [bpe.encode("the sea")]), bpe)

    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(matches_lib, "_spans", exhausted)
    with pytest.raises(UserError, match="regex = sea: takes too much memory"):
        text.matches("sea")


def test_memory_does_not_grow_with_the_length_of_a_document(tmp_path):
    letters = train_bpe([], 257)
    peaks = []
    for n in (300_000, 1_500_000):
        ids = np.resize(letters.encode("no ships at sea, "), n)
        text = StoredText(make_store(tmp_path / str(n), letters, [ids], cut=n), letters)
        tracemalloc.start()
        found = text.matches("sea")
        peaks.append(tracemalloc.get_traced_memory()[1] - found.touched.nbytes - found.ends.nbytes)
        tracemalloc.stop()
        assert found.count == n // 17
    assert peaks[1] < 1.2 * peaks[0]


def test_the_tokens_of_an_id_are_marked(tmp_path, bpe):
    documents = [bpe.encode(text) for text in TEXTS if text]
    ids = np.concatenate(documents)
    text = StoredText(make_store(tmp_path / "store", bpe, documents), bpe)
    for wanted in ([int(ids[0])], [int(ids[3]), int(ids[5])], []):
        np.testing.assert_array_equal(text.tokens_equal(*wanted), np.isin(ids, wanted))
    for wrong in (-1, bpe.vocab_size):
        with pytest.raises(UserError, match=f"token {wrong}: must be from 0 to {bpe.vocab_size - 1}"):
            text.tokens_equal(wrong)


def test_a_store_of_another_tokenizer_is_refused(tmp_path, bpe):
    store = make_store(tmp_path / "store", bpe, [bpe.encode("sea")])
    with pytest.raises(UserError, match="holds tokens of another tokenizer"):
        StoredText(store, train_bpe([], 257))


def test_an_empty_store_has_no_matches(tmp_path, bpe):
    make_store(tmp_path / "store", bpe, [np.zeros(0)])
    found = StoredText(Store(tmp_path / "store"), bpe).matches("sea")
    assert (found.count, found.touched.shape, found.ends.shape) == (0, (0,), (0,))
