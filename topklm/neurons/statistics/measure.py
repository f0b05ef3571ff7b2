"""Measures all statistics of all neurons of a store, or those that an older table lacks.

Neurons are taken in blocks, whose events are read at once, so that memory does not grow with the text beyond
a few bytes for each token.
"""

from collections.abc import Collection, Sequence
import dataclasses
from pathlib import Path

import pyarrow as pa

from topklm.errors import UserError
from topklm.neurons.statistics import MeasureSettings, ablation, activity, catalog, embeddings, lenses, table
from topklm.neurons.statistics.catalog import Statistic
from topklm.neurons.statistics.inputs import SLOW, Inputs, Neurons

EMBEDDING = "the model's own unembedding rows"

_ENCODED = {"clusters", "monosemanticity"}  # inputs that a sentence encoder takes part in
_BLOCK_EVENTS = 2**22  # some 200 MB with all that is made of them
_BLOCK_CELLS = 2**22  # neurons x vocabulary


def measure(path: Path, inputs: Inputs, without: Collection[str] = ()) -> None:
    """Measures a store's neurons and writes the table; inputs named in `without` are left for `extend`."""
    _check(inputs)
    wanted = [one for one in catalog.STATISTICS if not {*one.needs} & {*without}]
    table.write(path, _compute(inputs, wanted), _described(inputs))


def extend(path: Path, inputs: Inputs) -> tuple[str, ...]:
    """Adds to a table the statistics that it lacks, computed with the settings that it was measured with.

    If the store has grown since, everything is measured again, for all figures of a table are of one text.
    The settings of `inputs` are not used. Returns the names of the statistics that were missing; none: the
    table is left as it is. UserError if it is damaged, of another store, or needs the sentence encoder of
    that time.
    """
    rows, measured = table.read_stored(path)
    missing = table.missing(rows.column_names)
    if not missing:
        return ()
    names = tuple(statistic.name for statistic in missing)
    table.check_same(path, measured, inputs.store)
    _check(inputs)
    has_grown = inputs.store.n_tokens > measured.n_tokens
    wanted = catalog.STATISTICS if has_grown else missing
    if measured.embedding != EMBEDDING and any(_ENCODED & {*s.needs} for s in wanted):
        raise UserError(
            f"{path} lacks {', '.join(names)}, and was measured with {measured.embedding}: run topklm "
            "neurons measure with the same --encoder"
        )
    known = {field.name for field in dataclasses.fields(MeasureSettings)} & measured.details.keys()
    settings = MeasureSettings(**{name: measured.details[name] for name in known})
    inputs = dataclasses.replace(inputs, settings=settings)
    inputs.progress.say(f"{path.name} lacks {', '.join(names)}: measuring")
    found = _compute(inputs, wanted)
    if has_grown:
        rows, measured = found, _described(inputs)
    else:
        added = [name for statistic in missing for name in statistic.columns]
        rows = rows.drop_columns([name for name in added if name in rows.column_names])
        for name in added:
            rows = rows.append_column(name, found[name])
    table.write(path, rows, measured)
    return names


def _check(inputs: Inputs) -> None:
    store, dictionary = inputs.store, inputs.dictionary
    if store.n_tokens == 0:
        raise UserError(f"{store.folder} holds no tokens: run topklm neurons harvest")
    if store.metadata.dictionary != (dictionary.description if dictionary else ""):
        raise UserError(
            f"{store.folder} was harvested with another dictionary: delete both, and harvest again"
        )


def _compute(inputs: Inputs, statistics: Sequence[Statistic]) -> pa.Table:
    """Computes columns of all neurons, sorted by layer and neuron."""
    for name in SLOW:
        if any(name in statistic.needs for statistic in statistics):
            getattr(inputs, name)
    schema = pa.schema(
        [*catalog.KEYS.items(), *(pair for statistic in statistics for pair in statistic.columns.items())]
    )
    together = list(dict.fromkeys(statistic.compute for statistic in statistics))
    metadata, parts = inputs.store.metadata, []
    with inputs.progress.phase("measuring neurons", len(metadata.layers) * metadata.d_model) as report:
        for layer in metadata.layers:
            n_neurons = max(1, _BLOCK_CELLS // inputs.config.vocab_size)
            for begin, end in inputs.store.blocks(layer, _BLOCK_EVENTS, n_neurons):
                neurons = Neurons(inputs, layer, begin, end)
                found = {"layer": [layer] * (end - begin), "neuron": range(begin, end)}
                for compute in together:
                    found |= compute(neurons)
                # NaN becomes null.
                arrays = [pa.array(found[field.name], field.type, from_pandas=True) for field in schema]
                parts.append(pa.table(arrays, schema=schema))
                report(end - begin, 0, 0)
    return pa.concat_tables(parts)


def _described(inputs: Inputs) -> table.TableMetadata:
    store, windows = inputs.store, inputs.windows
    of_store = dataclasses.asdict(store.metadata)
    of_token, of_window = inputs.clusters
    return table.TableMetadata(
        **{name: of_store[name] for name in table.OF_STORE},
        n_tokens=store.n_tokens,
        n_documents=len(inputs.bounds) - 1,
        embedding=EMBEDDING if windows is None else windows.embedding,
        n_clusters=int((of_token if of_window is None else of_window).max()) + 1,
        store=store.sha256,
        details={
            **dataclasses.asdict(inputs.settings),
            "context_window": embeddings.WINDOW if windows is None else 2 * embeddings.SIDE + 1,
            "ablation_tokens": min(store.n_tokens, ablation.MAX_TOKENS),
            "lens_context_tokens": lenses.CONTEXT_TOKENS,
            "coactivation_tokens": min(store.n_tokens, activity.SAMPLE_TOKENS),
            "topk_activation": of_store["topk_activation"],
        },
    )
