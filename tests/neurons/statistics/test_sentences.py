"""Windows around tokens and what is made of their embeddings, with an encoder of a few lines."""

import itertools
import sys
import types

from activity_stores import block_of, make_store, random_dense
import numpy as np
import pytest
import saved_runs

from topklm.errors import UserError
from topklm.neurons.statistics import embeddings, selectivity

N, D = 90, 5
BOUNDS = np.array([0, 2, 40, N])


class Letters:
    """Embeds a text as how often it has each of some letters."""

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        return [[text.count(letter) for letter in "abcd"] for text in texts]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    rng = np.random.default_rng(0)
    ids = saved_runs.tokenizer().encode("".join(rng.choice(list("abcdxy"), N)))
    assert len(ids) == N  # a letter a token
    dense = random_dense(3, 1, N, D, share=0.5)
    documents = np.repeat(np.arange(3), np.diff(BOUNDS))
    return make_store(tmp_path_factory.mktemp("store"), dense, ids, documents, cuts=(50,)), dense[0], ids


@pytest.fixture
def embedded(filled, monkeypatch):
    monkeypatch.setattr(embeddings, "_BATCH", 32)
    encoder, done = Letters(), []
    windows = embeddings.embed_windows(filled[0], saved_runs.tokenizer(), encoder, "letters", done.append)
    assert sum(done) == N
    return windows, encoder.seen


def test_a_window_is_the_text_on_either_side_within_the_document(filled, embedded):
    letters = saved_runs.tokenizer().decode(filled[2])
    windows, seen = embedded
    for place in range(N):
        begin, end = next((a, b) for a, b in itertools.pairwise(BOUNDS) if a <= place < b)
        wanted = letters[max(begin, place - 8) : min(end, place + 9)]
        assert seen[place] == wanted
        counts = np.array([wanted.count(letter) for letter in "abcd"], float)
        np.testing.assert_allclose(windows.vectors[place], counts / (np.linalg.norm(counts) or 1), rtol=1e-6)
    assert (
        windows.embedding == "the sentence encoder letters, on each token with up to 8 tokens on either side"
    )


def test_contexts_are_centred_and_of_unit_length(embedded):
    windows, _ = embedded
    assert windows.width == 4
    vectors = windows.vectors.astype(float)
    wanted = vectors - vectors.mean(axis=0)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(windows.at(np.array([7, 3, 89])), wanted[[7, 3, 89]], atol=1e-5)


def test_semantic_entropy_is_that_of_the_clusters_of_places(filled, embedded):
    _, dense, ids = filled
    of_places = embedded[0].clusters(6, seed=2)
    assert set(of_places) == set(range(of_places.max() + 1)) and 2 <= of_places.max() + 1 <= 6
    np.testing.assert_array_equal(of_places, embedded[0].clusters(6, seed=2))
    columns = selectivity.columns(block_of(dense), ids, np.arange(257), of_places)
    for neuron in range(D - 1):
        a = dense[:, neuron].astype(float)
        shares = np.array([a[of_places == c].sum() for c in range(of_places.max() + 1)]) / a.sum()
        shares = shares[shares > 0]
        wanted = -(shares * np.log(shares)).sum()
        assert columns["semantic_entropy"][neuron] == pytest.approx(wanted, rel=1e-6)
        more = (len(shares) - 1) / (2 * np.count_nonzero(a))
        assert columns["semantic_entropy_corrected"][neuron] == pytest.approx(wanted + more, rel=1e-6)
    assert np.isnan(columns["semantic_entropy"][D - 1])
    plain = selectivity.columns(block_of(dense), ids, np.arange(257))
    np.testing.assert_array_equal(columns["token_entropy"], plain["token_entropy"])
    np.testing.assert_array_equal(columns["token_entropy"], plain["semantic_entropy"])


def test_windows_that_k_means_has_not_seen_fall_to_the_nearest_cluster(monkeypatch):
    rng = np.random.default_rng(1)
    middles = np.eye(4)[rng.integers(0, 4, 200)]
    vectors = (middles + rng.normal(0, 0.01, middles.shape)).astype(np.float32)
    monkeypatch.setattr(embeddings, "_CLUSTERED", 20)
    monkeypatch.setattr(embeddings, "_NEAREST_STRETCH", 64)
    found = embeddings.EncodedWindows("e", vectors).clusters(4)
    pairs = set(zip(found.tolist(), middles.argmax(axis=1).tolist(), strict=True))
    assert len(pairs) == len(set(found.tolist())) == 4


def test_monosemanticity_takes_these_contexts(filled, embedded):
    found = embeddings.monosemanticity(filled[0], embedded[0])["monosemanticity"]
    e = embedded[0].at(np.arange(N)).astype(float)
    for neuron in range(D - 1):
        weights = np.outer(a := filled[1][:, neuron].astype(float), a)
        np.fill_diagonal(weights, 0)
        wanted = (weights * (e @ e.T)).sum() / weights.sum()
        assert found[0, neuron] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "gives", [lambda n: [1.0] * n, lambda n: [[1.0]] * (n + 1), lambda n: [[np.nan]] * n]
)
def test_an_encoder_that_gives_something_else_is_refused(filled, gives):
    encoder = types.SimpleNamespace(encode=lambda texts: gives(len(texts)))
    with pytest.raises(UserError, match="--encoder = odd: must give a vector"):
        embeddings.embed_windows(filled[0], saved_runs.tokenizer(), encoder, "odd")


def test_without_the_package_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(embeddings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--encoder = m: .*pip install sentence-transformers"):
        embeddings.load_encoder("m")


def test_what_the_package_cannot_load_is_refused_in_a_line(monkeypatch):
    def refuse(name):
        raise OSError(f"no {name}\nsecond line")

    package = types.SimpleNamespace(SentenceTransformer=refuse)
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    monkeypatch.setattr(embeddings.importlib.util, "find_spec", lambda name: package)
    with pytest.raises(UserError, match=r"--encoder = m: .*\(no m\)") as refused:
        embeddings.load_encoder("m")
    assert "\n" not in str(refused.value)
    package.SentenceTransformer = lambda name: name.upper()
    assert embeddings.load_encoder("m") == "M"


def test_a_revision_behind_the_name_is_passed_on_unless_there_is_such_a_folder(monkeypatch, tmp_path):
    package = types.SimpleNamespace(SentenceTransformer=lambda name, revision=None: (name, revision))
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    monkeypatch.setattr(embeddings.importlib.util, "find_spec", lambda name: package)
    folder = tmp_path / "mine@home"
    folder.mkdir()
    assert embeddings.load_encoder("org/m@1a2b3c") == ("org/m", "1a2b3c")
    assert embeddings.load_encoder("org/m") == ("org/m", None)
    assert embeddings.load_encoder(str(folder)) == (str(folder), None)
