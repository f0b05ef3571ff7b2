"""How the processes of a run stop after the same step, though only one of them was asked to.

Each puts its own signal into the step as an array over its devices, and reads the largest of all among the
step's results: a step later all know, without any message of their own and whatever the network does.
"""

from collections.abc import Callable
import signal
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from topklm.runtime.signals import StopRequest

_BALLOT = "stop_signal"


class Agreement:
    """Truthy once all processes know that the run shall stop; the same in all of them after each step."""

    def __init__(self, mesh: Mesh, stop: StopRequest):
        """Asks nobody anything yet.

        Args:
            mesh: All devices of the run.
            stop: What this process was asked.
        """
        self._stop = stop
        self._alone = jax.process_count() == 1
        self._agreed = False
        self._sharding = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
        self._ballots: dict[int, jax.Array] = {}

    def __bool__(self) -> bool:
        return bool(self._stop) if self._alone else self._agreed

    def voting(self, step: Callable, donate_argnums: tuple[int, ...] = ()) -> Callable:
        """A step that takes a ballot as one more argument, if there are others, and puts it to the vote.

        Args:
            step: Jitted, `(...) -> results` or `(...) -> (state, results)`.
            donate_argnums: Of the step.
        """
        if self._alone:
            return step

        def with_ballot(*arguments_and_ballot: Any) -> Any:
            *arguments, ballot = arguments_and_ballot
            out = step(*arguments)
            *state, results = out if isinstance(out, tuple) else (out,)
            results = {**results, _BALLOT: jnp.max(ballot)}
            return (*state, results) if state else results

        return jax.jit(with_ballot, donate_argnums=donate_argnums)

    def ballot(self) -> tuple[jax.Array, ...]:
        """The further argument of a voting step: what this process has to say now, int32, per device."""
        if self._alone:
            return ()
        asked = signal.Signals[self._stop.signal_name].value if self._stop.signal_name else 0
        if asked not in self._ballots:
            shape = self._sharding.mesh.devices.shape
            self._ballots[asked] = jax.make_array_from_callback(
                shape, self._sharding, lambda _: np.full((1,) * len(shape), asked, np.int32)
            )
        return (self._ballots[asked],)

    def count(self, results: dict[str, Any]) -> dict[str, Any]:
        """Takes the vote out of a step's results, which every process must do for every step, in order."""
        asked = int(results.pop(_BALLOT, 0))
        if asked:
            self._agreed = True
            self._stop.request(signal.Signals(asked).name)
        return results
