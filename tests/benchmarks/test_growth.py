"""The sizes that are varied, the work that follows from them, and the cost model fitted to it."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import growth
from benchmarks.harness.shapes import SHAPES, with_model
from topklm.model import transformer

CENTRE = SHAPES["s1"]


def test_every_axis_has_five_points_and_goes_through_the_centre():
    points = growth.configs(CENTRE)
    assert points[CENTRE] == tuple(growth.AXES)
    for axis, values in growth.AXES.items():
        section = "train" if axis == "batch_size" else "model"
        found = [getattr(getattr(config, section), axis) for config, axes in points.items() if axis in axes]
        assert sorted(found) == sorted(values)
        assert len(values) == 5
    assert len(points) == 6 * 4 + 1


def test_only_what_belongs_to_an_axis_differs_from_the_centre():
    allowed = {axis: {axis} for axis in growth.AXES}
    allowed["d_model"] = {"d_model", "n_heads", "n_kv_heads", "d_mlp"}
    for config, axes in growth.configs(CENTRE).items():
        old, new = (dataclasses.asdict(c.model) | dataclasses.asdict(c.train) for c in (CENTRE, config))
        differing = {name for name in old if old[name] != new[name]}
        assert differing <= allowed[axes[0]]
        assert config.model.head_width == growth.HEAD_DIM


def test_the_work_is_that_of_loops_over_the_products_and_arrays():
    config = with_model(CENTRE, n_layers=2, vocab_size=1024)
    m, tokens = config.model, config.train.batch_size * config.model.context_length
    params = jax.eval_shape(lambda: transformer.create(m, 0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    in_products = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    pairs = config.train.batch_size * sum(range(1, m.context_length + 1))
    want = 3 * 2 * (tokens * in_products + 2 * m.n_layers * pairs * m.d_model)
    got = growth.work(config)
    assert got.matmul_flops == pytest.approx(want)
    assert got.parameter_bytes == 9 * 4 * sum(leaf.size for _, leaf in leaves)
    twice = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=32))
    assert growth.work(twice).activation_bytes == 2 * got.activation_bytes


def test_a_fit_finds_the_coefficients_that_made_the_times():
    works = [growth.work(config) for config in growth.configs(CENTRE)]
    features = {name: [getattr(w, name) for w in works] for name in growth.TIME_FEATURES}
    true = {"matmul_flops": 1e-11, "activation_bytes": 5e-11, "parameter_bytes": 1e-10}
    times = 0.02 + sum(rate * np.array(features[name]) for name, rate in true.items())
    found = growth.fit(features, times)
    assert found.constant == pytest.approx(0.02)
    assert found.rates == pytest.approx(true)
    assert found.worst < 1e-6
    np.testing.assert_allclose(found.fitted, times)


def test_no_coefficient_is_below_zero_and_residuals_are_measured_over_fitted():
    features = {"falls": [4.0, 3.0, 2.0, 1.0], "rises": [1.0, 2.0, 3.0, 4.0]}
    found = growth.fit(features, [1.0, 2.0, 3.0, 4.4])
    assert min(found.constant, *found.rates.values()) >= 0
    np.testing.assert_allclose(np.array(found.fitted) * (1 + np.array(found.residuals)), [1.0, 2.0, 3.0, 4.4])


@pytest.mark.slow
def test_a_point_is_measured_in_a_process_of_its_own():
    tiny = with_model(CENTRE, d_model=64, n_layers=1, n_heads=1, n_kv_heads=1, d_mlp=32, vocab_size=128)
    tiny = with_model(tiny, context_length=16, topk_k=8)
    tiny = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, batch_size=2))
    (point,) = growth.measure({tiny: ("batch_size",)}, repeats=2)
    assert point["axes"] == ["batch_size"]
    assert point["config"]["d_model"] == 64
    assert point["tokens_per_second"] == pytest.approx(32 / point["seconds"])
    assert point["seconds_range"][0] <= point["seconds"] <= point["seconds_range"][1]
    assert point["peak_bytes"] > 2**26
