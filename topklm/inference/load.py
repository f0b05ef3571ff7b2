"""Opens a run folder as a model: `topklm.load("runs/small")`.

Only parameters are read, never the optimizer, onto one device or any mesh, whatever the run was saved from.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import os

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from topklm import run_folder, sharding
from topklm.checkpoint_format import FACTS, PARAMS, mismatches, restore_args
from topklm.config import Config, MeshConfig, ModelConfig, from_saved
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.inference.generate import generate_tokens
from topklm.model import transformer


@dataclasses.dataclass(frozen=True, repr=False)
class LanguageModel:
    """A trained model with its tokenizer, ready to be called."""

    run: str
    step: int
    config: Config
    tokenizer: Tokenizer
    params: transformer.Parameters

    def __repr__(self) -> str:
        m = self.config.model
        shape = f"{m.n_layers} layers of width {m.d_model}, vocabulary {m.vocab_size:,}"
        topk = f"TopK keeps {m.topk_k} in {m.n_topk_layers} layers" if m.n_topk_layers else "no TopK"
        return f"LanguageModel({self.run}, step {self.step:,}: {shape}, {topk})"

    def __call__(self, tokens: str | jax.Array | np.ndarray | Sequence) -> jax.Array:
        """Next-token logits, float32[B, T, V].

        Args:
            tokens: A text, or token ids int32[B, T].
        """
        ids = self.to_tokens(tokens) if isinstance(tokens, str) else jnp.asarray(tokens, jnp.int32)
        if ids.ndim != 2:
            raise ValueError(f"tokens has shape {ids.shape}: must be [B, T]")
        if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < self.config.model.vocab_size):
            raise ValueError(f"tokens: ids must be from 0 to {self.config.model.vocab_size - 1}")
        return _logits(self.config.model, self.params, ids)

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> str | list[str]:
        """Prompt and continuation as one string; a list of them for a list of prompts.

        Args:
            prompt: Text that begins a document; may be empty.
            max_new_tokens: Upper bound on the continuation's length, tokens.
            temperature: Divides the logits; 0 takes the most likely token each time.
            seed: The same seed gives the same text.
        """
        if not isinstance(prompt, str):
            return [str(self.generate(p, max_new_tokens, temperature, seed)) for p in prompt]
        continuation = generate_tokens(
            self.config.model,
            self.params,
            np.asarray(self.to_tokens(prompt))[0].tolist(),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_token=self.tokenizer.separator_id,
        )
        return prompt + self.tokenizer.decode(continuation)

    def to_tokens(self, text: str, prepend_separator: bool = True) -> jax.Array:
        """Token ids int32[1, T]; the separator stands first, as it does in training."""
        ids = self.tokenizer.encode(text)
        if prepend_separator:
            ids = np.concatenate([[self.tokenizer.separator_id], ids])
        return jnp.asarray(ids, jnp.int32)[None]

    def to_str_tokens(self, text: str, prepend_separator: bool = True) -> list[str]:
        """The pieces that `to_tokens` cuts a text into."""
        return self.tokenizer.token_strings(np.asarray(self.to_tokens(text, prepend_separator))[0])


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


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: transformer.Parameters, tokens_BT: jax.Array) -> jax.Array:
    return transformer.bind(config, params)(tokens_BT)
