"""`topklm train`, also `python -m topklm.main`: reads the flags, and hands over to `training.loop.train`."""

import argparse
import ast
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import difflib
import functools
import os
import pathlib
import re
import sys
import traceback
import types
from typing import Any

import ml_collections

from topklm import config
from topklm.cli import Parser
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.imports import uncollected, when_used
from topklm.runtime import process
from topklm.runtime.process import stop_on_signal
from topklm.storage.files import AnyPath, as_path, check_name

with when_used():
    from topklm.checkpoint import run_folder
    from topklm.runtime import compilation_cache
    from topklm.storage import remote
    from topklm.training import loop

DESCRIPTION = (
    "Trains a model, or continues the run in --workdir from its newest checkpoint. Single settings are "
    "overridden like --config.model.topk_k=16."
)
TAKES_CONFIG = True
EXAMPLE = "topklm train --config=small --config.train.steps=500 --workdir=runs/try"
DEFAULT_CONFIG = "small"
SHIPPED_CONFIGS = pathlib.Path(config.__file__).parent / "configs"  # in a clone, a link to configs/

_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments, each field of the config among them."""
    parser.usage = "topklm train [--config=CONFIG[:VARIANT]] [--workdir=FOLDER] [--config.FIELD=VALUE ...]"
    parser.description = f"{DESCRIPTION}\n\nexample: {EXAMPLE}"
    defaults = config.flatten(config.Config())
    fields = [f"  {name} = {defaults[name]!r}\n      {s.meaning}" for name, s in config.settings().items()]
    configs = [f"{ast.get_docstring(ast.parse(path.read_bytes()))}\n" for path in shipped_configs().values()]
    parser.epilog = "\n".join(
        [
            "Configs that come with topklm:\n",
            *configs,
            "Fields of --config, their defaults and meaning:",
            *fields,
        ]
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_config(parser)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declares --config, its fields and --workdir; `read` reads what is given."""
    absent = argparse.SUPPRESS
    text = (
        "one that comes with topklm, a file with get_config(VARIANT), or a run, for its config; default "
        f"{DEFAULT_CONFIG}"
    )
    named = parser.add_argument("--config", metavar="CONFIG[:VARIANT]", default=DEFAULT_CONFIG, help=text)
    named.completer = lambda **_: list(shipped_configs())  # type: ignore[attr-defined]  # for shells
    parser.add_argument("--workdir", help="run folder, local or gs://...; default runs/<config name>")
    for name, default in config.flatten(config.Config()).items():
        bare: dict[str, Any] = {"nargs": "?", "const": True} if isinstance(default, bool) else {}
        kind = functools.partial(_value, name, type(default))
        parser.add_argument(f"--config.{name}", dest=name, type=kind, default=absent, help=absent, **bare)


def run(arguments: argparse.Namespace) -> None:
    """Trains as the flags say."""
    load_modules()
    from topklm import distributed  # noqa: PLC0415 - imports JAX, which --help does without

    experiment, workdir = read(arguments, arguments.config_flags, EXAMPLE)
    allocator_name = process.keep_freed_memory()
    # From before the others have come: waiting for them can take minutes.
    with stop_on_signal(distributed.announce_stop) as stop, distributed.session(lambda: stop.heard):
        if distributed.is_primary():
            print(f"allocator: {allocator_name}", flush=True)
        compilation_cache.enable()
        remote.check_usable(workdir, "--workdir", write=True)
        loop.train(experiment, workdir, stop=stop)


def load_modules() -> None:
    """Imports all that a run needs before its first step."""
    with uncollected(first=True):
        loop.train  # noqa: B018 - one that waits is loaded when something of it is used


def parse(arguments: Sequence[str], example: str = EXAMPLE) -> tuple[config.Config, AnyPath]:
    """Reads flags, without the program's name before them, as `read`."""
    parser = Parser("topklm train", allow_abbrev=False)
    add_config(parser)
    return read(*parser.parse_known_args(list(arguments)), example)


def read(known: argparse.Namespace, unknown: Sequence[str], example: str) -> tuple[config.Config, AnyPath]:
    """Returns the checked config and the run folder, of arguments of `add_config` and words beside them."""
    if unknown:
        raise UserError(_explain(unknown[0], example))
    given, experiment = vars(known), load(known.config)
    for name in config.flatten(config.Config()).keys() & given.keys():
        section, _, field = name.rpartition(".")
        values = experiment.setdefault(section, {}) if section else experiment
        if isinstance(values, dict):  # else the file has put something else there, which `resolve` refuses
            values[field] = given[name]
    workdir = known.workdir or f"runs/{_run_name(known.config)}"
    return config.resolve(experiment), as_path(workdir, "--workdir")


