"""Finds this process's index and the address of process 0 in the environment, and how long to wait.

Either three variables of ours give them, or the launcher's own (TPU pods, GKE, Slurm, Open MPI), read the
way JAX reads them. Nothing is started or connected here; on a laptop it costs a few look-ups.
"""

import dataclasses
import os
import re

from jax._src import clusters

from topklm.errors import UserError

# The port that Google's own firewall rules for TPU pods open; JAX's default moved away from it.
PORT = 8476
_NAME_TIMEOUT_S = 300  # until process 0's host name is known; `coordination` waits for its answer
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


def find() -> ClusterProcess | None:
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
