"""`topklm neurons card` on tiny runs: TopK and Base, two seeds, another tokenizer."""

import argparse
import dataclasses
import json
import xml.etree.ElementTree as ET

from helpers import sentences as some_sentences
from helpers import write_documents
import numpy as np
import pytest
import saved_runs

import topklm
from topklm import cli
from topklm.commands import shared
from topklm.commands.neurons_card import CARD
from topklm.config import DataConfig
from topklm.data.building.build import prepare
from topklm.errors import UserError
from topklm.explorer import card as card_lib
from topklm.neurons import card, probing
from topklm.neurons.ablate_set import Estimate
from topklm.neurons.dictionary import Dictionary
from topklm.sae import folder
from topklm.steering.dose import Response

STEP = 7
MODEL = dataclasses.replace(saved_runs.MODEL, n_layers=3, d_model=16, d_mlp=16, vocab_size=300)
TAGS = ("DET", "NOUN", "VERB")


def save(folder, data, n_nontopk=1, seed=0):
    train = dataclasses.replace(saved_runs.CONFIG.train, seed=seed)
    tokenizer = prepare(data, lambda line: None).tokenizer
    model = dataclasses.replace(MODEL, n_nontopk=n_nontopk, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(saved_runs.CONFIG, model=model, data=data, train=train)
    drawn = saved_runs.state

    def of_seed(step, config):
        return drawn(step, config)._replace(params=drawn(step + seed, config).params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_runs, "tokenizer", lambda: tokenizer)
        patch.setattr(saved_runs, "state", of_seed)
        saved_runs.save(folder, [STEP], config)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    texts = write_documents(folder / "texts.jsonl", some_sentences(3, 200))
    common = {"source": str(texts), "dir": str(folder / "datasets"), "heldout_fraction": 0.3}
    data = DataConfig(**common, vocab_size=300)
    save(folder / "small", data)
    save(folder / "seed", data, seed=1)
    save(folder / "base", data, n_nontopk=3)
    save(folder / "other", DataConfig(**common, vocab_size=280))
    rows = [{"text": text, "label": ("sea", "house")[i % 2]} for i, text in enumerate(some_sentences(5, 160))]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = []
    for text in some_sentences(6, 60):
        lines.append(f"# text = {text}")
        for i, word in enumerate(text.split(" ")):
            lines.append("\t".join([str(i + 1), word, word, TAGS[i % 3], *"______"]))
        lines.append("")
    (folder / "words.conllu").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _few_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "DRAWS", 8)
        patch.setattr(card, "READABLE", 3)
        yield


def run(*arguments):
    parser = argparse.ArgumentParser()
    CARD.add_arguments(parser)
    CARD.run(parser.parse_args([*map(str, arguments)]))


@pytest.fixture(scope="module")
def facts(place):
    """Measures all runs beside each other, and reads the file."""
    where = "--labels", place / "labels.jsonl", "--conllu", place / "words.conllu"
    against = "--against", place / "seed", place / "base", place / "other"
    sampled = "--tokens", 3000, "--dictionary-tokens", 4000, "--no-steering"
    out = "--json", place / "card.json", "--out", place / "card.svg"
    run(place / "small", *against, *where, *sampled, *out)
    return json.loads((place / "card.json").read_text())


def test_all_bases_of_all_runs_are_measured_alike(facts):
    names = [[basis["name"] for basis in one["bases"]] for one in facts["runs"]]
    own = ["own", "random", "pca"]
    assert names == [own, own, ["coordinates", "sae", "random", "pca"], own]
    assert 2800 < facts["tokens"] <= 3000
    for one in facts["runs"]:
        assert one["bits_per_byte"] > 0 and one["parameters"] > 0
        assert (one["bits_per_byte_without_neurons"] is None) == (one["kind"] == "base")
        # Of 5 steps of 6 N and 12 L H Q T, a third of it for the forward pass alone.
        assert one["training_flops"] == pytest.approx(
            3 * one["flops_per_generated_token"] * one["training_tokens"]
        )
        for basis in one["bases"]:
            assert len(basis["layers"]) == (3 if one["kind"] == "base" else 2)
            for layer in basis["layers"]:
                assert layer["n_neurons"] == 16
                assert (
                    0 < layer["density"]["low"] <= layer["density"]["value"] <= layer["density"]["high"] < 1
                )
                assert set(layer["probing"]) == {"labels", "part of speech"}


