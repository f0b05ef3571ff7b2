"""How much of a layer's neurons came in by the residual stream, and how much the layer itself wrote.

Of a layer with input h, which writes w = u - h (attention and MLP, see `topklm.model.block`) and keeps o: for
each neuron j, over the N tokens that are read,

    carried(j)      sum of max(s h, 0) / sum of |o|, over tokens where o is not 0; s is the sign of o there
    kept_before(j)  the share of these tokens at which s h is above 0
    r_input(j)      Pearson correlation of o and h
    r_written(j)    Pearson correlation of o and w
    r_written_other the same of o and w of the next neuron, j + 1: what chance and a common mean give

Sums of a row are taken in float32 where the layer is computed, and added up over rows in float64.
Dims: B rows, T tokens in a row, S layers, D neurons of a layer.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


def sums(h_BTD: jax.Array, u_BTD: jax.Array, kept_BTD: jax.Array, read_BT: jax.Array) -> dict[str, jax.Array]:
    """Sums over the inputs of each row that are read, bool[B, T]: float32[B, D] each, by name."""
    m = read_BT[:, :, None]
    h, u, o = (jnp.where(m, x.astype(jnp.float32), 0) for x in (h_BTD, u_BTD, kept_BTD))
    w, along = u - h, h * jnp.sign(o)
    terms = {
        "o": o,
        "oo": o * o,
        "h": h,
        "hh": h * h,
        "ho": h * o,
        "w": w,
        "ww": w * w,
        "wo": w * o,
        "hw": h * w,
        "other": jnp.roll(w, -1, axis=2) * o,
        "kept": jnp.abs(o),
        "carried": jnp.maximum(along, 0),
        "active": (o != 0).astype(jnp.float32),
        "before": (along > 0).astype(jnp.float32),
    }
    return {name: jnp.sum(x, axis=1) for name, x in terms.items()}


@dataclasses.dataclass(eq=False)
class Flows:
    """The sums of some text, filled batch by batch."""

    n_tokens: int = 0
    sums: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # float64[S, D] each

    def add(self, of_batch: Mapping[str, jax.Array], n_tokens: int) -> None:
        """Adds the sums of a batch's rows, float32[S, B, D] each, over so many tokens."""
        self.n_tokens += n_tokens
        for name, x in of_batch.items():
            self.sums[name] = self.sums.get(name, 0) + np.asarray(x).astype(np.float64).sum(axis=1)

    def columns(self) -> dict[str, np.ndarray]:
        """Returns the figures, float64[S, D] each; NaN where a neuron is never active, or does not vary.

        `r_written_input`, the correlation of h and w, is for a layer that reads another's neurons.
        """
        s = self.sums
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = {"carried": s["carried"] / s["kept"], "kept_before": s["before"] / s["active"]}
        next_w, next_ww = (np.roll(s[name], -1, axis=1) for name in ("w", "ww"))
        n = self.n_tokens
        return shares | {
            "r_input": pearson(n, s["h"], s["hh"], s["o"], s["oo"], s["ho"]),
            "r_written": pearson(n, s["w"], s["ww"], s["o"], s["oo"], s["wo"]),
            "r_written_other": pearson(n, next_w, next_ww, s["o"], s["oo"], s["other"]),
            "r_written_input": pearson(n, s["w"], s["ww"], s["h"], s["hh"], s["hw"]),
        }


def pearson(
    n: int, x: np.ndarray, xx: np.ndarray, y: np.ndarray, yy: np.ndarray, xy: np.ndarray
) -> np.ndarray:
    """Returns correlations from sums over n tokens of x, x^2, y, y^2 and xy; NaN where one does not vary."""
    varies = [squares - total * total / n for total, squares in ((x, xx), (y, yy))]
    # Of a constant, rounding leaves something that is no variance.
    is_constant = (varies[0] <= 1e-12 * xx) | (varies[1] <= 1e-12 * yy)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (xy - x * y / n) / np.sqrt(varies[0] * varies[1])
    return np.where(is_constant, np.nan, np.clip(r, -1, 1))
