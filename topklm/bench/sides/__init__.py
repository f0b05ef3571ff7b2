"""What is measured, each module run in a process of its own by `topklm.bench.processes.Worker`."""
