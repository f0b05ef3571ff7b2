"""The folder of one run: who may write to it, and the small files that describe it."""

from collections.abc import Iterator
import contextlib
import pathlib

from topklm import config as config_lib
from topklm import locks
from topklm.errors import UserError, disk_errors_are_user_errors

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
CHECKPOINTS_FOLDER = "checkpoints"
METRICS_FILE = "metrics.jsonl"


@contextlib.contextmanager
def owned(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Creates the folder and holds it for this process; the kernel lets go when the process ends.

    Raises:
        UserError: If the folder cannot be written, or another process is using it.
    """

    def refuse(owner: str) -> None:
        raise UserError(
            f"run folder {folder} is in use by process {owner}: wait for it, stop it, or choose "
            "another with --workdir"
        )

    with contextlib.ExitStack() as stack:
        with disk_errors_are_user_errors(f"opening the run folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.held(folder, refuse))
        yield folder


def saved_config(folder: pathlib.Path) -> config_lib.Config | None:
    """The config that the run was started with, or None for a new folder."""
    path = folder / CONFIG_FILE
    if not path.exists():
        return None
    try:
        return config_lib.from_json(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}): restore it, or choose another --workdir") from e


def has_checkpoint(folder: pathlib.Path) -> bool:
    """Whether the run has anything to continue from; until then it may start over, also as another."""
    return any(path.name.isdigit() for path in (folder / CHECKPOINTS_FOLDER).glob("*"))


def check_same_run(folder: pathlib.Path, asked: config_lib.Config) -> None:
    """Refuses to continue a run under a config that would make it a different run.

    Raises:
        UserError: Naming each field that differs, its saved and its asked value.
    """
    saved = saved_config(folder)
    if saved is None:
        return
    differing = config_lib.differences_that_matter(saved, asked)
    if differing:
        fields = "; ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in differing.items())
        raise UserError(
            f"run folder {folder} holds a run with another config: {fields}. Set them back, or start a "
            "new run with --workdir"
        )
