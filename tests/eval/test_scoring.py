"""Packed log-likelihoods against the model itself, one request at a time in NumPy's float64."""

import json

from helpers import ROOT, coordinator_port, devices
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import saved_runs

import topklm
from topklm.errors import ArgumentError
from topklm.eval import scoring
from topklm.eval.scoring import Request
from topklm.inference.adaptive import with_topk_k
from topklm.inference.interventions import Intervention
from topklm.layout import one_device
from topklm.neurons.documents import TextModel, first_fit

LENGTH = saved_runs.MODEL.context_length
STEER = {(0, 3): 2.0, (1, 7): 0.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    saved_runs.save(folder, [5])
    return folder


@pytest.fixture(scope="module")
def lm(run):
    return topklm.load(run)


@pytest.fixture(scope="module")
def model(lm):
    return TextModel(lm.cfg, lm.params, one_device(), lm.tokenizer.separator_id, batch_rows=2)


def draw(separator, seed=0, n=40):
    """Requests of all lengths; contexts of some do not fit."""
    rng = np.random.default_rng(seed)

    def ids(size):
        return rng.integers(0, 256, size).astype(np.int32)

    fits = [
        Request(np.concatenate([[separator], ids(rng.integers(0, LENGTH))]), ids(rng.integers(1, 12)))
        for _ in range(n)
    ]
    # A continuation of a whole row, and one id more than a row holds.
    return [*fits, Request(ids(1), ids(LENGTH)), Request(ids(5), ids(LENGTH - 4))]


def by_hand(lm, request, **options):
    """Nats, whether all are the likeliest, and ids that are cut, from logits of one row."""
    ids = np.concatenate(request)
    kept = ids[-(LENGTH + 1) :]
    logits = np.asarray(lm(kept[:-1], **options), np.float64)[0]
    logp = logits - logits.max(axis=-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(axis=-1, keepdims=True))
    places, targets = np.arange(len(kept) - 1), kept[1:]
    n = len(request.continuation)
    nats = -logp[places, targets][-n:].sum()
    return nats, bool((logits.argmax(axis=-1) == targets)[-n:].all()), len(ids) - len(kept)


def greedy_request(lm, separator):
    """A request whose continuation is the likeliest."""
    context = np.array([separator, 5, 9], np.int32)
    continuation = []
    for _ in range(3):
        logits = np.asarray(lm(np.concatenate([context, continuation]).astype(np.int32)))[0, -1]
        continuation.append(int(logits.argmax()))
    return Request(context, np.array(continuation, np.int32))


@pytest.mark.parametrize("how", ["plain", "steered, another k"])
def test_packed_requests_score_as_alone(lm, model, how):
    options = {} if how == "plain" else {"steer": STEER, "topk_k": 3}
    config = with_topk_k(lm.cfg, options.get("topk_k"))
    entries = [Intervention(*neuron, value) for neuron, value in options.get("steer", {}).items()]
    requests = draw(model.separator_id)
    if how == "plain":
        requests.append(greedy_request(lm, model.separator_id))
    found = scoring.score(
        TextModel(config, lm.params, model.layout, model.separator_id, batch_rows=2),
        requests,
        scoring.interventions_for(config, entries),
    )
    expected = [by_hand(lm, request, **options) for request in requests]
    nats, greedy, n_cut = (np.array(column) for column in zip(*expected, strict=True))
    np.testing.assert_allclose(found.nats, nats, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(found.is_greedy, greedy)
    np.testing.assert_array_equal(found.n_cut, n_cut)
    assert n_cut.any()
    assert how != "plain" or greedy[-1]


def test_short_requests_are_read_in_short_rows(lm, model, monkeypatch):
    monkeypatch.setattr(scoring, "_SHORTEST_ROW", 4)
    shapes = []
    whole = scoring.make_program(model.config, model.layout, in_float32=True)

    def program(params, given, columns, targets):
        shapes.append(given.tokens.shape)
        return whole(params, given, columns, targets)

    rng = np.random.default_rng(1)
    requests = [Request(rng.integers(0, 256, 3), rng.integers(0, 256, n)) for n in (1, 2, 3, 4) * 9]
    found = scoring.score(model, requests, program=program)
    want = [by_hand(lm, request)[0] for request in requests]
    np.testing.assert_allclose(found.nats, want, rtol=1e-4, atol=1e-3)
    assert {length for _, length in shapes} == {8}
    assert {rows for rows, _ in shapes} == {model.rows * LENGTH // 8}


def test_neighbours_and_order_change_nothing(model):
    requests = draw(model.separator_id)
    together = scoring.score(model, requests)
    backwards = scoring.score(model, requests[::-1])
    np.testing.assert_allclose(together.nats, backwards.nats[::-1], rtol=1e-6)


def test_windows_of_a_document_score_each_of_its_tokens_once(lm, model):
    documents = [np.arange(n, dtype=np.int32) % 250 for n in (3, LENGTH - 1, LENGTH, 100)]
    requests, owners = scoring.window_requests(model, documents)
    for number, ids in enumerate(documents):
        own = [r for r, owner in zip(requests, owners, strict=True) if owner == number]
        np.testing.assert_array_equal(np.concatenate([r.continuation for r in own]), ids)
        assert own[0].context.tolist() == [model.separator_id]
        assert all(len(r.context) + len(r.continuation) <= LENGTH for r in own)
        # The windows after the first see a quarter of a row before what they score.
        assert all(len(r.context) >= LENGTH // 4 for r in own[1:])


def test_tokens_that_are_read_are_told_and_scoring_can_be_given_up(model):
    requests, told = draw(model.separator_id), []
    scoring.score(model, requests, report=told.append)
    sizes = [min(LENGTH, len(r.context) + len(r.continuation) - 1) for r in requests]
    assert len(told) > 1
    assert sum(told) == sum(sizes)
    assert scoring.score(model, requests, stopped=lambda: True) is None


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(np.zeros(1, int), np.zeros(0, int)), "empty context or continuation"),
        (Request(np.zeros(0, int), np.zeros(1, int)), "empty context or continuation"),
        (Request(np.zeros(1, int), np.zeros(33, int)), "continuation of 33 tokens: must be at most 32"),
    ],
)
def test_requests_that_cannot_be_are_refused(model, request_, said):
    with pytest.raises(ArgumentError, match=said):
        scoring.score(model, [request_])


@pytest.mark.parametrize(
    "one", [Intervention(0, 1, 1.0, row=0), Intervention(0, 1, 1.0, positions="generated")]
)
def test_interventions_on_rows_and_generated_tokens_are_refused(lm, one):
    with pytest.raises(ArgumentError, match="steer = 0:1: acts on a row"):
        scoring.interventions_for(lm.cfg, [one])


@hypothesis.given(st.lists(st.integers(1, 20), max_size=60))
def test_the_longest_go_first_each_into_the_first_row_that_has_the_space(sizes):
    left, rows = [], [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((row for row, space in enumerate(left) if space >= sizes[i]), len(left))
        left += [20] * (row == len(left))
        left[row] -= sizes[i]
        rows[i] = row
    assert first_fit(sizes, 20) == (rows, len(left))


ON_MANY = """
import json, sys

sys.path[:0] = [sys.argv[1], sys.argv[2]]
import numpy as np
import saved_runs
from test_scoring import draw
from topklm import distributed
from topklm.config import MeshConfig
from topklm.eval import scoring
from topklm.inference.load import load
from topklm.layout import make_layout
from topklm.neurons.documents import TextModel

with distributed.session():
    layout = make_layout(MeshConfig(data=2, fsdp=2))
    lm = load(sys.argv[3], mesh=layout.mesh)
    model = TextModel(lm.cfg, lm.params, layout, lm.tokenizer.separator_id)
    found = scoring.score(model, draw(model.separator_id))
    print(json.dumps(found.nats.tolist()), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [1, 2])
def test_devices_and_hosts_share_the_rows_and_all_get_all_scores(run, model, trainer, n_processes):
    environment = devices(4 // n_processes)
    many = [{}]
    if n_processes > 1:
        environment["TOPKLM_COORDINATOR"] = f"127.0.0.1:{coordinator_port()}"
        environment["TOPKLM_PROCESS_COUNT"] = str(n_processes)
        many = [{"TOPKLM_PROCESS_ID": str(i)} for i in range(n_processes)]
    folders = str(ROOT / "tests"), str(ROOT / "tests/eval"), str(run)
    processes = [trainer.start_python("-c", ON_MANY, *folders, environment=environment | one) for one in many]
    expected = scoring.score(model, draw(model.separator_id)).nats
    for process in processes:
        assert process.finish() == 0, process.errors
        np.testing.assert_allclose(json.loads(process.output.splitlines()[-1]), expected, rtol=1e-4)
