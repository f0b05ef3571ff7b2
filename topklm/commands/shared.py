"""Arguments, output and checks that the verbs share: RUN, --step, --json, the console, errors of flags.

Imports nothing slow, for `--help` imports it.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import importlib.util
import json
import math
from typing import TYPE_CHECKING, Any

import rich.console
import rich.table

from topklm.errors import ArgumentError, UserError
from topklm.progress import TerminalProgress
from topklm.storage.files import is_bucket

if TYPE_CHECKING:
    import jax

    from topklm.inference.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb below another one, as `harvest` of `topklm neurons`.

    Attributes:
        summary: For the list of verbs.
        description: For its --help.
        example: A command.
        add_arguments: Declares its arguments.
        run: Carries it out.
    """

    summary: str
    description: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def add_verbs(parser: argparse.ArgumentParser, verbs: Mapping[str, Verb], metavar: str) -> None:
    """Declares verbs below the parser's; `call` of the parsed arguments is that of the one given."""
    inner = parser.add_subparsers(title="verbs", required=True, metavar=metavar)
    for name, verb in verbs.items():
        added = inner.add_parser(
            name, help=verb.summary, description=verb.description, epilog=f"example: {verb.example}"
        )
        verb.add_arguments(added)
        added.set_defaults(call=verb.run)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declares RUN."""
    parser.add_argument("run", metavar="RUN", help="run folder, e.g. runs/small")


def add_step(parser: argparse.ArgumentParser, default: str = "the newest") -> None:
    """Declares --step."""
    parser.add_argument("--step", type=int, help=f"which checkpoint; default {default}")


def add_json(parser: argparse.ArgumentParser, what: str = "print one JSON object") -> None:
    """Declares --json."""
    parser.add_argument("--json", action="store_true", help=what)


def add_address(parser: argparse.ArgumentParser, port: int, beyond: str) -> None:
    """Declares --port and --host of a server.

    Args:
        parser: Of the verb.
        port: The default.
        beyond: The demand on clients of other machines, for the help.
    """
    parser.add_argument(
        "--port", type=int, default=port, metavar="N", help="0: any that is free; default %(default)s"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=f"where to listen; {beyond}")


class Output:
    """Standard output of a verb: one JSON object, or tables and lines for a person.

    Attributes:
        console: For a person; standard error where standard output is JSON.
        progress: On the console.
    """

    def __init__(self, as_json: bool):
        self._as_json = as_json
        self.console = rich.console.Console(stderr=as_json)
        self.progress = TerminalProgress(self.console)

    def give(self, facts: Mapping[str, Any], show: Callable[[], object]) -> None:
        """Prints the object, or calls what shows it to a person."""
        if self._as_json:
            print(json.dumps(facts))
        else:
            show()

    def say(self, line: str) -> None:
        """Prints a line as it is, without colours or wrapping."""
        self.console.out(line, highlight=False)


def table_of(columns: Sequence[str], title: str | None = None) -> rich.table.Table:
    """Returns an empty table whose columns are numbers, aligned to the right."""
    table = rich.table.Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def flag(name: str) -> str:
    """Returns the flag that sets an argument: "--max-tokens" of "max_tokens"."""
    return f"--{name.replace('_', '-')}"


def wrong(arguments: argparse.Namespace, name: str, text: str = "", **parts: str) -> UserError:
    """Returns the error of a flag's value; `text` and `parts` as of `UserError`."""
    return UserError(text, field=flag(name), value=getattr(arguments, name), **parts)


def check_at_least(arguments: argparse.Namespace, least: int, *names: str) -> None:
    """Raises UserError for a flag that was given, and is less, or not finite."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not least <= value < math.inf:
            raise wrong(arguments, name, allowed=f"{least} or more")


def check_goes_with(arguments: argparse.Namespace, other: str, *names: str) -> None:
    """Raises UserError for a flag that was given, and only means something with another one."""
    for name in names:
        if getattr(arguments, name) not in (None, False):
            raise UserError(f"goes with {flag(other)} only; leave it out", field=flag(name))


@contextlib.contextmanager
def arguments_are_flags(arguments: argparse.Namespace) -> Iterator[None]:
    """Names an argument of the Python interface that the block refuses by its flag."""
    try:
        yield
    except ArgumentError as e:
        raise (e.named(flag(e.field)) if e.field in vars(arguments) else e) from e


def check_installed(verb: str, packages: Sequence[str]) -> None:
    """Raises UserError if a package of the extra `explore` is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"{verb} needs {', '.join(missing)}: run pip install 'topklm[explore]'")


def check_on_disk(run: str, text: str = "activations are kept on a disk; copy the run folder to one") -> None:
    """Raises UserError for a run folder in a bucket."""
    if is_bucket(run):
        raise UserError(text, field="RUN", value=run)


def load(arguments: argparse.Namespace) -> "tuple[LanguageModel, jax.sharding.Mesh]":
    """Loads the model of RUN and --step onto all devices of this host."""
    import jax  # noqa: PLC0415 - slow, and --help does without

    import topklm  # noqa: PLC0415
    from topklm.config import MeshConfig  # noqa: PLC0415
    from topklm.layout import make_layout  # noqa: PLC0415

    mesh = make_layout(MeshConfig(), jax.local_devices()).mesh
    return topklm.load(arguments.run, step=arguments.step, mesh=mesh), mesh