def shipped_configs() -> dict[str, pathlib.Path]:
    """Returns the files of the configs that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED_CONFIGS.glob("*.py"))}


def load(file_and_variant: str) -> dict[str, Any]:
    """Runs `get_config` of a config: "small", "mine.py", or "small:base" for the variant "base".

    A file of the user comes first. Names of the package's configs are "small" and "configs/small.py". A run
    folder stands for that run's config, but for the vocabulary, which the data fill in. Returns sections and
    fields as plain dicts, not checked; UserError names the file and its line for whatever goes wrong in it.
    """
    file, *variant = file_and_variant.split(":", 1)
    check_name(file, "--config")
    shipped = shipped_configs()
    ours = shipped.get(re.sub(r"^configs/(.*)\.py$", r"\1", file))
    if not ours and os.path.isdir(file_and_variant):  # False for a name too long for the system too
        return _config_of_run(file_and_variant)
    try:
        with disk_errors_are_user_errors(f"reading --config = {file}"):
            path = pathlib.Path(file).expanduser()
            source = (ours if ours and not path.is_file() else path).read_bytes()
    except FileNotFoundError as e:
        named = ", ".join(shipped)
        raise UserError(
            f"--config = {file}: there is no such file; give one, or a config that comes with topklm: {named}"
        ) from e
    module = types.ModuleType("topklm_config_file")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses look for their module there
    with _mistakes_of(file):
        exec(compile(source, file, "exec"), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            meant = difflib.get_close_matches("get_config", vars(module), n=1)
            raise UserError(
                f"--config = {file}: has no function get_config(), which returns the config"
                + (f"; it has {meant[0]}" if meant else "")
            )
        made = get_config(*variant)
        if not isinstance(made, Mapping | ml_collections.ConfigDict):
            kind = "None" if made is None else type(made).__name__
            raise UserError(
                f"--config = {file}: get_config() returned {kind}: return the ConfigDict that "
                "topklm.config.default() gave, or a dict of sections"
            )
        values = made.to_dict() if isinstance(made, ml_collections.ConfigDict) else made
        return {name: dict(part) if isinstance(part, Mapping) else part for name, part in values.items()}


def _config_of_run(folder: str) -> dict[str, Any]:
    saved = run_folder.saved_config(as_path(folder, "--config"))
    if saved is None:
        raise UserError(f"--config = {folder}: is no run folder: give a run, or a file with get_config()")
    values = saved.to_dict()
    values["model"]["vocab_size"] = 0
    return values


@contextlib.contextmanager
def _mistakes_of(file: str) -> Iterator[None]:
    """Turns every exception of a config file into one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as e:  # SystemExit too
        lines = [
            line for frame, line in traceback.walk_tb(e.__traceback__) if frame.f_code.co_filename == file
        ]
        try:
            text = str(e)
        except Exception:  # of a class of the file's own
            text = ""
        if isinstance(e, SyntaxError) and e.filename == file:
            lines, text = [e.lineno or 1], f"{e.msg}; give a Python file"
        line = f", line {lines[-1]}" if lines else ""
        raise UserError(f"--config = {file}{line}: {type(e).__name__}: {text}".rstrip(": ")) from e


def _run_name(config_file: str) -> str:
    """Makes a folder's name of a config's: small-base of configs/small.py:base."""
    path, _, variant = config_file.partition(":")
    return "-".join(re.sub(r"[^\w.-]+", "_", part) for part in (pathlib.Path(path).stem, variant) if part)


def _value(name: str, kind: type, text: str) -> Any:
    """Reads a field's value as it is written on the command line."""
    try:
        return _BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as e:
        example = {bool: "true or false", int: "an integer", float: "a number"}[kind]
        raise UserError(f"--config.{name}={text}: must be {example}") from e


def _explain(argument: str, example: str) -> str:
    """Describes an argument that is no flag, in a line."""
    flag = argument.partition("=")[0]
    if not flag.startswith("--config."):
        near = difflib.get_close_matches(flag, ("--config", "--workdir", "--help"), n=1)
        return f"{flag!r} is not a flag; " + (f"did you mean {near[0]}?" if near else f"example: {example}")
    section, _, field = flag.removeprefix("--config.").partition(".")
    sections = config.Config().to_dict()
    if isinstance(sections.get(section), dict) and not field:
        return (
            f"{flag} is a section: set a field of it, as --config.{section}.{next(iter(sections[section]))}"
        )
    unknown = field if section in sections else section
    return f"config has no field {unknown!r}; {config.nearest_field(unknown)}"
