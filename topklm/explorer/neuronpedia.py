"""Writes what is known of neurons as the files that Neuronpedia imports in bulk.

    DIR/{model}/{source}/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl    one line each
    DIR/{model}/{source}/features/batch-0.jsonl.gz        a line for each neuron
    DIR/{model}/{source}/activations/batch-0.jsonl.gz     a line for each example of these neurons
    DIR/{model}/{source}/explanations/batch-0.jsonl.gz    a line for each label that a person gave; if any

A source is a layer. `topklm.explorer.neuronpedia_rows` makes the lines. Numbers are the
store's and the table's own; nothing is rounded.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import gzip
import itertools
import json
from pathlib import Path
import re
import shutil
from typing import Any
import uuid

import numpy as np
import pyarrow as pa

from topklm.checkpoint.run_folder import saved_config
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.explorer.neuronpedia_rows import COLUMNS, ExampleWindows, NeuronpediaRows, Row, events
from topklm.neurons.labels import Labels
from topklm.neurons.paths import NeuronsFolder
from topklm.neurons.statistics import table
from topklm.neurons.store import Store
from topklm.progress import Progress
from topklm.storage.files import fsync

# The user whom Neuronpedia's own import scripts name as the creator; its database must hold who is named.
CREATOR_ID = "clkht01d40000jv08hvalcvly"

# Neurons in a file. Over there a file becomes one statement, of at most 256 MB.
_BATCH = 256
_COMPRESSION = 3  # of gzip; higher ones take twice the time for a few percent
_MODEL_ID = re.compile(r"[a-z0-9_-]{1,128}")


def export(
    folder: NeuronsFolder,
    tokenizer: Tokenizer,
    out: Path,
    *,
    model_id: str,
    neurons: Iterable[tuple[int, int]] | None = None,
    creator_id: str = CREATOR_ID,
    progress: Progress | None = None,
) -> None:
    """Writes the files; they are there all or not at all. Memory grows neither with text nor with neurons.

    Args:
        folder: Of the checkpoint; its store and its statistics are read.
        tokenizer: Of the run.
        out: The folder to be made; there may be an empty one.
        model_id: Of the model, over there.
        neurons: Which, as (layer, neuron); None: all.
        creator_id: Id of the user over there to whom all of it shall belong.
        progress: Shows how far it is.

    Raises:
        UserError: If an argument is none of this, if store or statistics are missing, damaged or not of one
            another, or if the disk is full.
    """
    if not _MODEL_ID.fullmatch(model_id):
        raise UserError(
            f"model id = {model_id!r}: must be 1 to 128 small letters, digits, hyphens and underscores; "
            "choose another name"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists: give a folder that is to be made, or delete it first")
    rows, measured = table.read(folder.table)
    store = Store(folder.store)
    _check_same(folder, store, measured, tokenizer)
    wanted = _wanted(measured, neurons)
    config = saved_config(folder.run)
    n_layers = config.model.n_layers if config else 0  # which is what SAEDashboard writes
    labels = Labels(folder.labels).all()
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    phase = (progress or Progress(lambda text: None)).phase("writing neurons", len(wanted))
    with disk_errors_are_user_errors(f"writing {out}"), phase as report:
        try:
            for layer, numbers in _by_layer(measured, wanted):
                of_layer = NeuronpediaRows(measured, layer, n_layers, tokenizer, model_id, creator_id)
                path = temporary / model_id / of_layer.source_id
                path.mkdir(parents=True)
                for name, row in of_layer.headings().items():
                    (path / f"{name}.jsonl").write_bytes(_line(row))
                for batch, chosen in _by_batch(measured, numbers):
                    some = rows.select(COLUMNS).take(pa.array(chosen)).to_pylist()
                    named = {row["neuron"]: labels.get((layer, row["neuron"]), "") for row in some}
                    lines = {
                        "features": map(of_layer.feature, some),
                        "activations": _activations(store, layer, some, of_layer),
                        "explanations": (of_layer.explanation(j, name) for j, name in named.items() if name),
                    }
                    for kind, made in lines.items():
                        _write(path / kind / f"batch-{batch}.jsonl.gz", made)
                    report(len(some), 0, 0)
            temporary.replace(out)
            fsync(out.absolute().parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _wanted(measured: table.TableMetadata, neurons: Iterable[tuple[int, int]] | None) -> Sequence[int]:
    """Returns numbers of rows of the table, rising."""
    layers, d = measured.layers, measured.d_model
    if neurons is None:
        return range(len(layers) * d)
    wanted = set()
    for layer, neuron in neurons:
        if layer not in layers:
            raise UserError(f"layer {layer}: must be one of {', '.join(map(str, layers))}")
        if not 0 <= neuron < d:
            raise UserError(f"neuron {neuron}: must be from 0 to {d - 1}")
        wanted.add(layers.index(layer) * d + neuron)
    if not wanted:
        raise UserError("neurons: there are none among those asked for; ask for others")
    return sorted(wanted)


def _by_layer(measured: table.TableMetadata, wanted: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    for place, numbers in itertools.groupby(wanted, lambda number: number // measured.d_model):
        yield measured.layers[place], list(numbers)


def _by_batch(measured: table.TableMetadata, numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Yields the same neuron is always in the batch of the same number."""
    for batch, chosen in itertools.groupby(numbers, lambda number: number % measured.d_model // _BATCH):
        yield batch, list(chosen)


def _activations(store: Store, layer: int, rows: Sequence[Row], made_by: NeuronpediaRows) -> Iterator[Row]:
    windows = ExampleWindows(store, np.array([at for row in rows for at in row["examples"] or []], np.int64))
    first = 0
    for row, tokens, values in events(store, layer, rows):
        stop = first + len(row["examples"] or [])
        yield from made_by.activations(row, windows.around(slice(first, stop), tokens, values))
        first = stop


def _write(path: Path, rows: Iterator[Row]) -> None:
    """Writes a file of lines; none if there are no rows, for the import fails at one without lines."""
    first = next(rows, None)
    if first is None:
        return
    path.parent.mkdir(exist_ok=True)
    # Without a name and a time in it, the same rows give the same bytes.
    with path.open("wb") as file, gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as compressed:
        for row in itertools.chain([first], rows):
            compressed.write(_line(row))


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n").encode()


def _check_same(
    folder: NeuronsFolder, store: Store, measured: table.TableMetadata, tokenizer: Tokenizer
) -> None:
    table.check_same(folder.table, measured, store)
    if store.n_tokens != measured.n_tokens:
        raise UserError(
            f"{folder.table} was measured on {measured.n_tokens:,} tokens, and {folder.store} holds "
            f"{store.n_tokens:,}: delete it, and run topklm neurons measure"
        )
    if tokenizer.sha256 != measured.tokenizer_sha256:
        raise UserError(
            f"{folder.store} was made with another tokenizer than that of {folder.run}: restore that, or "
            "delete the store and harvest again"
        )
