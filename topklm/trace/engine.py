"""The loop of a trace: reads checkpoints, compares, writes the tables of each step, and goes on after a stop.

The reference is read first, then the steps rise; of activations, those of the reference, of the step before
and of the present one are held, whatever the number of checkpoints. Each of several processes does this for
neighbouring steps, and the first writes the table over all steps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from topklm import distributed
from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel
from topklm.progress import Progress
from topklm.trace import formation, measure, tables
from topklm.trace.measure import Reading, Side, Text
from topklm.trace.tables import Settings, TraceFolder

# Measures the whole model of a step: values by name, the same at every step, and rows of `tables.HEADS`.
Measure = Callable[[LanguageModel], tuple[Mapping[str, float], Sequence[Mapping[str, Any]]]]


class Source(Protocol):
    """Everything that a trace reads: a run's checkpoints (`read.Checkpoints`), or planted ones in tests."""

    text: Text
    clusters: np.ndarray  # int[V], of each token

    def load(self, step: int) -> Any:
        """Loads the model of a step."""

    def read(self, model: Any, folder: TraceFolder, report: Callable[[int], None], store: bool) -> Reading:
        """Reads the text through it; `report` is told of tokens, `store` keeps the events in the folder."""


def trace(
    folder: TraceFolder,
    settings: Settings,
    source: Source,
    steps: Sequence[int],
    progress: Progress,
    measures: Sequence[Measure] = (),
    keep_events: bool = False,
) -> None:
    """Traces steps, rising, that are not traced yet; this process is in `folder.writing`.

    A step is done again where another one is now before it. UserError if two have the same parameters.
    """
    before = dict(zip(steps, [None, *steps[:-1]], strict=True))
    todo, known = distributed.of_first("steps to trace", lambda: _todo(folder, before))
    index, count = distributed.process_index(), distributed.process_count()
    begin, end = (-(-len(todo) * i // count) for i in (index, index + 1))  # rounded up: the first has a part
    own = todo[begin:end]
    if own:
        again = [s for s in own if before[s] is not None and before[s] not in own]
        total = (1 + len(own) + len(again)) * source.text.n_tokens
        of_all = f"{len(own)} of {len(todo)}" if count > 1 else f"{len(todo)}"
        with progress.phase(f"tracing {of_all} steps", total) as report:

            def read(step: int, store: bool = False) -> tuple[Any, Side]:
                return _read(source, step, folder, known, lambda tokens: report(tokens, 0, tokens), store)

            reference = read(settings.reference, store=index == 0)[1]
            previous: Side | None = None
            for step in own:
                earlier = before[step]
                if earlier is None:
                    previous = None
                elif previous is None or previous.reading.step != earlier:
                    previous = read(earlier)[1]
                model, now = read(step, keep_events and step != settings.reference)
                _write(folder, settings, source, now, reference, previous)
                _write_run(folder, source, model, now, earlier, measures)
                previous = now
    if count > 1:
        progress.say("waiting for the other processes")
    distributed.meet("steps traced")
    if index == 0:
        folder.wait_until_done(lambda: _todo(folder, before)[0])
        _check_distinct(folder)
        folder.write_formation(formation_rows(folder, settings))


def _todo(folder: TraceFolder, before: Mapping[int, int | None]) -> tuple[list[int], dict[str, int]]:
    """Returns the steps that are not traced after those before them, and traced ones by their parameters."""
    there = {step: folder.read_step("run", step).to_pylist()[0] for step in folder.steps()}
    todo = [s for s in before if s not in there or there[s]["previous"] != before[s]]
    return todo, {row["parameters"]: step for step, row in there.items()}


def _read(
    source: Source,
    step: int,
    folder: TraceFolder,
    known: dict[str, int],
    report: Callable[[int], None],
    store: bool,
) -> tuple[Any, Side]:
    model = source.load(step)
    reading = source.read(model, folder, report, store)
    if (other := known.setdefault(reading.parameters, step)) != step:
        raise _not_distinct(other, step)
    return model, measure.side(reading, source.text)


def _check_distinct(folder: TraceFolder) -> None:
    """Raises UserError for two steps with the same parameters, and forgets that the later one was traced."""
    known: dict[str, int] = {}
    for step in folder.steps():
        row = folder.read_step("run", step).to_pylist()[0]
        if (other := known.setdefault(row["parameters"], step)) != step:
            folder.forget(step)
            raise _not_distinct(other, step)


def _not_distinct(*steps: int) -> UserError:
    low, high = sorted(steps)
    return UserError(
        f"steps {low} and {high} hold the same parameters: one of the checkpoints is not what its name says; "
        "leave one out of --steps"
    )


def _write(
    folder: TraceFolder,
    settings: Settings,
    source: Source,
    now: Side,
    reference: Side,
    previous: Side | None,
) -> None:
    step, layers = now.reading.step, settings.layers
    rows = measure.neuron_rows(now, reference, previous, source.text, source.clusters, layers)
    folder.write("neurons", step, rows)
    of_layers, of_pairs = measure.layer_rows(now, layers, source.text.n_tokens)
    folder.write("layers", step, of_layers)
    folder.write("pairs", step, of_pairs)


def _write_run(
    folder: TraceFolder,
    source: Source,
    model: Any,
    now: Side,
    earlier: int | None,
    measures: Sequence[Measure],
) -> None:
    reading, text = now.reading, source.text
    values: dict[str, float] = {}
    heads: list[Mapping[str, Any]] = []
    for measure_model in measures:
        more, rows = measure_model(model)
        values |= more
        heads += rows
    if heads:
        with_step = [{"step": reading.step, **row} for row in heads]
        folder.write("heads", reading.step, pa.Table.from_pylist(with_step, schema=tables.HEADS))
    bits = reading.loss * text.n_tokens / np.log(2) / max(text.n_bytes, 1)
    columns = {
        "step": [reading.step],
        "previous": [earlier],
        "parameters": [reading.parameters],
        "loss": [reading.loss],
        "bits_per_byte": [bits],
        **{name: [float(value)] for name, value in values.items()},
    }
    folder.write("run", reading.step, tables.table(tables.run_schema(values), columns))


def formation_rows(folder: TraceFolder, settings: Settings) -> pa.Table:
    """Computes the table over all steps of a folder."""
    names = ["layer", "neuron", "r_reference", "r_previous", "top_previous", "best", "n_active"]
    steps, rows = np.array(folder.steps()), folder.read("neurons", names)
    layers = tables.numbers(rows, "layer")
    found = []
    for layer in settings.layers:
        of_layer = rows.filter(pa.array(layers == layer))
        curves = {name: tables.numbers(of_layer, name).reshape(len(steps), -1) for name in names[2:]}
        columns = formation.columns(steps, settings.reference, curves, settings.min_tokens)
        n = curves["n_active"].shape[1]
        found.append(tables.table(tables.FORMATION, {"layer": [layer] * n, "neuron": range(n), **columns}))
    return pa.concat_tables(found)
