"""One script per claim; each writes JSON under benchmarks/results/. Run as `python -m benchmarks.NAME`."""
