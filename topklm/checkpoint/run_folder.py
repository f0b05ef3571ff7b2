"""The folder of one run, on a disk or in a bucket: who may write to it, and the files that describe it."""

from collections.abc import Callable, Iterator
import contextlib
import datetime
import json
import os
import pathlib
import socket
import time
from typing import Any
import uuid

from topklm import config as config_lib
from topklm import distributed
from topklm.checkpoint import step_folder
from topklm.checkpoint.step_folder import FACTS, OPTIMIZER, CheckpointReader, DamagedError
from topklm.errors import UserError
from topklm.storage.files import (
    AnyPath,
    absolute,
    folder_lock,
    is_bucket,
    parse_json,
    storage_errors_are_user_errors,
    store_errors,
    write_atomically,
)

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"  # for others; nothing here reads it
CHECKPOINTS_FOLDER = "checkpoints"
TRACE_FOLDER = "trace"  # checkpoints of parameters alone (`checkpoint.manager.TraceManager`)
METRICS_FILE = "metrics.jsonl"
OWNER_FILE = ".owner"

# A network file system may show a new file to other machines only after its attribute cache has expired:
# NFS keeps what it knows of a folder for up to 60 s (acdirmax of nfs(5)).
SHARED_PATIENCE_SECONDS = 90.0

_THIS_PROCESS = uuid.uuid4().hex


@contextlib.contextmanager
def owned(folder: AnyPath, warn: Callable[[str], None] = print) -> Iterator[AnyPath]:
    """Creates the folder and holds it for this process; of many processes of one run, the first one does.

    On a disk nobody else gets in while this process lives: the kernel keeps the lock, and lets go when the
    process ends. A bucket has no such locks, and a machine that was taken away cannot let go, so there the
    last to come is the owner: it leaves its name in an object, warns if it finds another's that did not take
    its leave, and the other stops with one line at its next `check_owned`, before it saves. Between that
    check and the end of the saving both may write; their checkpoints are of one run, and complete. UserError
    if the folder cannot be written, or another process is known to be using it.
    """
    if is_bucket(folder):
        with _signed(folder, warn):
            yield folder
        return

    def refuse(owner: str) -> None:
        raise _in_use(folder, owner)

    with contextlib.ExitStack() as stack:
        with storage_errors_are_user_errors(f"opening the run folder {folder}", folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(pathlib.Path(folder), refuse))
        yield folder


def check_owned(folder: AnyPath) -> None:
    """Raises UserError if another process has taken over a folder in a bucket; called before each save."""
    if not is_bucket(folder):
        return
    try:
        owner = _read_owner(folder)
    except store_errors():
        return  # saving, which tries again for long, will show whether the bucket is well
    if owner is not None and owner["token"] != _THIS_PROCESS:
        raise UserError(
            f"run folder {folder} was taken over by {_describe(owner)}: this process stops here; what it "
            "saved before is kept. To run both, give one another --workdir"
        )


def saved_config(folder: AnyPath) -> config_lib.Config | None:
    """Returns the config that the run was started with, or None for a new folder.

    Where config.json is missing, it is the newest checkpoint's.
    """
    path = folder / CONFIG_FILE
    with storage_errors_are_user_errors(f"reading {path}", path):
        if not path.exists():
            return _config_of_newest_checkpoint(folder)
        content = path.read_bytes()
    values: dict[str, Any] = {}
    try:
        values = parse_json(content)
        return config_lib.from_saved(values)
    except (ValueError, UserError) as e:
        if "model_type" in values:
            advice = "make a run of it: topklm import"
            raise UserError(f"{folder} is a model in Hugging Face's format, no run: {advice}") from e
        raise UserError(
            f"{path} is damaged ({e}): restore it, or delete it and the newest checkpoint's is taken"
        ) from e


def _config_of_newest_checkpoint(folder: AnyPath) -> config_lib.Config | None:
    """Reads the config of the newest checkpoint whose facts are undamaged."""
    for step in reversed(complete_steps(folder)):
        checkpoint = absolute(folder / CHECKPOINTS_FOLDER / str(step))
        # The damage itself is reported where the arrays are read.
        with contextlib.suppress(DamagedError, FileNotFoundError, ValueError, KeyError):
            facts = CheckpointReader(checkpoint, arrays=(), values=()).values[FACTS]
            return config_lib.from_saved(facts["config"])
    return None


def complete_steps(folder: AnyPath, of: str = CHECKPOINTS_FOLDER) -> list[int]:
    """Returns the steps of the complete checkpoints, rising; renamed damaged ones do not count.

    `of` is the folder in the run's that holds them: CHECKPOINTS_FOLDER or TRACE_FOLDER.
    """
    checkpoints = folder / of
    with storage_errors_are_user_errors(f"listing {checkpoints}", checkpoints):
        return step_folder.complete_steps(absolute(checkpoints)) if checkpoints.exists() else []


def has_checkpoint(folder: AnyPath) -> bool:
    """Tells whether the run has anything to continue from; until then it may start over, also as another."""
    return bool(complete_steps(folder))


