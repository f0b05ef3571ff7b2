"""Several prepared datasets as one: how many windows each gives, and in which turn.

Decides whose window is next and nothing else: `topklm.data.stream` says which of its
windows that is.
"""

from collections.abc import Sequence
import dataclasses
from fractions import Fraction
import functools
import hashlib
import heapq
import json
import math
import os
from pathlib import Path
import re

import numpy as np

from topklm.data.dataset import Dataset, load_dataset
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError

MAX_PERIOD = 1_000_000  # windows after which the turns repeat; their table takes 12 bytes for each

_WEIGHT = re.compile(r"[0-9]{1,12}(\.[0-9]{0,12})?|\.[0-9]{1,12}")
_EXAMPLE = "write DIR:WEIGHT,DIR:WEIGHT with decimal weights above 0, such as books:0.7,wiki:0.3"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Datasets that share a tokenizer, and the share of the training windows that each one gives."""

    datasets: tuple[Dataset, ...]
    weights: tuple[int, ...]  # above 0, without a common divisor; dataset i gives weights[i] / period

    def __post_init__(self) -> None:
        """Raises UserError if the datasets were prepared with different tokenizers."""
        first = self.datasets[0]
        for other in self.datasets[1:]:
            if other.tokenizer.sha256 != first.tokenizer.sha256:
                raise UserError(
                    f"{other.path} was prepared with another tokenizer (sha256 "
                    f"{other.tokenizer.sha256[:12]}) than {first.path} ({first.tokenizer.sha256[:12]}): "
                    "prepare it again with that one (topklm prepare --tokenizer)",
                    field="data.mixture",
                )

    @classmethod
    def single(cls, dataset: Dataset) -> "Mixture":
        """Makes the mixture of one dataset alone."""
        return cls((dataset,), (1,))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all of them."""
        return self.datasets[0].tokenizer

    @property
    def period(self) -> int:
        """Windows after which the turns repeat."""
        return sum(self.weights)

    @property
    def fingerprint(self) -> str:
        """Names what the datasets hold and their weights, not where they lie."""
        if len(self.datasets) == 1:
            return self.datasets[0].fingerprint
        parts = [[d.fingerprint, weight] for d, weight in zip(self.datasets, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of all held-out text."""
        return sum(dataset.heldout.utf8_bytes for dataset in self.datasets)

    @property
    def heldout_text_tokens(self) -> int:
        """Tokens of all held-out text, separators not counted."""
        return sum(dataset.heldout.text_tokens for dataset in self.datasets)

    def picks(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Picks the dataset whose turn it is, at any point of a run.

        After any number n of windows, dataset i has given fewer than one window more or less than
        n weights[i] / period.

        Args:
            windows: Numbers of windows, counted from the start of the run; int64[N], in any order.

        Returns:
            The dataset that gives each window, int64[N], and how many windows it has given before,
            int64[N].
        """
        order, earlier = self._table
        periods, place = np.divmod(np.asarray(windows, np.int64), self.period)
        datasets = order[place].astype(np.int64)
        return datasets, periods * np.asarray(self.weights, np.int64)[datasets] + earlier[place]

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """For each window of a period: its dataset, int32, and that one's windows before it, int64."""
        order = _turns(self.weights)
        earlier = np.zeros(order.size, np.int64)
        for dataset, weight in enumerate(self.weights):
            earlier[order == dataset] = np.arange(weight)
        return order, earlier


def open_mixture(text: str) -> Mixture:
    """Opens the datasets of `data.mixture`: "DIR:0.7,DIR:0.3"; the weights need not add up to 1.

    Raises:
        UserError: For a text of another form, a folder given twice or without a dataset, datasets of
            different tokenizers, and weights that only repeat after more than a million windows.
    """
    said = f"data.mixture = {text!r}:"
    folders, weights = _parse(text, said)
    try:
        return Mixture(tuple(load_dataset(folder) for folder in folders), weights)
    except UserError as e:
        raise e.within("data.mixture", repr(text)) from e


def _parse(text: str, said: str) -> tuple[list[Path], tuple[int, ...]]:
    """Returns the folders, and their weights in smallest integers."""
    folders, weights = [], []
    for part in text.split(","):
        folder, _, weight = (word.strip() for word in part.rpartition(":"))
        if not folder or not _WEIGHT.fullmatch(weight) or not Fraction(weight):
            raise UserError(f"{said} {part.strip()!r} is not a folder and its weight: {_EXAMPLE}")
        path = Path(os.path.realpath(os.path.expanduser(folder)))
        if path in folders:
            raise UserError(f"{said} the folder {folder} is there twice: add its weights up")
        folders.append(path)
        weights.append(Fraction(weight))
    unit = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * unit) for weight in weights]
    divisor = math.gcd(*whole)
    reduced = tuple(weight // divisor for weight in whole)
    if sum(reduced) > MAX_PERIOD:
        raise UserError(
            f"{said} the weights stand as {' : '.join(map(str, reduced))}, so their turns repeat only after "
            f"{sum(reduced):,} windows; at most {MAX_PERIOD:,}: give weights of fewer digits"
        )
    return folders, reduced


def _turns(weights: Sequence[int]) -> np.ndarray:
    """Returns the dataset of each window of one period, int32[sum(weights)].

    The chairman assignment of R. Tijdeman (Discrete Mathematics 32, 1980): with k datasets, no count is
    ever further than 1 - 1 / (2 k - 2) from its share. To stay that close, window x of dataset i must
    stand in a certain stretch of the period; of all whose stretch has begun, the one whose stretch ends
    first is taken, which meets all of them if anything does (the "pfair" view of S. Baruah et al.,
    Algorithmica 15, 1996).
    """
    period, slack = sum(weights), 2 * (len(weights) - 1)
    if not slack:
        return np.zeros(period, np.int32)
    begin, end, dataset = [], [], []
    for i, weight in enumerate(weights):
        x = np.arange(weight, dtype=np.int64)
        # Places from 1. Not before it would be too many: x + 1 - place weight / period <= 1 - 1 / slack.
        begin.append(-(-period * (slack * x + 1) // (slack * weight)))
        # Not after it would be too few: (place - 1) weight / period - x <= 1 - 1 / slack.
        end.append(period * (slack * (x + 1) - 1) // (slack * weight) + 1)
        dataset.append(np.full(weight, i, np.int64))
    begins = np.concatenate(begin)
    by_begin = np.argsort(begins, kind="stable")
    # One integer sorts by the end of the stretch, then by dataset.
    keys = (np.concatenate(end) * len(weights) + np.concatenate(dataset))[by_begin].tolist()
    released = np.searchsorted(begins[by_begin], np.arange(1, period + 1), side="right").tolist()
    order, taken = np.empty(period, np.int32), 0
    waiting: list[int] = []
    for place in range(period):
        for key in keys[taken : released[place]]:
            heapq.heappush(waiting, key)
        taken = released[place]
        order[place] = heapq.heappop(waiting) % len(weights)
    return order
