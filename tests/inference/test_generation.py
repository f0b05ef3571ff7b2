"""Generation with a cache gives, token for token, what a loop over the whole model gives."""

import dataclasses
import os
import pathlib

from helpers import ROOT, devices
import jax
import numpy as np
from plain_loop import CONFIG, compilations, limited_logits, params_of, plain_loop
import pytest

from topklm.inference.scheduler import Generation
from topklm.inference.sequence import RowSampling, Sampling, bucket, cache_bucket, draw, held
from topklm.inference.steps import STEPS

PROMPT = [3, 14, 15, 9, 26]
LIMITED = Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=2**40 + 7)


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()


def texts(config, prompts, sampling, n, *, stop_token=-1, steps=STEPS, **options):
    """The new tokens of each row."""
    generation = Generation(
        config, params_of(config), prompts, sampling, max_new_tokens=n, stop_token=stop_token, **options
    )
    while not generation.done:
        generation.advance(steps)
    return [text[len(prompt) :] for text, prompt in zip(generation.texts, prompts, strict=True)]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"layer_stack": "unrolled", "qk_norm": True, "head_dim": 6}, marks=pytest.mark.slow),
        {"layer_stack": "scanned"},
        {"layer_stack": "unrolled", "token_input": "every", "topk_groups": "8:2,16:4"},
        {"layer_stack": "unrolled", "topk_centred": True, "topk_groups": "8:2,16:4"},
        pytest.param(
            {"layer_stack": "scanned", "token_input": "every", "topk_centred": True}, marks=pytest.mark.slow
        ),
        pytest.param({"layer_stack": "unrolled", "n_nontopk": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_greedy_and_drawn_tokens_are_those_of_a_plain_loop(changes):
    config = dataclasses.replace(CONFIG, **changes)
    sampling = [Sampling(temperature=0), Sampling(seed=3), LIMITED, Sampling(0.5)]
    found = texts(config, [PROMPT] * 4, sampling, [30] * 4)
    for one, tokens in zip(sampling, found, strict=True):
        assert tokens == plain_loop(config, params_of(config), PROMPT, 30, one)
    assert len(set(found[0])) > 3


def test_prompts_of_different_lengths_do_not_know_of_each_other():
    config = dataclasses.replace(CONFIG, context_length=40)  # two sizes: 32 and 40
    prompts = [prompt_of(n, seed=n) for n in (1, 31, 12, 25)]
    sampling = [LIMITED, Sampling(seed=1), Sampling(temperature=0), Sampling(temperature=0.5)]
    lengths = [44, 3, 0, 12]
    found = texts(config, prompts, sampling, lengths, steps=7)
    for tokens, prompt, one, n in zip(found, prompts, sampling, lengths, strict=True):
        assert len(tokens) == n
        assert tokens == plain_loop(config, params_of(config), prompt, n, one)


@pytest.mark.parametrize("length", [4, 95])
def test_beyond_the_context_half_of_it_can_be_forgotten_at_once(length):
    sampling, lengths = [LIMITED, Sampling(0), Sampling(seed=8), LIMITED], [90, 70, 5, 0]
    found = texts(CONFIG, [prompt_of(length)] * 4, sampling, lengths, when_full="halve")
    for tokens, one, n in zip(found, sampling, lengths, strict=True):
        assert tokens == plain_loop(CONFIG, params_of(CONFIG), prompt_of(length), n, one, halve=True)


def test_a_text_can_end_with_the_context():
    generation = Generation(
        CONFIG,
        params_of(CONFIG),
        [PROMPT, prompt_of(32), PROMPT, PROMPT],
        [Sampling()] * 4,
        max_new_tokens=[100, 100, 27, 2],
        stop_token=-1,
        when_full="stop",
    )
    while not generation.done:
        generation.advance()
    assert [len(text) for text in generation.texts] == [32, 32, 32, 7]
    assert generation.finished == ["length"] * 4
    with pytest.raises(ValueError, match="prompt has 33 tokens: must be at most 32"):
        texts(CONFIG, [prompt_of(33)], [Sampling()], [1], when_full="stop")


def test_the_stop_token_ends_its_row_alone():
    sampling = [Sampling(seed=seed) for seed in range(4)]
    free = texts(CONFIG, [PROMPT] * 4, sampling, [26] * 4)
    stop = free[1][20]
    generation = Generation(
        CONFIG, params_of(CONFIG), [PROMPT] * 4, sampling, max_new_tokens=[26] * 4, stop_token=stop
    )
    while not generation.done:
        generation.advance()
    for text, tokens, why in zip(generation.texts, free, generation.finished, strict=True):
        end = tokens.index(stop) if stop in tokens else len(tokens)
        assert text == PROMPT + tokens[:end]
        assert why == ("stop" if stop in tokens else "length")
    assert generation.advance() == [[]] * 4


def test_a_row_that_is_ended_from_outside_gets_no_more_tokens():
    sampling = [Sampling(seed=seed) for seed in range(4)]
    free = texts(CONFIG, [PROMPT] * 4, sampling, [26] * 4)
    generation = Generation(
        CONFIG, params_of(CONFIG), [PROMPT] * 4, sampling, max_new_tokens=[26] * 4, stop_token=-1
    )
    assert [len(new) for new in generation.advance(1)] == [1] * 4
    assert [len(new) for new in generation.advance(5)] == [5] * 4
    generation.end(2)
    while not generation.done:
        assert generation.advance()[2] == []
    assert [text[5:] for text in generation.texts] == [*free[:2], free[2][:6], free[3]]


def test_texts_of_one_seed_differ_by_their_index():
    sampling = [Sampling(seed=5, index=index) for index in (0, 1, 0, 2)]
    found = texts(CONFIG, [PROMPT] * 4, sampling, [26] * 4)
    assert found[0] == found[2]
    assert len({tuple(tokens) for tokens in found}) == 3


def test_sizes_are_powers_of_two_up_to_the_context_and_those_of_caches_finer():
    lengths = (1, 16, 17, 33, 48, 49, 64, 96, 97, 129, 200)
    assert [bucket(n, 200) for n in lengths] == [16, 16, 32, 64, 64, 64, 64, 128, 128, 200, 200]
    assert [cache_bucket(n, 200) for n in lengths] == [16, 16, 24, 48, 48, 64, 64, 96, 128, 150, 200]
    assert bucket(3, 8) == cache_bucket(3, 8) == 8


def test_neither_sampling_nor_lengths_within_a_size_compile_anything():
    def run(length, sampling, n=26):
        return texts(CONFIG, [prompt_of(length)] * 4, [sampling] * 4, [n] * 4)

    run(4, Sampling())
    with compilations() as compiled:
        run(9, LIMITED, 20)
        run(11, Sampling(temperature=0, seed=9), 18)
        run(16, Sampling(top_k=3, repetition_penalty=0.5), 12)
    assert compiled == []


ON_FOUR_DEVICES = """
import jax
from plain_loop import CONFIG, params_of
from topklm.config import MeshConfig
from topklm.inference.scheduler import generate_tokens
from topklm.layout import make_layout
from topklm.model.topk import for_gspmd

layout = make_layout(MeshConfig(data=1, fsdp=2, tensor=2))
params = params_of(CONFIG)
split = jax.device_put(params, layout.shardings(params))
assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))
config = for_gspmd(CONFIG, layout.size)
for one in (params, split):
    options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 0, "stop_token": -1}
    print(generate_tokens(config, one, [3, 14, 15, 9, 26], **options))
"""


@pytest.mark.slow
def test_parameters_split_over_devices_give_the_same_tokens(trainer):
    environment = {
        **devices(4),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(pathlib.Path(__file__).parent)]),
    }
    process = trainer.start_python("-c", ON_FOUR_DEVICES, environment=environment)
    assert process.finish() == 0, process.errors
    on_one, on_four = process.output.splitlines()
    assert on_one == on_four


