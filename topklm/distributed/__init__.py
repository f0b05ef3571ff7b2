"""The processes of one run: who they are, a few words between them, and how all end when one fails.

Words go through JAX's coordination service in process 0, never through a device collective, so that they can
time out. In a single process every function here is trivial.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import contextlib
import json
import os
from typing import Any, NoReturn

from topklm.distributed import coordination
from topklm.distributed.coordination import Ending, Kind, say_last_line
from topklm.distributed.coordination import PeerLost as PeerLost
from topklm.distributed.session import Session
from topklm.errors import EXIT_TRY_AGAIN, UserError

PATIENCE_S = 1800.0  # for the others to come to the same line: the slowest compilation or save
_WEEK_S = 604_800.0

_session: Session | None = None


@contextlib.contextmanager
def session(told_to_stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Joins the run's other processes, if the environment names any, and leaves together with them.

    Enter it before a device is used. `coordination.find_process` reads the environment. All must come
    within TOPKLM_START_TIMEOUT seconds (300); one that is silent for TOPKLM_PEER_TIMEOUT seconds (10) counts
    as gone.

    In a run of several processes, an exception inside does not get out: the usual last lines are printed,
    the others are told, and the process ends. When another process fails or is gone, this one ends by
    itself, whatever it is doing: with one line, and exit code 2 if a mistake of the user was the cause,
    else 75.

    `told_to_stop` returns whether somebody has asked this process itself to stop. If so, it ends with exit
    code 0 when another one ends the run by `announce_stop`. UserError for an environment that does not fit.
    """
    global _session  # noqa: PLW0603 - a process is part of one run
    process = coordination.find_process()
    if process is None:
        yield
        return
    _session = Session(
        process,
        start_timeout_s=coordination.seconds("TOPKLM_START_TIMEOUT", 300),
        peer_timeout_s=coordination.seconds("TOPKLM_PEER_TIMEOUT", 10),
        told_to_stop=told_to_stop,
    )
    try:
        _session.join()
        yield
        _session.leave(PATIENCE_S)
    except BaseException as e:
        _session.end_because_of(e)


def process_index() -> int:
    """Returns this process's number, from 0."""
    return _session.process.index if _session else 0


def process_count() -> int:
    """Returns how many processes the run has."""
    return _session.process.count if _session else 1


def is_primary() -> bool:
    """Returns whether this is the process that writes logs and metrics."""
    return process_index() == 0


def barrier(name: str, timeout_s: float = PATIENCE_S) -> None:
    """Waits until all processes have come to the barrier of this name; raises as `gather`."""
    gather(name, "", timeout_s)


def gather(name: str, value: str, timeout_s: float = PATIENCE_S) -> list[str]:
    """Returns the values of all processes, in their order, in every process; names can be used again.

    PeerLost, naming those that are missing, when not all have come `timeout_s` seconds after the first.
    """
    return _session.gather(name, value, timeout_s) if _session else [value]


def broadcast(name: str, value: str | None, timeout_s: float = PATIENCE_S) -> str:
    """Returns process 0's value, in every process; those of the others do not matter. Raises as `gather`."""
    return gather(name, value or "" if is_primary() else "", timeout_s)[0]


def of_first(name: str, make: Callable[[], Any]) -> Any:
    """Returns a value that process 0 alone makes, and JSON can hold, in every process; waits as `meet`."""
    return json.loads(meet(name, json.dumps(make()) if is_primary() else "")[0])


def meet(name: str, value: str = "") -> list[str]:
    """Returns the values of all processes as `gather`, for parts of work that take hours.

    Waits for a week, in a thread, so that the main thread hears signals. A process that ends, hung or killed,
    ends the run as ever.
    """
    if not _session:
        return [value]
    waiting = futures.ThreadPoolExecutor(1)
    try:
        return waiting.submit(_session.gather, name, value, _WEEK_S).result()
    finally:
        waiting.shutdown(wait=False)


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises UserError if a process is about to work on other facts than the first, by name; JSON-able."""
    first, *others = map(json.loads, meet("facts", json.dumps(facts)))
    for index, other in enumerate(others, 1):
        for name in {**first, **other}:
            if (there := other.get(name)) != (here := first.get(name)):
                text = f"process {index} has {there!r}, process 0 {here!r}"
                advice = "give all hosts, which are to be of one kind, the same command, text and versions"
                raise UserError(f"{text}: {advice}", field=name)


def announce_stop(text: str) -> None:
    """Ends all other processes, with `text` as their last line; any thread may call it.

    For a request to stop that comes before there is anything to save. Returns when they know, in process 0
    when they have gone; ending this process is left to the caller. Processes that were asked to stop too
    end with exit code 0, others with 75.
    """
    if _session:
        _session.announce(Kind.STOP, text)


def end_hung(text: str) -> NoReturn:
    """Ends all processes with exit code 75, `text` for the symptom, and the stacks of all their threads."""
    if _session:
        _session.end_hung(text)
    say_last_line(Ending(Kind.HANG, 0, text), 0)
    os._exit(EXIT_TRY_AGAIN)
