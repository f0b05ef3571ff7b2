"""Parsed sentences: which tokens words are, which arcs are kept, and attention between words."""

import jax.numpy as jnp
from making import conllu
import numpy as np
import pytest

from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.neurons import labelled_texts

BYTES = train_bpe([], 257)  # a token for every byte


SEES = [("The", 2, "det"), ("sea", 3, "nsubj"), ("has", 0, "root"), ("salt", 3, "obj"), (".", 3, "punct")]


def read(tmp_path, content, length=96, tokenizer=BYTES, **options):
    path = tmp_path / "some.conllu"
    path.write_text(content)
    return labelled_texts.read_trees(path, tokenizer, length, **options)


def test_arcs_are_looked_for_from_the_later_word(tmp_path):
    found = read(tmp_path, conllu(SEES))
    assert found.arcs.tolist() == [[[1, 0], [2, 1], [3, 2]]]
    assert found.relations.tolist() == [["det/head", "nsubj/head", "obj/dependent"]]
    assert not found.left_out


def test_a_word_is_the_tokens_whose_last_byte_is_in_it(tmp_path):
    found = read(tmp_path, conllu(SEES))
    assert BYTES.decode(found.tokens[0]) == "The sea has salt."
    assert found.words.tolist() == [[-1, 0, 0, 0, -1, 1, 1, 1, -1, 2, 2, 2, -1, 3, 3, 3, 3, 4]]
    merging = train_bpe(["The sea has salt."] * 50, 300)
    found = read(tmp_path, conllu(SEES), tokenizer=merging)
    pieces = merging.token_bytes(found.tokens[0][1:])
    words = {}
    for piece, word in zip(pieces, found.words[0][1:], strict=True):
        words[int(word)] = words.get(int(word), b"") + piece
    assert [words[n].strip() for n in range(5)] == [b"The", b"sea", b"has", b"salt", b"."]


def test_an_arc_of_a_word_without_a_token_of_its_own_is_left_out_and_counted(tmp_path):
    merging = train_bpe(["cannot"] * 50, 262)
    assert len(merging.encode("cannot")) == 1
    rows = ["1\tcan\t_\tX\t_\t_\t3\taux\t_\t_", "2\tnot\t_\tX\t_\t_\t3\tadvmod\t_\t_"]
    text = "\n".join(["# text = cannot go", *rows, "3\tgo\t_\tX\t_\t_\t0\troot\t_\t_", ""])
    found = read(tmp_path, text, tokenizer=merging)
    assert found.relations.tolist() == [["advmod/head"]]
    assert sum(found.left_out.values()) == 1


def test_sentences_that_do_not_fit_or_have_no_arc_are_counted(tmp_path):
    long = [("word", 0, "root"), *[("word", 1, "conj")] * 30]
    content = conllu(SEES, long, [("Yes", 0, "root")], SEES)
    found = read(tmp_path, content, length=24)
    assert len(found.tokens) == 2
    assert dict(found.left_out) == {"longer than 24 tokens": 1, "without an arc": 1}
    assert len(read(tmp_path, content, most=1).tokens) == 1
    assert found.segment_ids[0].tolist() == [1] * 18


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (conllu(SEES).replace("\t3\tobj", "\t_\t_"), "--conllu = .*: the sentence .* has no heads: give a"),
        (conllu(SEES).replace("\t3\tobj", "\t9\tobj"), "has no heads"),
        (conllu([("Yes", 0, "root")]), "no sentence is left .1 without an arc.; must be CoNLL-U"),
        ("nothing", "no sentence is left; must be CoNLL-U"),
        (conllu(SEES * 20), "longer than 96 tokens"),
    ],
)
def test_a_file_that_is_no_treebank_is_refused_in_a_line(tmp_path, content, words):
    with pytest.raises(UserError, match=words) as raised:
        read(tmp_path, content)
    assert "\n" not in str(raised.value)


def test_attention_between_words_is_a_mean_of_sums():
    rng = np.random.default_rng(0)
    weights = rng.random((2, 3, 6, 6)).astype(np.float32)
    words = np.array([[-1, 0, 0, 1, 2, 2], [-1, 0, 1, 1, 1, -1]])
    found = np.asarray(labelled_texts.word_attention(jnp.asarray(weights), jnp.asarray(words)))
    for b in range(2):
        for later in range(6):
            for earlier in range(6):
                own, other = np.flatnonzero(words[b] == later), np.flatnonzero(words[b] == earlier)
                block = weights[b][:, own][:, :, other]
                expected = block.sum(axis=2).mean(axis=1) if len(own) else np.zeros(3)
                np.testing.assert_allclose(found[b, :, later, earlier], expected, rtol=1e-5)
