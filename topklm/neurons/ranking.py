"""The order in which neurons are shown to a person who has asked for none."""

import numpy as np
import pyarrow as pa

# Below, a neuron was seen too seldom to say what it stands for; above, it is active nearly everywhere.
FAIR_DENSITY = (1e-4, 0.05)
# From fewer activations an entropy says little, however it is corrected.
FAIR_ACTIVE = 30


def readable_first(rows: pa.Table) -> np.ndarray:
    """Neurons by how likely it is that a person can name them.

    First those of fair density that were seen often enough, by rising corrected semantic entropy, and where
    that is equal by falling number of distinct tokens: several words for one thing come before one word. Then
    the other living ones in the same order, then the dead ones.

    Args:
        rows: Of `topklm.neurons.statistics.table`.

    Returns:
        int64[n], places in `rows`.
    """
    group = np.where(_numbers(rows, "n_active") > 0, np.where(is_fair(rows), 0, 1), 2)
    # Of keys, lexsort takes the last one first; it puts NaN behind every number.
    keys = (-_numbers(rows, "n_distinct_tokens"), _numbers(rows, "semantic_entropy_corrected"), group)
    return np.lexsort(keys)


def is_fair(rows: pa.Table) -> np.ndarray:
    """bool[n], which neurons `readable_first` puts first."""
    low, high = FAIR_DENSITY
    density = _numbers(rows, "density")
    return (density >= low) & (density <= high) & (_numbers(rows, "n_active") >= FAIR_ACTIVE)


def _numbers(rows: pa.Table, name: str) -> np.ndarray:
    """float64[n], NaN where there is none."""
    return rows[name].to_numpy().astype(np.float64)
