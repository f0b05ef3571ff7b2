"""The files of a trace, in the folder `neurons/trace/` of a run, or `neurons/trace-NAME/` of a dictionary.

    trace.json              what all steps share: text, reference, thresholds (`Settings`)
    neurons/STEP.parquet    a row for each layer and neuron (`NEURONS`)
    layers/STEP.parquet     a row for each two layers and neuron (`LAYERS`)
    pairs/STEP.parquet      a row for each two layers (`PAIRS`)
    heads/STEP.parquet      a row for each attention head and relation, if heads were measured (`HEADS`)
    run/STEP.parquet        one row, written last: a step whose file is there is whole (`RUN`)
    formation.parquet       a row for each layer and neuron, over all steps (`FORMATION`)
    stores/STEP/            activations (`topklm.neurons.store`): of the reference always, which also holds
                            the text that `examples` point to; of other steps if asked for
    dictionaries/STEP.npz   of a Base LM written in autoencoders: that of each step

A folder of Parquet files is one table, for pandas, DuckDB and pyarrow alike. A value that cannot be given, of
a dead neuron for example, is null.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
from pathlib import Path
import shutil
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from topklm import distributed
from topklm.checkpoint.run_folder import SHARED_PATIENCE_SECONDS
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.neurons import damage_is_a_user_error
from topklm.neurons.statistics import catalog
from topklm.storage.files import folder_lock, read_json, replacing, sealed_json, write_atomically
from topklm.trace import changes

FORMAT = 1
PLAIN = "trace"  # the folder's name without a dictionary

_F64, _I32, _I64, _BOOL = pa.float64(), pa.int32(), pa.int64(), pa.bool_()
_KEYS = {"step": _I32, "layer": _I32, "neuron": _I32}
_FORMATION = "formation.parquet"

# Statistics of `neurons measure`, whose definitions these columns have.
_OF_CATALOG = (
    "n_active",
    "density",
    "mean_activation",
    "token_entropy",
    "token_entropy_corrected",
    "semantic_entropy",
    "semantic_entropy_corrected",
    "by_token",
    "by_context",
    "top_tokens",
    "top_token_shares",
    "examples",
    "example_activations",
)

# Columns of a trace alone: type and definition.
DEFINITIONS: Mapping[str, tuple[pa.DataType, str]] = {
    "r_reference": (_F64, "Pearson correlation over tokens with the same index at the reference."),
    "r_previous": (_F64, "The same with the step before."),
    "r_shifted": (_F64, "Null: r with the reference moved by a third of the text."),
    "jaccard_reference": (
        _F64,
        "Tokens at which the neuron is active here and at the reference, over those at which it is at one.",
    ),
    "best": (_I32, "The index of the reference with the largest r, of the same layer."),
    "r_best": (_F64, "Its r."),
    "r_other": (_F64, "Null: the largest r of any other index of the reference."),
    "matched": (_I32, "The index of the reference by the one-to-one match with the largest sum of r."),
    "r_matched": (_F64, "Its r."),
    "lens_reference": (
        _F64,
        "Cosine of the effects on output tokens (identity lens) with those at the reference.",
    ),
    "top_reference": (_F64, "Jaccard index of the ten strongest tokens with those at the reference."),
    "top_previous": (_F64, "The same with the step before."),
}
NEURONS = pa.schema(
    [*_KEYS.items()]
    + [(name, catalog.schema().field(name).type) for name in _OF_CATALOG]
    + [(name, kind) for name, (kind, _) in DEFINITIONS.items()]
)
LAYERS = pa.schema(
    {
        "step": _I32,
        "layer_a": _I32,  # -1: the stream that enters the first layer, the token's embedding
        "layer_b": _I32,
        "neuron": _I32,
        "r": _F64,
        "jaccard": _F64,
        "jaccard_other": _F64,  # null: of neuron j with j + 1
        "same_is_best": _BOOL,
        # Of neighbouring layers: `topklm.neurons.harvest`, of layer b
        "kept_before": _F64,
        "carried": _F64,
        "r_written": _F64,
        "r_written_other": _F64,
        "r_written_input": _F64,  # of the neuron of layer a with the values that layer b writes
    }
)
QUANTILES = (0.05, 0.5, 0.95)
PAIRS = pa.schema(
    {"step": _I32, "layer_a": _I32, "layer_b": _I32, "n": _I32}
    # Of r of all pairs of other indices
    | {f"r_other_{q * 100:02.0f}": _F64 for q in QUANTILES}
)
HEADS = pa.schema(
    {
        "step": _I32,
        "layer": _I32,  # -1: no head, but the word at a fixed distance, `head`
        "head": _I32,
        "relation": pa.string(),
        "half": _I32,  # of the sentences, 0 or 1; -1: of all
        "hits": _I64,  # -1 where only a score is known
        "n": _I64,
        "score": _F64,
    }
)
# Values of the whole model come after these, float64 each.
RUN = pa.schema(
    {"step": _I32, "previous": _I32, "parameters": pa.string(), "loss": _F64, "bits_per_byte": _F64}
)
# Columns over all steps (`topklm.trace.changes`): type and definition.
FORMATION_DEFINITIONS: Mapping[str, tuple[pa.DataType, str]] = {
    **{
        f"onset_{level * 100:.0f}": (
            _I32,
            f"The first step from which on r with the reference stays at {level} or more, up to it.",
        )
        for level in changes.LEVELS
    },
    "onset_excess": (
        _I32,
        "The first step from which on (r - r0) / (1 - r0), r0 being r at the first step, stays at "
        f"{changes.EXCESS_LEVEL} or more.",
    ),
    "onset_best": (
        _I32,
        "The first step from which on no other index of the reference is more like the neuron.",
    ),
    "stage0_r": (_F64, "r with the reference at the first step."),
    "settled": (
        _BOOL,
        f"Whether r with the step before is {changes.SETTLED} or more at the reference.",
    ),
    "turnovers": (
        _I32,
        "Steps at which the ten strongest tokens are others than at the step before: Jaccard below "
        f"{changes.TURNOVER}.",
    ),
}
FORMATION = pa.schema(
    {"layer": _I32, "neuron": _I32, "n_active": _I64}
    | {name: kind for name, (kind, _) in FORMATION_DEFINITIONS.items()}
)
SCHEMAS: Mapping[str, pa.Schema] = {
    "neurons": NEURONS,
    "layers": LAYERS,
    "pairs": PAIRS,
    "heads": HEADS,
    "run": RUN,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that all steps of a trace share; a trace with others is another one."""

    run: str  # name of the run folder
    tokenizer_sha256: str
    source: str  # of the text, in words and fingerprints
    n_tokens: int
    text: str  # SHA-256 of the tokens and where documents begin
    reference: int  # step
    kind: str  # as of `store.Metadata`
    layers: tuple[int, ...]
    width: int  # neurons of a layer
    keep: int  # activations or codes kept of each token
    dictionary: str  # as asked for with --dictionary; "" for none
    sae_tokens: int  # from which each autoencoder is made; 0 for none
    min_tokens: int  # neurons active at fewer of the reference have no onsets, and are in no median
    measures: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the whole model


