"""`topklm train`, also `python -m topklm.main`: trains a model.

Short on purpose: it reads the flags and hands over to `training.loop.train`, which can be called from
anywhere. Single settings are overridden like `--config.model.topk_k=16`.
"""

from collections.abc import Sequence
import pathlib
import re
import sys

from absl import flags
from ml_collections import config_flags

from topklm import allocator, compilation_cache, config, distributed, errors
from topklm.buckets import check_usable
from topklm.files import AnyPath, as_path
from topklm.training import loop
from topklm.training.interruption import stop_on_signal

EXAMPLE = "python -m topklm.main --config=configs/small.py --config.train.steps=500 --workdir=runs/try"


def run(arguments: Sequence[str]) -> None:
    """Trains as the flags say."""
    experiment, workdir = parse(arguments)
    allocator_name = allocator.keep_freed_memory()
    # From before the others have come: waiting for them can take minutes.
    with stop_on_signal(distributed.announce_stop) as stop, distributed.session():
        if distributed.is_primary():
            print(f"allocator: {allocator_name}", flush=True)
        compilation_cache.enable()
        check_usable(workdir, "--workdir", write=True)
        loop.train(experiment, workdir, stop=stop)


def parse(arguments: Sequence[str], example: str = EXAMPLE) -> tuple[config.Config, AnyPath]:
    """Reads the flags, without the program's name before them; `example` is shown when they do not fit.

    Returns:
        The checked config, and the run folder.

    Raises:
        UserError: For a flag, a config file or a field that does not exist or does not fit.
    """
    argv = ["topklm train", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        f"Config file, with an optional :variant. Example: {EXAMPLE}",
        flag_values=values,
        sys_argv=argv,
    )
    flags.DEFINE_string(
        "workdir", None, "Run folder, local or gs://...; default runs/<config name>.", flag_values=values
    )
    flags.DEFINE_bool("help", False, "Show this help.", flag_values=values)
    try:
        rest = values(argv)
        # A file that failed to load shows itself only when it is read.
        experiment = values.config.to_dict() if values.config is not None else None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as e:
        raise errors.UserError(_explain(e, example)) from e
    if values.help:
        print(f"{__doc__}\n{values.main_module_help() or values.get_help()}\n\n{_fields_help()}")
        sys.exit(0)
    if len(rest) > 1:
        raise errors.UserError(f"{rest[1]!r} is not a flag; example: {example}")
    if experiment is None:
        raise errors.UserError(f"--config is missing: name a config file; example: {example}")
    workdir = values.workdir or f"runs/{_run_name(config_flags.get_config_filename(values['config']))}"
    return config.resolve(experiment), as_path(workdir, "--workdir")


def _run_name(config_file: str) -> str:
    """configs/small.py:base -> small-base."""
    path, _, variant = config_file.partition(":")
    return "-".join(re.sub(r"[^\w.-]+", "_", part) for part in (pathlib.Path(path).stem, variant) if part)


def _explain(error: Exception, example: str) -> str:
    """A line on what absl or ml_collections refused."""
    text = " ".join(str(error).split())
    if "No such file or directory" in text:
        missing = re.findall(r"No such file or directory: '([^']*)'", text)[-1]
        return f"--config = {missing}: there is no such file; example: {example}"
    if isinstance(error, SyntaxError):
        return f"--config = {error.filename}, line {error.lineno}: {error.msg}; give a Python file"
    if isinstance(error, AttributeError | KeyError) and (unknown := re.search(r"'(\w+)", text)):
        return f"config has no field {unknown[1]!r}; {config.nearest_field(unknown[1])}"
    return text


def _fields_help() -> str:
    fields = "\n".join(f"  {name} = {value!r}" for name, value in config.flatten(config.Config()).items())
    return f"Fields of --config and their defaults (topklm/config.py says what they mean):\n{fields}"
