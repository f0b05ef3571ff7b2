"""The processes of one run: who they are, a few words between them, and how all end when one fails.

Words go over plain connections to process 0, never through a device collective, so that they can time out.
In a single process every function here is trivial.
"""

from collections.abc import Iterator
import contextlib
from typing import NoReturn

from topklm.distributed import exits, patience, places, runtime
from topklm.distributed.ending import Kind
from topklm.distributed.ending import PeerLost as PeerLost
from topklm.distributed.membership import Membership

PATIENCE_S = 1800.0  # for the others to come to the same line: the slowest compilation or save

_membership: Membership | None = None


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Joins the run's other processes, if the environment names any, and leaves together with them.

    Enter it before the first use of a device. `places.find` says how the environment is read. All must come
    within TOPKLM_START_TIMEOUT seconds (300); one that is silent for TOPKLM_PEER_TIMEOUT seconds (30) counts
    as gone.

    In a run of several processes, an exception inside does not get out: the usual last lines are printed,
    the others are told, and the process ends. When another process fails or is gone, this one ends by
    itself, whatever it is doing: with one line, and exit code 2 if a mistake of the user was the cause,
    else 75.

    Raises:
        UserError: For an environment that does not fit.
    """
    global _membership  # noqa: PLW0603 - a process is part of one run
    place = places.find()
    if place is None:
        yield
        return
    membership = Membership(
        place,
        start_timeout_s=patience.seconds("TOPKLM_START_TIMEOUT", 300),
        peer_timeout_s=patience.seconds("TOPKLM_PEER_TIMEOUT", 30),
    )
    _membership = membership  # from before it has joined, so that a request to stop can be passed on
    try:
        address = membership.join()
        runtime.start(place, address)
        yield
        exits.leave_together(membership, PATIENCE_S)
    except BaseException as e:
        exits.leave_because_of(e, membership)


def process_index() -> int:
    """This process's number, from 0."""
    return _membership.place.index if _membership else 0


def process_count() -> int:
    """How many processes the run has."""
    return _membership.place.count if _membership else 1


def is_primary() -> bool:
    """Whether this is the process that writes logs and metrics."""
    return process_index() == 0


def barrier(name: str, timeout_s: float = PATIENCE_S) -> None:
    """Returns once all processes have come to the barrier of this name; names can be used again.

    Raises:
        PeerLost: When `timeout_s` seconds after the first not all have come; it names those that are missing.
    """
    gather(name, "", timeout_s)


def gather(name: str, value: str, timeout_s: float = PATIENCE_S) -> list[str]:
    """The values of all processes, in their order, in every process.

    Raises:
        PeerLost: Like `barrier`.
    """
    return _membership.gather(name, value, timeout_s) if _membership else [value]


def broadcast(name: str, value: str | None, timeout_s: float = PATIENCE_S) -> str:
    """Process 0's value, in every process; those of the others do not matter.

    Raises:
        PeerLost: Like `barrier`.
    """
    return gather(name, value or "" if is_primary() else "", timeout_s)[0]


def announce_stop(text: str) -> None:
    """Ends all other processes with exit code 0 and `text` as their last line; any thread may call it.

    For a request to stop that comes before there is anything to save. Returns when they know, in process 0
    when they have gone; ending this process is left to the caller.
    """
    if _membership:
        _membership.announce(Kind.STOP, text)


def end_hung(text: str) -> NoReturn:
    """Ends all processes, this one included, with exit code 75 and the stacks of all their threads.

    Args:
        text: What was noticed, like "no progress for 600 s".
    """
    exits.leave_hanging(text, _membership)
