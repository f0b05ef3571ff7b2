"""`topklm sae`: trained on a Base LM's text, measured, harvested with, taken to SAELens and back."""

import argparse
import dataclasses
import json
import re
import shutil

from helpers import sentences as some_sentences
from helpers import write_documents
import numpy as np
import pytest
import saved_runs

from topklm.commands import export, neurons, sae
from topklm.config import DataConfig
from topklm.data.building.build import prepare
from topklm.errors import UserError
from topklm.neurons import NeuronsFolder, documents, fit_dictionary
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.statistics import table
from topklm.neurons.store import Store
from topklm.sae import kinds
from topklm.storage.files import LOCK_FILE, folder_lock

STEP, K, M = 7, 3, 40
MODEL = dataclasses.replace(saved_runs.MODEL, n_nontopk=2, d_model=16, d_mlp=16, vocab_size=300)


def run(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([*map(str, arguments)]))


def make_run(folder, data, n_nontopk=2, step=STEP):
    model = dataclasses.replace(MODEL, n_nontopk=n_nontopk)
    config = dataclasses.replace(saved_runs.CONFIG, model=model, data=data)
    tokenizer = prepare(data, lambda line: None).tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_runs, "tokenizer", lambda: tokenizer)
        saved_runs.save(folder, [step], config)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BATCH_TOKENS", 512)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    texts = write_documents(folder / "some.jsonl", some_sentences(3, 120))
    return DataConfig(source=str(texts), dir=str(folder / "datasets"), vocab_size=300, heldout_fraction=0.3)


@pytest.fixture(scope="module")
def base(tmp_path_factory, data):
    return make_run(tmp_path_factory.mktemp("runs") / "village", data)


