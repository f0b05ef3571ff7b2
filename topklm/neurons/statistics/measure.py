"""All figures of all neurons of a store, put together as the table that `table` describes.

Neurons are taken in blocks, whose events are read at once, so that memory does not grow with the text beyond
a few bytes for each token.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from topklm.config import ModelConfig
from topklm.data.building.progress import Progress
from topklm.errors import UserError
from topklm.model import transformer
from topklm.neurons.statistics import (
    ablation,
    activity,
    clusters,
    coactivation,
    contexts,
    entropy,
    examples,
    jacobian,
    lenses,
    monosemanticity,
    similar,
    table,
)
from topklm.neurons.statistics.settings import Settings
from topklm.neurons.store import Store

EMBEDDING = "the model's own unembedding rows"

_BLOCK_EVENTS = 2**22  # some 200 MB with all that is made of them
_BLOCK_CELLS = 2**22  # neurons x vocabulary


def measure(
    path: Path,
    store: Store,
    config: ModelConfig,
    params: transformer.Parameters,
    *,
    separator_id: int,
    settings: Settings,
    progress: Progress,
) -> None:
    """Measures all neurons of a store, and writes the table.

    Args:
        path: Of the table.
        store: Of activations of this model.
        config: The model.
        params: Its parameters, on one device or a mesh.
        separator_id: Of the tokenizer.
        settings: How much is sampled.
        progress: Shows how far it is.

    Raises:
        UserError: If the store is empty or damaged.
    """
    if store.n_tokens == 0:
        raise UserError(f"{store.folder} holds no tokens: run topklm neurons harvest")
    metadata = store.metadata
    token_ids = store.tokens(0, store.n_tokens)
    bounds = contexts.document_bounds(store)
    unembedding = _unembedding(config, params)
    progress.say(f"clustering {config.vocab_size:,} tokens, and comparing the contexts of {store.n_tokens:,}")
    of_token = clusters.of_tokens(unembedding, settings.n_clusters, settings.seed)
    embedded = contexts.Contexts(token_ids, bounds, contexts.token_vectors(unembedding))
    scores = monosemanticity.measure(store, embedded, settings.seed)
    progress.say(f"averaging the Jacobian over {settings.lens_contexts:,} contexts")
    jacobians = jacobian.averaged_jacobians(
        config, params, separator_id, store, n_contexts=settings.lens_contexts, seed=settings.seed
    )
    both_lenses = lenses.make(config, params, jacobians)
    effects = None
    # Of what was kept of a Base LM, most of the model does not know: it goes on with all of its hidden state.
    is_part = metadata.kind == "dense" and metadata.topk_k < metadata.d_model
    if settings.ablation_samples and not is_part:
        with progress.phase("setting neurons to 0", 1000) as report:
            done = 0

            def tell(share: float) -> None:
                nonlocal done
                report(round(1000 * share) - done, 0, 0)
                done = round(1000 * share)

            effects = ablation.measure(
                store,
                bounds,
                config,
                params,
                separator_id=separator_id,
                samples=settings.ablation_samples,
                seed=settings.seed,
                report=tell,
            )

    def columns(layer: int, begin: int, end: int, similarities: np.ndarray) -> Mapping[str, Any]:
        block = store.block(layer, begin, end)
        return {
            "layer": [layer] * (end - begin),
            "neuron": range(begin, end),
            **activity.columns(block, store.n_tokens),
            **entropy.columns(block, token_ids, of_token),
            **monosemanticity.columns(scores, layer, begin, end),
            **lenses.columns(both_lenses, layer, begin, end),
            **ablation.columns(effects, layer, begin, end),
            **coactivation.columns(similarities, begin, end),
            **similar.columns(both_lenses, layer, begin, end),
            **examples.columns(block, bounds, layer, begin, settings.seed),
        }

    parts = []
    with progress.phase("measuring neurons", len(metadata.layers) * metadata.d_model) as report:
        for layer in metadata.layers:
            similarities = coactivation.measure(store, layer)
            for begin, end in _blocks(store, config.vocab_size, layer):
                parts.append(_as_table(columns(layer, begin, end, similarities)))
                report(end - begin, 0, 0)
    measured = table.Measured(
        run=metadata.run,
        step=metadata.step,
        tokenizer_sha256=metadata.tokenizer_sha256,
        kind=metadata.kind,
        layers=metadata.layers,
        d_model=metadata.d_model,
        topk_k=metadata.topk_k,
        source=metadata.source,
        n_tokens=store.n_tokens,
        n_documents=len(bounds) - 1,
        embedding=EMBEDDING,
        n_clusters=int(of_token.max()) + 1,
        details={
            **dataclasses.asdict(settings),
            "context_window": contexts.WINDOW,
            "ablation_tokens": min(store.n_tokens, ablation.MAX_TOKENS),
            "lens_context_tokens": jacobian.CONTEXT_TOKENS,
            "coactivation_tokens": min(store.n_tokens, coactivation.SAMPLE_TOKENS),
            "topk_activation": metadata.topk_activation,
        },
    )
    table.write(path, pa.concat_tables(parts), measured)


def _blocks(store: Store, vocab_size: int, layer: int) -> Iterator[tuple[int, int]]:
    """Neighbouring neurons whose events, and counts by token, fit into memory."""
    number = store.metadata.layers.index(layer) * store.metadata.d_model
    counts = np.sum([np.diff(segment.offsets) for segment in store.segments], axis=0)
    events = np.cumsum(counts[number : number + store.metadata.d_model])
    most = max(1, _BLOCK_CELLS // vocab_size)
    begin = 0
    while begin < len(events):
        before = events[begin - 1] if begin else 0
        end = int(np.searchsorted(events, before + _BLOCK_EVENTS, side="right"))
        end = min(max(end, begin + 1), begin + most, len(events))
        yield begin, end
        begin = end


def _as_table(columns: Mapping[str, Any]) -> pa.Table:
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in table.COLUMNS})


def _unembedding(config: ModelConfig, params: transformer.Parameters) -> np.ndarray:
    """float32[D, V], without padding."""
    columns = jax.jit(lambda params: transformer.bind(config, params).unembedding())(params)
    return np.asarray(columns)[:, : config.vocab_size]
