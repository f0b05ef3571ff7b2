"""The statistics of neurons: `catalog` lists them, `measure` computes them, `table` keeps them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """How much of a measurement is sampled.

    Attributes:
        ablation_samples: Tokens at which each neuron is set to 0; 0: none. Of 16, two draws agree on hardly
            anything (correlation over neurons 0.1), of 256 on much (0.6).
        lens_contexts: Contexts over which the Jacobian is averaged.
        n_clusters: Of tokens; None: by the vocabulary's size.
        seed: Of everything that is drawn.
    """

    ablation_samples: int = 256
    lens_contexts: int = 64
    n_clusters: int | None = None
    seed: int = 0
