"""Evaluation while training: held-out text, every token once, how the TopK layers do; tasks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm import distributed
from topklm.config import Config, EvalConfig
from topklm.data.dataset import Mixture
from topklm.data.stream import DeviceBatch, HeldoutPart, heldout_batches
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.eval import scoring, tasks
from topklm.eval.tasks import Task
from topklm.layout import REPLICATED, ROWS, Layout
from topklm.model import losses, topk, transformer
from topklm.model.block import NO_HOOKS, CaptureFn, LayerHooks
from topklm.neurons.documents import TextModel
from topklm.training.step import Batch, make_forward


def evaluate(
    eval_step: Callable[[Any, Any], dict[str, Any]],
    params: Any,
    batches: Iterable[Any],
    *,
    n_bytes: int,
    n_topk_layers: int,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Runs the model over the held-out batches.

    Batches together score every text token once; `eval_step` is from `make_eval_step`; `stopped` is asked
    after every batch whether to give up, which returns None.

    Otherwise it returns `loss` (nats per token), `perplexity`, `bits_per_byte` (all nats over all bytes, in
    bits), `tokens`, and the three lists of `summarize_topk_health`, one figure per TopK layer.
    """
    nll_nats, tokens = 0.0, 0
    health: Any = None
    for batch in batches:
        sums = jax.device_get(eval_step(params, batch))
        nll_nats += float(np.sum(sums["nll_nats"], dtype=np.float64))
        tokens += int(np.sum(sums["tokens"]))
        in_float64 = jax.tree.map(lambda x: np.asarray(x, np.float64), sums["topk_health"])
        health = in_float64 if health is None else jax.tree.map(np.add, health, in_float64)
        if stopped():
            return None
    loss = nll_nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # exp overflows a float64 above 709
        "bits_per_byte": nll_nats / math.log(2) / n_bytes,
        "tokens": tokens,
        **summarize_topk_health(health, tokens, n_topk_layers),
    }


def heldout_feed(
    config: Config, mixture: Mixture, layout: Layout, part: HeldoutPart
) -> Iterator[DeviceBatch]:
    """Yields the held-out batches on the devices, for one evaluation."""
    batch_size = layout.round_up(config.eval.batch_size)
    # Documents are packed one after another, so every process makes whole batches.
    rows = layout.process_rows(batch_size)
    for batch in heldout_batches(
        mixture, context_length=config.model.context_length, batch_size=batch_size, part=part
    ):
        yield layout.put_batch(batch, batch_size, rows)


def make_eval_step(
    config: Config, layout: Layout, hooks: LayerHooks = NO_HOOKS
) -> Callable[[transformer.Parameters, Batch], dict[str, Any]]:
    """Builds `(params, batch) -> sums` over the batch's weighted tokens, the same on every device.

    Hooks are called with the number of the layer.

    Returns of the built function: `nll_nats` float32[B] (one sum a row, to be added up in float64), `tokens`
    int32[B], how many a row has, and `topk_health`, see `capture_topk_health`.
    """
    specs, parallel, forward = make_forward(config.model, layout, hooks)

    def of_device(params: transformer.Parameters, batch: Batch) -> dict[str, Any]:
        batch = parallel.balanced(batch)
        capture = capture_topk_health(parallel.residual_tokens(batch["loss_weights"]))
        model, h, health = forward(params, batch, capture)
        h, w, targets = parallel.gather_tokens(h), model.unembedding(), batch["targets"]
        nll = losses.token_losses(h, w, targets, config.model.vocab_size, parallel.tensor)
        sums = (nll * batch["loss_weights"]).sum(axis=-1), (batch["loss_weights"] > 0).sum(axis=-1)
        nll_nats, tokens = (layout.sum_over(x, keep=ROWS, leave_out="tensor") for x in sums)
        topk_health = jax.tree.map(lambda x: layout.sum_over(x, keep=REPLICATED), health)
        return {"nll_nats": nll_nats, "tokens": tokens, "topk_health": topk_health}

    out = {"nll_nats": ROWS, "tokens": ROWS, "topk_health": REPLICATED}
    eval_step = layout.on_every_device(of_device, specs, out)
    # Every process reads the sums, those of other processes' rows too.
    return jax.jit(eval_step, out_shardings=layout.replicated)


