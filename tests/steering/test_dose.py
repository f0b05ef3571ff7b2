"""A neuron's dose-response against `generate`, and against figures of its own texts taken one by one."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import saved_runs

import topklm
from topklm.steering import Sampled, dose
from topklm.steering import concepts as concepts_lib
from topklm.steering.concepts import Concept

SAMPLED = Sampled(prompts=("The", "Was", "Her"), samples=3, max_new_tokens=9, temperature=0.9, seed=5)
NEURON, VALUES = (0, 3), [0.0, 30.0]


class Recording(Concept):
    """Keeps the tokens of every text that it is asked about."""

    seen: ClassVar[list[list[int]]] = []

    def count(self, tokens, text):
        self.seen.append(list(tokens))
        return super().count(tokens, text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    saved_runs.save(folder, [3])
    return topklm.load(folder)


@pytest.fixture(scope="module")
def concepts():
    return [Recording("input", "every third token", tuple(range(0, 256, 3))), concepts_lib.of_regex("[a-f]")]


@pytest.fixture(scope="module")
def responses(model, concepts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dose, "_MAX_ROWS", 2)  # 27 texts: the last call is filled up
        return dose.respond(model, NEURON, VALUES, concepts, SAMPLED)


def test_every_text_is_that_of_generate_with_the_neuron_set(model, responses):
    assert [response.value for response in responses] == [None, *VALUES]
    for response in responses:
        steer = {} if response.value is None else {NEURON: response.value}
        for sample in range(SAMPLED.samples):
            for first in (0, 1):  # two at a time, for which the programs are there
                prompts = SAMPLED.prompts[first : first + 2]
                whole = model.generate(prompts, 9, 0.9, SAMPLED.seed + sample, steer=steer)
                texts = [response.texts[first + row][sample] for row in range(2)]
                assert whole == [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    assert responses[0].texts != responses[2].texts


def test_the_figures_are_those_of_the_texts_one_by_one(model, concepts, responses):
    tokens = [concepts[0].seen[number * 9 : number * 9 + 9] for number in range(3)]
    for response, of_value in zip(responses, tokens, strict=True):
        texts = [text for of_prompt in response.texts for text in of_prompt]
        n_tokens = sum(map(len, of_value))
        hits = sum(len([c for c in text if c in "abcdefABCDEF"]) for text in texts)
        thirds = sum(1 for one in of_value for token in one if token % 3 == 0 and token < 256)
        assert response.n_tokens == n_tokens
        assert response.rates["regex"].value == pytest.approx(hits / n_tokens)
        assert response.rates["input"].value == pytest.approx(thirds / n_tokens)
        assert response.rates["input"].low <= response.rates["input"].value <= response.rates["input"].high
        for n in dose.DISTINCT:
            expected = np.mean([dose.distinct(one, n) for one in of_value])
            assert response.distinct[n].value == pytest.approx(expected)
        losses = []
        for number, one in enumerate(of_value):
            prompt = np.asarray(model.to_tokens(SAMPLED.prompts[number // 3]))[0].tolist()
            logits = np.asarray(model(np.array([prompt + one])), np.float64)[0]
            logits -= logits.max(axis=1, keepdims=True)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            losses += [-log_p[len(prompt) - 1 + at, token] for at, token in enumerate(one)]
        assert response.perplexity.value == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)


def test_what_cannot_be_measured_is_refused(model, concepts):
    with pytest.raises(ValueError, match="max_new_tokens = 40: a prompt of 4 tokens"):
        dose.respond(model, NEURON, [1.0], concepts, dataclasses.replace(SAMPLED, max_new_tokens=40))
    with pytest.raises(ValueError, match="samples = 0 of 3 prompts"):
        dose.respond(model, NEURON, [1.0], concepts, dataclasses.replace(SAMPLED, samples=0))
