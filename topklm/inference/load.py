"""Opens a run folder as a model: `topklm.load("runs/small")`.

Only parameters are read, never the optimizer, onto one device or any mesh, whatever the run was saved from.
"""

from collections.abc import Sequence
import functools
import hashlib
import os

from etils import epath
import jax
import orbax.checkpoint as ocp

from topklm import run_folder, sharding
from topklm.checkpoint_format import FACTS, PARAMS, mismatches, restore_args
from topklm.config import MeshConfig, from_saved
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel
from topklm.model import transformer


def load(
    run: str | os.PathLike[str], step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> LanguageModel:
    """Reads a checkpoint's model.

    Args:
        run: A run folder, local or remote (gs://...).
        step: Which checkpoint; default the newest.
        mesh: Where the parameters shall live; default the first device.

    Raises:
        UserError: If the folder holds no such checkpoint, or its parts do not belong together.
    """
    folder = epath.Path(run)
    checkpoints = folder / run_folder.CHECKPOINTS_FOLDER
    if not checkpoints.exists():
        raise UserError(f"{folder} is not a run folder with checkpoints: train first, or check the path")
    if mesh is None:
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    # Orbax refuses relative paths. Its CheckpointManager is for those who save: it asks for every item.
    path = checkpoints if checkpoints.as_posix().startswith("gs://") else checkpoints.resolve()
    chosen = _choose_step(ocp.utils.checkpoint_steps(path), step, str(folder))
    facts = ocp.JsonCheckpointHandler().restore(path / str(chosen) / FACTS)
    config = from_saved(facts["config"])
    abstract = jax.eval_shape(functools.partial(transformer.create, config.model, 0))
    handler = ocp.PyTreeCheckpointHandler()
    saved = handler.metadata(path / str(chosen) / PARAMS)
    if problems := mismatches(getattr(saved, "tree", saved), abstract):
        raise UserError(f"checkpoint {chosen} of {folder} holds another model: {'; '.join(problems)}")
    params = handler.restore(path / str(chosen) / PARAMS, args=restore_args(abstract, mesh))
    tokenizer = _load_tokenizer(folder / run_folder.TOKENIZER_FILE, facts["tokenizer_sha256"])
    return LanguageModel(str(folder), chosen, config, tokenizer, params)


def _choose_step(saved: Sequence[int], step: int | None, folder: str) -> int:
    if not saved:
        raise UserError(f"{folder} has no complete checkpoint yet: train on, or choose another run")
    if step is not None and step not in saved:
        raise UserError(f"step = {step}: {folder} has checkpoints {', '.join(map(str, sorted(saved)))}")
    return max(saved) if step is None else step


def _load_tokenizer(path: epath.Path, sha256: str) -> Tokenizer:
    if not path.exists():
        raise UserError(f"{path} is missing: copy the whole run folder")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} is not the tokenizer that this model was trained with: restore it")
    return Tokenizer(content)
