"""The verbs of the `topklm` command, one module each; `topklm.cli` finds them."""
