"""How the main thread of a process of several leaves: in good order, or after an error.

After an error nothing is unwound: other threads may hang in a collective, and XLA's own farewell would
wait for processes that are gone.
"""

from collections.abc import Iterator
import os
import sys
import threading
import traceback
from typing import NoReturn

from topklm import errors
from topklm.distributed import runtime
from topklm.distributed.ending import Ending, Kind, PeerLost, say_last_line
from topklm.distributed.membership import Membership

# What XLA's errors begin with when it cannot talk to a peer; they come as various exceptions.
_COMMUNICATION_ERRORS = (
    "UNKNOWN: ",
    "INTERNAL: ",
    "UNAVAILABLE: ",
    "ABORTED: ",
    "DEADLINE_EXCEEDED: ",
    "CANCELLED: ",
)
# An error may be the echo of another process's: time to hear of that.
_ECHO_S = 2.0


def leave_together(membership: Membership, timeout_s: float) -> None:
    """Ends this process's part after all others have done theirs; process 0 leaves last.

    Raises:
        PeerLost: If they have not within `timeout_s` seconds.
    """
    ending = membership.ending
    if ending and ending.kind is Kind.STOP:
        membership.wait_for_others()
        sys.stdout.flush()
        os._exit(0)
    membership.gather("the end of the run", "", timeout_s)
    runtime.stop()
    membership.close()


def leave_because_of(error: BaseException, membership: Membership) -> NoReturn:
    """Says this process's last words, tells the others, and ends it with the exit code that fits."""
    echoed = _cause_elsewhere(error, membership)
    if not membership.claim_exit():
        threading.Event().wait()  # the thread that heard the news is ending the process
    if echoed:
        say_last_line(echoed, membership.place.index)
        membership.wait_for_others()
        code = echoed.exit_code
    else:
        code = _own_end(error, membership)
    sys.stdout.flush()
    os._exit(code)


def leave_hanging(text: str, membership: Membership | None) -> NoReturn:
    """Ends this process from another thread than the main one, which hangs; see `topklm.distributed`."""
    me = membership.place.index if membership else 0
    ending = Ending(Kind.HANG, me, f"{text} (process {me})" if membership else text)
    if membership and not membership.claim_exit():
        threading.Event().wait()
    say_last_line(ending, me)
    if membership:
        membership.announce(ending.kind, ending.text)
    os._exit(ending.exit_code)


def _cause_elsewhere(error: BaseException, membership: Membership) -> Ending | None:
    """How another process ended the run, if that is why this one has an error."""
    match error:
        case _ if isinstance(error, KeyboardInterrupt) or errors.explain(error):
            return None  # these speak for themselves
        case PeerLost():
            return membership.ending
    # Collectives fail at once when a process dies; that its machine is gone is known after the peer timeout.
    in_collective = any(str(e).startswith(_COMMUNICATION_ERRORS) for e in _chain(error))
    ending = membership.wait_for_ending(_ECHO_S + membership.peer_timeout_s * in_collective)
    if ending and not in_collective:
        traceback.print_exception(error)
    return ending


def _own_end(error: BaseException, membership: Membership) -> int:
    """Reports an error that began here, like a single process would; returns the exit code."""

    def fail() -> None:
        raise error

    me = membership.place.index
    match error:
        case _ if text := errors.explain(error):
            code = errors.guarded(fail, errors.EXIT_TRY_AGAIN)
            kind = Kind.MISTAKE if code == errors.EXIT_USER_ERROR else Kind.FAILURE
            membership.announce(kind, errors.one_line(text))
        case KeyboardInterrupt():
            code = errors.guarded(fail)
            membership.announce(Kind.STOP, f"process {me} was interrupted; what was saved before stays")
        case PeerLost():
            ending = Ending(Kind.LATE, me, str(error))
            say_last_line(ending, me)
            membership.announce(Kind.LATE, str(error))
            code = ending.exit_code
        case _:
            traceback.print_exception(error)
            membership.announce(Kind.FAILURE, f"{type(error).__name__}: {' '.join(str(error).split())}")
            code = 1
    return code


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it came from."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
