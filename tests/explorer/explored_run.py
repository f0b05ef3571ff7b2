"""A run folder with a store of real activations of a tiny random model, and a table of figures made up here.

Figures of the store (counts, histograms, top tokens, examples) are true; the others are random.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path

from helpers import sentences
import ml_dtypes
import numpy as np
import pyarrow as pa
import saved_runs

import topklm
from topklm.config import Config
from topklm.neurons import NeuronsFolder
from topklm.neurons import segment as segment_lib
from topklm.neurons.statistics import activity, catalog, table
from topklm.neurons.statistics.activity import RANGE_PARTS
from topklm.neurons.store import Metadata, StoreWriter

STEP = 5
D, LAYERS = 32, (0, 1)
DEAD = (0, 31)  # layer and neuron
# Text that a page might run, hide or turn round.
HOSTILE = [
    "<script>alert(1)</script>",
    "</mark><img src=x onerror=alert(2)>",
    "{{ 7*7 }} {% raw %} \u202ereversed\x1b[31m\x00",
    "a\n\ttab & \"quoted\" 'single' \u00e9\u4e2d",
]
DOCUMENTS = [*sentences(3, 30), *HOSTILE]
CONFIG: Config = dataclasses.replace(
    saved_runs.CONFIG,
    model=dataclasses.replace(saved_runs.MODEL, d_model=D, n_layers=3, context_length=128),
)
LISTED = 10


def make(folder: Path) -> NeuronsFolder:
    """Makes all of it."""
    saved_runs.save(folder, [STEP], CONFIG)
    place = NeuronsFolder(folder, STEP)
    tokens, documents, layers = activations(folder)
    tokenizer = saved_runs.tokenizer()
    metadata = Metadata(
        run=folder.name,
        step=STEP,
        tokenizer_sha256=tokenizer.sha256,
        source="a village",
        kind="topk",
        layers=LAYERS,
        d_model=D,
        topk_k=CONFIG.model.topk_k,
        topk_activation=CONFIG.model.topk_activation,
        context_length=CONFIG.model.context_length,
    )
    writer = StoreWriter(place.store, metadata)
    losses = np.random.default_rng(0).random(len(tokens))
    # A document goes on in the next segment.
    for part in (slice(0, 700), slice(700, None)):
        writer.append(
            segment_lib.from_dense(
                tokens[part], documents[part], losses[part], [layer[part] for layer in layers]
            )
        )
    write_table(place, tokens, documents, layers)
    return place


def activations(folder: Path) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Tokens [N], documents [N], and what each TopK layer hands on, [N, D], one neuron of them silenced."""
    model = topklm.load(folder)
    length = CONFIG.model.context_length
    windows = []
    for number, text in enumerate(DOCUMENTS):
        ids = model.tokenizer.encode(text)
        windows += [(number, ids[at : at + length - 1]) for at in range(0, len(ids), length - 1)]
    inputs = np.full((len(windows), length), model.tokenizer.separator_id, np.int32)
    for row, (_, ids) in enumerate(windows):
        inputs[row, 1 : len(ids) + 1] = ids
    _, cache = model.run_with_cache(inputs)
    dense = np.asarray(cache.neurons.dense())
    layers = [
        np.concatenate([dense[place, row, 1 : len(ids) + 1] for row, (_, ids) in enumerate(windows)])
        for place in range(len(LAYERS))
    ]
    layers[DEAD[0]][:, DEAD[1]] = 0
    tokens = np.concatenate([ids for _, ids in windows])
    documents = np.concatenate([np.full(len(ids), number) for number, ids in windows])
    return tokens, documents, layers


def write_table(
    place: NeuronsFolder, tokens: np.ndarray, documents: np.ndarray, layers: Sequence[np.ndarray]
) -> None:
    rows = [
        _row(layer, neuron, layers[layer][:, neuron], tokens, documents)
        for layer in LAYERS
        for neuron in range(D)
    ]
    measured = table.TableMetadata(
        run=place.run.name,
        step=STEP,
        tokenizer_sha256=saved_runs.tokenizer().sha256,
        kind="topk",
        layers=LAYERS,
        d_model=D,
        topk_k=CONFIG.model.topk_k,
        source="a village",
        n_tokens=len(tokens),
        n_documents=int(documents[-1]) + 1,
        embedding="the model's own unembedding rows",
        n_clusters=20,
        details={},
    )
    table.write(place.table, pa.Table.from_pylist(rows, schema=catalog.schema()), measured)


def _row(layer: int, neuron: int, values: np.ndarray, tokens: np.ndarray, documents: np.ndarray) -> dict:
    random = np.random.default_rng([layer, neuron])
    # As the store keeps them.
    values = values.astype(ml_dtypes.bfloat16).astype(np.float64)
    where = np.flatnonzero(values)
    row = dict.fromkeys(catalog.schema().names)
    row |= {"layer": layer, "neuron": neuron, "n_active": len(where), "density": len(where) / len(values)}
    others = [int(j) for j in random.permutation(D)[:LISTED] if j != neuron]
    for name in ("coactive", "similar_effect"):
        row |= {name: others, f"{name}_similarity": sorted(random.random(len(others)).tolist(), reverse=True)}
    for lens in ("identity", "jacobian"):
        for end, sign in (("top", 1), ("bottom", -1)):
            effects = sign * np.sort(random.random(LISTED))[::-1]
            row |= {
                f"{lens}_{end}": random.permutation(256)[:LISTED].tolist(),
                f"{lens}_{end}_effects": effects,
            }
    if not len(where):
        empty = ("histogram", "top_tokens", "top_token_shares")
        return row | dict.fromkeys((*empty, "examples", "example_activations", "example_parts"), ())
    active, ids = values[where], tokens[where]
    shares = np.bincount(ids, active) / active.sum()
    top = np.argsort(-shares, kind="stable")[:LISTED]
    top = top[shares[top] > 0]
    entropies = np.sort(random.random(4) * 3)
    examples = _examples(where, active, documents)
    return row | {
        "mean_activation": active.mean(),
        "max_activation": active.max(),
        "histogram": np.histogram(active, activity.HISTOGRAM_BINS, (0, active.max()))[0],
        "n_distinct_tokens": len(set(ids.tolist())),
        "semantic_entropy": entropies[0],
        "semantic_entropy_corrected": entropies[1],
        "token_entropy": entropies[2],
        "token_entropy_corrected": entropies[3],
        "monosemanticity": random.random(),
        "monosemanticity_shuffled": random.random() / 10,
        "top_tokens": top,
        "top_token_shares": shares[top],
        "ablation_effect": random.normal() / 10,
        "ablation_standard_error": random.random() / 10,
        "ablation_samples": min(len(where), 64),
        "examples": [at for at, _ in examples],
        "example_activations": [values[at] for at, _ in examples],
        "example_parts": [part for _, part in examples],
    }


def _examples(where: np.ndarray, active: np.ndarray, documents: np.ndarray) -> list[tuple[int, int]]:
    order = where[np.argsort(-active, kind="stable")]
    _, first = np.unique(documents[order], return_index=True)
    strongest = [(int(at), 0) for at in order[np.sort(first)][:20]]
    part_of = np.clip(np.ceil(active / active.max() * RANGE_PARTS), 1, RANGE_PARTS).astype(int)
    parts = [(int(at), part) for part in range(1, RANGE_PARTS + 1) for at in where[part_of == part][:5]]
    return strongest + parts
