"""Lets these tests use the model in NumPy that those of the statistics are held to."""

from pathlib import Path
import sys

sys.path.append(str(Path(__file__).parents[1] / "neurons" / "statistics"))