def name_of(dictionary: str) -> str:
    """Returns the name of the folder of a trace with this dictionary, "" for none."""
    return f"{PLAIN}-{dictionary}" if dictionary else PLAIN


def names(run: Path) -> list[str]:
    """Lists the traces of a run that were once finished, by the names of their folders."""
    folder = run / "neurons"
    found = folder.glob(f"{PLAIN}*/{_FORMATION}") if folder.exists() else ()
    return sorted(path.parent.name for path in found)


class TraceFolder:
    """The folder of one trace."""

    def __init__(self, run: Path, name: str = PLAIN):
        self.path = run / "neurons" / name
        self.about = self.path / "trace.json"
        self._again = f"delete {self.path}, or run topklm trace run --restart"

    def store(self, step: int) -> Path:
        """Returns the path of a step's activations."""
        return self.path / "stores" / str(step)

    def dictionary(self, step: int) -> Path:
        """Returns the path of a step's autoencoders."""
        return self.path / "dictionaries" / f"{step}.npz"

    @contextlib.contextmanager
    def writing(self, settings: Settings, restart: bool = False) -> Iterator[None]:
        """Holds the folder while this process writes to it; UserError if it holds a trace of other settings.

        `restart` deletes that first. Of several processes the first holds it for all.
        """
        with self._held(settings, restart) if distributed.is_primary() else contextlib.nullcontext():
            distributed.meet("folder of the trace")
            with disk_errors_are_user_errors(f"writing {self.path}"):
                yield

    @contextlib.contextmanager
    def _held(self, settings: Settings, restart: bool) -> Iterator[None]:
        """Does what `writing` does, in the process that holds the folder."""

        def refuse(owner: str) -> None:
            raise UserError(f"{self.path}: process {owner} is tracing into it: wait for its end")

        with contextlib.ExitStack() as stack:
            with disk_errors_are_user_errors(f"writing {self.path}"):
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(folder_lock(self.path, refuse))
                if restart:
                    self._clear()
                if not self.about.exists():
                    content = {"format": FORMAT, **dataclasses.asdict(settings)}
                    write_atomically(self.about, sealed_json(content, indent=2))
            self._check_same(settings)
            yield

    def _clear(self) -> None:
        self.about.unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("."):  # such as the lock
                path.unlink()

    def settings(self) -> Settings:
        """Reads the settings; UserError if there is no trace, or it is damaged."""
        if not self.about.exists():
            run, name = self.path.parent.parent, self.path.name
            flag = f" --dictionary {name.removeprefix(f'{PLAIN}-')}" if name != PLAIN else ""
            if not run.exists():
                raise UserError(f"{run}: there is no such run folder; check the path")
            others = [other.removeprefix(PLAIN).lstrip("-") for other in names(run)]
            named = ", ".join(
                f"--dictionary {other}" if other else "one without --dictionary" for other in others
            )
            there = f", but {named}" if named else ""
            raise UserError(f"{self.path}: there is no trace{there}; run topklm trace run {run}{flag}")
        with damage_is_a_user_error(self.about, self._again, TypeError, KeyError):
            content = read_json(self.about, self._again, sealed=True)
            if content.pop("format") != FORMAT:
                raise UserError(f"{self.about} is of another version of topklm: {self._again}")
            return Settings(**{**content, "layers": tuple(content["layers"])})

    def _check_same(self, settings: Settings) -> None:
        there, asked = map(dataclasses.asdict, (self.settings(), settings))
        for name, value in asked.items():
            if there[name] != value:
                which = f"{name.replace('_', ' ')} {there[name]!r}, not {value!r}"
                raise UserError(
                    f"{self.path} holds a trace with {which}: give that, or --restart to begin again"
                )

    def steps(self) -> list[int]:
        """Lists the steps that are whole, rising."""
        folder = self.path / "run"
        found = folder.iterdir() if folder.exists() else ()
        return sorted(int(path.stem) for path in found if path.suffix == ".parquet" and path.stem.isdecimal())

    def wait_until_done(self, missing: Callable[[], Collection[int]]) -> None:
        """Waits until no step is missing: network file systems show late what others wrote."""
        deadline = time.monotonic() + SHARED_PATIENCE_SECONDS
        while steps := missing():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.path}: what another process made of step {min(steps)} is not there: all hosts "
                    "must share the file system"
                )
            time.sleep(0.1)

    def forget(self, step: int) -> None:
        """Makes a step one that is not traced."""
        (self.path / "run" / f"{step}.parquet").unlink()

    def write(self, table: str, step: int, rows: pa.Table) -> None:
        """Writes the rows of a step, whole or not at all."""
        self._write(self.path / table / f"{step}.parquet", rows)

    def write_formation(self, rows: pa.Table) -> None:
        """Writes the table over all steps."""
        self._write(self.path / _FORMATION, rows)

    def _write(self, path: Path, rows: pa.Table) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            pq.write_table(rows, temporary, compression="zstd", write_page_checksum=True)

    def read(self, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads a table of all whole steps, rows by step, in order; only some columns, or all.

        No rows where none were written. UserError if a file is missing or damaged.
        """
        parts = [self.read_step(table, step, columns) for step in self.steps()]
        if not parts:
            schema = SCHEMAS[table]
            return schema.empty_table().select(schema.names if columns is None else columns)
        return pa.concat_tables(parts, promote_options="default")

    def read_step(self, table: str, step: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads the rows of one step, as `read`."""
        path = self.path / table / f"{step}.parquet"
        if table == "heads" and not path.exists():
            return HEADS.empty_table().select(HEADS.names if columns is None else columns)
        return self._read(path, columns)

    def read_formation(self) -> pa.Table:
        """Reads the table over all steps."""
        return self._read(self.path / _FORMATION, None)

    def _read(self, path: Path, columns: Sequence[str] | None) -> pa.Table:
        if not path.exists():
            raise UserError(f"{path} is missing: run topklm trace run again")
        with damage_is_a_user_error(path, self._again, pa.ArrowException, KeyError):
            names = None if columns is None else list(columns)
            return pq.read_table(path, columns=names, page_checksum_verification=True, partitioning=None)


def table(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    """Makes a table of columns; NaN becomes null, and so do indices below 0, but of layers."""
    arrays = [_array(columns[field.name], field) for field in schema]
    return pa.table(arrays, schema=schema)


def _array(values: Any, field: pa.Field) -> pa.Array:
    if isinstance(values, np.ndarray) and pa.types.is_integer(field.type):
        missing = np.isnan(values) if values.dtype.kind == "f" else (values < 0) & (field.name != "layer_a")
        return pa.array(np.where(missing, 0, values).astype(np.int64), field.type, mask=missing)
    if isinstance(values, np.ndarray) and pa.types.is_boolean(field.type):
        missing = np.isnan(values.astype(np.float64))
        return pa.array(np.nan_to_num(values.astype(np.float64)) > 0, field.type, mask=missing)
    return pa.array(values, field.type, from_pandas=True)


def numbers(rows: pa.Table, name: str) -> np.ndarray:
    """Returns a column as float64[n], NaN where it is null."""
    column = rows[name]
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return column.to_numpy().astype(np.float64)


def run_schema(values: Mapping[str, float]) -> pa.Schema:
    """Returns `RUN` with a column for each value of the whole model."""
    return pa.schema([*RUN, *(pa.field(name, _F64) for name in values)])


def described(settings: Settings) -> str:
    """Describes a trace in a line."""
    what = f", {settings.dictionary}" if settings.dictionary else ""
    return (
        f"{settings.run}{what}: layers {', '.join(map(str, settings.layers))}, {settings.n_tokens:,} tokens "
        f"of {settings.source}, reference step {settings.reference:,}"
    )


def as_facts(settings: Settings) -> dict[str, Any]:
    """Returns settings as JSON can hold them."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))
