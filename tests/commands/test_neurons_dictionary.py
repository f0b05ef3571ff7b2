"""A Base LM harvested with a dictionary and measured, with a sentence encoder of a few lines."""

import argparse
import dataclasses
import json

from helpers import sentences as some_sentences
from helpers import write_documents
import numpy as np
import pytest
import saved_runs

from topklm.checkpoint import run_folder
from topklm.commands import export, neurons
from topklm.config import DataConfig
from topklm.data.building.build import prepare
from topklm.errors import UserError
from topklm.neurons import NeuronsFolder
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.statistics import embeddings, table
from topklm.neurons.store import Store

STEP = 7
MODEL = dataclasses.replace(saved_runs.MODEL, n_nontopk=2, d_model=16, d_mlp=16, vocab_size=300)


def run(*arguments):
    parser = argparse.ArgumentParser()
    neurons.add_arguments(parser)
    neurons.run(parser.parse_args([*map(str, arguments)]))


def make_run(folder, texts, n_nontopk=2):
    data = DataConfig(source=str(texts), dir=str(folder / "datasets"), vocab_size=300, heldout_fraction=0.3)
    model = dataclasses.replace(MODEL, n_nontopk=n_nontopk)
    config = dataclasses.replace(saved_runs.CONFIG, model=model, data=data)
    tokenizer = prepare(data, lambda line: None).tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_runs, "tokenizer", lambda: tokenizer)
        saved_runs.save(folder / "village", [STEP], config)
    return NeuronsFolder(folder / "village", STEP)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("texts") / "some.jsonl", some_sentences(3, 120))


@pytest.fixture(scope="module")
def harvested(tmp_path_factory, texts):
    folder = make_run(tmp_path_factory.mktemp("base"), texts)
    run("harvest", folder.run, "--dictionary", "sae", "--dictionary-tokens", "9000", "--keep", "5")
    return folder


def test_the_codes_of_held_out_text_are_stored_and_said_to_be_codes(harvested):
    store, dictionary = Store(harvested.store), Dictionary.load(harvested.dictionary)
    metadata = store.metadata
    assert (metadata.kind, metadata.topk_k, metadata.layers) == ("sae", 5, (0, 1))
    assert metadata.dictionary == dictionary.description
    assert metadata.source.startswith("held-out text") and "training text" in metadata.dictionary
    counts = np.zeros((2, store.n_tokens), int)
    for layer in metadata.layers:
        for neuron in range(16):
            events = store.neuron(layer, neuron)
            assert (events.values > 0).all()
            counts[layer, events.tokens] += 1
    assert counts.max() == 5 and counts.mean() > 3


def test_harvesting_again_goes_on_with_the_same_dictionary(harvested):
    before = harvested.dictionary.read_bytes(), Store(harvested.store).n_tokens
    run("harvest", harvested.run, "--dictionary", "sae", "--dictionary-tokens", "9000", "--keep", "5")
    assert (harvested.dictionary.read_bytes(), Store(harvested.store).n_tokens) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dictionary", "pca"], r"--dictionary = pca: .* another kind \(sae\)"),
        (["--dictionary", "sae", "--keep", "5"], "--dictionary-tokens = 1000000: .* 9000"),
        (["--dictionary", "sae", "--keep", "17"], "--keep = 17"),
        ([], "another kind"),
    ],
)
def test_what_does_not_fit_to_the_store_is_refused(harvested, arguments, words):
    with pytest.raises(UserError, match=words):
        run("harvest", harvested.run, *arguments)


def test_a_dictionary_goes_to_saelens_and_back(tmp_path, harvested):
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    out = ["--format", "saelens", "--out", str(tmp_path / "saes")]
    export.run(parser.parse_args([str(harvested.run), *out]))
    copy = NeuronsFolder(tmp_path / "village", harvested.step)
    copy.run.mkdir()
    for path in (run_folder.CONFIG_FILE, run_folder.TOKENIZER_FILE, run_folder.CHECKPOINTS_FOLDER):
        (copy.run / path).symlink_to(harvested.run / path)
    run("harvest", copy.run, "--dictionary", tmp_path / "saes")
    ours, theirs = Store(harvested.store), Store(copy.store)
    assert (theirs.metadata.kind, theirs.metadata.topk_k) == ("saelens", 5)
    for layer in (0, 1):
        for name in ("tokens", "values"):
            want, got = (getattr(store.block(layer, 0, 16), name) for store in (ours, theirs))
            np.testing.assert_array_equal(got, want)
    run("harvest", copy.run, "--dictionary", tmp_path / "saes")  # goes on
    for wrong, words in [("nowhere", "random, pca, sae, or a folder"), ("sae", "another kind")]:
        with pytest.raises(UserError, match=words):
            run("harvest", copy.run, "--dictionary", wrong)
    with pytest.raises(UserError, match="its SAEs keep 5"):
        run("harvest", copy.run, "--dictionary", tmp_path / "saes", "--keep", "4")


def test_training_text_is_not_harvested_with_a_dictionary_that_learned_from_it(tmp_path, harvested):
    copy = NeuronsFolder(tmp_path / "village", harvested.step)
    copy.run.mkdir()
    for path in (run_folder.CONFIG_FILE, run_folder.TOKENIZER_FILE, run_folder.CHECKPOINTS_FOLDER):
        (copy.run / path).symlink_to(harvested.run / path)
    with pytest.raises(UserError, match="--split = train"):
        run("harvest", copy.run, "--dictionary", "pca", "--split", "train")
    with pytest.raises(UserError, match="part 0 makes it"):
        run("harvest", copy.run, "--dictionary", "pca", "--part", "1/2")


def test_a_topk_model_has_neurons_of_its_own(tmp_path, texts):
    folder = make_run(tmp_path, texts, n_nontopk=1)
    with pytest.raises(UserError, match="--dictionary = pca: is for Base LMs"):
        run("harvest", folder.run, "--dictionary", "pca")


def test_the_table_says_which_dictionary_and_which_encoder(harvested, monkeypatch, capsys):
    class Lengths:
        def encode(self, texts):
            return [[len(text), text.count("e"), 1] for text in texts]

    monkeypatch.setattr(embeddings, "load_encoder", lambda name: Lengths())
    options = ["--lens-contexts", "4", "--encoder", "models/lengths", "--json"]
    run("measure", harvested.run, *options)
    assert json.loads(capsys.readouterr().out)["table"] == str(harvested.table)
    rows, measured = table.read(harvested.table)
    assert (measured.kind, measured.topk_k) == ("sae", 5)
    assert measured.dictionary == Store(harvested.store).metadata.dictionary
    assert measured.embedding.startswith("the sentence encoder lengths, on each token")
    assert rows["ablation_effect"].null_count == rows.num_rows  # a code is no coordinate to be set to 0
    assert rows["jacobian_top"].null_count == rows["identity_top"].null_count == 0


def test_a_store_and_another_dictionary_are_not_measured_together(harvested):
    there = Dictionary.load(harvested.dictionary)
    before = harvested.dictionary.read_bytes()
    dataclasses.replace(there, centre=there.centre + 1).save(harvested.dictionary)
    try:
        with pytest.raises(UserError, match="another dictionary"):
            run("measure", harvested.run)
    finally:
        harvested.dictionary.write_bytes(before)
