"""Docstrings, comments and pages keep the rules of docs/contributing.md."""

import ast
import io
from pathlib import Path
import re
import tokenize

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path for folder in ("topklm", "benchmarks", "configs") for path in (ROOT / folder).rglob("*.py")
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COINED = re.compile(r"\b(affairs?|anew|behind|rooms?|news)\b", re.IGNORECASE)
SUBJECT = re.compile(  # a question may begin with it
    r"(?:^|(?<=[.;] ))(?:what|whoever|those (?:that|who|which))\b(?![^.;:]*\?)", re.IGNORECASE
)
VERB = re.compile(r"[A-Z][a-z-]*s\b")


def prose(text):
    """The text without code, in one line."""
    return " ".join(re.sub(r"``?[^`]*``?", "X", text).split())


def breaches(text):
    return [found.group() for pattern in (COINED, SUBJECT) for found in pattern.finditer(prose(text))]


def docstrings(tree):
    """(line, docstring, whether it is a function's) of all that have one; properties are no functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
            is_function = not isinstance(node, ast.Module | ast.ClassDef) and not any(
                "property" in decorator for decorator in decorators
            )
            if docstring := ast.get_docstring(node):
                yield getattr(node, "lineno", 1), docstring, is_function


def comments(source):
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_comments_use_the_words_of_the_field(path):
    source = path.read_text(encoding="utf-8")
    found = list(docstrings(ast.parse(source)))
    texts = [(line, text) for line, text, _ in found] + list(comments(source))
    assert not [(line, breaches(text)) for line, text in texts if breaches(text)]
    assert not [
        (line, text[:60]) for line, text, is_function in found if is_function and not VERB.match(text)
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_use_the_words_of_the_field(path):
    if path.name in ("contributing.md", "glossary.md"):  # which name the words
        return
    paragraphs = path.read_text(encoding="utf-8").split("\n\n")
    assert not [(text[:60], breaches(text)) for text in paragraphs if breaches(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The place behind it.", ["behind"]),
        ("Runs. What it returns is a list.", ["What"]),
        ("Returns what is known; those that are not are left out.", ["those that"]),
        ("Returns `what behind` it stands.", []),
        ("## One: what may end a run?", []),
    ],
)
def test_the_rules_find_their_breaches(text, found):
    assert breaches(text) == found
