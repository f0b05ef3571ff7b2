"""Where a run keeps what is known of its neurons.

    neurons/labels.json           names that people gave (`topklm.neurons.labels`)
    neurons/1300/store/           activations of the checkpoint of step 1300 (`topklm.neurons.store`)
    neurons/1300/dictionary.npz   where a Base LM was harvested with one: `topklm.neurons.dictionary`
    neurons/1300/neurons.parquet  their statistics (`topklm.neurons.statistics.table`)
    neurons/1300/index.sqlite     the explorer's index, made anew when it is missing

All in the run folder.
"""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class NeuronsFolder:
    """The paths for one checkpoint of a run.

    Attributes:
        run: The run folder.
        step: Of the checkpoint.
    """

    run: Path
    step: int

    @property
    def path(self) -> Path:
        """Of all that belongs to the checkpoint."""
        return self.run / "neurons" / str(self.step)

    @property
    def store(self) -> Path:
        """Of the activations."""
        return self.path / "store"

    @property
    def dictionary(self) -> Path:
        """Of the dictionary that the activations are written in, where there is one."""
        return self.path / "dictionary.npz"

    @property
    def table(self) -> Path:
        """Of the statistics."""
        return self.path / "neurons.parquet"

    @property
    def index(self) -> Path:
        """Of the explorer's index."""
        return self.path / "index.sqlite"

    @property
    def labels(self) -> Path:
        """Of the labels, which all checkpoints of a run share."""
        return self.run / "neurons" / "labels.json"
