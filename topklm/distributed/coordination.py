"""Finds this process in its environment, and connects to JAX's coordination service in process 0.

Index and address are in three variables of ours, or the launcher's own (TPU pods, GKE, Slurm, Open MPI), read
the way JAX reads them. The service is a key-value store, barriers, and which processes are alive. Process 0
hosts the service. Heartbeats come from threads of XLA, which Python cannot delay. XLA aborts a process
(SIGABRT) that loses process 0 or cannot join: `connect` takes a handler for that. Why a run ends early is
described once, by the first process in trouble; every other process ends on the same description. This is the
only module that uses private names of `jax.distributed`; Orbax uses the same client.
"""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import dataclasses
import enum
import faulthandler
import functools
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from typing import Any

import jax
from jax._src import clusters
from jax._src import distributed as jax_distributed

from topklm.errors import EXIT_TRY_AGAIN, EXIT_USER_ERROR, UserError

# The port that Google's own firewall rules for TPU pods open; JAX's default moved away from it.
PORT = 8476
_NAME_TIMEOUT_S = 300  # until process 0's host name is known; `connect` waits for its answer
_EXPLICIT = ("TOPKLM_COORDINATOR", "TOPKLM_PROCESS_ID", "TOPKLM_PROCESS_COUNT")
_BY_HAND = f"set {', '.join(_EXPLICIT)}, or TOPKLM_DISTRIBUTED=off for a single process"