def capture_topk_health(weights_BT: jax.Array) -> CaptureFn:
    """Makes a capture function that measures how the TopK of one layer does on held-out text.

    Tokens of weight 0, padding and separators that are never scored, are left out. It gives float32 sums over
    the batch: `active_tokens` [D], tokens on which the neuron is not zero; `kept_square_share`, sum over
    tokens of |h'|^2 / |u|^2; `active` and `also_active_below`, active neurons, and those of them that are
    active in the layer's input too.
    """
    counted_BT1 = (weights_BT > 0)[..., None]

    def measure(h: jax.Array, u: jax.Array, h_next: jax.Array) -> dict[str, jax.Array]:
        active = (h_next != 0) & counted_BT1
        squares = [jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1) for x in (u, h_next)]
        share = jnp.where(squares[0] > 0, squares[1] / squares[0], 1.0)
        return {
            "active_tokens": active.sum(axis=(0, 1)).astype(jnp.float32),
            "kept_square_share": jnp.sum(share * counted_BT1[..., 0]),
            "active": active.sum().astype(jnp.float32),
            "also_active_below": (active & (h != 0)).sum().astype(jnp.float32),
        }

    return measure


def summarize_topk_health(
    sums: Mapping[str, Any], n_tokens: int, n_topk_layers: int
) -> dict[str, list[float]]:
    """Computes three figures per TopK layer, in layer order (empty lists for the Base LM).

    `sums` are the results of `capture_topk_health`, stacked to [L, ...] and added up over batches, float64.
    `dead_neurons`: share of neurons never active on these tokens. `norm_kept`: mean over tokens of the share
    of the squared norm that TopK keeps. `overlap_below`: share of active neurons that are active in the layer
    below too; from the second layer on, so it has S - 1 entries.
    """
    found = {name: np.asarray(x)[:n_topk_layers] for name, x in sums.items()}
    overlap = found["also_active_below"] / np.maximum(found["active"], 1)
    return {
        "dead_neurons": (found["active_tokens"] == 0).mean(axis=-1).tolist(),
        "norm_kept": (found["kept_square_share"] / max(n_tokens, 1)).tolist(),
        "overlap_below": overlap[1:].tolist(),
    }


def find_tasks(config: EvalConfig) -> list[Task]:
    """Reads the tasks of `eval.tasks`; UserError for one that is not there, or a line that is no item."""
    names = dict.fromkeys(name.strip() for name in config.tasks.split(",") if name.strip())
    folder = Path(config.tasks_dir).expanduser() if config.tasks_dir else None
    if names and folder is not None and not folder.is_dir():
        raise UserError(
            "is no folder; give one with files of tasks", field="eval.tasks_dir", value=str(folder)
        )
    limit = config.tasks_limit or None
    fields = {"field": "eval.tasks", "flag": "eval.tasks_dir"}
    return [tasks.find(name, folder, limit, **fields) for name in names]


class TaskEvaluation:
    """Tasks, ready to be evaluated in training's dtype by all processes; UserError if their files differ."""

    def __init__(self, config: Config, found: Sequence[Task], tokenizer: Tokenizer, layout: Layout):
        if found and distributed.process_count() > 1:
            digests = distributed.gather("tasks", " ".join(task.sha256 for task in found))
            if len(set(digests)) > 1:
                raise UserError("eval.tasks_dir: processes have other files; give all hosts the same")
        model = topk.for_gspmd(config.model, layout.size)
        self._model = TextModel(model, {}, layout, tokenizer.separator_id)
        self._tasks = [tasks.tokenize(task, self._model, tokenizer) for task in found]
        self.program = scoring.make_program(model, layout, in_float32=False)

    def evaluate(
        self, params: transformer.Parameters, program: scoring.Program, stopped: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Returns the figures of all tasks by name, "blimp" and "blimp_bits_per_byte"; None if given up.

        `program` is `self.program`, or does as it does.
        """
        model, found = dataclasses.replace(self._model, params=params), dict[str, float]()
        for tokenized in self._tasks:
            outcome = tokenized.evaluate(model, program=program, stopped=stopped)
            if outcome is None:
                return None
            name, (main, *_) = tokenized.task.name, tokenized.task.measures
            for figure in tasks.figures_of(outcome):
                if not figure.part:
                    full = name if figure.measure == main else f"{name}_{figure.measure}"
                    found[full] = float(figure.sums.sum() / figure.weights.sum())
        return found
