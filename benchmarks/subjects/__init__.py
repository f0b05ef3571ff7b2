"""The code that is measured; `benchmarks.harness.worker.Worker` runs each module in a process of its own."""
