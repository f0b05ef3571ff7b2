"""Interpolated modified Kneser-Ney n-grams (Chen and Goodman 1998, section 3 and eq. 2 to 4 of its appendix).

A baseline to judge a language model by, kept simple: dictionaries, no pruning.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
import dataclasses


@dataclasses.dataclass
class _Context:
    """Tokens that followed one context."""

    counts: dict[int, int] = dataclasses.field(default_factory=dict)
    total: int = 0
    discount: float = 0.0  # mass taken from the counts, given to the lower order

    def add(self, token: int, count: int = 1) -> None:
        self.counts[token] = self.counts.get(token, 0) + count
        self.total += count


class KneserNey:
    """P(token | context) from counts; `add` sequences, `finish`, then ask for `probability`.

    The highest order, and contexts that begin a sequence (which nothing can precede), use plain counts;
    the others use continuation counts: in how many different contexts a token was seen. Three discounts per
    order, for counts of 1, 2 and more, come from the counts of counts. Below the unigrams stands the
    uniform distribution.
    """

    def __init__(self, order: int, vocab_size: int):
        self._order, self._vocab_size = order, vocab_size
        # One table for each context length, 0 to order - 1.
        self._tables: list[dict[tuple[int, ...], _Context]] = [defaultdict(_Context) for _ in range(order)]
        self._discounts: list[tuple[float, float, float]] = []

    def add(self, sequence: Sequence[int]) -> None:
        """Counts a sequence; its first token is context only, e.g. a separator."""
        longest = self._order - 1
        for i in range(1, len(sequence)):
            start = max(0, i - longest)
            context = tuple(sequence[start:i])
            self._tables[len(context)][context].add(sequence[i])

    def finish(self) -> None:
        """Turns counts into continuation counts for the lower orders and sets the discounts."""
        for length in range(self._order - 1, 0, -1):
            for context, seen in self._tables[length].items():
                shorter = self._tables[length - 1][context[1:]]
                for token in seen.counts:
                    shorter.add(token)
        for table in self._tables:
            self._discounts.append(_discounts(table))
            for seen in table.values():
                seen.discount = sum(self._discount(len(self._discounts) - 1, c) for c in seen.counts.values())

    def probability(self, context: tuple[int, ...], token: int) -> float:
        """Computes P(token | the last order - 1 tokens of context); over the vocabulary it sums to 1."""
        p = 1.0 / self._vocab_size
        context = context[max(0, len(context) - self._order + 1) :]
        for length in range(len(context) + 1):
            seen = self._tables[length].get(context[len(context) - length :])
            if seen is None or not seen.total:
                continue
            count = seen.counts.get(token, 0)
            kept = max(count - self._discount(length, count), 0.0)
            p = (kept + seen.discount * p) / seen.total
        return p

    def _discount(self, length: int, count: int) -> float:
        return self._discounts[length][min(count, 3) - 1] if count else 0.0


def _discounts(table: dict[tuple[int, ...], _Context]) -> tuple[float, float, float]:
    """Computes D1, D2, D3+ from the numbers of n-grams seen once, twice, three and four times."""
    n = Counter(count for seen in table.values() for count in seen.counts.values() if count <= 4)
    if not (n[1] and n[2] and n[3]):
        return 0.5, 0.5, 0.5  # too little text to estimate them
    y = n[1] / (n[1] + 2 * n[2])
    estimates = (1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3])
    return tuple(min(max(d, 0.0), float(i)) for i, d in enumerate(estimates, start=1))  # type: ignore[return-value]
