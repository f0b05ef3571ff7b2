"""Opens a run folder as a model, parameters alone, onto a device or mesh: `topklm.load("runs/small")`."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

import jax

from topklm.checkpoint import run_folder
from topklm.checkpoint.manager import rounded_shapes
from topklm.checkpoint.step_folder import (
    FACTS,
    PARAMS,
    READ_ERRORS,
    CheckpointReader,
    describe_damage,
    write_checkpoint,
)
from topklm.config import Config, ModelConfig, from_saved
from topklm.convert import huggingface
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel, dtype_name
from topklm.layout import Layout, one_device, scans_layers
from topklm.model import topk, transformer
from topklm.storage.files import AnyPath, absolute, as_path, storage_errors_are_user_errors, write_atomically
from topklm.storage.remote import check_usable


def load(
    run: str | os.PathLike[str],
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
) -> LanguageModel:
    """Reads a checkpoint's model, or that of a Hugging Face folder (`topklm.convert.huggingface`).

    Besides the parameters, which stay in the memory of the host where that is the device, it takes little
    (see `topklm.checkpoint.step_folder`). UserError if there is none, it is damaged, or parts do not belong
    together.

    Args:
        run: A run folder, local or in a bucket (gs://...); a folder of `topklm export`, or of another Llama
            or Qwen 3; or hf:ORG/NAME, one on Hugging Face's hub.
        step: Which checkpoint, or entry of the trace (`checkpoint.trace`), whose bfloat16 parameters become
            float32; default the newest checkpoint.
        mesh: Where the parameters shall live; default this process's first device.
        dtype: The dtype in which the model shall compute, see `LanguageModel.astype`; default as in training.
    """
    dtype = None if dtype is None else dtype_name(dtype)
    layout = one_device() if mesh is None else Layout(mesh)
    if huggingface.is_folder(run):
        loaded = _from_hugging_face(str(run), step, layout)
        return loaded if dtype is None else loaded.astype(dtype)
    folder = as_path(run, "run")
    check_usable(folder, "run", write=False)
    saved = _saved(folder)
    step = _chosen(folder, saved, step)
    kind = saved[step]
    checkpoint = absolute(folder) / kind / str(step)
    with _damage_is_a_user_error(folder, step, saved):
        reader = CheckpointReader(checkpoint, arrays=(PARAMS,), values=(FACTS,))
        facts = reader.values[FACTS]
        saved_config, tokenizer_sha256 = facts["config"], facts["tokenizer_sha256"]
    try:
        config = config_of_checkpoint = from_saved(saved_config)
    except UserError as e:
        raise UserError(
            f"checkpoint {step} of {folder} was saved with another version, or is damaged: {e}"
        ) from e
    config = dataclasses.replace(config, model=_for_layout(config.model, layout))
    abstract = jax.eval_shape(functools.partial(transformer.create, config.model, 0))
    as_stored = abstract if kind == run_folder.CHECKPOINTS_FOLDER else rounded_shapes(abstract)
    with _damage_is_a_user_error(folder, step, saved):
        arrays = reader.read({PARAMS: layout.with_shardings(as_stored)})
        reader.verify(arrays)
    params = jax.tree.map(lambda array, shape: array.astype(shape.dtype), arrays[PARAMS], abstract)
    # All of a checkpoint can be another run's; then each of its parts is as it was written.
    own = run_folder.saved_config(folder)
    if own and (fields := run_folder.differing_fields(own, config_of_checkpoint)):
        raise UserError(
            f"checkpoint {step} of {folder} is of another run than {run_folder.CONFIG_FILE} "
            f"there ({fields}): put back the run's own"
        )
    tokenizer = _load_tokenizer(folder / run_folder.TOKENIZER_FILE, tokenizer_sha256)
    loaded = LanguageModel(str(folder), step, config, tokenizer, params)
    return loaded if dtype is None else loaded.astype(dtype)


def describe_run(folder: AnyPath, config: Config, tokenizer: Tokenizer) -> None:
    """Writes the files that make a run folder self-contained: config and tokenizer."""

    def write_json(name: str, values: dict[str, Any]) -> None:
        write_atomically(folder / name, (json.dumps(values, indent=2) + "\n").encode())

    write_json(run_folder.CONFIG_FILE, config.to_dict())
    write_atomically(folder / run_folder.TOKENIZER_FILE, tokenizer.to_bytes())
    if tokenizer.kind == "huggingface":
        write_json(run_folder.TOKENIZER_CONFIG_FILE, tokenizer.config(config.model.context_length))


def create_run(folder: AnyPath, model: huggingface.Model) -> None:
    """Writes a run of parameters alone into an empty folder: it can be read, and not be continued."""
    describe_run(folder, model.config, model.tokenizer)
    facts = {"config": model.config.to_dict(), "tokenizer_sha256": model.tokenizer.sha256}
    checkpoints = absolute(folder / run_folder.CHECKPOINTS_FOLDER)
    write_checkpoint(checkpoints, model.step, {PARAMS: model.params}, {FACTS: facts})


def _for_layout(model: ModelConfig, layout: Layout) -> ModelConfig:
    """Returns the model as it is run where its parameters lie."""
    model = topk.for_gspmd(model, layout.size)
    if model.layer_stack == "auto" and scans_layers(layout.platform):
        return dataclasses.replace(model, layer_stack="scanned")
    return model


def _from_hugging_face(path: str, step: int | None, layout: Layout) -> LanguageModel:
    found = huggingface.read(path, "run")
    if step not in (None, found.step):
        raise UserError(f"step = {step}: {path} holds one model, of step {found.step}: leave it out")
    config = dataclasses.replace(found.config, model=_for_layout(found.config.model, layout))
    params = jax.device_put(found.params, layout.shardings(found.params))
    return LanguageModel(path, found.step, config, found.tokenizer, params)


def checkpoint_step(run: str | os.PathLike[str], step: int | None = None) -> int:
    """Returns the step of the checkpoint that `load` would read; raises UserError without one."""
    if huggingface.is_folder(run):
        return huggingface.read(str(run), "run").step
    folder = as_path(run, "run")
    return _chosen(folder, _saved(folder), step)


def saved_steps(run: str | os.PathLike[str]) -> list[int]:
    """Returns the steps that `load` can read, of checkpoints and trace, rising; UserError without one."""
    return sorted(_saved(as_path(run, "run")))


def _chosen(folder: AnyPath, saved: Mapping[int, str], step: int | None) -> int:
    if step is not None and step not in saved:
        raise UserError(f"step = {step}: {folder} has checkpoints {', '.join(map(str, sorted(saved)))}")
    if step is not None:
        return step
    return max(saved, key=lambda step: (saved[step] == run_folder.CHECKPOINTS_FOLDER, step))


def _saved(folder: AnyPath) -> dict[int, str]:
    """Returns the folder that holds each step: that of the checkpoints, where both do."""
    kinds = (run_folder.TRACE_FOLDER, run_folder.CHECKPOINTS_FOLDER)
    saved = {step: kind for kind in kinds for step in run_folder.complete_steps(folder, kind)}
    if not saved and not (folder / run_folder.CHECKPOINTS_FOLDER).exists():
        run, step = folder.parent.parent, folder.name
        if folder.parent.name == run_folder.CHECKPOINTS_FOLDER and step.isdigit():
            raise UserError(f"{folder} is a checkpoint, not a run folder: give {run}, with step={step}")
        raise UserError(f"{folder} is not a run folder with checkpoints: train first, or check the path")
    if not saved:
        raise UserError(f"{folder} has no complete checkpoint yet: train on, or choose another run")
    return saved


@contextlib.contextmanager
def _damage_is_a_user_error(folder: AnyPath, step: int, saved: Mapping[int, str]) -> Iterator[None]:
    """Names the checkpoint that the block finds damaged, and one that could be loaded instead."""
    with storage_errors_are_user_errors(f"reading checkpoint {step} of {folder}", folder):
        try:
            yield
        except READ_ERRORS as e:
            if not (damage := describe_damage(e)):
                raise
            older = [s for s in saved if s < step]
            advice = f"load an older one, e.g. step={max(older)}" if older else "there is no older one"
            raise UserError(
                f"checkpoint {step} of {folder} is damaged or incomplete ({damage}): {advice}"
            ) from e


def _load_tokenizer(path: AnyPath, sha256: str) -> Tokenizer:
    with storage_errors_are_user_errors(f"reading {path}", path):
        if not path.exists():
            raise UserError(f"{path} is missing: copy the whole run folder")
        content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} is not the tokenizer that this model was trained with: restore it")
    return Tokenizer(content)
