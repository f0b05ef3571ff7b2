"""Sums over a layer's input, writing and output, against NumPy in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from topklm.neurons.harvest import Flows, flow_sums

S, B, T, D = 2, 3, 50, 5


@pytest.mark.parametrize("cuts", [[0, 3], [0, 1, 3]])
def test_figures_are_those_of_numpy_however_rows_are_cut(cuts):
    rng = np.random.default_rng(0)
    h, w = (rng.standard_normal((S, B, T, D)).astype(np.float32) for _ in range(2))
    w[..., 1] = 2 * h[..., 1]
    u = h + w
    kept = np.where(u > 0.5, u, 0)
    kept[..., 4] = 0  # dead
    read = rng.random((B, T)) < 0.7
    flows = Flows()
    for a, b in itertools.pairwise(cuts):
        of_layers = [flow_sums(*(jnp.asarray(x[s, a:b]) for x in (h, u, kept)), read[a:b]) for s in range(S)]
        stacked = {name: jnp.stack([layer[name] for layer in of_layers]) for name in of_layers[0]}
        flows.add(stacked, int(read[a:b].sum()))
    found = flows.columns()
    h, u, kept = (x[:, read].astype(np.float64) for x in (h, u, kept))
    w = u - h
    for s in range(S):
        for j in range(D - 1):
            o, active = kept[s, :, j], kept[s, :, j] != 0
            wanted = {
                "carried": np.maximum(h[s, active, j], 0).sum() / o.sum(),
                "kept_before": (h[s, active, j] > 0).mean(),
                "r_input": np.corrcoef(o, h[s, :, j])[0, 1],
                "r_written": np.corrcoef(o, w[s, :, j])[0, 1],
                "r_written_other": np.corrcoef(o, w[s, :, (j + 1) % D])[0, 1],
                "r_written_input": np.corrcoef(h[s, :, j], w[s, :, j])[0, 1],
            }
            for name, value in wanted.items():
                assert found[name][s, j] == pytest.approx(value, abs=2e-5), name
        assert all(np.isnan(found[name][s, 4]) for name in ("carried", "kept_before", "r_written"))


def test_a_negative_activation_is_carried_by_a_negative_input():
    h, kept = jnp.array([[[-1.0]]]), jnp.array([[[-2.0]]])
    flows = Flows()
    flows.add({name: x[None] for name, x in flow_sums(h, kept, kept, jnp.ones((1, 1), bool)).items()}, 1)
    assert flows.columns()["carried"] == 0.5
    assert flows.columns()["kept_before"] == 1