def train(base, out, *options, kind="batchtopk"):
    sizes = ["--kind", kind, "--width", M, "--k", K, "--tokens", 9000, "--minibatch", 256]
    run(sae, "train", base, "--out", out, *sizes, *options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("saes")
    for seed in (0, 1):
        train(base, folder / str(seed), "--seed", seed)
    return folder


def test_a_folder_says_of_which_model_its_autoencoders_are(trained):
    made = Dictionary.load(trained / "0/dictionary.npz")
    assert (made.kind, made.keep, made.width) == ("sae-batchtopk", K, M)
    assert made.facts["run"] == "village" and made.facts["layers"] == [0, 1]
    assert made.facts["text"].startswith("training text of")
    assert all(0 < share < 1 for share in made.facts["explained_variance"])
    history = json.loads((trained / "0/history.json").read_text())
    assert history[-1]["explained_variance"][0] > history[0]["explained_variance"][0]
    there = sorted(path.name for path in (trained / "0").iterdir() if path.name != LOCK_FILE)
    assert there == ["dictionary.npz", "history.json"]


def test_measures_of_several_seeds_have_their_stability(trained, base, capsys):
    capsys.readouterr()
    folders = trained / "0", trained / "1"
    run(sae, "measure", *folders, "--run", base, "--tokens", 500, "--hedging", 2, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found["autoencoders"]] == list(map(str, folders))
    for entry in found["autoencoders"]:
        assert entry["of_layers"] == [0, 1]
        for layer in entry["layers"]:
            assert 0.5 * K < layer["l0"] < 2 * K
            assert 0 < layer["matched"] <= layer["stability"] <= 1
            assert np.isfinite(layer["recovered_zero"]) and layer["loss"] > 0
            assert 0 <= layer["hedging"] < 1
    run(sae, "measure", trained / "0", "--run", base, "--tokens", 500)
    shown = capsys.readouterr().out
    assert f"{trained / '0'}: post-hoc BatchTopK SAE: about {K} of {M} codes" in shown
    assert "layers 0 together: loss " in shown
    with pytest.raises(UserError, match="--hedging = 16: must be below the model's width, 16"):
        run(sae, "measure", trained / "0", "--run", base, "--tokens", 500, "--hedging", 16)
    with pytest.raises(UserError, match="--against is of TopK LMs"):
        run(sae, "measure", trained / "0", "--run", base, "--against", base)


def copy_of(base, folder):
    folder.mkdir()
    for path in base.iterdir():
        if path.name != "neurons":
            (folder / path.name).symlink_to(path)
    return folder


def test_a_base_lm_is_harvested_and_measured_with_more_codes_than_coordinates(trained, base, tmp_path):
    copy = copy_of(base, tmp_path / "village")
    run(neurons, "harvest", copy, "--dictionary", trained / "0", "--tokens", 1500)
    folder = NeuronsFolder(copy, STEP)
    store, made = Store(folder.store), Dictionary.load(trained / "0/dictionary.npz")
    assert (store.metadata.d_model, store.metadata.kind) == (M, "sae-batchtopk")
    assert store.metadata.dictionary == made.description
    events = store.block(1, 0, M)
    assert np.diff(events.offsets)[16:].sum() > 0  # of codes past the coordinates
    assert 0.4 * K < len(events.tokens) / store.n_tokens < 2.5 * K
    run(neurons, "harvest", copy, "--dictionary", trained / "0", "--tokens", 1500)  # goes on
    with pytest.raises(UserError, match="is another one"):
        run(neurons, "harvest", copy, "--dictionary", trained / "1", "--tokens", 1500)
    run(neurons, "measure", copy, "--lens-contexts", "4")
    rows, _ = table.read(folder.table)
    assert rows.num_rows == 2 * M
    out = tmp_path / "saelens"
    run(export, copy, "--format", "saelens", "--out", out)
    run(sae, "measure", out, "--run", base, "--tokens", 300)
    again = copy_of(base, tmp_path / "again")
    run(neurons, "harvest", again, "--dictionary", out, "--tokens", 1500)
    theirs = Store(NeuronsFolder(again, STEP).store)
    assert (theirs.metadata.kind, theirs.metadata.topk_k, theirs.metadata.d_model) == ("saelens", K, M)
    for name in ("offsets", "tokens", "values"):
        np.testing.assert_array_equal(getattr(theirs.block(1, 0, M), name), getattr(events, name))


def test_one_layer_is_trained_and_harvested(base, tmp_path):
    train(base, tmp_path / "one", "--layers", 1, kind="topk")
    copy = copy_of(base, tmp_path / "village")
    run(neurons, "harvest", copy, "--dictionary", tmp_path / "one", "--tokens", 500)
    assert Store(NeuronsFolder(copy, STEP).store).metadata.layers == (1,)


def test_training_that_was_stopped_goes_on_to_the_same_bits(base, trained, tmp_path, monkeypatch):
    calls, states = [], fit_dictionary.hidden_states

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 12:
            raise InterruptedError
        return states(*arguments)

    out = tmp_path / "out"
    monkeypatch.setattr(fit_dictionary, "hidden_states", stops)
    with pytest.raises(InterruptedError):
        train(base, out, "--save-every", 0)
    monkeypatch.setattr(fit_dictionary, "hidden_states", states)
    for other, said in ((["--seed", 3], r"--seed = 3: .* begun with 0"), (["--k", "auto"], "--k = auto: ")):
        with pytest.raises(UserError, match=said):
            train(base, out, *other)
    with folder_lock(out, pytest.fail), pytest.raises(UserError, match=r"--out = .*: process \d+ trains"):
        train(base, out)
    train(base, out)
    for name in ("dictionary.npz", "history.json"):
        assert (out / name).read_bytes() == (trained / "0" / name).read_bytes(), name
    assert not (out / "state.npz").exists()
    with pytest.raises(UserError, match="holds autoencoders"):
        train(base, out, "--resume")


def test_neurons_of_a_base_lm_have_no_wider_one(base):
    with pytest.raises(UserError, match="--wider is of TopK LMs"):
        run(sae, "measure", "--run", base, "--wider", base)


def test_the_help_names_every_kind():
    assert tuple(kinds.KINDS) == sae._KINDS


@pytest.mark.slow
def test_an_ensemble_has_the_codes_of_all_members_and_k_is_chosen_by_cosine(base, tmp_path, capsys):
    train(base, tmp_path / "bag", "--ensemble", "bag", "--members", 2)
    made = Dictionary.load(tmp_path / "bag/dictionary.npz")
    assert (made.width, made.members, made.facts["ensemble"]) == (2 * M, 2, "bag of 2")
    capsys.readouterr()
    run(sae, "train", base, "--out", tmp_path / "auto", "--k", "auto", "--tokens", 4000, "--json")
    found = json.loads(capsys.readouterr().out)
    sums = {trial["k"]: sum(trial["decoder_cosine"]) for trial in found["trials"]}
    assert len(sums) > 1 and found["k"] == min(sums, key=sums.get)


def test_neurons_of_topk_lms_have_the_same_table(data, tmp_path, capsys):
    one, other = (make_run(tmp_path / str(step), data, n_nontopk=1, step=step) for step in (7, 8))
    capsys.readouterr()
    run(sae, "measure", "--run", one, "--against", other, "--tokens", 300, "--json")
    found = json.loads(capsys.readouterr().out)
    (layer,) = found["autoencoders"][0]["layers"]
    assert layer["l0"] <= MODEL.topk_k and layer["explained_variance"] == 1 and layer["stability"] < 1
    for option, value in (("--hedging", 2), ("--together", 0)):
        with pytest.raises(UserError, match=f"{option} is of autoencoders"):
            run(sae, "measure", "--run", one, option, value)
    with pytest.raises(UserError, match=r"--wider = .*: must be a run begun like .* by train.init"):
        run(sae, "measure", "--run", one, "--wider", one)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--k", "41"], "--k = 41: must be from 1 to the width, 40"),
        (["--k", "many"], "--k = many: must be a whole number, or auto"),
        (["--kind", "gated"], "--kind = gated: must be one of topk"),
        (["--layers", "0,5"], "--layers = 5: must be of 0, 1"),
        (["--members", "3"], "--members = 3: says nothing without --ensemble"),
        (["--coefficient", "1"], "--coefficient = 1.0: says nothing without --kind jumprelu"),
        (["--kind", "jumprelu", "--coefficient", "-1"], "--coefficient = -1.0: must be 0 or more"),
        (["--save-every", "-1"], "--save-every = -1.0: must be 0 or more"),
        (["--tokens", "0"], "--tokens"),
        (["--resume"], "nothing to go on from"),
        pytest.param(["--learning-rate", "1e30"], "diverged", marks=pytest.mark.slow),
    ],
)
def test_mistakes_of_training_end_in_a_line(base, tmp_path, options, said):
    with pytest.raises(UserError, match=said) as refused:
        train(base, tmp_path / "out", *options)
    assert "\n" not in str(refused.value)


def test_autoencoders_of_another_model_are_refused(data, trained, base, tmp_path):
    other = make_run(tmp_path / "other", data, step=9)
    with pytest.raises(UserError, match=r"is of another model, village at step 7"):
        run(sae, "measure", trained / "0", "--run", other)
    with pytest.raises(UserError, match=r"--dictionary = .* is of another model"):
        run(neurons, "harvest", other, "--dictionary", trained / "0")
    topk_lm = make_run(tmp_path / "topk", data, n_nontopk=1)
    with pytest.raises(UserError, match="neurons need no autoencoder"):
        run(sae, "train", topk_lm, "--out", tmp_path / "x")
    for folder, said in (
        (tmp_path / "nowhere", "has no dictionary.npz, and no blocks"),
        (tmp_path, "has no dictionary.npz, and no blocks"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            run(sae, "measure", folder, "--run", base)
    shutil.copytree(trained / "1", tmp_path / "half")
    content = (tmp_path / "half/dictionary.npz").read_bytes()
    (tmp_path / "half/dictionary.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged"):
        run(sae, "measure", tmp_path / "half", "--run", base)
