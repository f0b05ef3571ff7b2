"""`python -m topklm VERB ...`: the same as the `topklm` command."""

import sys

from topklm.cli import run

sys.exit(run())
