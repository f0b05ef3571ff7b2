"""`topklm steer` on a small run with activations made by hand: what it prints, and what it refuses."""

import dataclasses
import json
import math

import numpy as np
import pytest
import saved_runs

from topklm import cli
from topklm.commands import steer
from topklm.errors import UserError
from topklm.neurons import NeuronsFolder
from topklm.neurons import segment as segment_lib
from topklm.neurons.ablate_set import Estimate
from topklm.neurons.store import Metadata, Store, StoreWriter
from topklm.steering import Sampled, dose, survey
from topklm.steering.dose import Response

D, STEP = saved_runs.MODEL.d_model, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Neuron 3 of layer 0 is active at "e", neuron 5 everywhere, the others at random or never."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    saved_runs.save(folder, [STEP])
    tokenizer = saved_runs.tokenizer()
    metadata = Metadata(
        run="small",
        step=STEP,
        tokenizer_sha256=tokenizer.sha256,
        source="made up",
        kind="topk",
        layers=(0,),
        d_model=D,
        topk_k=8,
        topk_activation="relu",
        context_length=32,
    )
    place = NeuronsFolder(folder, STEP)
    place.path.mkdir(parents=True)
    writer = StoreWriter(place.store, metadata)
    rng = np.random.default_rng(0)
    for number in range(4):
        text = "the sea and the ships were seen by all the people there " * 2
        ids = tokenizer.encode(text)
        dense = np.maximum(rng.standard_normal((1, len(ids), D)), 0)
        dense[0, :, 9:] = 0
        dense[0, :, 5] = 1.0
        dense[0, :, 3] = [2.0 if character == "e" else 0.0 for character in text]
        writer.append(segment_lib.from_dense(ids, np.full(len(ids), number), np.zeros(len(ids)), list(dense)))
    return folder


DOSE = ("--values", "0,40", "--samples", "1", "--max-new-tokens", "6", "--prompt", "The", "--prompt", "It")
VALUES = [("unsteered", None), ("0", 0.0), ("40", 40.0)]
SURVEY = ("--survey", "--neutral-prompts", "3", "--directions", "4", "--neurons", "5", "--values", "0.5,1")


def made_up(value, rate):
    """What `dose.respond` would give; its own tests run it."""
    estimate = Estimate(rate, rate - 0.1, rate + 0.1)
    texts = [[f" sea at {value}\x1b[2J"], [" [bold]"]]
    varied = {n: Estimate(0.9, 0.8, 1.0) for n in dose.DISTINCT}
    return Response(value, texts, 12, {}, Estimate(20.0, 15.0, 25.0), varied), estimate


@pytest.fixture
def asked(monkeypatch):
    """Takes the place of the generation; keeps what it was asked for."""
    calls = []

    def respond(model, neuron, values, concepts, sampled, *, mode, positions, report):
        calls.append((neuron, values, [one.name for one in concepts], sampled, mode, positions))
        report(1)
        found = [
            made_up(value, rate) for value, rate in zip([None, *values], (0.2, 0.3, math.nan), strict=True)
        ]
        return [dataclasses.replace(one, rates={c.name: r for c in concepts}) for one, r in found]

    monkeypatch.setattr(dose, "respond", respond)
    return calls