RANDOM = np.random.default_rng(0)
SETTINGS = [
    Sampling(
        temperature=float(RANDOM.choice([0.3, 1.0, 2.0])),
        top_k=int(RANDOM.choice([0, 1, 5, 29, 60])),
        top_p=float(RANDOM.choice([1.0, 0.95, 0.5, 1e-6])),
        min_p=float(RANDOM.choice([0.0, 0.05, 1.0])),
        repetition_penalty=float(RANDOM.choice([1.0, 1.5, 0.7])),
        seed=int(RANDOM.integers(2**62)),
    )
    for _ in range(24)
]


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_only_what_the_limits_leave_is_drawn_and_with_its_probability(scale):
    logits = scale * RANDOM.normal(size=(len(SETTINGS), 30)).astype(np.float32)
    logits[:, 7] = logits[:, 11]  # a tie
    present = RANDOM.random(logits.shape) < 0.3
    rows = RowSampling.of(SETTINGS)

    @jax.jit
    def draws(number):
        keys = rows.keys()
        return draw(logits, present, rows, keys, number), jax.vmap(jax.random.fold_in)(keys, number)

    for number in range(8):
        found, keys = draws(np.full(len(SETTINGS), number, np.int32))
        for row, sampling in enumerate(SETTINGS):
            limited = limited_logits(logits[row], np.flatnonzero(present[row]).tolist(), sampling)
            assert found[row] == jax.random.categorical(keys[row], limited)


