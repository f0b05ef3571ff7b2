"""How often and how long something is tried again that depends on storage, and which errors are storage's.

The clock is monotonic; what is tried is the caller's affair.
"""

import dataclasses
import re
import time

from topklm.buckets import storage_errors_are_user_errors
from topklm.errors import UserError
from topklm.files import AnyPath

FIRST_WAIT_S = 2.0
LONGEST_WAIT_S = 60.0

# In the messages of TensorStore, e.g. "[OS error 28: ENOSPC No space left on device]".
SYSTEM_ERROR = re.compile(r"\[OS error (\d+): (?:[A-Z0-9]+ )?([^\]]+)\]")


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


def storage_problem(error: Exception, path: AnyPath) -> str | None:
    """What an error says of the storage, a phrase for a person; None if it is about something else."""
    try:
        with storage_errors_are_user_errors("", path):
            raise error
    except UserError as e:
        return str(e).partition(": ")[2]
    except OSError as e:
        return (e.strerror or str(e) or type(e).__name__).lower()
    except (ValueError, RuntimeError) as e:
        found = SYSTEM_ERROR.search(str(e))
        return found[2].lower() if found else None