def test_an_autoencoder_is_paid_for(facts):
    """Reading 4,000 tokens, and 5 products of 16 states with 16 codes for each token in 3 layers."""
    (base,) = (one for one in facts["runs"] if one["kind"] == "base")
    (sae,) = (basis["dictionary"] for basis in base["bases"] if basis["name"] == "sae")
    products = 3 * 5 * 2 * 16 * 16
    assert sae["training_flops"] == pytest.approx(4000 * (base["flops_per_generated_token"] + products))


def test_without_neurons_a_model_whose_stream_carries_all_knows_nothing(facts, place):
    model = topklm.load(str(place / "small"))
    mixture = prepare(model.config.data, lambda line: None)
    # The layers after map 0 to 0, so all tokens are as likely.
    nats = np.log(model.cfg.vocab_size) * mixture.heldout_text_tokens
    bits_per_byte = nats / np.log(2) / mixture.heldout_bytes
    assert facts["runs"][0]["bits_per_byte_without_neurons"] == pytest.approx(bits_per_byte, rel=1e-5)


def test_differences_from_the_rotation_are_those_of_the_means(facts):
    seen = 0
    for one in facts["runs"]:
        random = next(basis for basis in one["bases"] if basis["name"] == "random")
        assert "less_random" not in random["layers"][0]["probing"]["labels"]
        for basis in one["bases"]:
            for layer, of_random in zip(basis["layers"], random["layers"], strict=True):
                for name, found in layer["probing"].items():
                    for score in ("auc", "balanced_accuracy"):
                        assert set(found[score]) == {str(k) for k in probing.KS}
                        for k, gap in found.get("less_random", {}).get(score, {}).items():
                            values = [x["probing"][name][score][k]["value"] for x in (layer, of_random)]
                            assert gap["value"] == pytest.approx(values[0] - values[1], abs=1e-9)
                            seen += 1
                        of_cut = (
                            x["probing"][name]["less_random_cut"][score]["1"] for x in (layer, of_random)
                        )
                        if basis["name"] != "random" and "less_random_cut" in found:
                            # Both less the same control.
                            gap = found["less_random"][score]["1"]["value"]
                            own, whole = (x["value"] for x in of_cut)
                            assert gap == pytest.approx(own - whole, abs=1e-9)
    assert seen > 50


def test_another_tokenizer_leaves_out_what_depends_on_tokens(facts):
    other = facts["runs"][3]
    assert any("other has another tokenizer than" in line for line in facts["notes"])
    for basis in other["bases"]:
        assert "detectors" not in basis
        for layer in basis["layers"]:
            assert not {"token_entropy", "semantic_entropy", "by_token", "by_context"} & layer.keys()
    for basis in facts["runs"][0]["bases"]:
        assert basis["layers"][0]["by_token"]["value"] is not None
        assert len(basis["detectors"]["neurons"]) == 3
        assert ("ablation" in basis) == (basis["name"] == "own")


def test_runs_that_differ_by_the_seed_alone_are_one_group(facts, place):
    (group,) = facts["seeds"]
    assert group["runs"] == [str(place / "small"), str(place / "seed")]

    def layer(one, number):
        return one["bases"][0]["layers"][number]

    for get in (
        lambda one: one["bits_per_byte"],
        lambda one: layer(one, 1)["by_token"]["value"],
        lambda one: layer(one, 0)["probing"]["labels"]["auc"]["5"]["value"],
    ):
        values = [get(one) for one in facts["runs"][:2]]
        assert get(group["mean"]) == pytest.approx(sum(values) / 2)
        assert values[0] != values[1]
    figure = layer(group["mean"], 1)["by_token"]
    assert figure["values"] == [layer(one, 1)["by_token"]["value"] for one in facts["runs"][:2]]
    assert group["mean"]["run"] == "mean of 2 seeds" and group["mean"]["kind"] == "topk"


