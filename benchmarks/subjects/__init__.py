"""The code that is measured; `benchmarks.harness.worker.Worker` runs each module in a process of its own."""

from collections.abc import Callable
from typing import Any

import jax


def blocking(function: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    """Makes a subject that calls a function and waits for all of its arrays."""

    def subject() -> None:
        jax.block_until_ready(function(*arguments))

    return subject
