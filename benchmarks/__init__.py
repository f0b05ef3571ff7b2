"""Measurements of the library, outside of the package.

- `command`: `topklm bench`, whose verbs are the modules of `cases`.
- `harness`: subjects in turns and in processes of their own, floors of the machine, reports, results.
- `subjects`, `peers`: the code that is measured, ours and that of other libraries.
- All other modules are scripts, `python -m benchmarks.NAME`, one for each claim of the documentation; each
  writes JSON under benchmarks/results/.
"""