@dataclasses.dataclass(frozen=True)
class ClusterProcess:
    """One process of a run of several."""

    index: int
    count: int  # of all processes; at least 2
    host: str  # name or address at which process 0 listens
    port: int = PORT
    local_device_ids: tuple[int, ...] | None = None  # GPUs of its host that it may use; None for all

    @property
    def address(self) -> str:
        """Host and port of process 0, as gRPC reads them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def find_process() -> ClusterProcess | None:
    """Reads this process's index and its run's size, or returns None where it is alone.

    TOPKLM_DISTRIBUTED=off turns the search off. TOPKLM_COORDINATOR=host:port, TOPKLM_PROCESS_ID and
    TOPKLM_PROCESS_COUNT set all three by hand; UserError if they do not fit. JAX_COORDINATOR_PORT replaces
    port 8476 for the launchers.
    """
    switch = os.environ.get("TOPKLM_DISTRIBUTED", "auto")
    if switch not in ("auto", "off"):
        raise UserError(f"TOPKLM_DISTRIBUTED = {switch!r}: must be auto or off; leave it away for auto")
    if switch == "off":
        return None
    given = [name for name in _EXPLICIT if name in os.environ]
    return _explicit(given) if given else _launched()


def seconds(name: str, default: float) -> float:
    """Returns the seconds in an environment variable, or the default; UserError if they are not above 0."""
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{name} = {text!r}: must be a number of seconds above 0")
    return value


def _explicit(given: list[str]) -> ClusterProcess | None:
    if missing := [name for name in _EXPLICIT if name not in given]:
        raise UserError(
            f"{' and '.join(missing)}: missing, while {' and '.join(given)} is set; set all three or none"
        )
    coordinator = os.environ["TOPKLM_COORDINATOR"]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"TOPKLM_COORDINATOR = {coordinator!r}: must be host:port, e.g. 10.0.0.2:{PORT}")
    count = _number("TOPKLM_PROCESS_COUNT", 1, None)
    index = _number("TOPKLM_PROCESS_ID", 0, count - 1)
    return ClusterProcess(index, count, host.strip("[]"), int(port)) if count > 1 else None


def _number(name: str, lowest: int, highest: int | None) -> int:
    text = os.environ[name]
    if not text.isdigit() or int(text) < lowest or (highest is not None and int(text) > highest):
        allowed = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"
        raise UserError(f"{name} = {text!r}: must be a whole number, {allowed}")
    return int(text)


def _launched() -> ClusterProcess | None:
    """Asks the launcher that JAX recognizes, if any."""
    # Any pod looks like Kubernetes, also a lone notebook: only indexed jobs are runs of several processes.
    ignored = () if "JOB_COMPLETION_INDEX" in os.environ else (clusters.K8sCluster,)
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if kind not in ignored]
    try:
        launcher = next((k for k in kinds if not k.opt_in_only_method and k.is_env_present()), None)
        if launcher is None or launcher.get_process_count() == 1:
            return None
        address = launcher.get_coordinator_address(
            timeout_secs=_NAME_TIMEOUT_S,
            override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT", str(PORT)),
        )
        host, _, port = address.rpartition(":")
        index, count = launcher.get_process_id(), launcher.get_process_count()
        return ClusterProcess(index, count, host.strip("[]"), int(port), _own_gpus())
    except (RuntimeError, LookupError, ValueError, OSError, ImportError) as e:
        raise UserError(
            f"this looks like one process of several, but its index cannot be read ({e}): {_BY_HAND}"
        ) from e


def _own_gpus() -> tuple[int, ...] | None:
    """Chooses one GPU for each process where several share a host and the launcher gave each all of them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _processes_on_host() == 1 or (visible is not None and "," not in visible):
        return None
    own = os.environ.get("SLURM_LOCALID", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK"))
    return None if own is None else (int(own),)


def _processes_on_host() -> int:
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        return int(os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    # Slurm: "8(x2),4" for two hosts with eight and one with four.
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(times or 1)
    return counts[int(os.environ.get("SLURM_NODEID", "0"))] if counts else 1


_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# The service gives up the wait for all processes first, because only it can name those that are missing.
_CLIENT_WAITS_LONGER_S = 30
_LONGEST_WAIT_MS = 3_600_000
_STDERR = 2
# XLA's warning about a setting that `connect` makes on purpose.
_EXPECTED_WARNING = b"Using experimental recoverable task feature"
_FLUSH_S = 2.0
AGAIN = "start the same command again to resume"


class Kind(enum.StrEnum):
    """Sort of an end."""

    MISTAKE = "mistake"  # of the user; the text says what to do
    FAILURE = "failure"  # a bug
    HANG = "hang"  # no progress, somewhere
    GONE = "gone"  # a process that cannot speak for itself any more
    LATE = "late"  # somebody was waited for in vain, or does not belong to the run
    STOP = "stop"  # a process was asked to stop, and nothing is lost
    STOPPED = "stopped"  # the same, for a process that was not asked itself


_LAST_LINES = {
    Kind.MISTAKE: "error: process {process} failed: {text}",
    Kind.FAILURE: "error: process {process} failed: {text}; {again}",
    Kind.HANG: "error: {text}; stacks above; {again}",
    Kind.GONE: "error: process {process} is gone ({text}): it was killed or its machine failed; {again}",
    Kind.LATE: "error: {text}",
    Kind.STOP: "{text}",
    Kind.STOPPED: "error: process {process} was told to stop ({text}); {again}",
}
_GIVEN_UP = "error: the others gave up this process, {process} ({text}); {again}"


class PeerLost(Exception):  # noqa: N818 - named for what happened
    """Another process of the run failed, is gone or did not come; its text is one line for a person."""


@dataclasses.dataclass(frozen=True)
class Ending:
    """The end of a run, as its processes tell each other."""

    kind: Kind
    process: int  # index of the one that caused it
    text: str  # one line: that process's last words, or what others saw of it

    @property
    def exit_code(self) -> int:
        """Code of the processes that end because of it."""
        return {Kind.MISTAKE: EXIT_USER_ERROR, Kind.STOP: 0}.get(self.kind, EXIT_TRY_AGAIN)

    def heard(self, *, told_to_stop: bool) -> "Ending":
        """Returns the ending for a process that was told to stop itself, or was not.

        Only the former may end with 0, which launchers read as finished.
        """
        if self.kind is Kind.STOP and not told_to_stop:
            return dataclasses.replace(self, kind=Kind.STOPPED)
        return self

    def last_line(self, reader: int) -> str:
        """Returns what the process with index `reader` prints before it ends."""
        given_up = self.kind is Kind.GONE and self.process == reader
        line = _GIVEN_UP if given_up else _LAST_LINES[self.kind]
        return line.format(process=self.process, text=self.text, again=AGAIN)


def say_last_line(ending: Ending, reader: int) -> None:
    """Prints what `reader` says before it ends; never blocks for long; in a hang, also the stacks."""

    def write() -> None:
        sys.stdout.flush()
        if ending.kind is Kind.HANG:
            faulthandler.dump_traceback(_STDERR)
        stream = sys.stdout if ending.kind is Kind.STOP else sys.stderr
        print(ending.last_line(reader), file=stream, flush=True)

    # The main thread may hold the streams, blocked.
    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(_FLUSH_S)


class CoordinationClient:
    """This process's connection to the service, for any thread; JaxRuntimeError where it does not answer."""

    def __init__(self) -> None:
        """Takes the connection that `jax.distributed.initialize` has made."""
        self._client: Any = jax_distributed.global_state.client

    def set(self, key: str, value: str) -> bool:
        """Stores a value; returns False, and stores nothing, if the key has one."""
        with _expecting("ALREADY_EXISTS"):
            self._client.key_value_set(key, value)
            return True
        return False

    def get(self, key: str) -> str | None:
        """Returns the value of a key, or None if it has none."""
        with _expecting("NOT_FOUND"):
            return self._client.key_value_try_get(key)
        return None

    def wait_for(self, key: str) -> str:
        """Returns the value of a key, once it has one."""
        while True:
            with _expecting("DEADLINE_EXCEEDED"):
                return self._client.blocking_key_value_get(key, _LONGEST_WAIT_MS)

    def values(self, folder: str) -> dict[str, str]:
        """Returns the values of all keys `folder`/NAME, by NAME."""
        found = self._client.key_value_dir_get(f"{folder}/")
        return {key.rpartition("/")[2]: value for key, value in found}

    def delete(self, key: str) -> None:
        """Removes a key."""
        self._client.key_value_delete(key)

    def barrier(self, name: str, timeout_s: float) -> bool:
        """Waits until all have called this with a new name; False if `timeout_s` passed since the first."""
        with _expecting("DEADLINE_EXCEEDED"):
            self._client.wait_at_barrier(name, max(1, round(timeout_s * 1000)))
            return True
        return False

    def alive(self, count: int) -> dict[int, int]:
        """Waits for all living processes; returns for each of them a number that it has until its end."""
        return dict(self._client.get_live_nodes(list(range(count))))

    def disconnect(self) -> None:
        """Leaves the service, which ends calls of other threads with an error; in process 0, ends it."""
        jax.distributed.shutdown()


@contextlib.contextmanager
def _expecting(status: str) -> Iterator[None]:
    """Suppresses the service's error of this status inside the block."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if not str(e).startswith(status):
            raise


def connect(
    process: ClusterProcess,
    *,
    start_timeout_s: float,
    peer_timeout_s: float,
    on_abort: Callable[[str], None],
) -> CoordinationClient:
    """Starts the service (in process 0) and waits until all processes have connected to it.

    A process without heartbeats for `peer_timeout_s` counts as dead. `on_abort` is called when XLA aborts
    this process, now or later, in any thread, and must end it. It gets what XLA printed, while this function
    waits; an empty text after that. PeerLost if process 0 does not answer; UserError in process 0 if the port
    is taken.
    """
    if process.index == 0:
        _check_port_is_free(process)
    else:
        _wait_for_port(process, start_timeout_s)
    # It would take SIGTERM for itself; the training loop agrees with other processes on when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    # Else XLA aborts all processes as soon as one is dead, without a name.
    jax.config.update("jax_enable_recoverability", True)
    # gRPC would look for the run's hosts through a proxy, and JAX would warn of that.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), process.host)))
    jax.config.update("jax_check_proxy_envs", False)
    patience_s = math.ceil(start_timeout_s)
    with _standard_error_held_back() as held, _register_timeout(patience_s):
        _handle_abort(lambda: on_abort(held()))
        try:
            jax.distributed.initialize(
                coordinator_address=process.address,
                # A run that stays on one machine need not be seen by others.
                coordinator_bind_address=process.address if process.host in _LOOPBACK else None,
                num_processes=process.count,
                process_id=process.index,
                local_device_ids=process.local_device_ids,
                cluster_detection_method="deactivate",
                initialization_timeout=patience_s + _CLIENT_WAITS_LONGER_S,
                heartbeat_timeout_seconds=max(1, math.ceil(peer_timeout_s)),
            )
        except RuntimeError as e:
            if process.index == 0 and "start RPC server" in str(e):
                raise _port_is_taken(process, "address already in use") from e
            raise
    return CoordinationClient()


def is_listening(process: ClusterProcess, timeout_s: float) -> bool:
    """Returns whether anything accepts connections at process 0's port."""
    try:
        socket.create_connection((process.host, process.port), timeout_s).close()
    except OSError:
        return False
    return True


def missing_processes(said: str) -> tuple[int, str] | None:
    """Reads from XLA's text how many connected, and which did not: (2, "1, 4"); None for another text."""
    found = re.search(
        r"tasks that reached the barrier: (\d+)/(\d+)\.\n.*Some timed out task names:\n((?:\S*\d+\n)+)", said
    )
    if not found:
        return None
    came, count = int(found[1]), int(found[2])
    missing = sorted(int(re.findall(r"\d+", line)[-1]) for line in found[3].splitlines())
    rest = ["..."] * (len(missing) < count - came)  # XLA does not list them all
    return came, ", ".join([*map(str, missing), *rest])


def _check_port_is_free(process: ClusterProcess) -> None:
    """Refuses a taken port before jaxlib crashes on it, or shares it with a run that is using it."""
    family = socket.AF_INET6 if ":" in process.host else socket.AF_INET
    with socket.socket(family) as probe:
        # Connections of an earlier run may linger.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((process.host if process.host in _LOOPBACK else "", process.port))
        except OSError as e:
            raise _port_is_taken(process, e.strerror or str(e)) from e


def _port_is_taken(process: ClusterProcess, why: str) -> UserError:
    return UserError(
        f"process 0 cannot listen at port {process.port} ({why.lower()}): end the run that uses it on this "
        "host, or choose another with TOPKLM_COORDINATOR or JAX_COORDINATOR_PORT"
    )


def _wait_for_port(process: ClusterProcess, timeout_s: float) -> None:
    """Waits until process 0 accepts connections, which also means until its host's name is known."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            wait_s = max(1.0, min(10.0, deadline - time.monotonic()))
            socket.create_connection((process.host, process.port), wait_s).close()
        except OSError as e:
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"waited {timeout_s:g} s for process 0 to answer at {process.address} "
                    f"({e.strerror or e}): start the same command on every host, and let them reach that port"
                ) from e
            time.sleep(0.2)
        else:
            return


@contextlib.contextmanager
def _register_timeout(seconds: int) -> Iterator[None]:
    """Has the service name the missing processes after so long; `initialize` cannot pass that on."""
    make = jax_distributed._jax.get_distributed_runtime_service
    with_timeout = functools.partial(make, cluster_register_timeout=seconds)
    jax_distributed._jax.get_distributed_runtime_service = with_timeout
    try:
        yield
    finally:
        jax_distributed._jax.get_distributed_runtime_service = make


@contextlib.contextmanager
def _standard_error_held_back() -> Iterator[Callable[[], str]]:
    """Keeps all that is printed to standard error in a file, and prints it at the end of the block.

    Yields a function that restores standard error and returns what was printed until then; "" after the
    block.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        real: int | None = os.dup(_STDERR)
        os.dup2(file.fileno(), _STDERR)

        def restore() -> bytes:
            nonlocal real
            descriptor, real = real, None  # at once: XLA may abort in another thread
            if descriptor is None:
                return b""
            os.dup2(descriptor, _STDERR)
            os.close(descriptor)
            file.seek(0)
            return file.read()

        try:
            yield lambda: restore().decode(errors="replace")
        finally:
            lines = restore().splitlines(keepends=True)
            os.write(_STDERR, b"".join(line for line in lines if _EXPECTED_WARNING not in line))


_handlers: list[object] = []  # ctypes does not keep them


def _handle_abort(on_abort: Callable[[], None]) -> None:
    """Handles SIGABRT, also while the main thread, which runs Python's handlers, is in native code."""
    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: on_abort()))
    ctypes.CDLL(None).signal(signal.SIGABRT, _handlers[-1])
