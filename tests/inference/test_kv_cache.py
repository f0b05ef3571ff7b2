"""A KV cache in blocks holds what one array would; blocks that no sequence has reached are not read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from plain_loop import CONFIG, params_of, plain_loop
import pytest

from topklm.inference import kv_cache
from topklm.inference.scheduler import Generation
from topklm.inference.sequence import Sampling
from topklm.model.cached_attention import KeysAndValues, KVBlock, attend_over

RANDOM = np.random.default_rng(0)


def random(*shape):
    return KeysAndValues(*(RANDOM.normal(size=shape).astype(np.float32) for _ in range(2)))


@pytest.mark.parametrize(
    ("capacity", "sizes"),
    [
        (8, (8,)),
        (32, (32,)),
        (33, (32, 1)),
        (96, (32, 32, 32)),
        (256, (32, 32, 64, 128)),
        (300, (32, 32, 64, 128, 44)),
    ],
)
def test_blocks_double_the_tokens_before_them(capacity, sizes):
    assert kv_cache.block_sizes(capacity) == sizes


@pytest.mark.parametrize("n_places", [70, 90, 100, 130])
def test_what_is_cut_and_joined_is_what_it_was(n_places):
    whole = random(2, 3, n_places, 4)
    parts = kv_cache.split_blocks(whole, kv_cache.block_sizes(100))
    assert [part.keys.shape for part in parts] == [(2, 3, n, 4) for n in (32, 32, 36)]
    for one, expected in zip(kv_cache.join_blocks(parts), whole, strict=True):
        n = min(n_places, 100)
        np.testing.assert_array_equal(one[:, :, :n], expected[:, :, :n])
        assert not np.any(one[:, :, n:])


@pytest.mark.parametrize("layers", [(), (2,)])
def test_new_tokens_stand_behind_each_rows_text_and_nothing_else_changes(layers):
    lengths = np.array([0, 20, 30, 32, 60, 95, 99, 100])
    whole, new = random(*layers, 8, 2, 100, 3), random(*layers, 8, 2, 5, 3)
    put = jax.jit(kv_cache.append_tokens)(
        kv_cache.split_blocks(whole, kv_cache.block_sizes(100)), new, lengths
    )
    for one, before, more in zip(kv_cache.join_blocks(put), whole, new, strict=True):
        expected = before.copy()
        for row, length in enumerate(lengths):
            fits = min(5, 100 - length)  # what has no place is left out
            expected[..., row, :, length : length + fits, :] = more[..., row, :, :fits, :]
        np.testing.assert_array_equal(one, expected)


def test_the_parts_that_are_read_are_those_up_to_the_longest_text():
    parts = kv_cache.split_blocks(random(2, 1, 100, 1), kv_cache.block_sizes(100))
    for n, n_used in ((0, 1), (1, 1), (32, 1), (33, 2), (64, 2), (65, 3), (100, 3)):
        places, are_used = zip(*kv_cache.block_masks(parts, jnp.array([3, n])), strict=True)
        assert list(map(bool, are_used)) == [number < n_used for number in range(3)]
        places = np.concatenate(places, axis=-1)[:, 0]
        np.testing.assert_array_equal(places, np.arange(100) < np.array([[3], [n]]))


def test_attention_over_parts_is_attention_over_all_that_is_seen():
    q = RANDOM.normal(size=(2, 3, 2, 1, 4)).astype(np.float32)
    kept, seen = [random(2, 3, n, 4) for n in (5, 7, 2)], [RANDOM.random((2, 1, n)) < 0.7 for n in (5, 7, 2)]
    seen[1][0], seen[2][:] = False, False
    kept[2] = jax.tree.map(lambda x: np.full_like(x, np.nan), kept[2])  # what is not used is not read
    seen[0][:, :, 0] = True
    parts = [KVBlock(*of_part) for of_part in zip(kept, seen, (True, True, jnp.array(False)), strict=True)]
    found = jax.jit(attend_over)(q, parts)
    keys, values = (np.concatenate(x, axis=2).astype(np.float64) for x in list(zip(*kept[:2], strict=True)))
    scores = np.einsum("bkgmd,bktd->bkgmt", q, keys)
    weights = np.exp(scores) * np.concatenate(seen[:2], axis=-1)[:, None, None]
    weights /= weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, np.einsum("bkgmt,bktd->bkgmd", weights, values), rtol=1e-5, atol=1e-6)


def test_texts_that_grow_from_part_to_part_get_the_tokens_of_a_plain_loop():
    config = dataclasses.replace(CONFIG, context_length=80)
    prompts = [RANDOM.integers(0, config.vocab_size, n).tolist() for n in (5, 31, 50)]
    lengths, sampling = [65, 4, 30], [Sampling(seed=1), Sampling(seed=2), Sampling(temperature=0)]
    generation = Generation(
        config, params_of(config), prompts, sampling, max_new_tokens=lengths, stop_token=-1
    )
    while not generation.done:
        generation.advance()
    for text, prompt, one, n in zip(generation.texts, prompts, sampling, lengths, strict=True):
        assert text[len(prompt) :] == plain_loop(config, params_of(config), prompt, n, one)
