"""A trace of the explored run, with planted activations at early steps; at the reference they are its own."""

import hashlib
from pathlib import Path
import shutil
import types

import explored_run
import numpy as np
import pyarrow as pa
import saved_runs

from topklm.neurons.store import NeuronBlock
from topklm.progress import Progress
from topklm.trace import measure, tables
from topklm.trace.measure import Reading, Text
from topklm.trace.tables import Settings, TraceFolder

STEPS = [0, 2, 4, 5]
REFERENCE = explored_run.STEP
MIN_TOKENS = 3
V = saved_runs.tokenizer().vocab_size
LEAVES = 7  # a neuron that is as at the reference at step 2, and not at step 4
_LATE = 16  # neurons from here on are as at the reference from step 4 on, those below from step 2 on
COLUMNS = ("r_written", "r_written_other", "r_written_input", "carried")  # planted at random


def block_of(dense: np.ndarray) -> NeuronBlock:
    """The events of dense activations, [N, D]."""
    neurons, tokens = np.nonzero(dense.T)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(neurons, minlength=dense.shape[1]))])
    return NeuronBlock(offsets, tokens.astype(np.int32), dense[tokens, neurons].astype(np.float32))


class Source(measure.Source):
    """Checkpoints as functions of the step."""

    def __init__(self, tokens: np.ndarray, documents: np.ndarray, layers: list[np.ndarray]):
        bounds = np.append(np.flatnonzero(np.diff(documents, prepend=-1)), len(tokens))
        self.text = Text(tokens.astype(np.uint16), bounds, V, n_bytes=3 * len(tokens))
        self.clusters, self._layers = np.arange(V) // 16, layers

    def load(self, step):
        return types.SimpleNamespace(step=step)

    def read(self, model, folder, report, store):
        step, found = model.step, []
        for layer in self._layers:
            moved = np.random.default_rng(step).permutation(layer)
            final = np.full(layer.shape[1], step >= 4)
            final |= (np.arange(layer.shape[1]) < _LATE) & (step >= 2)
            final[LEAVES] &= step != 4
            found.append(block_of(np.where(final, layer, moved)))
        lens = np.random.default_rng(step).standard_normal((explored_run.D, V)).astype(np.float32)
        loss = 6.0 - step / 2
        return Reading(step, str(step), loss, found, [lens] * len(found), None)


def measured(model):
    """Figures of the whole model of a step, and no heads."""
    return {"kl_bigram": 5.0 - model.step, "kl_unigram": 1.0 + model.step, "uas": model.step / 10}, []


def make(run: Path, source: Source, dictionary: str = "") -> TraceFolder:
    """Writes a trace into a run folder that `explored_run.make` made."""
    folder = TraceFolder(run, tables.name_of(dictionary))
    settings = Settings(
        run=run.name,
        tokenizer_sha256=saved_runs.tokenizer().sha256,
        source="a <b>village</b>",
        n_tokens=len(source.text.tokens),
        text=hashlib.sha256(source.text.tokens.tobytes()).hexdigest(),
        reference=REFERENCE,
        kind="topk",
        layers=explored_run.LAYERS,
        width=explored_run.D,
        keep=explored_run.CONFIG.model.topk_k,
        dictionary=dictionary,
        sae_tokens=0,
        min_tokens=MIN_TOKENS,
    )
    with folder.writing(settings):
        measure.trace(folder, settings, source, STEPS, Progress(lambda line: None), [measured])
        for step in STEPS:
            folder.write("layers", step, _with_flows(folder.read_step("layers", step), step))
    shutil.copytree(run / "neurons" / str(REFERENCE) / "store", folder.store(REFERENCE))
    return folder


def _with_flows(rows: pa.Table, step: int) -> pa.Table:
    for number, name in enumerate(COLUMNS):
        values = np.random.default_rng([step, number]).random(rows.num_rows)
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(values))
    return rows


def rows_of(folder: TraceFolder, table: str) -> list[dict]:
    """A table as plain rows."""
    return (folder.read_formation() if table == "formation" else folder.read(table)).to_pylist()
