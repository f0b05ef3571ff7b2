"""The engine of many machines: the same tasks as Apache Beam pipelines, on any of its runners.

The machines share one thing, the work folder, which holds every result; a pipeline is a list of tasks and
ends with their results in that folder. Needs the extra `beam`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import json
import operator
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
import numpy as np

from topklm.data.building.chunks import Chunk, Totals
from topklm.data.building.encode import FileResult, ReportProgress
from topklm.data.building.storage import Storage
from topklm.data.building.work_items import EncodeTask, ShardTask
from topklm.data.records import Shard
from topklm.errors import UserError

_RESULTS_FILE = "pipeline-results.json"

Place = tuple[int, int, int]  # (0 if held out, else 1; chunk; row): the least of all copies stays


class BeamEngine:
    """See `work_items.Engine`."""

    def __init__(self, runner: str, options: Sequence[str]):
        """Takes the name of a runner and Beam's own options, e.g. `--project=...`."""
        self._options = [f"--runner={runner}", *options]

    def encode(self, tasks: Sequence[EncodeTask], work: Storage, report: ReportProgress) -> list[FileResult]:
        """Encodes the files, see `work_items.Engine`."""
        results = [FileResult(**result) for result in self._map(_run, tasks, work)]
        report(sum(result.size for result in results), sum(result.documents for result in results), 0)
        return results

    def drop_duplicates(self, chunks: Sequence[Chunk], work: Storage) -> None:
        """Marks copies, see `work_items.Engine`."""
        with self._pipeline() as pipeline:
            numbered = pipeline | "chunks" >> beam.Create(list(enumerate(chunks))) | beam.Reshuffle()
            copies = (
                numbered
                | "documents" >> beam.FlatMapTuple(_places)
                | "copies" >> beam.GroupByKey()
                | "all but one" >> beam.FlatMapTuple(_all_but_least)
            )
            both = {"chunk": numbered, "rows": copies} | "by chunk" >> beam.CoGroupByKey()
            _ = both | "mark" >> beam.MapTuple(_mark)

    def totals(self, chunks: Sequence[Chunk], work: Storage) -> list[Totals]:
        """Counts the kept documents, tokens and bytes of each chunk, see `work_items.Engine`."""
        return [Totals(**total) for total in self._map(_totals, chunks, work)]

    def write_shards(self, tasks: Sequence[ShardTask], work: Storage, report: ReportProgress) -> list[Shard]:
        """Writes the shards, see `work_items.Engine`."""
        return [Shard(**shard) for shard in self._map(_run, tasks, work)]

    def _map(
        self, function: Callable[[Any], dict[str, Any]], tasks: Sequence[Any], work: Storage
    ) -> list[dict[str, Any]]:
        """Returns `[function(task) for task in tasks]`; results must be JSON."""
        with self._pipeline() as pipeline:
            _ = (
                pipeline
                | "tasks" >> beam.Create(list(enumerate(tasks)))
                | beam.Reshuffle()
                | "run" >> beam.MapTuple(lambda number, task: (number, function(task)))
                | "gather" >> beam.combiners.ToList()
                | "write" >> beam.Map(_write_results, work)
            )
        results = json.loads(work.read(_RESULTS_FILE))
        return [result for _, result in sorted(results, key=operator.itemgetter(0))]

    def _pipeline(self) -> beam.Pipeline:
        try:
            return beam.Pipeline(options=PipelineOptions(self._options))
        except (ValueError, ImportError) as e:
            raise UserError(f"--runner, --beam-options = {' '.join(self._options)}: {e}") from e


def _run(task: EncodeTask | ShardTask) -> dict[str, Any]:
    return dataclasses.asdict(task.run(lambda *_: None))


def _totals(chunk: Chunk) -> dict[str, Any]:
    return dataclasses.asdict(chunk.totals())


def _write_results(results: list[tuple[int, dict[str, Any]]], work: Storage) -> None:
    work.write(_RESULTS_FILE, json.dumps(results).encode())


def _places(number: int, chunk: Chunk) -> Iterator[tuple[bytes, Place]]:
    index = chunk.index()
    for row in range(index.size):
        yield index["digest"][row].tobytes(), (1 - int(index["heldout"][row]), number, row)


def _all_but_least(_digest: bytes, places: Iterable[Place]) -> Iterator[tuple[int, int]]:
    for _, number, row in sorted(places)[1:]:
        yield number, row


def _mark(_number: int, found: dict[str, Any]) -> None:
    (chunk,) = found["chunk"]
    chunk.drop(np.array(sorted(found["rows"]), np.int64))
