"""Dictionaries, what they explain and how they are made, against NumPy in float64."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
import shutil

import damage
import jax
import jax.numpy as jnp
from making import make_dataset
import numpy as np
import pytest
import saved_runs

from topklm.data.dataset import Mixture
from topklm.errors import UserError
from topklm.layout import one_device
from topklm.model import transformer
from topklm.neurons import documents, fit_dictionary
from topklm.neurons.dictionary import Dictionary, ExplainedVariance, check_coordinates
from topklm.neurons.documents import TextModel
from topklm.progress import Progress

S, D, M, K = 2, 6, 8, 3
BASE = dataclasses.replace(saved_runs.MODEL, n_nontopk=2, d_model=16, d_mlp=24)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def dictionary():
    rng = np.random.default_rng(3)
    arrays = rng.normal(size=(S, D)), rng.normal(size=(S, D, M)), unit(rng.normal(size=(S, M, D)))
    return Dictionary("sae", K, *(array.astype(np.float32) for array in arrays), {"tokens": 1000, "seed": 4})


def test_the_largest_positive_codes_are_kept_and_decoded(dictionary):
    h = np.random.default_rng(5).normal(size=(S, 2, 7, D)).astype(np.float32)
    codes = np.asarray(dictionary.encode(h))
    decoded = np.asarray(dictionary.decode(codes))
    for layer, row, token in np.ndindex(h.shape[:-1]):
        wanted = (h[layer, row, token].astype(float) - dictionary.centre[layer]) @ dictionary.encoder[layer]
        wanted[np.argsort(-wanted)[K:]] = 0
        wanted = np.maximum(wanted, 0)
        np.testing.assert_allclose(codes[layer, row, token], wanted, atol=1e-5)
        back = dictionary.centre[layer] + wanted @ dictionary.decoder[layer]
        np.testing.assert_allclose(decoded[layer, row, token], back, atol=1e-5)


def test_it_is_read_as_it_was_written(tmp_path, dictionary):
    dictionary.save(tmp_path / "new" / "d.npz")
    there = Dictionary.load(tmp_path / "new" / "d.npz")
    assert there.description == dictionary.description
    assert there.description.startswith("post-hoc TopK SAE: 3 of 8 codes; tokens 1,000, seed 4 (")
    for name in ("centre", "encoder", "decoder"):
        np.testing.assert_array_equal(getattr(there, name), getattr(dictionary, name))
    other = dataclasses.replace(dictionary, encoder=dictionary.encoder + 1)
    assert other.description != dictionary.description


@pytest.mark.parametrize("content", [None, b"", b"PK no zip", "half"])
def test_a_missing_or_damaged_file_is_refused_in_a_line(tmp_path, dictionary, content):
    path = tmp_path / "d.npz"
    if content == "half":
        dictionary.save(path)
        content = path.read_bytes()[:300]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"missing|damaged"):
        Dictionary.load(path)


def test_codes_are_not_taken_for_coordinates(dictionary):
    check_coordinates("", "steering")
    with pytest.raises(UserError, match=r"steering acts on coordinates .* \(post-hoc TopK SAE\)"):
        check_coordinates(dictionary.description, "steering")


def explained(x, reconstructed, cuts):
    found = ExplainedVariance(x.shape[1])
    for rows in np.split(np.arange(len(x)), cuts):
        found.add(x[rows], reconstructed[rows])
    return found.value


def test_to_predict_the_mean_explains_nothing_and_the_vectors_themselves_everything():
    x = np.random.default_rng(0).normal(3, 2, size=(50, D))
    assert explained(x, np.tile(x.mean(axis=0), (50, 1)), []) == pytest.approx(0, abs=1e-12)
    assert explained(x, x, [10, 40]) == 1
    assert explained(x, x - 100, []) < 0
    assert np.isnan(explained(np.ones((4, D)), np.ones((4, D)), []))


@pytest.mark.parametrize("cuts", [[], [1], [0, 7, 7, 30, 49], list(range(50))])
def test_the_explained_variance_is_the_same_at_any_batch_size(cuts):
    rng = np.random.default_rng(1)
    x = 1000 + rng.normal(size=(50, D)).astype(np.float32)
    reconstructed = x + rng.normal(0, 0.3, size=x.shape).astype(np.float32)
    error = np.square(x.astype(float) - reconstructed).sum()
    wanted = 1 - error / np.square(x.astype(float) - x.mean(axis=0, dtype=float)).sum()
    assert explained(x, reconstructed, cuts) == pytest.approx(wanted, rel=1e-9)


def states_of(x, counts, cuts):
    """As training batches give them, float32[S, N, D]."""
    pieces = np.split(np.arange(x.shape[1]), cuts)
    return iter([(jnp.asarray(x[:, rows]), jnp.asarray(counts[rows])) for rows in pieces])


def test_mean_and_covariance_leave_out_what_is_no_text():
    rng = np.random.default_rng(2)
    x = (5 + rng.normal(size=(S, 90, D)) @ rng.normal(size=(D, D))).astype(np.float32)
    counts = rng.random(90) < 0.8
    mean, covariance = fit_dictionary.moments(states_of(x, counts, [30, 60]))
    for layer in range(S):
        np.testing.assert_allclose(mean[layer], x[layer, counts].mean(axis=0, dtype=float), rtol=1e-5)
        wanted = np.cov(x[layer, counts].astype(float), rowvar=False, bias=True)
        np.testing.assert_allclose(covariance[layer], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d", [6, 5])
def test_principal_components_come_with_both_signs_by_falling_variance(d):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(200, d)) @ rng.normal(size=(d, d))
    found = fit_dictionary.signed_components(np.cov(x, rowvar=False)[None])[0]
    assert found.shape == (d, d)
    _, _, wanted = np.linalg.svd(x - x.mean(axis=0))
    for number, row in enumerate(found):
        assert abs(row @ wanted[number // 2]) == pytest.approx(1)
        assert row[np.abs(row).argmax()] * (1, -1)[number % 2] > 0
    np.testing.assert_allclose(found[0], -found[1])


def test_random_dictionaries_are_orthonormal_and_differ_between_layers_and_seeds():
    found = fit_dictionary.random_rows(S, D, 0)
    for rows in found:
        np.testing.assert_allclose(rows @ rows.T, np.eye(D), atol=1e-12)
    assert not np.allclose(found[0], found[1])
    assert not np.allclose(found, fit_dictionary.random_rows(S, D, 1))
    np.testing.assert_array_equal(found, fit_dictionary.random_rows(S, D, 0))


class Texts:
    name, n_tokens = "random bytes", None

    def __iter__(self):
        return iter([np.random.default_rng(n).integers(0, 256, 3 * n) for n in range(60)])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 200)) for _ in range(40)]
    return Mixture.single(make_dataset(tmp_path_factory.mktemp("data") / "letters", texts))


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(functools.partial(transformer.create, BASE, 0))
    draw = np.random.default_rng(1).standard_normal
    return jax.tree.map(lambda leaf: 0.3 * draw(leaf.shape, dtype=np.float32), shapes)


def fit(kind, params, mixture, monkeypatch):
    monkeypatch.setattr(fit_dictionary, "prepare", lambda data, announce: mixture)
    monkeypatch.setattr(documents, "_BATCH_TOKENS", 1024)
    model = TextModel(BASE, params, one_device(), mixture.tokenizer.separator_id)
    progress = Progress(lambda line: None)
    settings = {"keep": 4, "n_tokens": 8000, "progress": progress}
    return fit_dictionary.fit(kind, model, saved_runs.CONFIG.data, Texts(), **settings), model


@pytest.mark.parametrize("kind", ["random", "pca"])
def test_dictionaries_are_made_of_training_text_and_say_what_they_explain(kind, params, mixture, monkeypatch):
    made, model = fit(kind, params, mixture, monkeypatch)
    assert (made.kind, made.keep, made.centre.shape) == (kind, 4, (2, 16))
    assert made.encoder.shape == made.decoder.shape == (2, 16, 16)
    np.testing.assert_allclose(np.linalg.norm(made.decoder, axis=-1), 1, rtol=1e-5)
    assert made.facts["text"] == "training text of letters"
    assert made.facts["explained_variance"] == fit_dictionary.explained_variance(made, model, Texts())
    assert all(0 < share < 1 for share in made.facts["explained_variance"])


def test_a_harvest_goes_on_with_the_dictionary_that_is_there_or_says_why_not(tmp_path, dictionary):
    path = tmp_path / "1300" / "dictionary.npz"
    assert fit_dictionary.load_fitting(path, "sae", K, 1000) is None
    dictionary.save(path)
    assert fit_dictionary.load_fitting(path, "sae", K, 1000).description == dictionary.description
    for kind, keep, tokens, words in (
        ("pca", K, 1000, "--dictionary = pca"),
        ("sae", 4, 1000, "--keep = 4"),
        ("sae", K, 9, "--dictionary-tokens = 9"),
    ):
        with pytest.raises(UserError, match=words):
            fit_dictionary.load_fitting(path, kind, keep, tokens)


def written_by_an_earlier_version(dictionary, path):
    about = {"format": 1, "kind": dictionary.kind, "keep": dictionary.keep, "facts": dict(dictionary.facts)}
    arrays = {name: getattr(dictionary, name) for name in ("centre", "encoder", "decoder")}
    np.savez(path, about=np.array(json.dumps(about)), **arrays)


def test_a_dictionary_of_an_earlier_version_is_read(tmp_path, dictionary):
    written_by_an_earlier_version(dictionary, tmp_path / "d.npz")
    assert Dictionary.load(tmp_path / "d.npz").description == dictionary.description


def test_no_damage_is_read_as_another_dictionary(tmp_path, dictionary):
    whole = tmp_path / "whole"
    dictionary.save(whole / "d.npz")
    written_by_an_earlier_version(dictionary, whole / "old.npz")
    numbers = itertools.count()

    def copy():
        return Path(shutil.copytree(whole, tmp_path / str(next(numbers))))

    def load(folder):
        found = Dictionary.load(folder / "d.npz")
        return found.kind, found.keep, dict(found.facts), found.centre, found.encoder, found.decoder

    def is_other(path):
        return path.name != "d.npz"

    kinds = [kind for kind in damage.KINDS if kind != "swap"]
    n = damage.check(copy, load, load(whole), kinds=kinds, per_file=300, ignore=is_other)
    assert n > 300
    assert damage.check_unreadable(copy, load, load(whole), ignore=is_other)
