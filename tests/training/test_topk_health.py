"""Dead neurons, kept norm and overlap of a case small enough to count by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topklm.training.evaluation import capture_topk_health, summarize_topk_health

# Three tokens, the last of which does not count; four neurons; two TopK layers, then a dense one.
WEIGHTS = jnp.array([[1.0, 1.0, 0.0]])
EMBEDDED = jnp.ones((1, 3, 4))
BEFORE_TOPK = jnp.array(
    [
        [[[3.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 9.0]]],
        [[[6.0, 8.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]]],
        [[[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]],
    ]
)
AFTER_TOPK = jnp.array(
    [
        [[[0.0, 4.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 9.0]]],
        [[[6.0, 8.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [5.0, 0.0, 0.0, 5.0]]],
        [[[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]],
    ]
)


def measured(weights=WEIGHTS):
    """Returns the sums of all three layers, stacked as the model stacks them."""
    capture = capture_topk_health(weights)
    inputs = [EMBEDDED, AFTER_TOPK[0], AFTER_TOPK[1]]
    layers = [capture(h, u, h_next) for h, u, h_next in zip(inputs, BEFORE_TOPK, AFTER_TOPK, strict=True)]
    return jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float64), *layers)


def test_the_three_figures_are_those_counted_by_hand():
    got = summarize_topk_health(measured(), n_tokens=2, n_topk_layers=2)
    # Layer 0: neurons 1 and 2 ever active. Layer 1: neurons 0 and 1.
    assert got["dead_neurons"] == [0.5, 0.5]
    # Layer 0: 16/25 and 2/4. Layer 1: all of it, twice.
    assert got["norm_kept"] == pytest.approx([(0.64 + 0.5) / 2, 1.0])
    # Layer 1: of (token 0, neuron 0), (0, 1), (1, 1), the last two are active in layer 0 too.
    assert got["overlap_below"] == pytest.approx([2 / 3])


def test_tokens_without_weight_do_not_count():
    sums = measured()
    np.testing.assert_array_equal(sums["active_tokens"][:2], [[0, 2, 1, 0], [1, 2, 0, 0]])
    np.testing.assert_array_equal(sums["active"], [3, 3, 8])
    np.testing.assert_array_equal(sums["also_active_below"], [3, 2, 3])
    assert measured(jnp.ones((1, 3)))["active_tokens"][0, 3] == 1


def test_a_weight_counts_a_token_once_whatever_its_size():
    jax.tree.map(np.testing.assert_array_equal, measured(), measured(WEIGHTS * 0.25))


def test_sums_of_two_batches_add_up():
    twice = jax.tree.map(np.add, measured(), measured())
    once = summarize_topk_health(measured(), n_tokens=2, n_topk_layers=2)
    assert summarize_topk_health(twice, n_tokens=4, n_topk_layers=2) == once


def test_a_token_whose_residual_is_zero_keeps_all_of_nothing():
    zeros = jnp.zeros((1, 3, 4))
    sums = capture_topk_health(WEIGHTS)(zeros, zeros, zeros)
    assert (float(sums["kept_square_share"]), float(sums["active"])) == (2.0, 0.0)


def test_squares_are_summed_in_float32():
    u = jnp.full((1, 1, 1000), 1.0, jnp.bfloat16)
    sums = capture_topk_health(jnp.ones((1, 1)))(u, u, u.at[..., 700:].set(0))
    assert float(sums["kept_square_share"]) == pytest.approx(0.7, abs=1e-6)


def test_the_base_model_has_no_topk_layers_to_report_on():
    got = summarize_topk_health(measured(), n_tokens=2, n_topk_layers=0)
    assert got == {"dead_neurons": [], "norm_kept": [], "overlap_below": []}
