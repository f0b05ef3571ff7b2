"""The neurons of TopK layers: captured from a model, stored, measured and shown; and where a run keeps that.

    neurons/labels.json           names that people gave (`topklm.neurons.labels`)
    neurons/1300/store/           activations of the checkpoint of step 1300 (`topklm.neurons.store`)
    neurons/1300/dictionary.npz   where a Base LM was harvested with one: `topklm.neurons.dictionary`
    neurons/1300/neurons.parquet  their statistics (`topklm.neurons.statistics.table`)
    neurons/1300/index.sqlite     the explorer's index, made again when it is missing
    neurons/trace/                all checkpoints compared: `topklm.trace.tables`
    neurons/1300/unfinished       there while the explorer harvests: one that was stopped goes on

All in the run folder.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from topklm.errors import UserError, disk_errors_are_user_errors

# Kinds of dictionaries that a Base LM's hidden states are written in, and their names.
DICTIONARIES = {
    "random": "random dictionary",
    "pca": "PCA",
    "sae": "post-hoc TopK SAE",
    "sae-batchtopk": "post-hoc BatchTopK SAE",
    "sae-matryoshka": "post-hoc Matryoshka SAE",
    "sae-jumprelu": "post-hoc JumpReLU SAE",
    "sae-gba": "post-hoc SAE with group bias adaptation",
    "saelens": "SAELens",
}
FITTED = ("random", "pca", "sae")  # made by topklm
DICTIONARY_TOKENS = 1_000_000  # of training text, from which one is made
SHOWN_PER_LAYER = 5  # strongest neurons of a layer, for each token


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """How much of a measurement is sampled."""

    # Tokens at which each neuron is set to 0; 0: none. Of 16, two draws agree on hardly anything (correlation
    # over neurons 0.1), of 256 on much (0.6)
    ablation_samples: int = 256
    lens_contexts: int = 64  # contexts over which the Jacobian is averaged
    n_clusters: int | None = None  # of tokens; None: by the vocabulary's size
    seed: int = 0  # of everything that is drawn


class NeuronsFolder:
    """The paths for one checkpoint of a run, of which all share the labels."""

    def __init__(self, run: Path, step: int):
        self.run, self.step = run, step
        self.path, self.labels = run / "neurons" / str(step), run / "neurons" / "labels.json"
        self.store, self.dictionary = self.path / "store", self.path / "dictionary.npz"
        self.table, self.index = self.path / "neurons.parquet", self.path / "index.sqlite"
        self.unfinished = self.path / "unfinished"


def harvested_steps(run: Path) -> list[int]:
    """Lists the checkpoints of a run of which there are activations, rising."""
    folder = run / "neurons"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    steps = sorted(int(name) for name in names if name.isdecimal())
    return [step for step in steps if NeuronsFolder(run, step).store.exists()]


def check_begun_with(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises UserError for the first setting, by flag, that the work at a path was not begun with."""
    for name in {**asked, **there}:
        if asked.get(name) != there.get(name):
            text = f"{path} was begun with {there.get(name)}: give what it was begun with, or another folder"
            raise UserError(text, field=name, value=asked.get(name))


@contextlib.contextmanager
def damage_is_a_user_error(path: Path, advice: str, *more: type[Exception]) -> Iterator[None]:
    """Turns errors of a block that reads such a folder into one line, which `advice` ends for damage.

    A refusal of the system is told apart from damage, so that nobody deletes a file for lack of permission.
    Errors of libraries that mean damage, besides the ValueError of most, are `more`.
    """
    kinds: tuple[type[Exception], ...] = (OSError, ValueError, *more)
    try:
        yield
    except kinds as e:
        shape = isinstance(e, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        if not shape and isinstance(e, OSError | ValueError | RuntimeError):
            with contextlib.suppress(type(e)), disk_errors_are_user_errors(f"reading {path}"):
                raise e
        reason = next(iter(str(e).splitlines()), "")[:300] or type(e).__name__
        if isinstance(e, OSError) and e.filename:
            reason = f"{Path(os.fsdecode(e.filename)).name}: {e.strerror}"
        raise UserError(f"{path} is damaged ({reason}): {advice}") from e