def test_one_neuron_prints_texts_side_by_side_and_a_table(run, asked, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    cli.dispatch(["steer", str(run), "--neuron", "0:3", *DOSE, "--mode", "add", "--positions", "prompt"])
    out = capsys.readouterr().out
    for part in (
        "unsteered",
        "sea at 40.0\\x1b",
        "[bold]",
        "20.0 [10.0, 30.0]",
        "dist-3",
        "identity lens",
    ):
        assert part in out
    assert "\x1b" not in out
    sampled = Sampled(("The", "It"), samples=1, max_new_tokens=6)
    assert asked == [((0, 3), [0.0, 40.0], ["next", "raised"], sampled, "add", "prompt")]


def test_nothing_is_cut_on_a_narrow_terminal(run, asked, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cli.dispatch(["steer", str(run), "--neuron", "0:3", *DOSE])
    out = capsys.readouterr().out
    tables = [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
    assert "…" not in out and max(map(len, tables)) <= 80
    rows = [[cell.strip() for cell in line.split("│")] for line in tables if " sea at " in line]
    assert [row[1:3] for row in rows] == [[name, f"sea at {value}\\x1b[2J"] for name, value in VALUES]
    cli.dispatch(["steer", str(run), *SURVEY])
    out = capsys.readouterr().out
    tables = [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
    assert "…" not in out and max(map(len, tables)) <= 80
    heads = next(line for line in tables if "┃" in line)
    for head in ("run", "value", "KL", "gain", "rand", "prompt"):
        assert head in heads


def test_one_neuron_as_json_has_all_of_it(run, asked, capsys):
    cli.dispatch(["steer", str(run), "--neuron", "0:3", *DOSE, "--concept-words", "sea,ship", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [response["value"] for response in found["responses"]] == [None, 0.0, 40.0]
    assert found["responses"][2]["rates"]["words"]["value"] is None  # JSON has no NaN
    assert list(found["concepts"]) == ["words"]
    assert (found["layer"], found["neuron"], found["step"]) == (0, 3, STEP)


def test_a_dead_neuron_has_no_tokens_that_follow_it(run, asked, capsys):
    cli.dispatch(["steer", str(run), "--neuron", "0:20", *DOSE, "--json"])
    assert list(json.loads(capsys.readouterr().out)["concepts"]) == ["raised"]


def test_a_survey_prints_shares_and_writes_json(run, tmp_path, capsys):
    file = tmp_path / "survey.json"
    cli.dispatch(["steer", str(run), *SURVEY, "--against", str(run), "--json", str(file)])
    out = capsys.readouterr().out
    assert "concept: next tokens" in out
    one, other = json.loads(file.read_text())["surveys"]
    assert one == other  # the same run twice, with the same seed
    assert one["layers"][0]["n_alive"] == 9
    assert len(one["neurons"]) == 5
    assert one["settings"]["strengths"] == [0.5, 1.0]


def test_the_former_name_of_a_flag_goes_on_working(monkeypatch):
    asked = []
    monkeypatch.setattr(steer, "run", asked.append)
    for flags in (["--count", "5"], ["--neurons", "5"]):
        cli.dispatch(["steer", "runs/x", "--survey", *flags, "--layers", "2,0"])
    assert [(one.count, one.layers) for one in asked] == [(5, (0, 2))] * 2


REFUSED = [
    (("--neuron", "3-117"), "--neuron = 3-117: must be LAYER:NEURON"),
    (("--neuron", "0:99"), "--neuron = 0:99: neuron = 99: must be an integer from 0 to 31"),
    (("--neuron", "0:3", "--values", "1,nan"), "--values = 1,nan: value = nan"),
    (("--neuron", "0:3", "--values", "1,two"), "--values = 1,two: 'two' is no number"),
    (("--neuron", "0:20", "--values", "1x"), "the largest activation of 0:20 is not known, or it is never"),
    (("--neuron", "1:3", "--values", "1x"), "the largest activation of 1:3 is not known"),  # is not harvested
    (("--neuron", "0:3", "--values", "1", "--mode", "ablate"), "mode ablate has no use for values"),
    (("--neuron", "0:3", "--values", "2x", "--mode", "scale"), "leave the x out"),
    (("--neuron", "0:3", "--samples", "0"), "--samples = 0: must be 1 or more"),
    (("--neuron", "0:3", "--temperature", "-1"), "--temperature = -1.0: must be 0 or more"),
    (("--neuron", "0:3", "--max-new-tokens", "40"), "--max-new-tokens = 40: a prompt of"),
    (("--neuron", "0:3", "--prompts", "no/such"), "--prompts = no/such: cannot be read"),
    (("--neuron", "0:3", "--prompt", "a", "--prompts", "b"), "leave one of the two out"),
    (("--neuron", "0:3", "--concept-regex", "("), "is no regular expression"),
    (("--neuron", "0:3", "--layers", "0"), "--layers: goes with --survey only"),
    (("--survey", "--prompt", "a"), "--prompt: goes with --neuron only"),
    (("--survey", "--values", "0,1"), "--values = 0,1: must be above 0"),
    (("--survey", "--layers", "a"), "--layers = a: must be numbers"),
    (("--survey", "--layers", "1"), "layer 1: .*has activations of the layers 0;"),
    (("--survey", "--count", "0"), "--count = 0: must be 1 or more"),
    (("--survey", "--bound", "nan"), "--bound = nan: must be above 0"),
    (("--survey", "--neuron", "0:3"), "not allowed with argument"),
    ((), "one of the arguments --neuron --toward --survey is required"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_what_is_wrong_is_said_in_one_line(run, flags, message):
    with pytest.raises(UserError, match=message) as refused:
        cli.dispatch(["steer", str(run), *flags])
    assert "\n" not in str(refused.value)


def test_a_survey_without_activations_says_how_to_get_them(tmp_path):
    saved_runs.save(tmp_path / "bare", [STEP])
    with pytest.raises(UserError, match="run topklm neurons harvest"):
        cli.dispatch(["steer", str(tmp_path / "bare"), "--survey"])


def test_values_may_be_in_units_of_the_largest_activation_that_was_harvested(run, asked, capsys):
    cli.dispatch(["steer", str(run), "--neuron", "0:3", *DOSE[2:], "--values", "0.5x,1x"])
    assert asked[0][:2] == ((0, 3), [1.0, 2.0])
    capsys.readouterr()


TOWARD = ("--toward", "were", "--neutral-prompts", "3", "--directions", "4", "--limit", "3", "--bound", "100")


def test_neurons_toward_a_pattern_are_ranked_on_half_of_the_documents_and_written_on_the_other(
    run, asked, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["steer", str(run), *TOWARD, "--values", "0,0.5x", "--samples", "1"]
    drawn = []
    neutral = survey.neutral_prompts

    def draw(*args):
        drawn.append(args[-1])
        return neutral(*args)

    monkeypatch.setattr(survey, "neutral_prompts", draw)
    cli.dispatch([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == ["w"]
    gains = [one["gain_per_nat"] for one in found["neurons"]]
    assert len(gains) == 3 and gains == sorted(gains, reverse=True)
    # No token of the prompts for ranking is of a document of those for texts.
    assert not (drawn[0] & drawn[1]).any() and (drawn[0] | drawn[1]).all()
    ((neuron, values, concepts, sampled, mode, _),) = asked
    assert neuron == (found["neurons"][0]["layer"], found["neurons"][0]["neuron"])
    assert concepts == ["regex"] and mode == "clamp" and len(sampled.prompts) == 8
    assert all(
        prompt in "the sea and the ships were seen by all the people there " * 2 for prompt in sampled.prompts
    )
    largest = float(Store(NeuronsFolder(run, STEP).store).largest_activation(*neuron))
    assert values == [0.0, 0.5 * largest]
    assert found["doses"][0]["neuron"] == neuron[1] and len(found["doses"][0]["responses"]) == 3
    cli.dispatch([*arguments, "--top", "2", "--prompt", "The"])
    out = capsys.readouterr().out
    assert len(asked) == 3 and asked[-1][3].prompts == ("The",)
    assert out.count("prompts of the other half of the documents") == 2 and "gain/KL" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--toward", "sea", "--concept-regex", "a"], "--concept-regex: goes with --neuron only"),
        (["--toward", "sea", "--against", "b"], "--against: goes with --survey only"),
        (["--neuron", "0:3", "--top", "2"], "--top: goes with --toward only"),
        (["--toward", "("], r"--toward = \(: is no regular expression"),
        (["--toward", "qq"], "0 matches in the harvested text, and no token begins one"),
        (["--toward", "were", "--neutral-prompts", "3", "--bound", "1e-9"], "no neuron stays within --bound"),
    ],
)
def test_wrong_questions_toward_a_pattern_are_refused(run, arguments, message):
    with pytest.raises(UserError, match=message):
        cli.dispatch(["steer", str(run), *arguments])
