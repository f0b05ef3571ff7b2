"""The statistics of every neuron, one row each, as a Parquet file.

Columns and their meaning are those of `catalog.STATISTICS`; the text that they were measured on is described
by the file's own metadata, as `TableMetadata`. A figure that cannot be given (of a dead neuron, say) is null,
and so is a statistic that did not exist when the table was written, until `extend` adds it. Neurons are
measured in blocks, whose events are read at once, so that memory does not grow with the text beyond a few
bytes for each token.

Before the file's footer stands the SHA-256 of all the rest of it, at a position that other readers of Parquet
skip. Files of format 1 do not have it.
"""

from collections.abc import Collection, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from topklm.errors import UserError
from topklm.neurons import MeasureSettings, damage_is_a_user_error
from topklm.neurons.statistics import ablation, activity, catalog, embeddings, lenses
from topklm.neurons.statistics.catalog import SLOW, Inputs, Neurons, Statistic
from topklm.neurons.store import Store
from topklm.storage.files import parse_json, write_atomically

FORMAT = 2

_IDENTITY = ("step", "tokenizer_sha256", "kind", "layers", "d_model", "topk_k", "dictionary")
OF_STORE = ("run", "source", *_IDENTITY)  # fields of a table's metadata that are those of its store

# Below, a neuron was seen too seldom to say what it stands for; above, it is active nearly everywhere.
FAIR_DENSITY = (1e-4, 0.05)
FAIR_ACTIVE = 30  # from fewer activations an entropy says little, however it is corrected
SEVERAL_TOKENS = 3.0  # a neuron for one token needs no page to be named, and every model has many

_METADATA_KEY = b"topklm"
_OF_FORMAT_1 = b'"format": 1'  # stands in the footer, as it is
_DIGEST_BYTES = 64

_AGAIN = "delete it, and run topklm neurons measure"


@dataclasses.dataclass(frozen=True)
class TableMetadata:
    """The text and the model that a table was measured on."""

    # Of the store, as all of `OF_STORE`. With a dictionary, logit effects are those of the decoder's
    # directions, and ablation effects are null
    run: str
    step: int
    tokenizer_sha256: str
    kind: str
    layers: tuple[int, ...]
    d_model: int
    topk_k: int
    source: str
    n_tokens: int  # tokens of text; separators and padding are not among them
    n_documents: int  # of which those are
    embedding: str  # by which semantic entropy and monosemanticity compare tokens
    n_clusters: int  # of tokens, for semantic entropy
    details: Mapping[str, Any]  # sample sizes, seeds and the like, by name
    dictionary: str = ""
    store: str = ""  # `Store.sha256`; empty where that, or the table, is of format 1


