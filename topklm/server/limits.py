"""How much one request may ask for, and all together."""

import dataclasses

from topklm.errors import UserError
from topklm.inference.engine import MOST_WAITING


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds; a request beyond one is refused.

    Attributes:
        waiting: Sequences that wait for a slot.
        texts: Sequences of one request, prompts times n.
        prompt_tokens: Of one prompt.
        max_tokens: New tokens of one sequence.
        interventions: Of one request.
        body: Bytes of one request.
        timeout: Seconds from a request to the end of its answer.
        grace: Seconds that sequences may go on when the server is told to stop.
    """

    waiting: int = MOST_WAITING
    texts: int = 128
    prompt_tokens: int = 16384
    max_tokens: int = 4096
    interventions: int = 64
    body: int = 1024 * 1024
    timeout: float = 300.0
    grace: float = 10.0

    def check(self) -> "Limits":
        """Returns itself.

        Raises:
            UserError: For a bound that cannot be, named as the command's flag.
        """
        flags = {"waiting": "max-waiting", "timeout": "timeout", "grace": "grace"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            lowest = 0 if field.name in ("waiting", "grace") else 1
            if not lowest <= value <= 1e9:
                flag = flags.get(field.name, f"max-{field.name.removeprefix('max_').replace('_', '-')}")
                raise UserError(f"--{flag} = {value}: must be {lowest} or more, and at most 1e9")
        return self
