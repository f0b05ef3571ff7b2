"""The verbs of the `topklm` command, a module each; `topklm.cli` reads their command lines.

A module has `DESCRIPTION`, `EXAMPLE`, `add_arguments(parser)` and `run(arguments)`; where flags that its
parser does not know are those of a config, also `TAKES_CONFIG = True`; where its positional arguments are
files that it reads, also `READS_FILES = True`.
"""
