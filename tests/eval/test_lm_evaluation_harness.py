"""The adapter for lm-evaluation-harness: requests by hand, and by the model of Hugging Face in it."""

import importlib
import json

from helpers import in_this_process
import numpy as np
import pytest
import saved_runs
from test_eval_tasks import DOCS, write

import topklm
from topklm.errors import UserError
from topklm.eval import tasks
from topklm.inference.interventions import Intervention
from topklm.layout import one_device
from topklm.neurons.documents import TextModel

pytest.importorskip("lm_eval")
adapter = importlib.import_module("topklm.eval.lm_eval")
Instance = importlib.import_module("lm_eval.api.instance").Instance

LENGTH = saved_runs.MODEL.context_length
PAIRS = [("the sea", " is"), ("", " a town"), ("x" * 60, "y"), ("trailing ", "blank"), ("sea", " s\u00e9a")]
TEXTS = ["short", "a text that is longer than the context " * 3, ""]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    saved_runs.save(folder, [3, 5])
    return folder


@pytest.fixture(scope="module")
def lm(run):
    return topklm.load(run)


@pytest.fixture(scope="module")
def wrapped(lm):
    return adapter.TopKLM(model=lm)


def instances(kind, arguments):
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def nats_of(lm, ids, n):
    """The log-likelihood of the last n ids, in one row."""
    return -float(np.asarray(lm.loss(np.array(ids), per_token=True), np.float64)[0, -n:].sum())


def test_log_likelihoods_are_those_of_the_model(lm, wrapped):
    found = wrapped.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    separator = lm.tokenizer.separator_id
    for (context, continuation), (nats, greedy) in zip(PAIRS, found, strict=True):
        ids = [separator, *lm.tokenizer.encode(context + continuation)]
        n = len(ids) - 1 - len(lm.tokenizer.encode(context.rstrip()))
        assert nats == pytest.approx(nats_of(lm, ids[-LENGTH:], n), rel=1e-2 if len(ids) > LENGTH else 1e-4)
        assert greedy is False or nats > -5
    assert wrapped.n_cut == 1


def test_rolling_log_likelihoods_are_sums_over_the_windows_of_the_harness(lm, wrapped):
    found = wrapped.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in TEXTS]))
    separator = lm.tokenizer.separator_id
    for text, total in zip(TEXTS, found, strict=True):
        ids, expected, done = lm.tokenizer.encode(text).tolist(), 0.0, 0
        while done < len(ids):
            # A window holds `LENGTH` tokens that are read; all but the first predict as many as they can.
            end = min(len(ids), done + LENGTH)
            row = ([separator, *ids])[max(0, end - LENGTH) : end + 1]
            logits = np.asarray(lm(np.array(row[:-1])), np.float64)[0]
            logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            logp -= logits.max(-1, keepdims=True)
            own = logp[np.arange(len(row) - 1), row[1:]]
            expected += own[-(end - done) :].sum()
            done = end
        assert total == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.slow
def test_answers_are_greedy_continuations_up_to_a_stop_string(lm, wrapped):
    settings = {"until": ["\n\n"], "max_gen_toks": 6}
    contexts = ["the sea", "a", "x" * 60]
    found = wrapped.generate_until(instances("generate_until", [(c, settings) for c in contexts]))
    for context, answer in zip(contexts[:2], found, strict=False):
        assert context + answer == lm.generate(context, 6, temperature=0.0, stop="\n\n")
    ids = np.array([lm.tokenizer.separator_id, *lm.tokenizer.encode(contexts[2])])[-(LENGTH - 6) :]
    assert lm.tokenizer.decode(ids) + found[2] == lm.generate(ids, 6, temperature=0.0)
    stop = found[0][1]
    (cut,) = wrapped.generate_until(instances("generate_until", [("the sea", {**settings, "until": stop})]))
    assert cut == found[0][: found[0].index(stop)]


@pytest.mark.slow
def test_another_k_and_interventions_take_part(lm, wrapped):
    plain = wrapped.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for options in ({"topk_k": "2"}, {"steer": [Intervention(0, 3, 50.0)]}):
        other = adapter.TopKLM(model=lm, **options)
        assert other.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True) != plain


