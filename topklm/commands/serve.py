"""`topklm serve`: serves a model by OpenAI's interface for completions, with its neurons beside it."""

import argparse
from collections.abc import Callable
import contextlib
import json
import os
from pathlib import Path
import secrets

import rich.console

from topklm.commands import shared
from topklm.progress import TerminalProgress
from topklm.storage.files import is_bucket

DESCRIPTION = (
    "Answers OpenAI's completions (/v1/completions) with a run's model, and tells which neurons are active "
    "on a text (/v1/neurons). Texts of all clients are continued together."
)
EXAMPLE = "topklm serve runs/small --port 8766"

PORT = 8766
TOKEN_VARIABLE = "TOPKLM_TOKEN"
_NEEDED = ("starlette", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    shared.add_run(parser)
    shared.add_address(
        parser, PORT, f"beyond this machine a token is demanded, ${TOKEN_VARIABLE} or a new one"
    )
    shared.add_step(parser)
    parser.add_argument("--name", help="what clients call the model; default the folder's name")
    parser.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="texts continued at once; default 64, or as many as need 1 GiB for keys and values",
    )
    parser.add_argument(
        "--max-waiting", type=int, default=256, metavar="N", help="texts that may wait; default %(default)s"
    )
    parser.add_argument(
        "--max-texts",
        type=int,
        default=128,
        metavar="N",
        help="prompts times n, of one request; default %(default)s",
    )
    parser.add_argument(
        "--max-prompt-tokens", type=int, default=16384, metavar="N", help="of one prompt; default %(default)s"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=4096, metavar="N", help="new ones of one text; default %(default)s"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="for one answer; default %(default)g"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="that texts may go on when the server is told to stop; default %(default)g",
    )
    parser.add_argument(
        "--warm-up",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile first what most requests need, else when it is needed; default do",
    )
    parser.add_argument("--json", action="store_true", help="print the address as one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    shared.check_installed("serve", _NEEDED)
    # These need packages of the extra, and JAX.
    import topklm  # noqa: PLC0415
    from topklm.runtime import compilation_cache  # noqa: PLC0415
    from topklm.server import app  # noqa: PLC0415
    from topklm.server.requests import Limits  # noqa: PLC0415
    from topklm.server.service import Service  # noqa: PLC0415
    from topklm.web.http import is_loopback  # noqa: PLC0415
    from topklm.web.server import listen  # noqa: PLC0415

    if arguments.slots is not None and not 1 <= arguments.slots <= 1024:
        raise shared.wrong(arguments, "slots", allowed="from 1 to 1024")
    limits = Limits(
        waiting=arguments.max_waiting,
        texts=arguments.max_texts,
        prompt_tokens=arguments.max_prompt_tokens,
        max_tokens=arguments.max_tokens,
        timeout=arguments.timeout,
        grace=arguments.grace,
    ).check()
    listen(arguments.host, arguments.port).close()  # a taken port shows before work is done
    console = rich.console.Console(stderr=True)
    compilation_cache.enable()
    model = topklm.load(arguments.run, step=arguments.step)
    name = arguments.name or _name(arguments.run)
    service = Service(model, name, limits, arguments.slots)
    with contextlib.ExitStack() as stack:
        service.start(_compiling(console, stack) if arguments.warm_up else None)
    token = None
    if not is_loopback(arguments.host):
        token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)

    def ready(address: str) -> None:
        if arguments.json:
            print(json.dumps({"address": address, "model": name, "token": token}), flush=True)
        else:
            key = f", API key {token}" if token else ""
            print(f"{name}: answers at {address}{key}   (Ctrl-C ends it)", flush=True)

    app.serve(service, listen(arguments.host, arguments.port), arguments.host, token, ready)


def _name(run: str) -> str:
    return run.rstrip("/").rpartition("/")[2] if is_bucket(run) else Path(run).resolve().name


def _compiling(console: rich.console.Console, stack: contextlib.ExitStack) -> Callable[[int, int], None]:
    """Shows how far the compiling is, until the stack is closed."""
    console.print("compiling programs; most are kept for the next start", highlight=False)
    phases: list[Callable[[int, int, int], None]] = []

    def report(done: int, total: int) -> None:
        if not phases:
            phases.append(stack.enter_context(TerminalProgress(console).phase("compiling", total)))
        phases[0](min(done, 1), 0, 0)

    return report