@pytest.mark.parametrize("temperature", [1e-11, 1e-37, 1e-45, 1e-300, 5e-324])
@pytest.mark.parametrize("limits", [{}, {"top_p": 0.9}, {"top_p": 1e-37}, {"top_k": 3, "min_p": 1e-300}])
def test_the_colder_the_nearer_to_the_most_likely_token(temperature, limits):
    logits = np.array([[3.0, -200.0, 250.0, 7.0]], np.float32)
    rows = RowSampling.of([Sampling(temperature, **limits).check()])
    found = draw(logits, np.zeros(logits.shape, bool), rows, rows.keys(), np.zeros(1, np.int32))
    assert found.tolist() == [2]


def test_the_separator_is_held_by_no_text_whatever_the_penalty():
    present = held([[4, 1, 1], [3], []], 6, separator=4)
    assert [np.flatnonzero(row).tolist() for row in present] == [[1], [3], []]
    rows = RowSampling.of([Sampling(temperature=0, repetition_penalty=100.0)])
    logits = np.array([[0.5, 3.0, 0.1, 0.1, 5.0, 1.0]], np.float32)
    assert draw(logits, present[:1], rows, rows.keys(), np.zeros(1, np.int32)).tolist() == [4]


def test_a_text_that_begins_with_the_separator_ends_as_likely_under_a_penalty():
    several = [Sampling(temperature=2.0, top_k=12, repetition_penalty=1.5, seed=seed) for seed in range(8)]
    found = texts(CONFIG, [[9, *PROMPT]] * 8, several, [12] * 8, stop_token=9, when_full="halve")
    expected = [
        plain_loop(CONFIG, params_of(CONFIG), [9, *PROMPT], 12, one, stop_token=9, halve=True)
        for one in several
    ]
    assert found == expected
    assert {len(tokens) < 12 for tokens in found} == {True, False}


def test_a_tie_at_the_limit_stays_in():
    rows = RowSampling.of([Sampling(top_k=2, seed=seed) for seed in range(100)])
    logits = np.tile(np.array([2.0, 1.0, 1.0, 0.0], np.float32), (100, 1))
    found = draw(logits, np.zeros(logits.shape, bool), rows, rows.keys(), np.zeros(100, np.int32))
    assert set(np.asarray(found).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.5),
        ("temperature", float("inf")),
        ("temperature", 1e39),
        ("temperature", 10**400),
        ("temperature", np.float64(1e39)),
        ("top_p", 1e-300),
        ("top_p", 10**400),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 1e300),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", 2**64),
        ("seed", 0.5),
        ("index", -1),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} = .*: must be ") as refused:
        texts(CONFIG, [PROMPT], [Sampling(**{name: value})], [1])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[]]}, "prompt is empty"),
        ({"prompts": [[50]]}, "prompt: token 50 must be from 0 to 49"),
        ({"prompts": [[-1]]}, "prompt: token -1 must be from 0 to 49"),
        ({"n": [-1]}, "max_new_tokens = -1: must be an integer, 0 or more"),
        ({"n": [1.5]}, "max_new_tokens = 1.5: must be an integer"),
        ({"when_full": "x"}, "when_full = 'x': must be one of slide, halve, stop"),
    ],
)
def test_what_cannot_be_continued_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        texts(CONFIG, **{"prompts": [PROMPT], "sampling": [Sampling()], "n": [1], **change})
