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
from topklm.errors import UserError
from topklm.model import transformer
from topklm.neurons.dictionary import Dictionary
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
    sentences,
    similar,
    table,
)
from topklm.neurons.statistics.settings import Settings
from topklm.neurons.store import Store
from topklm.progress import Progress

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
    dictionary: Dictionary | None = None,
    windows: sentences.Windows | None = None,
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
        dictionary: What the store's activations are written in. Logit effects are then those of its decoder's
            directions, and nothing is set to 0. None: the hidden state's own coordinates.
        windows: Embeddings of the text around each token by a sentence encoder, for semantic entropy and
            monosemanticity; None: the model's own unembedding rows.

    Raises:
        UserError: If the store is empty or damaged, or of another dictionary.
    """
    if store.n_tokens == 0:
        raise UserError(f"{store.folder} holds no tokens: run topklm neurons harvest")
    metadata = store.metadata
    if metadata.dictionary != (dictionary.description if dictionary else ""):
        raise UserError(
            f"{store.folder} was harvested with another dictionary: delete both, and harvest again"
        )
    token_ids = store.tokens(0, store.n_tokens)
    bounds = contexts.document_bounds(store)
    unembedding = _unembedding(config, params)
    # JAX computes it while NumPy is busy with clusters and contexts: nobody waits for it before the lenses.
    progress.say(f"averaging the Jacobian over {settings.lens_contexts:,} contexts")
    jacobians = jacobian.averaged_jacobians(
        config, params, separator_id, store, n_contexts=settings.lens_contexts, seed=settings.seed
    )
    clustered = f"{config.vocab_size:,} tokens" if windows is None else f"{store.n_tokens:,} windows"
    progress.say(f"clustering {clustered}, and comparing the contexts of {store.n_tokens:,} tokens")
    embedded: contexts.Embeddings
    of_places = None
    if windows is None:
        of_token = clusters.of_tokens(unembedding, settings.n_clusters, settings.seed)
        embedded = contexts.Contexts(token_ids, bounds, contexts.token_vectors(unembedding))
    else:
        of_token = np.arange(config.vocab_size)
        embedded = windows
        of_places = windows.clusters(
            settings.n_clusters or clusters.default_count(config.vocab_size), settings.seed
        )
    scores = monosemanticity.measure(store, embedded, settings.seed)
    directions = None
    if dictionary is not None:
        directions = np.zeros((config.n_layers, config.d_model, config.d_model), np.float32)
        directions[list(metadata.layers)] = dictionary.decoder
    both_lenses = lenses.make(config, params, jacobians, directions)
    effects = None
    # Of what was kept of a Base LM, most of the model does not know: it goes on with all of its hidden state.
    is_part = metadata.kind != "topk" and metadata.topk_k < metadata.d_model
    if settings.ablation_samples and not is_part and dictionary is None:
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
            **entropy.columns(block, token_ids, of_token, of_places),
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
        embedding=EMBEDDING if windows is None else windows.embedding,
        n_clusters=int((of_token if of_places is None else of_places).max()) + 1,
        dictionary=metadata.dictionary,
        store=store.sha256,
        details={
            **dataclasses.asdict(settings),
            "context_window": contexts.WINDOW if windows is None else 2 * sentences.SIDE + 1,
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
