"""Writes what is known of neurons as the files that Neuronpedia imports in bulk.

    DIR/{model}/{source}/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl    one line each
    DIR/{model}/{source}/features/batch-0.jsonl.gz        a line for each neuron
    DIR/{model}/{source}/activations/batch-0.jsonl.gz     a line for each example of these neurons
    DIR/{model}/{source}/explanations/batch-0.jsonl.gz    a line for each label that a person gave; if any

A source is a layer. `topklm.explorer.neuronpedia_rows` makes the lines. Numbers are the
store's and the table's own; nothing is rounded.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
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
from topklm.explorer.neuronpedia_rows import COLUMNS, Row, Rows
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
                of_layer = Rows(measured, layer, n_layers, tokenizer, model_id, creator_id)
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


def _wanted(measured: table.Measured, neurons: Iterable[tuple[int, int]] | None) -> Sequence[int]:
    """Rows of the table, rising."""
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


def _by_layer(measured: table.Measured, wanted: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    for place, numbers in itertools.groupby(wanted, lambda number: number // measured.d_model):
        yield measured.layers[place], list(numbers)


def _by_batch(measured: table.Measured, numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Yields the same neuron is always in the batch of the same number."""
    for batch, chosen in itertools.groupby(numbers, lambda number: number % measured.d_model // _BATCH):
        yield batch, list(chosen)


def _activations(store: Store, layer: int, rows: Sequence[Row], made_by: Rows) -> Iterator[Row]:
    windows = Windows(store, np.array([at for row in rows for at in row["examples"] or []], np.int64))
    first = 0
    for row, tokens, values in events(store, layer, rows):
        behind = first + len(row["examples"] or [])
        yield from made_by.activations(row, windows.around(slice(first, behind), tokens, values))
        first = behind


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


def _check_same(folder: NeuronsFolder, store: Store, measured: table.Measured, tokenizer: Tokenizer) -> None:
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


WINDOW = 128  # tokens around an example

_BLOCK_EVENTS = 2**21  # held at once, some 80 MB with all that is made of them
_STRIP = 2**20  # tokens of the store that are read at once


@dataclasses.dataclass(frozen=True)
class Window:
    """Text around an example.

    Attributes:
        begin: Its first token, counted through the store.
        ids: Of each token.
        values: Activation of the neuron at each token.
        losses: Of each token, nats; None where the store has none.
    """

    begin: int
    ids: list[int]
    values: list[float]
    losses: list[float | None]


class Windows:
    """Text around M tokens of a store: of one document, `WINDOW` tokens or all it has, the token well inside.

    Args:
        store: Of the text.
        places: int64[M], the tokens, in any order.
    """

    def __init__(self, store: Store, places: np.ndarray):
        shape = len(places), WINDOW
        self._begins, self._lengths = np.zeros(len(places), np.int64), np.zeros(len(places), np.int64)
        self._ids, self._losses = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        order = np.argsort(places, kind="stable")
        # Strip by strip, so that all of a store is read once at most, and never held.
        for rows in np.split(order, np.flatnonzero(np.diff(places[order] // _STRIP)) + 1):
            if len(rows):
                self._read(store, places[rows], rows)

    def around(self, numbers: slice, tokens: np.ndarray, values: np.ndarray) -> Iterator[Window]:
        """Yields some of them, with the activations of one neuron.

        Args:
            numbers: Which of the M, from start to stop.
            tokens: int64[E], where in the store the neuron is active, rising.
            values: float32[E].
        """
        begins, lengths = self._begins[numbers], self._lengths[numbers]
        first = np.searchsorted(tokens, begins).tolist()
        behind = np.searchsorted(tokens, begins + lengths).tolist()
        for number, begin, n, a, b in zip(
            range(numbers.start, numbers.stop), begins.tolist(), lengths.tolist(), first, behind, strict=True
        ):
            found = np.zeros(n)
            found[tokens[a:b] - begin] = values[a:b]
            losses = self._losses[number, :n].tolist()
            if not np.isfinite(self._losses[number, :n]).all():
                losses = [loss if np.isfinite(loss) else None for loss in losses]
            yield Window(begin, self._ids[number, :n].tolist(), found.tolist(), losses)

    def _read(self, store: Store, places: np.ndarray, rows: np.ndarray) -> None:
        """Reads those around rising places of one strip."""
        start, end = max(int(places[0]) - WINDOW, 0), int(places[-1]) + WINDOW + 1
        documents = store.documents(start, end)
        # Where a document reaches out of what is read, it reaches further than a window does.
        borders = np.flatnonzero(documents[1:] != documents[:-1]) + 1
        bounds = start + np.concatenate([[0], borders, [len(documents)]])
        document = np.searchsorted(bounds, places, side="right")
        first, behind = bounds[document - 1], bounds[document]
        begins = np.maximum(first, np.minimum(places - WINDOW // 2, behind - WINDOW))
        self._begins[rows], self._lengths[rows] = begins, np.minimum(WINDOW, behind - begins)
        taken = np.minimum(begins[:, None] + np.arange(WINDOW) - start, len(documents) - 1)
        self._ids[rows] = store.tokens(start, end)[taken]
        self._losses[rows] = store.losses(start, end)[taken]


def events(
    store: Store, layer: int, rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], np.ndarray, np.ndarray]]:
    """Rows of the statistics with all events of their neurons.

    Neighbours are read at once, as many as fit into memory.

    Args:
        store: Of the activations.
        layer: Of all the rows.
        rows: With `neuron`, rising, and `n_active`.

    Yields:
        A row; the tokens at which its neuron is active, int64[E], rising; and its values there, float32[E].
    """
    begin = 0
    while begin < len(rows):
        end, n_events = begin + 1, rows[begin]["n_active"]
        while end < len(rows) and rows[end]["neuron"] == rows[end - 1]["neuron"] + 1:
            n_events += rows[end]["n_active"]
            if n_events > _BLOCK_EVENTS:
                break
            end += 1
        block = store.block(layer, rows[begin]["neuron"], rows[end - 1]["neuron"] + 1)
        for row, a, b in zip(rows[begin:end], block.offsets[:-1], block.offsets[1:], strict=True):
            yield row, block.tokens[a:b], block.values[a:b]
        begin = end
