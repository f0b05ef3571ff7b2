"""Verdicts on claims: intervals against SciPy, the rules case by case, figures read off the JSON of verbs."""

import math

import numpy as np
import pytest
from scipy import stats

from topklm.eval import claims
from topklm.eval.claims import Figure


def figure(ours, theirs, *, up=True, margin=0.0, **others):
    values = {"rival": tuple(theirs), **{name: tuple(x) for name, x in others.items()}}
    return Figure("f", "", up, margin, tuple(ours), values, tuple(values))


def test_the_interval_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 5))
    wanted = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert figure(ours, theirs).interval == pytest.approx((wanted.low, wanted.high))
    assert all(math.isnan(end) for end in figure([1.0], [2.0]).interval)


@pytest.mark.parametrize(
    ("gaps", "up", "margin", "verdict"),
    [
        ([1.0, 1.1, 0.9], True, 0.0, "better"),
        ([1.0, 1.1, 0.9], False, 0.0, "worse"),
        ([1.0, 1.1, 0.9], False, 2.0, "no worse"),
        ([-0.01, 0.01, 0.0], True, 0.1, "no worse"),
        ([-0.01, 0.01, 0.0], True, 0.001, "open"),
        ([-1.0, 1.0, 0.0], True, 0.1, "open"),
        ([1.0], True, 0.0, "open"),  # one seed says nothing
    ],
)
def test_a_verdict_is_where_the_interval_lies(gaps, up, margin, verdict):
    assert figure(gaps, [0.0] * len(gaps), up=up, margin=margin).verdict == verdict


def test_the_best_baseline_is_compared():
    three = figure([3.0, 3.0], [1.0, 1.0], other=[2.0, 2.0])
    assert three.rival == "other"
    assert three.differences == (1.0, 1.0)
    fewer = figure([3.0, 3.0], [1.0, 1.0], up=False, other=[2.0, 2.0])
    assert fewer.rival == "rival"


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ([], "unmeasured"),
        (["better", "no worse"], "holds"),
        (["better", "open"], "open"),
        (["better", "worse", "open"], "mixed"),
        (["no worse", "worse", "open"], "fails"),
    ],
)
def test_a_claim_is_judged_by_all_its_figures(words, verdict):
    of_word = {
        "better": figure([1.0, 1.0], [0.0, 0.0]),
        "no worse": figure([0.0, 0.0], [0.0, 0.0], margin=0.1),
        "worse": figure([0.0, 0.0], [1.0, 1.0]),
        "open": figure([0.0, 1.0], [1.0, 0.0]),
    }
    assert all(one.verdict == word for word, one in of_word.items())
    assert claims.verdict([of_word[word] for word in words]) == verdict


def layer(value):
    return {
        "token_entropy": {"value": value},
        "semantic_entropy": {"value": None},
        "probing": {"topic": {"auc": {"1": {"value": 0.5 + value / 10}}}},
    }


def card_run(kind, bases, flops=2e12, bits=1.6):
    made = []
    for name, values in bases.items():
        basis = {"name": name, "layers": [layer(value) for value in values]}
        if name.startswith("sae"):
            basis |= {"dictionary": {"training_flops": 1e12}, "detectors": {"n_fair": 20}}
        made.append(basis | ({"detectors": {"n_fair": 30}} if name == "own" else {}))
    return {"kind": kind, "bases": made, "training_flops": flops, "bits_per_byte": bits}


def spliced(kind, factor):
    return {"kind": kind, "together": {"loss": 3.0, "loss_reconstructed": 3.0 * factor}}


def surveyed(*shares):
    names = [*map(str, range(len(shares) - 1)), "all"]
    layers = [
        {"layer": name, "concepts": {kind: {"specific": {"share": one}} for kind in ("next", "input")}}
        for name, one in zip(names, shares, strict=True)
    ]
    return {"layers": layers}


def report(dictionary, r, beside=(), matches=()):
    own = {"dictionary": dictionary, "steps": [0, 10, 100, 800], "reference": 800, **r}
    return {
        "settings": {"dictionary": dictionary, "reference": 800},
        "beside": [own, *beside],
        "matched": [
            {
                "dictionary": name,
                "rows": [
                    {"step": step, "matched": value / (1 if step == 800 else 9), "matched_shifted": 0.01}
                    for step in (100, 800)
                ],
            }
            for name, value in matches
        ],
    }


