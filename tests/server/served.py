"""A real server process on a run of random parameters, for the tests that need one."""

from collections.abc import Iterator
import contextlib
import dataclasses
import http.client
import json
import os
from pathlib import Path
import sys
from typing import Any

from helpers import Process
import saved_runs

from topklm.config import Config, ModelConfig

MODEL: ModelConfig = saved_runs.MODEL
CONFIG: Config = dataclasses.replace(saved_runs.CONFIG, model=MODEL)


@dataclasses.dataclass(frozen=True)
class Served:
    """Attributes: the run's folder; the process; its port."""

    run: Path
    process: Process
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(self, path: str, content: Any = None) -> tuple[int, Any]:
        """Status and JSON of one request: GET without content, else POST of it, bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, body)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Served]:
    """Serves until the block ends."""
    run = folder / "village"
    saved_runs.save(run, [7], CONFIG)
    # Speed does not matter here, and what is compiled shall not be kept where people keep theirs.
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "topklm", "serve", str(run), "--port", "0", "--json", *flags]
    process = Process(command, env={**os.environ, "JAX_PLATFORMS": "cpu", **quickly})
    try:
        address = json.loads(process.wait_for_line("address"))["address"]
        yield Served(run, process, int(address.rpartition(":")[2].removesuffix("/v1")))
    finally:
        if process.exit_code is None:
            process.kill()
