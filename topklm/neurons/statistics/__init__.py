"""The statistics of neurons: `catalog` lists them, `measure` computes them, `table` keeps them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """How much of a measurement is sampled."""

    # Tokens at which each neuron is set to 0; 0: none. Of 16, two draws agree on hardly anything (correlation
    # over neurons 0.1), of 256 on much (0.6)
    ablation_samples: int = 256
    lens_contexts: int = 64  # contexts over which the Jacobian is averaged
    n_clusters: int | None = None  # of tokens; None: by the vocabulary's size
    seed: int = 0  # of everything that is drawn
