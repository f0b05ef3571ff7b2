"""`topklm trace run` with parsed sentences, its report, and files that are no treebank."""

import json
import shutil

from helpers import assert_one_line_error, in_this_process
from making import conllu
import pytest

SENTENCES = conllu(*[[("The", 2, "det"), ("mill", 0, "root")]] * 120)
FEW = "--tokens", 900, "--min-tokens", 5, "--steps", "0,5,24"


@pytest.fixture(scope="module")
def run(tmp_path_factory, finished_run):
    return shutil.copytree(finished_run, tmp_path_factory.mktemp("traced") / "run")


def test_a_trace_has_relations_and_figures_of_language(run, tmp_path):
    path = tmp_path / "some.conllu"
    path.write_text(SENTENCES)
    ended = in_this_process("trace", "run", run, *FEW, "--conllu", path)
    assert ended.exit_code == 0, ended.errors
    assert "some.conllu: 120 sentences" in ended.output
    report = in_this_process("trace", "report", run, "--json")
    content = json.loads(report.output)
    for name in ("kl_unigram", "kl_bigram", "entropy", "copy_gain", "prefix_matching", "uas"):
        assert len(content["values"][name]) == 3
        assert set(content["changes"][name]) == {"rises", "falls"}
    # There is no other word before.
    assert [one["uas"] for one in content["relations"]["det/head"]] == [1, 1, 1]
    assert "det/head (1.00)" in in_this_process("trace", "report", run).output
    path.write_text(SENTENCES.replace("mill", "hill"))
    ended = in_this_process("trace", "run", run, *FEW, "--conllu", path)
    assert ended.exit_code == 2
    assert "conllu" in assert_one_line_error(ended.errors)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (SENTENCES.replace("\t2\tdet", "\t_\tdet"), "has no heads: give a treebank"),
        (SENTENCES[:300], "no relation has 100 arcs"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_treebank_ends_in_a_line(run, tmp_path, content, words):
    path = tmp_path / "other.conllu"
    if content is not None:
        path.write_text(content)
    ended = in_this_process("trace", "run", run, *FEW, "--conllu", path)
    assert ended.exit_code == 2
    assert words in assert_one_line_error(ended.errors)
