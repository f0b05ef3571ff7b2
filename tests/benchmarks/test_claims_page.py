"""docs/claims.md says what the committed studies say, by the command that writes it."""

from helpers import ROOT, in_this_process

STUDIES = ROOT / "benchmarks" / "results" / "claims"


def test_the_page_is_written_from_the_committed_studies(tmp_path):
    folders = sorted((path.parent for path in STUDIES.glob("*/claims.json")), reverse=True)
    page = tmp_path / "claims.md"
    ended = in_this_process("study", *folders, "--page", page)
    assert ended.exit_code == 0, ended.errors
    assert page.read_text() == (ROOT / "docs" / "claims.md").read_text()
    for folder in folders:
        name = f"claims-{folder.name}.svg"
        assert (tmp_path / "images" / name).read_text() == (ROOT / "docs" / "images" / name).read_text()
