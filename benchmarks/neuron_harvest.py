"""The cost of harvesting beside the forward pass that it needs; a part of `benchmarks.bench_neuron_pages`."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import shutil
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import timing
from topklm.config import ModelConfig
from topklm.inference.language_model import LanguageModel
from topklm.layout import Layout
from topklm.model import transformer
from topklm.model.losses import token_losses
from topklm.neurons import NeuronsFolder
from topklm.neurons import harvest as harvest_lib
from topklm.neurons.documents import TextModel, batches
from topklm.neurons.store import Metadata, StoreWriter

_Batch = tuple[np.ndarray, ...]  # inputs, segment ids, positions


@dataclasses.dataclass
class Held:
    """Documents in memory, as `topklm.neurons.documents.Documents`."""

    name: str
    n_tokens: int | None
    ids: Sequence[np.ndarray]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.ids)


def against_forward(
    model: LanguageModel, layout: Layout, documents: Held, folder: NeuronsFolder, repeats: int
) -> dict[str, Any]:
    """Harvests again and again, in turns with the plain forward pass; the last store stays.

    Args:
        model: On the devices of `layout`.
        layout: Of all devices.
        documents: The text.
        folder: Where the store goes.
        repeats: Rounds.

    Returns:
        Ratios and rates, for JSON.
    """
    config, separator_id = model.config.model, model.tokenizer.separator_id
    text_model = TextModel(config, model.params, layout, separator_id)
    rows = text_model.rows
    kind, layers = harvest_lib.kind_and_layers(config)
    metadata = Metadata(
        run="benchmark",
        step=model.step,
        tokenizer_sha256=model.tokenizer.sha256,
        source=documents.name,
        kind=kind,
        layers=layers,
        d_model=config.d_model,
        topk_k=config.topk_k if kind == harvest_lib.TOPK else config.d_model,
        topk_activation=config.topk_activation,
        context_length=config.context_length,
    )

    def harvest(calls: int) -> float:
        seconds = 0.0
        for _ in range(calls):
            shutil.rmtree(folder.store, ignore_errors=True)
            writer = StoreWriter(folder.store, metadata)
            whole = functools.partial(harvest_lib.harvest, text_model, documents, writer)
            seconds += timing.timed(whole)(1)
        return seconds

    batches = _batches(text_model, documents)
    forward = timing.timed(functools.partial(_forward_all, text_model, batches))
    subjects = {"harvest": harvest, "forward": forward}
    samples = timing.alternate(subjects, repeats, label="harvest")
    n_tokens = sum(map(len, documents))
    return {
        **_over_forward(samples, "harvest"),
        "tokens_per_second": n_tokens / samples["harvest"].median,
        "forward_tokens_per_second": n_tokens / samples["forward"].median,
        "batch_rows": rows,
        "n_batches": len(batches),
    }


def capture_against_forward(model: LanguageModel, repeats: int) -> dict[str, Any]:
    """Times `run_with_cache` in turns with calling the model, on a batch of 4,096 tokens.

    Returns:
        Ratios, for JSON.
    """
    length = model.config.model.context_length
    shape = (max(1, 4096 // length), length)
    tokens = np.random.default_rng(0).integers(0, model.config.model.vocab_size, shape)

    def forward() -> None:
        model(tokens).block_until_ready()

    def captured() -> None:
        logits, cache = model.run_with_cache(tokens)
        jax.block_until_ready((logits, cache.neurons.values))

    subjects = {"captured": timing.timed(captured), "forward": timing.timed(forward)}
    samples = timing.alternate(subjects, repeats, label="capture")
    return {**_over_forward(samples, "captured"), "tokens": list(shape)}


def _over_forward(samples: dict[str, timing.Samples], name: str) -> dict[str, Any]:
    ratios = samples["forward"].speedup_over(samples[name])
    seconds = {name: of_side.seconds for name, of_side in samples.items()}
    return {
        "over_forward": statistics.median(ratios),
        "over_forward_of_rounds": ratios,
        "seconds": seconds,
    }


def _batches(model: TextModel, documents: Held) -> list[tuple[np.ndarray, ...]]:
    """Packs the batches of a harvest, in its order: inputs, segment ids and positions of each."""
    return [
        arrays
        for stretch in batches(model.windows(documents), harvest_lib.segment_tokens(model.config))
        for arrays, _, _ in model.pack(stretch).batches()
    ]


def _forward_all(model: TextModel, batches: Sequence[tuple[np.ndarray, ...]]) -> None:
    """Computes the losses of all batches, on the host; while one is fetched the next is computed."""
    ahead = None
    for arrays in batches:
        before, ahead = ahead, _forward(model.config, model.params, *model.put(arrays))
        if before is not None:
            np.asarray(before)
    np.asarray(ahead)


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    config: ModelConfig,
    params: transformer.Parameters,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
) -> jax.Array:
    """Computes next-token losses, float32[B, T]."""
    model = transformer.bind(config, params)
    h_BTD, _ = model.hidden(tokens_BT, segment_ids_BT, positions_BT)
    return token_losses(h_BTD, model.unembedding(), jnp.roll(tokens_BT, -1, axis=1), config.vocab_size)
