"""`topklm neurons find` on a small run whose neurons are made to stand for something."""

import argparse
import json

import numpy as np
import pytest
import saved_runs

import topklm
from topklm.commands.neurons_find import FIND
from topklm.errors import UserError
from topklm.neurons import NeuronsFolder
from topklm.neurons import segment as segment_lib
from topklm.neurons.labels import Labels
from topklm.neurons.store import Metadata, StoreWriter

D, LAYERS = saved_runs.MODEL.d_model, (0, 1)  # the store's; of the model, only layer 0 has TopK
TEXTS = ["the sea and the Sea", "no ships at sea [bold]", "\x1b[2J towns"]
HOSTILE = "[red]<b>=1"


def write_store(run, step, texts=TEXTS, everywhere=(5,), **metadata):
    """A store in which neuron 3 of layer 1 is active where "sea" is, and some of layer 0 everywhere.

    If they are several, those of layer 1 are so too.
    """
    tokenizer = saved_runs.tokenizer()
    documents = [tokenizer.encode(text) for text in texts]
    facts = {
        "run": run.name,
        "step": step,
        "tokenizer_sha256": tokenizer.sha256,
        "source": "made up",
        "kind": "topk",
        "layers": LAYERS,
        "d_model": D,
        "topk_k": 8,
        "topk_activation": "relu",
        "context_length": 32,
    }
    folder = NeuronsFolder(run, step)
    folder.path.mkdir(parents=True, exist_ok=True)
    writer = StoreWriter(folder.store, Metadata(**{**facts, **metadata}))
    for number, (text, ids) in enumerate(zip(texts, documents, strict=True)):
        dense = np.zeros((2, len(ids), D))
        dense[: 1 + (len(everywhere) > 1), :, list(everywhere)] = 1.0
        for at in range(len(text)):
            if text[at : at + 3] in ("sea", "Sea"):
                dense[1, at : at + 3, 3] = 2.0
                dense[1, at + 2, 9] = 1.0
        numbers = np.full(len(ids), number)
        writer.append(segment_lib.from_dense(ids, numbers, np.zeros(len(ids)), dense))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two checkpoints, both with activations; those of the first are of another text."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    saved_runs.save(folder, [10, 24])
    write_store(folder, 10, ["sea"])
    write_store(folder, 24)
    Labels(NeuronsFolder(folder, 24).labels).set(1, 3, HOSTILE)
    return folder


