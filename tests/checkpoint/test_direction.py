"""Which folders know of which: storage of nothing, checkpoints of storage, training and inference of both."""

import ast

from helpers import ROOT
import pytest


def imported_by(folder):
    """Yields the modules of ours that a folder's files import."""
    for path in sorted((ROOT / "topklm" / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (name.name for name in node.names if name.name.startswith("topklm"))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("topklm"):
                yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize(
    ("folder", "known"),
    [
        ("storage", {"storage", "errors", "imports"}),
        ("checkpoint", {"checkpoint", "storage", "errors", "config", "distributed", "layout"}),
    ],
)
def test_a_folder_imports_only_what_lies_below_it(folder, known):
    assert {name.split(".")[1] for name in imported_by(folder)} == known
