"""Saving and restoring a run: parameters, optimizer, data position and facts, in one atomic Orbax step.

Everything on disk is a plain nested dict of arrays or JSON, so the layout depends on neither Flax nor optax
classes, and parameters can be read without the optimizer (see `checkpoint_format`).
"""

from collections.abc import Mapping
import pathlib
from typing import Any

from etils import epath
import flax.serialization
import jax
import orbax.checkpoint as ocp

from topklm.checkpoint_format import DATA, FACTS, OPTIMIZER, PARAMS, mismatches, restore_args
from topklm.config import CheckpointConfig
from topklm.errors import UserError
from topklm.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run folder. Saving is asynchronous: training goes on while bytes are written."""

    def __init__(self, folder: pathlib.Path, config: CheckpointConfig):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(
            epath.Path(folder.absolute()),
            options=options,
            handler_registry=_item_handlers(),
        )

    @property
    def latest_step(self) -> int | None:
        """Newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Starts saving; a step that is already saved is left as it is.

        Args:
            state: The training state; the next step may be given its buffers once this returns.
            data_state: JSON-able state of the data iterator after exactly `state.step` batches.
            facts: JSON-able: config, tokenizer sha256, tokens seen, seconds trained, versions.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        optimizer = {
            "step": state.step,
            "opt_state": flax.serialization.to_state_dict(state.opt_state),
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    PARAMS: ocp.args.PyTreeSave(state.params),
                    OPTIMIZER: ocp.args.PyTreeSave(optimizer),
                    DATA: ocp.args.JsonSave(dict(data_state)),
                    FACTS: ocp.args.JsonSave(dict(facts)),
                }
            ),
        )

    def restore(
        self, abstract_state: TrainState, mesh: jax.sharding.Mesh
    ) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """Reads the newest checkpoint onto `mesh`, whatever devices it was saved from.

        Args:
            abstract_state: Shapes and dtypes, as from `jax.eval_shape`.
            mesh: Where the arrays shall live.

        Returns:
            The state, the data iterator's state, and the facts.

        Raises:
            UserError: If the checkpoint holds another model; each parameter that differs is named.
        """
        step = self._manager.latest_step()
        if step is None:
            raise ValueError("there is no checkpoint to restore")
        self._check_parameters(step, abstract_state.params)
        optimizer = {
            "step": abstract_state.step,
            "opt_state": flax.serialization.to_state_dict(abstract_state.opt_state),
        }
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    PARAMS: restore_args(abstract_state.params, mesh),
                    OPTIMIZER: restore_args(optimizer, mesh),
                    DATA: ocp.args.JsonRestore(),
                    FACTS: ocp.args.JsonRestore(),
                }
            ),
        )
        opt_state = flax.serialization.from_state_dict(
            abstract_state.opt_state, restored[OPTIMIZER]["opt_state"]
        )
        state = TrainState(restored[OPTIMIZER]["step"], restored[PARAMS], opt_state)
        return state, restored[DATA], restored[FACTS]

    def wait(self) -> None:
        """Returns when everything started is safely on disk; raises what went wrong while writing."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the manager's threads."""
        self._manager.close()

    def _check_parameters(self, step: int, params: Any) -> None:
        saved = self._manager.item_metadata(step)[PARAMS]
        problems = mismatches(getattr(saved, "tree", saved), params)
        if problems:
            raise UserError(f"checkpoint {step} holds another model: {'; '.join(problems)}")


def _item_handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Without it, what an item holds cannot be asked for before it is restored."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in (PARAMS, OPTIMIZER):
        trees = ocp.PyTreeCheckpointHandler()
        registry.add(item, ocp.args.PyTreeSave, trees)
        registry.add(item, ocp.args.PyTreeRestore, trees)
    for item in (DATA, FACTS):
        json_files = ocp.JsonCheckpointHandler()
        registry.add(item, ocp.args.JsonSave, json_files)
        registry.add(item, ocp.args.JsonRestore, json_files)
    return registry