def test_the_picture_shows_each_figure(facts, place):
    drawn = ET.parse(place / "card.svg").getroot()
    circles = list(drawn.iter("{http://www.w3.org/2000/svg}circle"))
    n_layers = sum(len(basis["layers"]) for one in facts["runs"] for basis in one["bases"])
    n_same = n_layers - sum(len(basis["layers"]) for basis in facts["runs"][3]["bases"])
    assert len(circles) == 2 * n_layers + 4 * n_same + 4 * n_layers  # two sets, k = 1 and 16


def test_the_same_command_gives_the_same_figures_and_tables(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    options = "--labels", place / "labels.jsonl", "--tokens", 1500, "--no-steering"
    printed = []
    for _ in range(2):
        run(place / "small", *options, "--json")
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]
    run(place / "small", *options)
    shown = capsys.readouterr().out
    for words in ("own neurons", "random rotation", "PCA", "by token", "less rotation", "bits per byte"):
        assert words in shown
    assert f"{printed[0]['runs'][0]['bits_per_byte']:.4f}" in shown


def test_neurons_are_steered_unless_that_is_left_out(place, capsys):
    run(place / "small", "--tokens", 1500, "--json")
    printed = json.loads(capsys.readouterr().out)
    steering = printed["runs"][0]["bases"][0]["steering"]
    assert len(steering["neurons"]) == 3 and 0 <= steering["n_fluent"] <= 3
    assert any("nothing is probed" in line for line in printed["notes"])


def test_labels_with_too_few_texts_are_said_to_be_left_out(place, capsys):
    labels = place / "few.jsonl"
    labels.write_text("\n".join(json.dumps({"text": f"text {i}", "label": i}) for i in range(20)))
    run(place / "small", "--tokens", 1500, "--no-steering", "--labels", labels)
    assert "0 labels, 20 with too few examples left out" in capsys.readouterr().out


def responses(rates, perplexities):
    """Makes texts of two values, unsteered ones first, with intervals of 0.1 on either side."""
    return [
        Response(None, [], 9, {"input": Estimate(r, r - 0.1, r + 0.1)}, Estimate(p, p, p), {})
        for r, p in zip(rates, perplexities, strict=True)
    ]


@pytest.mark.parametrize(
    ("rates", "perplexities", "turned"),
    [
        ([0.1, 0.4], [10, 20], True),
        ([0.1, 0.4], [10, 21], False),  # no longer fluent
        ([0.1, 0.25], [10, 9], False),  # intervals overlap
        ([0.4, 0.1], [10, 10], False),
    ],
)
def test_text_is_turned_fluently_where_the_rate_is_up_and_perplexity_at_most_doubled(
    rates, perplexities, turned
):
    assert card_lib.turns(*responses(rates, perplexities), "input") is turned


