"""Paths on disks and in buckets: files that are never half-written, locks, errors, copies into a bucket."""
