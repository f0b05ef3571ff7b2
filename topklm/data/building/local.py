"""The engine of one machine: its cores, and a folder of its own."""

from collections.abc import Sequence

from topklm.data.building import duplicates
from topklm.data.building.chunks import Chunk, Totals
from topklm.data.building.encode import FileResult, Report
from topklm.data.building.storage import Storage
from topklm.data.building.tasks import EncodeTask, ShardTask
from topklm.data.building.workers import Workers
from topklm.data.records import Shard


class LocalEngine:
    """See `tasks.Engine`."""

    def __init__(self, workers: Workers):
        self._workers = workers

    def encode(self, tasks: Sequence[EncodeTask], work: Storage, report: Report) -> list[FileResult]:
        """See `tasks.Engine`."""
        # The largest first, so that no worker is left with a large one at the end.
        order = sorted(range(len(tasks)), key=lambda i: -tasks[i].job.file.size)
        done = self._workers.map(_encode, [tasks[i] for i in order], report)
        by_number = dict(zip(order, done, strict=True))
        return [by_number[i] for i in range(len(tasks))]

    def drop_duplicates(self, chunks: Sequence[Chunk], work: Storage) -> None:
        """See `tasks.Engine`."""
        duplicates.drop_duplicates(chunks, work.path)

    def totals(self, chunks: Sequence[Chunk], work: Storage) -> list[Totals]:
        """See `tasks.Engine`."""
        return [chunk.totals() for chunk in chunks]

    def write_shards(self, tasks: Sequence[ShardTask], work: Storage, report: Report) -> list[Shard]:
        """See `tasks.Engine`."""
        return self._workers.map(_write_shard, tasks, report)


def _encode(task: EncodeTask, report: Report) -> FileResult:
    return task.run(report)


def _write_shard(task: ShardTask, report: Report) -> Shard:
    return task.run(report)
