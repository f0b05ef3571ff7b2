"""The order in which neurons are shown to a person who has asked for none."""

import numpy as np
import pyarrow as pa

# Below, a neuron was seen too seldom to say what it stands for; above, it is active nearly everywhere.
FAIR_DENSITY = (1e-4, 0.05)
# From fewer activations an entropy says little, however it is corrected.
FAIR_ACTIVE = 30
# A neuron for one token needs no page to be named, and every model has many.
SEVERAL_TOKENS = 3.0


def readable_first(rows: pa.Table) -> np.ndarray:
    """Neurons by how likely it is that a person can name them.

    First those of fair density that were seen often enough and whose activation is spread over several
    tokens (exp of the corrected token entropy), by rising corrected semantic entropy, and where that is equal
    by falling number of distinct tokens. Then, in the same order, those of fair density for a token or two,
    then the other living ones, then the dead ones.

    Args:
        rows: Of `topklm.neurons.statistics.table`.

    Returns:
        int64[n], places in `rows`.
    """
    with np.errstate(invalid="ignore"):  # NaN is not above anything
        several = np.exp(_numbers(rows, "token_entropy_corrected")) >= SEVERAL_TOKENS
    living = _numbers(rows, "n_active") > 0
    group = np.select([~living, ~is_fair(rows), ~several], [3, 2, 1], 0)
    # Of keys, lexsort takes the last one first; it puts NaN behind every number.
    keys = (-_numbers(rows, "n_distinct_tokens"), _numbers(rows, "semantic_entropy_corrected"), group)
    return np.lexsort(keys)


def is_fair(rows: pa.Table) -> np.ndarray:
    """bool[n], which neurons are active neither too seldom nor too often to be read."""
    low, high = FAIR_DENSITY
    density = _numbers(rows, "density")
    return (density >= low) & (density <= high) & (_numbers(rows, "n_active") >= FAIR_ACTIVE)


def _numbers(rows: pa.Table, name: str) -> np.ndarray:
    """float64[n], NaN where there is none."""
    return rows[name].to_numpy().astype(np.float64)
