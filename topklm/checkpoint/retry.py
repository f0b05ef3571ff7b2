"""How often and how long something is tried again that depends on storage, and which errors are storage's.

The clock is monotonic; what is tried is the caller's affair.
"""

import dataclasses
import time

FIRST_WAIT_S = 2.0
LONGEST_WAIT_S = 60.0


@dataclasses.dataclass
class Backoff:
    """Waits of 2, 4, 8 ... 60 s after failures in a row, until patience is over."""

    patience_s: float
    failures: int = 0
    _since: float = 0.0

    def failed(self) -> float | None:
        """Counts a failure.

        Returns:
            Seconds until the next attempt; None once `patience_s` have passed since the first failure.
        """
        now = time.monotonic()
        self._since = self._since if self.failures else now
        self.failures += 1
        if now - self._since >= self.patience_s:
            return None
        return min(FIRST_WAIT_S * 2.0 ** (self.failures - 1), LONGEST_WAIT_S)

    def succeeded(self) -> None:
        """Forgets the failures."""
        self.failures = 0