def test_a_run_and_its_step_are_named_as_model_args(run):
    made = adapter.TopKLM.create_from_arg_string(f"run={run},step=3", {"batch_size": 1, "device": None})
    assert made.lm.step == 3
    assert made.get_model_info()["step"] == 3
    with pytest.raises(UserError, match="--model_args: 'runs' is none of run, step, topk_k"):
        adapter.TopKLM.create_from_arg_string(f"runs={run}")
    with pytest.raises(UserError, match="--model_args: name a run folder"):
        adapter.TopKLM.create_from_arg_string("")
    registry = importlib.import_module("lm_eval.api.registry")
    assert registry.get_model("topklm") is adapter.TopKLM


@pytest.fixture(scope="module")
def hugging_face(lm):
    """The same weights in Hugging Face's Llama with a TopK hook, as the harness' own model."""
    for name in ("torch", "transformers", "accelerate"):
        pytest.importorskip(name)
    return importlib.import_module("benchmarks.peers.harness_model").build(
        lm, batch_size=2, attention="eager"
    )


@pytest.mark.slow
def test_item_by_item_it_gives_the_results_of_hugging_face(wrapped, hugging_face, lm, monkeypatch):
    ours = wrapped.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    theirs = hugging_face.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([one[0] for one in ours], [one[0] for one in theirs], rtol=1e-4)
    assert [one[1] for one in ours] == [one[1] for one in theirs]
    settings = {"until": ["zzz"], "max_gen_toks": 8, "do_sample": False}
    asked = instances("generate_until", [("the sea", settings), ("a", settings)])
    assert wrapped.generate_until(asked) == hugging_face.generate_until(asked, disable_tqdm=True)
    texts = instances("loglikelihood_rolling", [(text,) for text in TEXTS[:2]])
    # With add_bos_token it would score the separator of a text too, given another one.
    monkeypatch.setattr(hugging_face, "tok_encode", lambda text: lm.tokenizer.encode(text).tolist())
    ours, theirs = (one.loglikelihood_rolling(texts, disable_tqdm=True) for one in (wrapped, hugging_face))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.slow
def test_stock_tasks_on_local_files_agree_with_native_ones(run, lm, tmp_path):
    rng = np.random.default_rng(0)

    def text(n):
        return "".join(rng.choice(list("abc d"), n)).strip() + "e"

    names = ("piqa", "arc_easy", "sciq")
    for name in names:
        documents = [
            {
                key: text(5) if isinstance(value, str) and key != "answerKey" else value
                for key, value in doc.items()
            }
            for doc in [DOCS[name]] * 9
        ]
        write(tmp_path, name, documents)
    ended = in_this_process("eval", run, "--harness", ",".join(names), "--data", tmp_path, "--json")
    assert ended.exit_code == 0, ended.errors
    content = json.loads(ended.output)
    model = TextModel(lm.cfg, lm.params, one_device(), lm.tokenizer.separator_id)
    for name in names:
        outcome = tasks.tokenize(tasks.find(name, tmp_path), model, lm.tokenizer).evaluate(model)
        assert content["results"][name]["acc"] == outcome.ratios["acc"][0].mean()
        for sample, nats in zip(content["samples"][name], outcome.nats, strict=True):
            likelihoods = [float(answer[0]) for answer in sample["answers"]]
            np.testing.assert_allclose(likelihoods, -nats, rtol=1e-5)
    unknown = in_this_process("eval", run, "--harness", "piqaa")
    assert unknown.exit_code == 2
    assert "--harness = piqaa: lm-evaluation-harness has no such task; did you mean" in unknown.errors


@pytest.mark.slow
def test_the_harness_own_command_line_knows_the_model(run, tmp_path, trainer):
    write(tmp_path, "piqa", [DOCS["piqa"]] * 3)
    process = trainer.start_python("-m", "topklm.eval.lm_eval", "ls", "models")
    assert process.finish() in (0, 2)
    wrong = ["run", "--model", "topklm", "--model_args", "run=nowhere", "--tasks", "piqa"]
    process = trainer.start_python("-m", "topklm.eval.lm_eval", *wrong)
    assert process.finish() == 2
    assert "error: nowhere is not a run folder" in process.errors
