"""What a benchmark ran on, for the JSON beside its numbers; as `topklm bench` has it."""

from topklm.bench.machine import describe

__all__ = ["describe"]
