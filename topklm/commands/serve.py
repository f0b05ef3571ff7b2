"""`topklm serve`: serves a model by OpenAI's interface for completions, with its neurons beside it."""

import argparse
from collections.abc import Callable
import contextlib
import itertools
import os
from pathlib import Path
import secrets
import sys

from topklm.commands import shared
from topklm.commands.shared import Output
from topklm.imports import uncollected
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
    add = shared.flags(parser, "run", "step")
    add("--port N", "0: any that is free", PORT)
    text = f"where to listen; beyond this machine a token is demanded, ${TOKEN_VARIABLE} or a new one"
    add("--host ADDRESS", text, "127.0.0.1")
    add("--name NAME", "what clients call the model; default the folder's name")
    text = "texts continued at once; default 64, or as many as need 1 GiB for keys and values"
    add("--slots N", text, int)
    add("--max-waiting N", "texts that may wait", 256)
    add("--max-texts N", "prompts times n, of one request", 128)
    add("--max-prompt-tokens N", "of one prompt", 16384)
    add("--max-tokens N", "new ones of one text", 4096)
    add("--timeout SECONDS", "for one answer", 300.0)
    add("--grace SECONDS", "that texts may go on when the server is told to stop", 10.0)
    text = "compile what most requests need while there are none, else when it is needed; default do"
    add("--warm-up", text, action=argparse.BooleanOptionalAction, default=True)
    shared.flags(parser, "json")


def run(arguments: argparse.Namespace) -> None:
    shared.check_installed("serve", _NEEDED)
    output = Output(arguments.json)
    # These need packages of the extra, and JAX.
    with uncollected(first=True):
        from topklm.inference.load import load  # noqa: PLC0415
        from topklm.runtime import compilation_cache  # noqa: PLC0415
        from topklm.server import app  # noqa: PLC0415
        from topklm.server.app import Service  # noqa: PLC0415
        from topklm.server.requests import Limits  # noqa: PLC0415
        from topklm.web import is_loopback, listen  # noqa: PLC0415

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
    compilation_cache.enable()
    model = load(arguments.run, step=arguments.step)
    run = arguments.run.rstrip("/") if is_bucket(arguments.run) else Path(arguments.run).resolve()
    name = arguments.name or os.path.basename(run)
    service = Service(model, name, limits, arguments.slots)
    token = None
    if not is_loopback(arguments.host):
        token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)

    def ready(address: str) -> None:
        key = f", API key {token}" if token else ""
        line = f"{name}: answers at {address}{key}   (Ctrl-C ends it)"
        output.give({"address": address, "model": name, "token": token}, lambda: print(line))
        sys.stdout.flush()
        service.engine.start(programs, _shown(len(programs), stack))

    programs = service.programs() if arguments.warm_up else []
    with contextlib.ExitStack() as stack:
        app.serve(service, listen(arguments.host, arguments.port), arguments.host, token, ready)


def _shown(total: int, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Shows on standard error how much is compiled, until all is or the stack ends; call it after each."""
    if not total:
        return lambda: None
    shown = Output("-")
    text = "compiling programs while there are no requests; most are kept for the next start"
    shown.console.print(text, highlight=False)
    report = stack.enter_context(shown.progress.phase("compiling", total))
    left = itertools.count(total - 1, -1)

    def after_each() -> None:
        report(1)
        if next(left) == 0:
            stack.close()
            shown.console.print("compiling: all is compiled", highlight=False)

    return after_each