def test_vectors_of_words_are_the_resource_of_clusters(place, capsys):
    words = [
        "the",
        "sea",
        "house",
        "of",
        "and",
        "to",
        "a",
        "in",
        "was",
        "he",
        "she",
        "it",
        "old",
        "man",
        "way",
        "day",
    ]
    vectors = place / "vectors.txt"
    vectors.write_text("".join(f"{word} {i % 3} {i} 1\n" for i, word in enumerate(words)))
    run(place / "small", "--tokens", 1500, "--no-steering", "--vectors", vectors, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert str(vectors) in printed["clusters"]["resource"]
    assert 0 < printed["clusters"]["tokens_without"] < 1
    layer = printed["runs"][0]["bases"][0]["layers"][0]
    assert 0 <= layer["semantic_entropy"]["value"] < layer["token_entropy"]["value"]


def test_a_long_document_gives_a_sixteenth_of_the_text(place, monkeypatch):
    lengths = [4, 5000, 30, 1, *[100] * 20]  # of one token: left out
    monkeypatch.setattr(
        card_lib, "open_documents", lambda tokenizer, data: (np.arange(length) for length in lengths)
    )
    run = card_lib.Run("base", *shared.load(argparse.Namespace(run=str(place / "base"), step=None)))
    found = card_lib.documents(run, 320)
    assert [len(ids) for ids in found] == [4, *[20] * 15, 16]
    lengths = [4, 5000, 30, 1, 100, 100, 100]
    assert [len(ids) for ids in card_lib.documents(run, 40)] == [4, 8, 8, 8, 8, 4]  # too few for sixteenths
    lengths = [9000]
    assert [len(ids) for ids in card_lib.documents(run, 7000)] == [7000]


def test_the_sae_of_a_base_lm_is_made_once_for_its_parameters(facts, place, capsys, monkeypatch):
    monkeypatch.setattr(card_lib, "fit_text", None)
    options = "--tokens", 1500, "--no-steering", "--json"
    run(place / "base", "--dictionary-tokens", 4000, *options)
    there = json.loads(capsys.readouterr().out)["runs"][0]["bases"]
    assert [basis["name"] for basis in there] == ["coordinates", "sae", "random", "pca"]
    made = there[1]["dictionary"]
    assert made["tokens"] == 4000 and len(made["explained_variance"]) == len(made["dead_codes"]) == 3
    with pytest.raises(TypeError):  # other tokens: it would be made again
        run(place / "base", "--dictionary-tokens", 5000, *options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "200"], r"--tokens: \d+ tokens of \d+ documents are too few for an interval; at least"),
        (["--tokens", "0"], "--tokens = 0: must be 1 or more"),
        (["--seed", "-1"], "--seed = -1: must be 0 or more"),
        (["--labels", "none.jsonl"], "--labels = none.jsonl: No such file or directory; check the path"),
        (["--conllu", "none"], "--conllu = none: No such file"),
        (["--vectors", "none"], "--vectors = none: No such file"),
        (["--sae-probes"], "--sae-probes: its data are not installed"),
        (["--json", "nowhere/card.json"], "--json = nowhere/card.json: there is no folder nowhere; make it"),
        (["--out", "nowhere/card.svg"], "--out = nowhere/card.svg: there is no folder nowhere; make it"),
        (["--sae", "nowhere"], r"--sae = nowhere: has no dictionary\.npz: give a folder of topklm sae train"),
        (["--out", "card.png"], r"--out = card.png: must be a file that ends in \.svg"),
        (["--against", "gs://bucket/run"], r"RUN = gs://bucket/run"),
    ],
)
def test_what_is_not_allowed_is_named(place, arguments, words):
    with pytest.raises(UserError, match=words):
        run(place / "small", *arguments)


def test_saes_that_are_given_take_the_place_of_the_own_one(place):
    asked = [argparse.Namespace(run=str(place / name), step=None) for name in ("base", "seed")]
    runs = [card_lib.Run(one.run, *shared.load(one)) for one in asked]
    base, other = runs
    d = MODEL.d_model

    def given(kind, of, layers=(0, 1, 2)):
        eye = np.broadcast_to(np.eye(d, dtype=np.float32), (len(layers), d, d)).copy()
        facts = {**folder.facts_of(of.model, layers), "tokens": 10}
        made = Dictionary(kind, 4, np.zeros((len(layers), d), np.float32), eye, eye, facts)
        return f"{kind}-{layers}", made, layers

    def found(*saes):
        common = card_lib.Common(
            runs, [], np.zeros(1), [], seed=0, dictionary_tokens=1, saes=saes, steers=False, progress=None
        )
        return [sae.kind for sae in card_lib._saes(common, base, [], d, 4)]

    both = [given("sae", base), given("sae-batchtopk", base)]
    assert found(*both, given("sae-gba", other)) == ["sae", "sae-batchtopk"]
    for saes, words in (
        ([given("sae", other)], "--sae: none is of"),
        ([*both, given("sae", base)], "is the second of its kind"),
        ([given("sae", base, (0, 1))], "is of the layers 0, 1: the card needs all of"),
    ):
        with pytest.raises(UserError, match=words):
            found(*saes)


def test_the_exit_code_of_a_mistake_is_2(place, capsys):
    assert cli.run(["neurons", "card", str(place / "small"), "--labels", "none.jsonl"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