@pytest.fixture
def measured():
    saes = {"coordinates": [1, 1, 9], "sae-a": [2, 4, 9], "sae-b": [3, 5, 9], "random": [0, 0, 9]}
    topk = [card_run("topk", {"own": [4, 6], "random": [0, 0]}, bits=1.64) for _ in range(2)]
    base = [card_run("base", saes) for _ in range(2)]
    survey, other = surveyed(0.2, 0.4, 0.9), surveyed(0.1, 0.1, 0.1, 0.1)
    curve = {"same_index": [0.1, 0.2, 0.7, 1.0], "other_index": [0.1, 0.1, 0.3, 0.3]}
    slow = {"dictionary": "coordinates", "steps": [0, 100, 800], "reference": 800, "same_index": [0, 0.4, 1]}
    return {
        "capabilities": [
            {
                "figures": [
                    {
                        "task": task,
                        "part": part,
                        "measure": kind,
                        "runs": [{"value": 1.0}] * 2,
                        "against": [{"value": 1.1}] * 2,
                        "difference": {"low": -0.2, "high": 0.001, "margin": 0.01},
                    }
                    for task, part, kind in [
                        ("heldout", "", "bits_per_byte"),
                        ("blimp", "", "acc"),
                        ("blimp", "syntax", "acc"),
                        ("blimp", "", "bits_per_byte"),
                    ]
                ]
            }
        ],
        "card": [{"runs": [*topk, *base], "probing": {"sets": [{"name": "topic"}]}}],
        "dictionaries": [{"autoencoders": [spliced("sae-a", 2.0), spliced("sae-b", 1.5)]}] * 2,
        "steering": [{"surveys": [survey, other]}] * 2,
        "formation": [report("", curve, [slow])] * 2,
        "stability": [
            report("", curve, matches=[("", 0.2)]),
            report("", curve, matches=[("", 0.3)]),
            report("coordinates", curve, matches=[("coordinates", 0.4), ("sae-chained", 0.9)]),
            report("coordinates", curve, matches=[("coordinates", 0.5)]),
        ],
    }


def figures_of(name, measured):
    claim = next(claim for claim in claims.CLAIMS if claim.name == name)
    return list(claim.figures(measured))


def test_figures_are_read_off_the_measurements(measured):
    names = [one.name for one in figures_of("capabilities", measured)]
    assert names == ["heldout, bits per byte", "blimp, accuracy"]
    entropy, detectors, topic = figures_of("interpretability", measured)
    assert entropy.ours == (5, 5)
    assert entropy.others["sae-a"] == (3, 3)  # of the layers that both have, the third is left out
    assert (entropy.rival, entropy.verdict) == ("sae-a", "worse")
    assert (detectors.ours, detectors.others["sae-b"]) == ((30, 30), (20, 20))
    assert detectors.verdict == "better"
    assert (topic.ours, topic.rival) == ((1, 1), "sae-b")
    bits, cost = figures_of("trade-off", measured)
    assert (bits.ours, bits.rival, bits.others["Base LM"]) == ((1.64, 1.64), "sae-b", (1.6, 1.6))
    assert bits.others["sae-b"] == pytest.approx((2.4, 2.4))
    assert (cost.ours, cost.others["sae-a"]) == ((2, 2), (3, 3))
    following, inputs = figures_of("steering", measured)
    assert following.ours == inputs.ours == pytest.approx((0.3, 0.3))  # not the entry of all layers
    (formation,) = figures_of("formation", measured)
    assert formation.ours == (0.7, 0.7)  # at step 100 of 800
    assert formation.others == {"the nearest other neuron": (0.3, 0.3), "Base LM, coordinates": (0.4, 0.4)}
    (stability,) = figures_of("stability", measured)
    assert stability.ours == (0.2, 0.3)
    assert stability.others == {"Base LM, coordinates": (0.4, 0.5), "text shifted": (0.01, 0.01)}
    assert stability.verdict == "worse"


def test_a_chain_begins_at_an_eighth_of_the_training():
    log = [0, 1, 2, 4, 8, 16, 32, 64, 91, 128, 181, 256, 362, 512, 724, 1024, 1200, 1300]
    assert claims.late_steps(log) == [181, 362, 724, 1300]
    assert claims.late_steps([0, 24]) == [0, 24]


def test_each_claim_has_a_verdict_and_a_reason_where_it_has_none(measured):
    del measured["steering"], measured["dictionaries"]
    found = {one["claim"]: one for one in claims.judge(measured, {"steering": "no store"})}
    assert found["steering"]["verdict"] == "unmeasured"
    assert found["steering"]["why"] == "no store"
    assert found["interpretability"]["verdict"] == "mixed"
    assert found["trade-off"]["verdict"] == "holds"
    assert len(found["trade-off"]["figures"]) == 1
    assert found["stability"]["verdict"] == "fails"
    study = {"claims": [*found.values()], "topk": ["a", "b"], "steps": [800], "settings": {}}
    page = claims.page({"small": study}, {"sae-a": "TopK SAE"})
    assert "**small: unmeasured**: no store" in page
    assert "| token entropy, nats | 5.000 |" in page
    assert "**TopK SAE 3.000**" in page
