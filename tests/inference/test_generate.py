import jax.numpy as jnp
import numpy as np
import pytest

import topklm
from topklm.inference.scheduler import generate_tokens

PROMPT = "The old baker"


@pytest.fixture(scope="module")
def model(finished_run):
    return topklm.load(finished_run)


def continuation(model, prompt, *, max_new_tokens=12, temperature=0.0, seed=0, stop_token=-1):
    """Of token ids; nothing stops it unless asked to."""
    return generate_tokens(
        model.config.model,
        model.params,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop_token=stop_token,
    )


def tokens_of(model, text):
    return np.asarray(model.to_tokens(text))[0].tolist()


def test_the_prompt_comes_first(model):
    text = model.generate(PROMPT, max_new_tokens=4)
    assert isinstance(text, str)
    assert text.startswith(PROMPT)
    assert model.generate(PROMPT, max_new_tokens=0) == PROMPT


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model):
    texts = [model.generate(PROMPT, 20, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_0_takes_the_most_likely_token_each_time(model):
    context = model.config.model.context_length
    tokens = tokens_of(model, PROMPT)
    prompt_length = len(tokens)
    for _ in range(context - prompt_length + 4):  # a little beyond the context
        seen = tokens[-context:]
        # One shape, so that this compiles once; what follows a position cannot change it.
        padded = jnp.asarray([seen + [0] * (context - len(seen))])
        tokens.append(int(jnp.argmax(model(padded)[0, len(seen) - 1])))
    greedy = continuation(model, tokens[:prompt_length], max_new_tokens=len(tokens) - prompt_length)
    assert greedy == tokens[prompt_length:]


def test_temperature_0_does_not_depend_on_the_seed(model):
    assert model.generate(PROMPT, 8, 0.0, seed=1) == model.generate(PROMPT, 8, 0.0, seed=2)


def test_a_low_temperature_is_almost_greedy_and_a_high_one_is_not(model):
    prompt = tokens_of(model, PROMPT)
    greedy = continuation(model, prompt)
    assert continuation(model, prompt, temperature=1e-5) == greedy
    assert continuation(model, prompt, temperature=100.0) != greedy


def test_samples_follow_the_probabilities_of_the_model(model):
    prompt, n = tokens_of(model, PROMPT), 400
    logits = np.asarray(model(np.asarray([prompt]))[0, -1], np.float64)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    drawn = [continuation(model, prompt, max_new_tokens=1, temperature=1.0, seed=s)[0] for s in range(n)]
    best = int(np.argmax(probabilities))
    expected, deviation = n * probabilities[best], np.sqrt(n * probabilities[best])
    assert abs(drawn.count(best) - expected) < 5 * deviation


def test_a_list_of_prompts_gives_a_list_of_texts(model):
    prompts = [PROMPT, "", "A letter"]
    texts = model.generate(prompts, max_new_tokens=6, seed=5)
    assert texts == [model.generate(prompt, max_new_tokens=6, seed=5) for prompt in prompts]
    assert model.generate([], max_new_tokens=6) == []


def test_of_a_long_prompt_the_last_tokens_count(model):
    long_text = "The tired sailor hid a small lantern by the river. " * 10
    prompt = tokens_of(model, long_text)
    context = model.config.model.context_length
    assert len(prompt) > 2 * context
    assert continuation(model, prompt) == continuation(model, prompt[-context:])
    assert model.generate(long_text, max_new_tokens=3).startswith(long_text)


def test_generation_ends_at_the_stop_token_which_is_left_out(model):
    prompt = tokens_of(model, PROMPT)
    free = continuation(model, prompt, temperature=1.0)
    stop = free[5]
    stopped = continuation(model, prompt, temperature=1.0, stop_token=stop)
    assert stopped == free[: free.index(stop)]


def test_the_separator_ends_a_text(model):
    separator = model.tokenizer.separator_id
    prompt = tokens_of(model, PROMPT)
    hot = {"max_new_tokens": 400, "temperature": 100.0, "seed": 0}  # nearly uniform: it comes up soon
    free = continuation(model, prompt, **hot)
    assert separator in free
    expected = PROMPT + model.tokenizer.decode(free[: free.index(separator)])
    assert model.generate(PROMPT, **hot) == expected


def test_an_empty_prompt_begins_a_document(model):
    assert model.generate("", 8, 0.0) == model.tokenizer.decode(
        continuation(model, [model.tokenizer.separator_id], max_new_tokens=8, stop_token=0)
    )


@pytest.mark.parametrize("temperature", [-0.5, float("nan")])
def test_a_temperature_below_0_is_refused(model, temperature):
    with pytest.raises(ValueError, match=r"temperature = .*: must be 0 or more"):
        model.generate(PROMPT, temperature=temperature)


def test_no_tokens_at_all_are_refused(model):
    with pytest.raises(ValueError, match="prompt is empty"):
        continuation(model, [])
