"""Starts and stops JAX's distributed runtime, set so that we, not XLA, decide when a process is gone."""

import os

import jax

from topklm.distributed.places import Place

# XLA aborts a process that missed its heartbeats. A week: the membership notices sooner, and says why.
_HEARTBEAT_S = 7 * 24 * 3600
_SHUTDOWN_S = 60
CONNECT_S = 300  # process 0 is known to be there, and about to start the service


def start(place: Place, address: str) -> None:
    """Connects JAX to its coordination service, which process 0 hosts; all processes are known to be there.

    Args:
        place: This process's.
        address: Of the service, or of the way to it, on this host.
    """
    # It would take SIGTERM for itself; how processes agree to stop is the training loop's affair.
    jax.config.update("jax_enable_preemption_service", False)
    # gRPC would look for this very host behind a proxy, and JAX would warn of that.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    jax.config.update("jax_check_proxy_envs", False)
    jax.distributed.initialize(
        coordinator_address=address,
        coordinator_bind_address=address,
        num_processes=place.count,
        process_id=place.index,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=CONNECT_S,
        heartbeat_timeout_seconds=_HEARTBEAT_S,
        shutdown_timeout_seconds=_SHUTDOWN_S,
    )


def stop() -> None:
    """Takes leave of the service; all processes must call it."""
    jax.distributed.shutdown()
