"""The prompt page: losses and predictions against NumPy, rankings against the store."""

import explored_run
import numpy as np
import pytest
import scipy.special

import topklm
from topklm.errors import UserError
from topklm.explorer import views
from topklm.explorer.steering import LiveModel, predictions


@pytest.fixture(scope="module")
def reader(source):
    return LiveModel(str(source.folder.run), source.store.metadata)


@pytest.fixture(scope="module")
def data(source, reader):
    return views.prompt(source, reader, "The old baker found a lantern")


def test_losses_and_predictions_are_those_of_the_logits():
    random = np.random.default_rng(0)
    logits = (5 * random.standard_normal((7, 40))).astype(np.float32)
    logits[2] += 300  # float32 has no exp of it
    ids = random.integers(0, 40, 6)
    losses, next_ids, chances = predictions(logits, ids, 5)
    exact = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(losses, -exact[np.arange(6), ids], rtol=1e-4, atol=1e-4)
    order = np.argsort(-exact[1:], axis=1)[:, :5]
    np.testing.assert_array_equal(next_ids, order)
    np.testing.assert_allclose(chances, np.exp(np.take_along_axis(exact[1:], order, axis=1)), rtol=1e-4)


def test_a_token_has_the_loss_and_the_predictions_that_the_model_gives(source, data):
    model = topklm.load(source.folder.run)
    ids = [token["id"] for token in data["tokens"]]
    logits = np.asarray(model([model.tokenizer.separator_id, *ids])[0], np.float64)
    exact = scipy.special.log_softmax(logits, axis=1)
    for at, token in enumerate(data["tokens"]):
        assert token["loss"] == pytest.approx(-exact[at, token["id"]], rel=1e-3)
        best = max(range(exact.shape[1]), key=lambda i: exact[at + 1, i])
        assert token["next"][0]["id"] == best
        assert token["next"][0]["probability"] == pytest.approx(np.exp(exact[at + 1, best]), rel=1e-3)
        assert len(token["next"]) == 5


def test_shares_are_of_the_neurons_own_highest_activation_and_rank_neurons(source, reader, data):
    by_share = views.prompt(source, reader, data["text"], "share")
    for one, other in zip(data["tokens"], by_share["tokens"], strict=True):
        for layer, ranked in zip(one["layers"], other["layers"], strict=True):
            assert sorted(ranked["neurons"], key=str) == sorted(layer["neurons"], key=str)
            shares = [n["share"] for n in ranked["neurons"]]
            known = [share for share in shares if share is not None]
            assert known == sorted(known, reverse=True)
            assert shares[len(known) :] == [None] * (len(shares) - len(known))
            for n in ranked["neurons"]:
                dead = (ranked["layer"], n["neuron"]) == explored_run.DEAD
                assert (n["share"] is None) == dead
                if not dead:
                    number = source.number(ranked["layer"], n["neuron"])
                    highest = source.row(number)["max_activation"]
                    assert n["share"] == pytest.approx(n["activation"] / highest, rel=1e-5)


def test_another_ranking_is_refused(source, reader):
    with pytest.raises(UserError, match="by = size: must be one of activation, share"):
        views.prompt(source, reader, "The", "size")


def test_sentences_stand_in_the_text_at_the_beginnings_of_documents(source):
    found = views.sentences(source)
    assert len(set(found)) == 5
    starts, _ = source.documents
    beginnings = [source.plain_text(begin, begin + 160) for begin in starts[:-1].tolist()]
    assert all(any(text.startswith(one) for text in beginnings) for one in found)
    assert all(one[-1] in ".!?" for one in found)


def test_the_page_names_neurons_and_offers_sentences_before_there_is_a_text(site):
    page = site.ask("/prompt").text
    assert page.count('class="button" href="/prompt?text=') == 5
    text = site.ask("/prompt?text=The+old+baker").text
    assert text.count('<span class="guess') == 13 * 5  # a token for each byte
    assert 'name="by"' not in text
    ranked = site.ask("/prompt?text=The+old+baker&by=share").text
    assert 'name="by" value="share"' in ranked
    answer = site.ask("/prompt", form={"text": "a b", "by": "share"})
    assert answer.headers["location"] == "/prompt?text=a+b&by=share"
    assert site.ask("/prompt?text=The&by=size").status == 400
