"""Writes the repository's address into the notebooks and their page: the one place where it is given.

    python notebooks/publish.py https://github.com/OWNER/NAME

An install cell then has a default, and notebooks/README.md badges that open the notebooks in Colab.
"""

from pathlib import Path
import re
import sys

FOLDER = Path(__file__).parent
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"


def publish(address: str, folder: Path = FOLDER) -> None:
    """Writes the address, `https://github.com/OWNER/NAME`, in place of the one before, if any.

    Raises:
        SystemExit: For another form.
    """
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", address)
    if not found:
        raise SystemExit(f"error: {address!r} must be https://github.com/OWNER/NAME")
    for notebook in folder.glob("*.ipynb"):
        text = notebook.read_text(encoding="utf-8")
        new = rf'INSTALL_FROM = \"git+https://github.com/{found[1]}\"'
        text, n = re.subn(r'INSTALL_FROM = \\"[^"\\]*\\"', lambda _: new, text)
        assert n == 1, notebook
        notebook.write_text(text, encoding="utf-8")
    page = folder / "README.md"
    text = page.read_text(encoding="utf-8")
    colab = f"https://colab.research.google.com/github/{found[1]}/blob/main/notebooks"

    def row(match: re.Match[str]) -> str:
        return f"| {BADGE.format(url=f'{colab}/{match[1]}')} [{match[1]}]({match[1]}) |"

    text = re.sub(r"^\| (?:\[!\[.*?\)\]\(.*?\) )?\[(\w+\.ipynb)\]\(\1\) \|", row, text, flags=re.MULTILINE)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    publish(*sys.argv[1:2] or [""])
