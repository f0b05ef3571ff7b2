"""The cost of harvesting beside the forward pass that it needs; a part of `benchmarks.bench_neuron_pages`."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import shutil
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from benchmarks.harness import timing
from topklm.config import ModelConfig
from topklm.inference.language_model import LanguageModel
from topklm.model import transformer
from topklm.model.losses import token_losses
from topklm.neurons import harvest as harvest_lib
from topklm.neurons.documents import batches, pack, windows_of
from topklm.neurons.paths import NeuronsFolder
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
    model: LanguageModel, mesh: Mesh, documents: Held, folder: NeuronsFolder, repeats: int
) -> dict[str, Any]:
    """Harvests again and again, in turns with the plain forward pass; the last store stays.

    Args:
        model: On the devices of `mesh`.
        mesh: Of all devices.
        documents: The text.
        folder: Where the store goes.
        repeats: Rounds.

    Returns:
        Ratios and rates, for JSON.
    """
    config, separator_id = model.config.model, model.tokenizer.separator_id
    rows = harvest_lib.batch_rows(config, mesh)
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
            arguments = config, model.params, mesh, documents, writer
            whole = functools.partial(harvest_lib.harvest, *arguments, separator_id=separator_id, rows=rows)
            seconds += timing.timed(whole)(1)
        return seconds

    batches = _batches(config, documents, separator_id, rows)
    forward = timing.timed(functools.partial(_forward_all, config, model.params, mesh, batches))
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


def _batches(config: ModelConfig, documents: Held, separator_id: int, rows: int) -> list[_Batch]:
    """Packs the batches of a harvest, in its order, of `rows` rows each."""
    length = config.context_length
    of_documents = (windows_of(n, ids, separator_id, length) for n, ids in enumerate(documents))
    windows = itertools.chain.from_iterable(of_documents)
    found = []
    for stretch in batches(windows, harvest_lib.segment_tokens(config)):
        packed = pack(stretch, length, rows, separator_id)
        arrays = packed.inputs, packed.segment_ids, packed.positions
        for start in range(0, len(packed.inputs), rows):
            found.append(tuple(array[start : start + rows] for array in arrays))
    return found


def _forward_all(
    config: ModelConfig, params: transformer.Parameters, mesh: Mesh, batches: Sequence[_Batch]
) -> None:
    """Computes the losses of all batches, on the host; while one is fetched the next is computed."""
    batch = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ahead = None
    for arrays in batches:
        before, ahead = ahead, _forward(config, params, *jax.device_put(arrays, batch))
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
