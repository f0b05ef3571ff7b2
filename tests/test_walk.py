"""README and docs as a newcomer reads them: every command, top to bottom, in one clean folder.

A fenced block of `bash` or `python` runs as it stands, in the order of the pages. A comment above it,
`<!-- needs: X -->`, says which thing it needs that a newcomer's machine lacks (a cloud, the network, hours);
the set of such things is `ABSENT`. Only training is cut short.
"""

from collections.abc import Iterator
import dataclasses
import os
from pathlib import Path
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    "README",
    "docs/training",
    "docs/data",
    "docs/neurons",
    "docs/contrast",
    "docs/steering",
    "docs/serving",
]
ABSENT = {
    "Google Cloud",
    "Slurm",
    "hours",
    "a notebook",
    "tasks, a folder of files",
    "the network",
    "transformers and torch",
    "runs/books, of data.md",
    "runs/books, of data.md, and two texts",
    "ud.conllu.gz, any treebank of Universal Dependencies",
}
STEPS = 40  # of the quickstart's 1,300
SECONDS = 1200  # for one command
# Verbs that serve until they are interrupted, and the address that answers when they are ready.
SERVERS = {
    "topklm explore": "http://127.0.0.1:8765/",
    "topklm serve": "http://127.0.0.1:8766/health",
}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str
    mark: str  # the HTML comment above it: "run command", "needs: ...", or ""

    @property
    def needs(self) -> str:
        return self.mark.removeprefix("needs: ") if self.mark.startswith("needs: ") else ""


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / f"{page}.md").read_text(encoding="utf-8")
    pattern = r"(?:^<!-- ([^\n]*) -->\n)?^```(bash|python)\n(.*?)^```$"
    for mark, language, body in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
        yield Block(page, language, body, mark)


def everything() -> list[Block]:
    others = sorted(f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md"))
    pages = [*PAGES, *(page for page in others if page not in PAGES), "notebooks/README"]
    return [block for page in pages for block in blocks(page)]


def test_a_block_that_does_not_run_names_what_it_needs():
    found = everything()
    assert {block.needs for block in found} - {""} == ABSENT
    running = [block for block in found if not block.needs]
    assert len(running) > 25
    assert {"README", "docs/neurons", "docs/steering", "docs/serving"} <= {block.page for block in running}


class Newcomer:
    """A shell and a Python prompt in a clone, without variables, home or commands of anybody else's."""

    def __init__(self, clone: Path, home: Path):
        self.clone = clone
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        kept |= {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
        commands = f"{clone}/.venv/bin:/usr/local/bin:/usr/bin:/bin"
        self.environment = {**kept, "HOME": str(home), "PATH": commands, "LANG": "C.UTF-8", "COLUMNS": "80"}
        self.servers: dict[str, subprocess.Popen[bytes]] = {}
        self.python: dict[str, str] = {}  # of each page, what its earlier blocks define

    def shell(self, block: Block) -> None:
        for line in block.text.replace("\\\n", " ").splitlines():
            if not line.strip():
                continue
            command = re.sub(r"(--config=\S+)", rf"\1 --config.train.steps={STEPS}", line)
            command = command.replace("neurons/1300/", f"neurons/{STEPS}/")
            server = next((s for s in SERVERS if line.startswith(s) and "--export" not in line), "")
            if server:
                self.serve(server, command)
            else:
                self.run(["bash", "-euo", "pipefail", "-c", command], block, line)

    def prompt(self, block: Block) -> None:
        """Run a block of Python; what earlier blocks of its page defined is made once more, unseen."""
        text = block.text.replace("neurons/1300/", f"neurons/{STEPS}/")
        defined = self.python.get(block.page, "")
        self.run([f"{self.clone}/.venv/bin/python", "-c", defined + text], block, text)
        self.python[block.page] = defined + text

    def run(self, command: list[str], block: Block, shown: str) -> None:
        begin = time.monotonic()
        ended = subprocess.run(
            command,
            cwd=self.clone,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        print(f"{time.monotonic() - begin:6.1f} s  {block.page}: {shown.splitlines()[0]}", flush=True)
        assert ended.returncode == 0, f"{block.page}: {shown}\n{ended.stdout[-3000:]}"

    def serve(self, server: str, command: str) -> None:
        """Start a server, or start it again, and wait until it answers."""
        self.stop(server)
        self.servers[server] = subprocess.Popen(
            ["bash", "-c", f"exec {command.partition(' #')[0]}"],
            cwd=self.clone,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            assert self.servers[server].poll() is None, f"{command} ended"
            try:
                with urllib.request.urlopen(SERVERS[server], timeout=60) as answer:
                    if b"is being prepared" not in answer.read():
                        return
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.5)
        pytest.fail(f"{command} did not answer in {SECONDS} s")

    def stop(self, server: str) -> None:
        process = self.servers.pop(server, None)
        if process is not None:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, f"{server} was interrupted and ended with {process.returncode}"


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_every_command_of_readme_and_docs_runs_in_order(tmp_path):
    clone = tmp_path / "topklm"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    (tmp_path / "home").mkdir()
    newcomer = Newcomer(clone, tmp_path / "home")
    try:
        for block in everything():
            if block.needs or block.mark == "test command":
                continue
            (newcomer.shell if block.language == "bash" else newcomer.prompt)(block)
            if block.page != "docs/serving":
                newcomer.stop("topklm serve")
            newcomer.stop("topklm explore")
    finally:
        for process in newcomer.servers.values():
            process.kill()
