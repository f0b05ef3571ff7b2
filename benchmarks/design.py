"""Counts how many places one must know: `python -m benchmarks.design [TREE ...]`.

Prints one column for each tree (a checkout of the project) and writes benchmarks/results/design.json. It
reads the trees as text and never imports them, so an older version is counted by the same rules.
"""

import argparse
import ast
from collections.abc import Iterator
import json
from pathlib import Path
import re

from benchmarks.config_walk import config_climbs

RESULTS = Path(__file__).parent / "results/design.json"
# One entry of each table, as it is written wherever code must know it, in scripts and templates too.
ENTRIES = {
    "steering mode": "force",
    "TopK backend": "pallas_tpu",
    "attention backend": "splash",
    "file format of prepare": ".parquet",
    "neuron statistic": "token_entropy",
    "QK-norm": "qk_norm",
}


def sources(tree: Path) -> Iterator[str]:
    """Yields the text of each module of the package of a tree."""
    for path in sorted((tree / "topklm").rglob("*.py")):
        yield path.read_text(encoding="utf-8")


def named(tree: Path, entry: str) -> tuple[int, int]:
    """Counts the files, and the lines in them, whose code names an entry; comments do not count."""
    files = lines = 0
    for text in sources(tree):
        parsed = ast.parse(text)
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(parsed)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        found = {
            node.lineno
            for node in ast.walk(parsed)
            if (isinstance(node, ast.Constant) and node.value == entry and id(node) not in documentation)
            or (isinstance(node, ast.Attribute) and node.attr == entry)
            or (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and node.target.id == entry
            )
            or (isinstance(node, ast.keyword) and node.arg == entry)
        }
        files, lines = files + bool(found), lines + len(found)
    for path in [*(tree / "topklm").rglob("*.js"), *(tree / "topklm").rglob("*.html")]:
        quoted = re.findall(rf"""["']{re.escape(entry)}["']""", path.read_text(encoding="utf-8"))
        files, lines = files + bool(quoted), lines + len(quoted)
    return files, lines


def size(tree: Path) -> tuple[int, int]:
    """Counts the modules of the package that hold more than a docstring, and all its lines."""
    texts = list(sources(tree))
    return sum(len(ast.parse(text).body) > 1 for text in texts), sum(len(text.splitlines()) for text in texts)


def count(tree: Path) -> dict[str, object]:
    """Counts all figures of a tree."""
    modules, lines = size(tree)
    figures: dict[str, object] = {"modules": modules, "lines": lines}
    for kind, entry in ENTRIES.items():
        figures[f"files / lines that name a {kind} ({entry})"] = "{} / {}".format(*named(tree, entry))
    figures["climbs of config through training"] = len(config_climbs(tree))
    figures["README, lines"] = len((tree / "README.md").read_text(encoding="utf-8").splitlines())
    return figures


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parents[1]
    parser.add_argument(
        "trees", nargs="*", type=Path, default=[here], metavar="TREE", help="default: this one"
    )
    arguments = parser.parse_args()
    for tree in arguments.trees:
        if not (tree / "topklm/training/loop.py").is_file() or not (tree / "README.md").is_file():
            parser.error(f"TREE = {tree}: must be a checkout of the project, with topklm/ and README.md")
    counted = [count(tree) for tree in arguments.trees]
    for name in counted[0]:
        print(f"{name:70}", *(f"{figures[name]!s:>10}" for figures in counted))
    RESULTS.write_text(json.dumps(counted, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
