"""The benchmarks of `topklm bench`, a module each."""