@pytest.fixture
def find(capsys, monkeypatch):
    """Runs the command; gives back what it printed, with --json what that says."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        parser = argparse.ArgumentParser()
        FIND.add_arguments(parser)
        parsed = parser.parse_args([str(argument) for argument in arguments])
        FIND.run(parsed)
        output, errors = capsys.readouterr()
        assert errors == ""
        return json.loads(output) if parsed.json else output

    return call


def test_a_pattern_ranks_the_neuron_that_stands_for_it_first(find, run):
    found = find(run, "--regex", "sea", "--json")
    n_tokens = sum(len(text) for text in TEXTS)
    assert {name: found[name] for name in ("step", "regex", "ignore_case", "counted")} == {
        "step": 24,
        "regex": "sea",
        "ignore_case": True,
        "counted": "touched",
    }
    assert (found["n_tokens"], found["n_matches"], found["n_matched_tokens"]) == (n_tokens, 3, 9)
    first, second, third = found["neurons"]
    assert first == {
        "layer": 1,
        "neuron": 3,
        "n_active": 9,
        "threshold": first["threshold"],
        "n_firing": 9,
        "n_hits": 9,
        "precision": 1.0,
        "weighted_precision": 1.0,
        "recall": 1.0,
        "f1": 1.0,
        "label": HOSTILE,
    }
    assert (second["layer"], second["neuron"], second["label"]) == (1, 9, "")
    assert (second["precision"], second["recall"]) == (1.0, pytest.approx(1 / 3))
    assert (third["layer"], third["neuron"]) == (0, 5)
    assert third["precision"] == pytest.approx(9 / n_tokens)


def test_where_only_ends_count_the_neuron_of_the_last_token_comes_first(find, run):
    found = find(run, "--regex", "sea", "--ends", "--json")
    assert (found["counted"], found["n_matches"], found["n_matched_tokens"]) == ("ends", 3, 3)
    assert [(r["layer"], r["neuron"], r["f1"]) for r in found["neurons"][:2]] == [(1, 9, 1.0), (1, 3, 0.5)]


def test_case_layer_limit_and_step_narrow_what_is_found(find, run):
    assert find(run, "--regex", "sea", "--case", "--json")["n_matches"] == 2
    only = find(run, "--regex", "sea", "--layer", 0, "--json")["neurons"]
    assert [(r["layer"], r["neuron"]) for r in only] == [(0, 5)]
    assert len(find(run, "--regex", "sea", "--limit", 1, "--json")["neurons"]) == 1
    older = find(run, "--regex", "sea", "--step", 10, "--json")
    assert (older["step"], older["n_tokens"]) == (10, 3)


@pytest.mark.parametrize("digit", "07")
def test_a_number_in_double_quotes_is_a_text_and_without_them_an_id(find, run, digit):
    ids = saved_runs.tokenizer().encode(digit).tolist()
    assert ids != [int(digit)]
    assert find(run, "--token", f'"{digit}"', "--json")["token_ids"] == ids
    assert find(run, "--token", digit, "--json")["token_ids"] == [int(digit)]


def test_a_token_is_found_by_its_text_with_and_without_a_space_and_by_its_id(find, run):
    tokenizer = saved_runs.tokenizer()
    (token_id,) = tokenizer.encode("e").tolist()
    found = find(run, "--token", "e", "--json")
    assert (found["token_ids"], found["tokens"]) == ([token_id], ["e"])
    assert found["n_matched_tokens"] == found["n_matches"] == "".join(TEXTS).count("e")
    by_id = find(run, "--token", token_id, "--json")
    assert by_id == found


def test_the_tables_say_the_same_and_show_hostile_text_as_text(find, run):
    output = find(run, "--regex", "sea|\x1b")
    lines = output.splitlines()
    assert lines[0].startswith("'sea|\\x1b': 4 matches, 10 of 51 tokens (19.61%)")
    row = next(line for line in lines if HOSTILE in line)
    assert [float(figure) for figure in row.replace("│", " ").split()[:5]] == [1, 3, 0.947, 1, 0.9]
    assert "\x1b" not in output
    assert "by chance 0.2)" in output
    assert "'e': 5 matches, 5 of" in find(run, "--token", "e")


def test_what_is_nowhere_is_said_to_be_nowhere(find, run):
    assert find(run, "--regex", "ocean").startswith(
        "'ocean': 0 matches, 0 of 51 tokens (0.00%); nothing to rank"
    )
    found = find(run, "--regex", "ocean", "--json")
    assert (found["n_matches"], found["neurons"]) == (0, [])
    assert "no neuron is active there" in find(run, "--regex", "ships", "--layer", 1)


def test_the_neurons_of_a_text_are_those_of_the_model(find, run):
    active = topklm.load(run).active_neurons("a sea")
    found = find(run, "a sea", "--top", 3, "--json")
    assert (found["step"], found["text"]) == (24, "a sea")
    assert [token["token"] for token in found["tokens"]] == list("a sea")
    for position, token in enumerate(found["tokens"]):
        wanted = active[position + 1]  # the separator comes first
        assert len(wanted) > 3
        assert token["position"] == position
        assert token["n_active"] == [{"layer": 0, "n_active": len(wanted)}]
        got = [(n["layer"], n["neuron"], n["value"]) for n in token["neurons"]]
        assert got == [tuple(a) for a in wanted[:3]]


def test_a_text_may_be_read_with_an_older_checkpoint_and_without_any_activations(find, run, tmp_path):
    bare = tmp_path / "bare"
    saved_runs.save(bare, [7])
    for folder, step in ((bare, 7), (run, 10)):
        found = find(folder, "a sea", "--step", step, "--top", 99, "--json")
        assert found["step"] == step
        active = topklm.load(folder, step=step).active_neurons("a sea")
        assert [n["neuron"] for n in found["tokens"][4]["neurons"]] == [a.neuron for a in active[5]]


def test_the_table_of_a_text_has_a_line_for_each_token_and_labels_beside_the_neurons(find, run):
    text = "[/b]\x1b"
    active = topklm.load(run).active_neurons(text)
    named, labels = active[2][-1], Labels(NeuronsFolder(run, 24).labels)
    labels.set(named.layer, named.neuron, "[bold]odd[/bold]")
    try:
        output = find(run, text, "--layer", 0, "--top", 99)
    finally:
        labels.set(named.layer, named.neuron, "")
    assert "\x1b" not in output
    rows = [line.split("│")[1:3] for line in output.splitlines() if line.startswith("│")]
    assert [token.strip() for token, _ in rows] == ["[", "/", "b", "]", r"\x1b"]
    for position, (_, cell) in enumerate(rows, start=1):
        wanted = [f"{a.neuron}:{a.value:.3g}" for a in active[position]]
        if position == 2:
            wanted[-1] += " ([bold]odd[/bold])"
        got = cell.strip().replace(" ([bold]odd[/bold])", "") if position != 2 else cell.strip()
        assert got == ", ".join(wanted)
    assert f", +{len(active[1]) - 2} " in find(run, text, "--top", 2).splitlines()[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of TEXT, --regex and --token"),
        (["text", "--regex", "sea"], "give one of TEXT, --regex and --token"),
        ([""], "TEXT is empty"),
        (
            ["x" * 32],
            r"TEXT = 'x+': has 32 tokens, this model reads at most 31 and the separator; shorten it",
        ),
        (["sea\udcff"], r"'sea\\udcff' is no valid UTF-8"),
        (["a sea", "--layer", "1"], "layer = 1: must be a TopK layer, from 0 to 0"),
        (["sea", "--top", "0"], "--top = 0: must be 1 or more"),
        (["sea", "--ends"], "--ends: goes with --regex only"),
        (["--token", "e", "--case"], "--case: goes with --regex only"),
        (["--regex", "sea", "--limit", "0"], "--limit = 0: must be 1 or more"),
        (["--regex", "sea", "--layer", "2"], "layer = 2: must be one of 0, 1"),
        (["--regex", "("], r"regex = \(: is no regular expression"),
        (["--regex", "sea", "--step", "11"], r"step = 11: .* run topklm neurons harvest .*small --step 11"),
        (["--token", ""], "--token is empty"),
        (["--token", "sea"], "--token = 'sea': is 3 tokens of this model, 's', 'e', 'a'; give one of them"),
        (["--token", "257"], "--token = 257: ids are from 0 to 256; for the text of a number"),
        (["--token", "9" * 5000], "ids are from 0 to 256"),
        (["--token", '"17"'], "--token = '17': is 2 tokens of this model, '1', '7'; give one of them"),
    ],
)
def test_mistakes_are_named(find, run, arguments, message):
    with pytest.raises(UserError, match=message):
        find(run, *arguments)


def test_a_run_without_activations_or_without_anything_says_what_to_run(find, tmp_path):
    with pytest.raises(UserError, match="there is no such folder; check the path"):
        find(tmp_path / "nowhere", "--regex", "sea")
    with pytest.raises(UserError, match=r"there are no activations yet; run topklm neurons harvest .*empty"):
        (tmp_path / "empty").mkdir()
        find(tmp_path / "empty", "--regex", "sea")
    with pytest.raises(UserError, match="activations are kept on a disk; copy the run folder"):
        find("gs://bucket/run", "--regex", "sea")


def test_activations_of_something_else_are_refused(find, tmp_path):
    run = tmp_path / "run"
    saved_runs.describe(run)
    write_store(run, 24, tokenizer_sha256="ab" * 32)
    with pytest.raises(UserError, match="holds tokens of another tokenizer"):
        find(run, "--regex", "sea")
    NeuronsFolder(run, 24).path.rename(NeuronsFolder(run, 25).path)
    with pytest.raises(UserError, match="holds activations of step 24: delete it"):
        find(run, "--regex", "sea")


def test_a_store_that_was_only_begun_is_named(find, tmp_path):
    run = tmp_path / "run"
    saved_runs.describe(run)
    write_store(run, 24, [])
    with pytest.raises(UserError, match="is empty: run topklm neurons harvest"):
        find(run, "--regex", "sea")
    (NeuronsFolder(run, 24).store / "metadata.json").unlink()
    with pytest.raises(UserError, match="there are no activations here; run topklm neurons harvest"):
        find(run, "--regex", "sea")


def test_damaged_labels_are_named(find, tmp_path):
    run = tmp_path / "run"
    saved_runs.describe(run)
    write_store(run, 24)
    NeuronsFolder(run, 24).labels.write_text("{")
    with pytest.raises(UserError, match=r"labels\.json is damaged"):
        find(run, "--regex", "sea")
