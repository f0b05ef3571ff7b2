"""Figures of language: against NumPy, a bigram model that is known, and files that are wrong."""

import dataclasses
import itertools

from helpers import sentences
import jax
from making import make_dataset, stream_of
import numpy as np
import pytest

from topklm.config import Config, DataConfig, ModelConfig
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.eval import tasks
from topklm.inference.language_model import LanguageModel
from topklm.model import transformer
from topklm.trace import language
from topklm.trace.language import LanguageMeasures, NGrams

V = 257
BASE = ModelConfig(
    d_model=260,
    n_layers=1,
    n_heads=2,
    n_kv_heads=2,
    d_mlp=8,
    vocab_size=V,
    context_length=512,
    topk_k=8,
    n_nontopk=1,
)
TOKENIZER = train_bpe([], V)
TRAIN = sentences(0, 60)
HELDOUT = [" ".join(sentences(seed, 12)) for seed in range(1, 13)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "village", TRAIN, HELDOUT, tokenizer=TOKENIZER)


def model_of(dataset, params, config=BASE):
    whole = Config(model=config, data=DataConfig(source=str(dataset.path)))
    return LanguageModel("runs/none", 0, whole, TOKENIZER, params)


def bigram_model(table_VV):
    """Parameters of a model whose next-token probabilities are a table's, whatever stands before."""
    params = jax.tree.map(np.array, transformer.create(BASE, 0))
    d, rows = BASE.d_model, params["embed"]["embedding"].shape[0]
    params["embed"]["embedding"] = np.eye(rows, d, dtype=np.float32)
    params["blocks"] = jax.tree.map(np.zeros_like, params["blocks"])
    params["unembed"]["kernel"][:V, :V] = np.log(table_VV) * np.sqrt(1 / d + BASE.norm_eps)
    return params


@pytest.fixture(scope="module")
def counted():
    """Bigrams of the training text by a loop, smoothed; unigrams."""
    stream = np.append(stream_of(TRAIN, TOKENIZER), TOKENIZER.separator_id)
    counts, pairs = np.ones(V), np.zeros((V, V))
    for a, b in itertools.pairwise(stream.tolist()):
        pairs[a, b] += 1
    for a in stream.tolist():
        counts[a] += 1
    unigram = counts / counts.sum()
    return unigram, (pairs + unigram) / (pairs.sum(axis=1, keepdims=True) + 1)


def test_ngrams_are_those_of_a_loop_however_the_text_is_cut(counted):
    stream = np.append(stream_of(TRAIN, TOKENIZER), TOKENIZER.separator_id)
    contexts = np.unique(stream)[::2]
    found = NGrams(np.array_split(stream, 7), contexts, V)
    np.testing.assert_allclose(found.unigram(), counted[0])
    np.testing.assert_allclose(found.bigram(contexts[::-1]), counted[1][contexts[::-1]])


def test_a_model_that_is_the_bigram_table_has_no_distance_from_it(dataset, counted):
    unigram, bigram = counted
    measures = LanguageMeasures(model_of(dataset, None))
    values, _ = measures(model_of(dataset, bigram_model(bigram)))
    assert abs(values["kl_bigram"]) < 1e-5
    # Nothing but the token before counts, so a second copy is no easier.
    assert abs(values["copy_gain"]) < 1e-5
    table = np.log(0.9 * unigram + 0.1 / V) + np.zeros((V, 1))
    values, _ = measures(model_of(dataset, bigram_model(np.exp(table))))
    p = np.exp(table[0])
    assert values["kl_unigram"] == pytest.approx((p * (np.log(p) - np.log(unigram))).sum(), abs=1e-5)
    assert values["entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-5)
    at = measures._contexts.reshape(-1)
    kl = (p * (np.log(p) - np.log(bigram[at]))).sum(axis=1).mean()
    assert values["kl_bigram"] == pytest.approx(kl, abs=1e-4)


def test_the_bigram_oracle_has_the_minimal_pairs_that_bigrams_tell_apart(dataset, counted):
    _, bigram = counted
    measures = LanguageMeasures(model_of(dataset, None), blimp=2)
    values, _ = measures(model_of(dataset, bigram_model(bigram)))
    right = {}
    for item in tasks.find("blimp", limit=2).items:
        nats = []
        for choice in item.choices:
            ids = [TOKENIZER.separator_id, *TOKENIZER.encode(choice).tolist()]
            nats.append(-np.log(bigram[ids[:-1], ids[1:]]).sum())
        right.setdefault((item.part, item.group), []).append(nats[0] <= nats[1])
    means = {key: np.mean(hits) for key, hits in right.items()}
    assert values["blimp"] == pytest.approx(np.mean(list(means.values())), abs=1e-9)
    for part in {part for part, _ in means}:
        expected = np.mean([mean for (field, _), mean in means.items() if field == part])
        assert values[f"blimp_{part}"] == pytest.approx(expected, abs=1e-9)


def test_copying_and_context_are_differences_of_the_models_own_losses(dataset):
    params = transformer.create(BASE, 3)
    model = model_of(dataset, params)
    values, _ = LanguageMeasures(model)(model)

    def losses(rows):
        logits = np.asarray(model(rows[:, :-1]), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return -np.take_along_axis(log_p, rows[:, 1:, None], axis=-1)[..., 0]

    long = [ids[:500] for text in HELDOUT if len(ids := TOKENIZER.encode(text)) >= 500]
    assert len(long) >= 8
    of_long = losses(np.stack([np.append([TOKENIZER.separator_id], ids) for ids in long]))
    assert values["icl_score"] == pytest.approx((of_long[:, 499] - of_long[:, 49]).mean(), abs=1e-4)
    copies = language._copies(64, TOKENIZER.separator_id, V)
    assert copies.shape == (16, 129)
    assert (copies[:, 1:65] == copies[:, 65:]).all()
    assert (copies[:, 1:] != TOKENIZER.separator_id).all()
    of_copies = losses(copies)
    # Token i is predicted at i - 1; the first of a copy is not counted.
    gain = of_copies[:, 1:64].mean() - of_copies[:, 65:].mean()
    assert values["copy_gain"] == pytest.approx(gain, abs=1e-4)


SHORT = dataclasses.replace(BASE, context_length=32, d_model=16)


def test_a_treebank_too_small_for_any_relation_is_refused(dataset, tmp_path):
    path = tmp_path / "one.conllu"
    words = "1\tThe\t_\tX\t_\t_\t2\tdet\t_\t_\n2\tsea\t_\tX\t_\t_\t0\troot\t_\t_\n"
    path.write_text(f"# text = The sea\n{words}\n")
    with pytest.raises(UserError, match="no relation has 100 arcs in its sentences; give more sentences"):
        LanguageMeasures(model_of(dataset, None, SHORT), conllu=path)
    path.write_text(f"# text = The sea\n{words}\n" * 120)
    measures = LanguageMeasures(model_of(dataset, None, SHORT), conllu=path)
    values, rows = measures(model_of(dataset, transformer.create(SHORT, 0), SHORT))
    assert (values["uas"], values["uas_distance"]) == (1, 1)  # there is no other word
    assert measures.notes == ["one.conllu: 120 sentences"]
    assert {row["relation"] for row in rows} == {"det/head", "prefix_matching"}
    # The context is too short for the other one.
    figures = ("kl_unigram", "kl_bigram", "entropy", "copy_gain", "prefix_matching", "uas", "uas_distance")
    assert set(values) == set(figures)