def check_same_run(folder: AnyPath, asked: config_lib.Config) -> None:
    """Refuses to continue a run under a config that would make it a different run; names what differs."""
    saved = saved_config(folder)
    if saved is not None:
        check_same_config(folder, saved, asked)


def check_same_config(folder: AnyPath, saved: config_lib.Config, asked: config_lib.Config) -> None:
    """Refuses a config that would make another run of the one in `folder`, as `check_same_run`."""
    if fields := differing_fields(saved, asked):
        raise UserError(
            f"run folder {folder} holds a run with another config: {fields}. Set them back, or start a "
            "new run with --workdir"
        )


def differing_fields(saved: config_lib.Config, asked: config_lib.Config) -> str:
    """Lists the fields that make two configs those of different runs, each with its values; "" if none do."""
    differing = config_lib.differences_that_matter(saved, asked)
    return "; ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in differing.items())


def holds_parameters_alone(folder: AnyPath) -> bool:
    """Tells whether the newest checkpoint has no optimizer, so that the run cannot be continued."""
    steps = complete_steps(folder)
    return bool(steps) and not (folder / CHECKPOINTS_FOLDER / str(steps[-1]) / OPTIMIZER).exists()


def check_shared(folder: AnyPath, field: str) -> None:
    """Raises UserError, which names `field`, if a process does not see what process 0 writes there."""
    if distributed.process_count() == 1:
        return
    marker = distributed.broadcast("marker", write_marker(folder) if distributed.is_primary() else None)
    check_marker(folder, marker, field)
    distributed.barrier("marker")
    if distributed.is_primary():
        remove_marker(folder, marker)


def write_marker(folder: AnyPath) -> str:
    """Leaves a file in the folder that the run's other processes can look for; returns its name."""
    # A name that nobody has asked for before: file systems also remember what was not there.
    name = f".shared-{uuid.uuid4().hex}"
    with storage_errors_are_user_errors(f"writing to the run folder {folder}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, b"")
    return name


def check_marker(
    folder: AnyPath, name: str, field: str = "--workdir", patience_seconds: float = SHARED_PATIENCE_SECONDS
) -> None:
    """Waits for the file of `write_marker`; UserError if it does not come: hosts do not share the folder."""
    deadline = time.monotonic() + patience_seconds
    with storage_errors_are_user_errors(f"reading the run folder {folder}", folder):
        while not (folder / name).exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{field} = {folder}: host {socket.gethostname()} does not see what the first process "
                    "writes there: give gs://BUCKET/FOLDER, or a folder of a file system that all hosts share"
                )
            time.sleep(0.1)


def remove_marker(folder: AnyPath, name: str) -> None:
    """Removes the file of `write_marker`, once all have seen it."""
    with storage_errors_are_user_errors(f"writing to the run folder {folder}", folder):
        (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _signed(folder: AnyPath, warn: Callable[[str], None]) -> Iterator[None]:
    """Holds a folder in a bucket: `owned` says how."""
    with storage_errors_are_user_errors(f"opening the run folder {folder}", folder):
        before = _read_owner(folder)
        if before and _is_alive_here(before):
            raise _in_use(folder, str(before["process"]))
        write_atomically(folder / OWNER_FILE, json.dumps(_signature()).encode())
    if before:
        warn(
            f"warning: run folder {folder} was left without notice by {_describe(before)}: if that is still "
            "running, it will stop before its next checkpoint"
        )
    try:
        yield
    finally:
        # A name that stays costs the next process a warning, nothing else.
        with contextlib.suppress(*store_errors()):
            owner = _read_owner(folder)
            if owner is not None and owner["token"] == _THIS_PROCESS:
                (folder / OWNER_FILE).unlink(missing_ok=True)


def _signature() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "birth": _birth(os.getpid()),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "token": _THIS_PROCESS,
    }


def _read_owner(folder: AnyPath) -> dict[str, Any] | None:
    """Reads who holds the folder: nobody, where that does not parse, for it is no more than a courtesy."""
    try:
        owner = parse_json((folder / OWNER_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return owner if _signature().keys() <= owner.keys() else None


def _is_alive_here(owner: dict[str, Any]) -> bool:
    """Tells whether the owner is another process of this machine that is known to live."""
    elsewhere = owner["host"] != socket.gethostname() or owner["token"] == _THIS_PROCESS
    return not elsewhere and owner["birth"] is not None and owner["birth"] == _birth(owner["process"])


def _birth(process: int) -> int | None:
    """Returns when a process began, in clock ticks since boot; None if there is none, or no /proc to ask.

    A process id alone says little: in a container that was started again, it is the same.
    """
    try:
        content = pathlib.Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return int(content.rpartition(")")[2].split()[19])  # field 22 of proc_pid_stat(5)


def _describe(owner: dict[str, Any]) -> str:
    return f"process {owner['process']} on {owner['host']} (there since {owner['since']})"


def _in_use(folder: AnyPath, owner: str) -> UserError:
    return UserError(
        f"run folder {folder} is in use by process {owner}: wait for it, stop it, or choose "
        "another with --workdir"
    )
