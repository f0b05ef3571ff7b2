"""Opens a run folder as a model: `topklm.load("runs/small")`.

Only parameters are read, never the optimizer, onto one device or any mesh, whatever the run was saved from.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import os
from typing import Any

import jax

from topklm import sharding
from topklm.checkpoint import run_folder
from topklm.checkpoint.format import FACTS, PARAMS, Contents, DamagedError, mismatches
from topklm.checkpoint.verification import changed
from topklm.config import Config, MeshConfig, ModelConfig, from_saved
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel, dtype_name
from topklm.model import transformer
from topklm.storage.errors import says_nothing_of_content, storage_errors_are_user_errors
from topklm.storage.files import AnyPath, absolute, as_path
from topklm.storage.gcs import check_usable


def load(
    run: str | os.PathLike[str],
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
) -> LanguageModel:
    """Reads a checkpoint's model.

    Besides the parameters, which stay in the memory of the host where that is the device, it takes little
    (see `topklm.checkpoint.arrays`).

    Args:
        run: A run folder, local or in a bucket (gs://...).
        step: Which checkpoint; default the newest.
        mesh: Where the parameters shall live; default this process's first device.
        dtype: What the model shall compute in, see `LanguageModel.astype`; default as in training.

    Raises:
        UserError: If the folder holds no such checkpoint, it is damaged, or its parts do not belong together.
    """
    dtype = None if dtype is None else dtype_name(dtype)
    folder = as_path(run, "run")
    check_usable(folder, "run", write=False)
    saved = _complete_steps(folder)
    chosen = _choose_step(saved, step, folder)
    place = absolute(folder) / run_folder.CHECKPOINTS_FOLDER / str(chosen)
    with _damage_is_a_user_error(folder, chosen, saved):
        contents = Contents(place, arrays=(PARAMS,), values=(FACTS,))
        facts = contents.values[FACTS]
        saved_config, tokenizer_sha256 = facts["config"], facts["tokenizer_sha256"]
    config = config_of_checkpoint = _config(saved_config, chosen, folder)
    if mesh is None:
        mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    model = sharding.outside_shard_map(config.model, mesh)
    if model.layer_stack == "auto" and sharding.scans_layers(mesh.devices.flat[0].platform):
        model = dataclasses.replace(model, layer_stack="scanned")
    config = dataclasses.replace(config, model=model)
    target = _target(config.model, mesh)
    if problems := mismatches(contents.shapes[PARAMS], target):
        raise UserError(f"checkpoint {chosen} of {folder} holds another model: {'; '.join(problems)}")
    # All of a checkpoint can be another run's; then each of its parts is as it was written.
    own = run_folder.saved_config(folder)
    if own and (fields := run_folder.differing_fields(own, config_of_checkpoint)):
        raise UserError(
            f"checkpoint {chosen} of {folder} is of another run than {run_folder.CONFIG_FILE} "
            f"there ({fields}): put back the run's own"
        )
    with _damage_is_a_user_error(folder, chosen, saved):
        params = contents.read(PARAMS, target)
        contents.check({PARAMS: params}, changed)
    tokenizer = _load_tokenizer(folder / run_folder.TOKENIZER_FILE, tokenizer_sha256)
    loaded = LanguageModel(str(folder), chosen, config, tokenizer, params)
    return loaded if dtype is None else loaded.astype(dtype)


def _complete_steps(folder: AnyPath) -> list[int]:
    saved = run_folder.complete_steps(folder)
    if not saved and not (folder / run_folder.CHECKPOINTS_FOLDER).exists():
        run, step = folder.parent.parent, folder.name
        if folder.parent.name == run_folder.CHECKPOINTS_FOLDER and step.isdigit():
            raise UserError(f"{folder} is a checkpoint, not a run folder: give {run}, with step={step}")
        raise UserError(f"{folder} is not a run folder with checkpoints: train first, or check the path")
    if not saved:
        raise UserError(f"{folder} has no complete checkpoint yet: train on, or choose another run")
    return saved


def _choose_step(saved: Sequence[int], step: int | None, folder: AnyPath) -> int:
    if step is not None and step not in saved:
        raise UserError(f"step = {step}: {folder} has checkpoints {', '.join(map(str, saved))}")
    return max(saved) if step is None else step


def _config(saved: dict[str, Any], step: int, folder: AnyPath) -> Config:
    try:
        return from_saved(saved)
    except UserError as e:
        raise UserError(
            f"checkpoint {step} of {folder} was saved with another version, or is damaged: {e}"
        ) from e


def _target(config: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """Shape, dtype and layout of every parameter."""
    abstract = jax.eval_shape(functools.partial(transformer.create, config, 0))
    shardings = sharding.parameter_shardings(abstract, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


@contextlib.contextmanager
def _damage_is_a_user_error(folder: AnyPath, step: int, saved: Sequence[int]) -> Iterator[None]:
    """For a block that reads a checkpoint: names it, and what could be loaded instead."""
    with storage_errors_are_user_errors(f"reading checkpoint {step} of {folder}", folder):
        try:
            yield
        # What Orbax and TensorStore raise where a file is missing, cut off or changed.
        except (DamagedError, OSError, ValueError, KeyError, TypeError) as e:
            if says_nothing_of_content(e):
                raise
            older = [s for s in saved if s < step]
            advice = f"load an older one, e.g. step={max(older)}" if older else "there is no older one"
            raise UserError(
                f"checkpoint {step} of {folder} is damaged or incomplete ({_short(e)}): {advice}"
            ) from e


def _short(error: Exception) -> str:
    """The first line of an error; TensorStore adds whole specifications to its own."""
    line = next(iter(str(error).splitlines()), "")
    return line[:200] if isinstance(error, DamagedError) else f"{type(error).__name__}: {line[:200]}"


def _load_tokenizer(path: AnyPath, sha256: str) -> Tokenizer:
    with storage_errors_are_user_errors(f"reading {path}", path):
        if not path.exists():
            raise UserError(f"{path} is missing: copy the whole run folder")
        content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} is not the tokenizer that this model was trained with: restore it")
    return Tokenizer(content)
