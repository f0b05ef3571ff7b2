"""docs/architecture.md draws the package as it is."""

import ast
from pathlib import Path
import re

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
ROWS = {name: int(row) for row, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", PAGE, flags=re.M)}
# Modules that any may import or that only start something.
LOOSE = {"__init__", "__main__", "main", "cli", "imports", "progress", "parallel"}


def parts(path):
    """The folder or module of the package that a file is in."""
    inside = path.relative_to(ROOT / "topklm").parts
    return inside[0].removesuffix(".py")


def imported(path):
    """The folders and modules of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "topklm":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("topklm."):
            yield from (f"{node.module}.{alias.name}".removeprefix("topklm.") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("topklm.") for a in node.names if a.name.startswith("topklm."))


def test_the_page_has_every_folder_and_module():
    there = {parts(path) for path in (ROOT / "topklm").rglob("*.py")}
    assert there - LOOSE == set(ROWS)
    picture = (ROOT / "docs/images/architecture.svg").read_text(encoding="utf-8")
    assert all(f">{name}</text>" in picture for name in ROWS)


def test_imports_go_down():
    up = []
    for path in sorted((ROOT / "topklm").rglob("*.py")):
        this = parts(path)
        for name in imported(path):
            other = name.partition(".")[0]
            # The table of backends imports nothing, so that settings can name its entries.
            known = other in ROWS and this in ROWS and other != this and name != "model.backends"
            if known and ROWS[other] <= ROWS[this]:
                up.append((str(path.relative_to(ROOT)), name))
    assert not up


def test_the_tables_that_the_page_names_exist():
    for file, name in re.findall(r"`(topklm/[\w/]+\.py): (\w+)`", PAGE):
        assert re.search(rf"^{name}\b.* = ", (ROOT / file).read_text(encoding="utf-8"), flags=re.M), (
            file,
            name,
        )
