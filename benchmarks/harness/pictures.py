"""Pictures of results: one style, and the same bytes from the same figures."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.figure
import matplotlib.pyplot as plt

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito's, told apart by colour-blind eyes


def panels(*shape: int, font_size: int = 10, **options: Any) -> tuple[matplotlib.figure.Figure, Any]:
    """Returns a figure in the style of all of them, and its axes, as `matplotlib.pyplot.subplots` does."""
    mpl.rcParams.update({"svg.hashsalt": "topklm", "font.size": font_size})
    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(*shape, **options)


def save(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Writes a figure, without a date; its format is that of the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    plt.close(figure)