def write(path: Path, rows: pa.Table, measured: TableMetadata) -> None:
    """Writes a table, sorted by layer and neuron; it is there whole or not at all.

    Columns of `catalog.schema` come first, in their order and types; others are kept as they are.
    """
    content = {"format": FORMAT, **dataclasses.asdict(measured)}
    known = [field for field in catalog.schema() if field.name in rows.column_names]
    more = [field for field in rows.schema if field.name not in catalog.schema().names]
    rows = rows.select([field.name for field in known + more]).cast(pa.schema(known + more))
    rows = rows.replace_schema_metadata({_METADATA_KEY: json.dumps(content).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
    write_atomically(path, _sealed(sink.getvalue().to_pybytes()))


def read(path: Path) -> tuple[pa.Table, TableMetadata]:
    """Reads a table, all of `catalog.schema`, null where it lacks them; UserError if missing or damaged."""
    rows, measured = read_stored(path)
    with damage_is_a_user_error(path, _AGAIN, pa.ArrowException):
        for field in catalog.schema():
            if field.name not in rows.column_names:
                rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
        return rows.select(catalog.schema().names).cast(catalog.schema()), measured


def read_stored(path: Path) -> tuple[pa.Table, TableMetadata]:
    """Reads a table with the columns that it was written with; raises as `read`."""
    with damage_is_a_user_error(path, _AGAIN, pa.ArrowException, TypeError, KeyError):
        try:
            content = path.read_bytes()
        except FileNotFoundError as e:
            raise UserError(f"{path} is missing: run topklm neurons measure") from e
        if _OF_FORMAT_1 not in content:
            content = _unsealed(content)
        rows = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
        measured = parse_json((rows.schema.metadata or {})[_METADATA_KEY])
        if measured.pop("format") not in (1, FORMAT):
            raise UserError(f"{path} was written by another version of topklm: delete it, and measure again")
        if not catalog.KEYS.keys() <= set(rows.column_names):
            raise ValueError("it does not say which neurons its rows are of")
        measured["layers"] = tuple(measured["layers"])
        return rows, TableMetadata(**measured)


def missing(names: Collection[str]) -> list[Statistic]:
    """Returns the statistics of which a table with columns of these names lacks some."""
    return [statistic for statistic in catalog.STATISTICS if not statistic.columns.keys() <= set(names)]


def is_complete(path: Path) -> bool:
    """Returns whether a table has all statistics; a damaged one counts as complete, for reading says so."""
    with contextlib.suppress(OSError, pa.ArrowException):
        return not missing(pq.read_schema(path).names)
    return True


def check_same(path: Path, measured: TableMetadata, store: Store) -> None:
    """Raises UserError for a table that was not measured on a store; the store may hold more tokens since."""
    pairs = {name: (getattr(measured, name), getattr(store.metadata, name)) for name in _IDENTITY}
    if measured.store and store.sha256:
        pairs["store"] = measured.store[:12], store.sha256[:12]
    for name, (here, there) in pairs.items():
        if here != there:
            raise UserError(
                f"{path} was measured on another {name} ({here!r}) than {store.folder} holds ({there!r}): "
                f"{_AGAIN}"
            )
    if measured.n_tokens > store.n_tokens:
        raise UserError(
            f"{path} was measured on {measured.n_tokens:,} tokens, and {store.folder} holds "
            f"{store.n_tokens:,}: {_AGAIN}"
        )


def _sealed(content: bytes) -> bytes:
    at = _footer(content)
    return content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at:]


def _unsealed(content: bytes) -> bytes:
    """Takes the digest out of a file; raises ValueError if that is not its own."""
    at = _footer(content)
    before, digest = content[: at - _DIGEST_BYTES], content[at - _DIGEST_BYTES : at]
    if at < _DIGEST_BYTES or hashlib.sha256(before + content[at:]).hexdigest().encode() != digest:
        raise ValueError("its digest differs")
    return before + content[at:]


def _footer(content: bytes) -> int:
    """Returns the place of the footer, before 4 bytes of its length and 4 of a mark; below 0: nowhere."""
    return len(content) - 8 - int.from_bytes(content[-8:-4], "little")


def readable_first(rows: pa.Table) -> np.ndarray:
    """Returns places in rows of a table, int64[n], by how likely it is that a person can name the neuron.

    First those of fair density that were seen often enough and whose activation is spread over several
    tokens (exp of the corrected token entropy), by rising corrected semantic entropy, and where that is equal
    by falling number of distinct tokens. Then, in the same order, those of fair density for a token or two,
    then the other living ones, then the dead ones.
    """
    with np.errstate(invalid="ignore"):  # NaN is not above anything
        several = np.exp(_numbers(rows, "token_entropy_corrected")) >= SEVERAL_TOKENS
    living = _numbers(rows, "n_active") > 0
    group = np.select([~living, ~is_fair(rows), ~several], [3, 2, 1], 0)
    # Of keys, lexsort takes the last one first; it puts NaN after every number.
    keys = (-_numbers(rows, "n_distinct_tokens"), _numbers(rows, "semantic_entropy_corrected"), group)
    return np.lexsort(keys)


def is_fair(rows: pa.Table) -> np.ndarray:
    """Returns bool[n], which neurons are active neither too seldom nor too often to be read."""
    low, high = FAIR_DENSITY
    density = _numbers(rows, "density")
    return (density >= low) & (density <= high) & (_numbers(rows, "n_active") >= FAIR_ACTIVE)


def _numbers(rows: pa.Table, name: str) -> np.ndarray:
    """Returns float64[n], NaN where there is none."""
    return rows[name].to_numpy().astype(np.float64)


EMBEDDING = "the model's own unembedding rows"

_ENCODED = {"clusters", "monosemanticity"}  # inputs that a sentence encoder takes part in
_BLOCK_EVENTS = 2**22  # some 200 MB with all that is made of them
_BLOCK_CELLS = 2**22  # neurons x vocabulary


def measure(path: Path, inputs: Inputs, without: Collection[str] = ()) -> None:
    """Measures a store's neurons and writes the table; inputs named in `without` are left for `extend`."""
    _check(inputs)
    wanted = [one for one in catalog.STATISTICS if not {*one.needs} & {*without}]
    write(path, _compute(inputs, wanted), _described(inputs))


def extend(path: Path, inputs: Inputs) -> tuple[str, ...]:
    """Adds to a table the statistics that it lacks, computed with the settings that it was measured with.

    If the store has grown since, everything is measured again, for all figures of a table are of one text.
    The settings of `inputs` are not used. Returns the names of the statistics that were missing; none: the
    table is left as it is. UserError if it is damaged, of another store, or needs the sentence encoder of
    that time.
    """
    rows, measured = read_stored(path)
    lacking = missing(rows.column_names)
    if not lacking:
        return ()
    names = tuple(statistic.name for statistic in lacking)
    check_same(path, measured, inputs.store)
    _check(inputs)
    has_grown = inputs.store.n_tokens > measured.n_tokens
    wanted = catalog.STATISTICS if has_grown else lacking
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
        added = [name for statistic in lacking for name in statistic.columns]
        rows = rows.drop_columns([name for name in added if name in rows.column_names])
        for name in added:
            rows = rows.append_column(name, found[name])
    write(path, rows, measured)
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
                report(end - begin)
    return pa.concat_tables(parts)


def _described(inputs: Inputs) -> TableMetadata:
    store, windows = inputs.store, inputs.windows
    of_store = dataclasses.asdict(store.metadata)
    of_token, of_window = inputs.clusters
    return TableMetadata(
        **{name: of_store[name] for name in OF_STORE},
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
