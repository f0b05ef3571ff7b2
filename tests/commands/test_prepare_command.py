import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

from helpers import ROOT, Process, assert_one_line_error, sentences, wait_until, write_documents
import pytest

from topklm import cli, errors

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}


def command(*arguments):
    return [sys.executable, "-m", "topklm", "prepare", *map(str, arguments)]


def start(*arguments, **options):
    return Process(command(*arguments), env=ENVIRONMENT, **options)


def run(*arguments, **options):
    process = start(*arguments, **options)
    process.finish()
    return process


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def descendants(pid):
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Six files of some 1.5 MB each, large enough to be killed in."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        with gzip.open(folder / f"{i}.jsonl.gz", "wt", compresslevel=1) as file:
            for document in sentences(i, 7000):
                file.write(json.dumps({"text": document}) + "\n")
    return folder


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("datasets") / "undisturbed"
    process = run(
        text, "--out", out, "--tokenizer", "train:600", "--workers", "2", "--shard-tokens", "300000"
    )
    assert process.exit_code == 0, process.errors
    assert process.errors == ""
    return out, process.output


def test_a_table_sums_up_what_was_made(undisturbed):
    out, output = undisturbed
    content = json.loads((out / "dataset.json").read_text())
    for split in content["splits"].values():
        for name in ("documents", "tokens", "utf8_bytes"):
            assert f"{split[name]:,}" in output
    assert "copies dropped" in output
    assert f"data: encoded {6 * 7000:,} documents" in output


def test_started_again_it_says_so_and_writes_nothing(text, undisturbed, tmp_path):
    out, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    arguments = ("--out", out, "--tokenizer", "train:600", "--shard-tokens", "300000")
    again = run(text, *arguments, "--json")
    assert again.exit_code == 0, again.errors
    assert "is prepared already" in again.errors
    printed = json.loads(again.output)
    assert printed["path"] == str(out)
    assert printed["splits"] == json.loads((out / "dataset.json").read_text())["splits"]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_again_and_again_it_ends_with_the_same_bytes(text, undisturbed, tmp_path, seed):
    chance, out = random.Random(seed), tmp_path / "out"
    arguments = (text, "--out", out, "--tokenizer", "train:600", "--shard-tokens", "300000")
    for _ in range(5):
        process = start(*arguments, "--workers", chance.choice([1, 2, 3]))
        deadline = time.monotonic() + chance.uniform(0.3, 4)
        wait_until(lambda deadline=deadline: time.monotonic() > deadline, process)
        workers = descendants(process.pid)
        process.kill()
        assert not out.exists() or (out / "dataset.json").exists()
        # Workers notice within seconds that nobody waits for them any more.
        for worker in workers:
            while os.path.exists(f"/proc/{worker}"):
                time.sleep(0.05)
    last = run(*arguments)
    assert last.exit_code == 0, last.errors
    assert contents(out) == contents(undisturbed[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_command_says_so_and_continues(text, undisturbed, tmp_path):
    arguments = (text, "--out", tmp_path / "out", "--tokenizer", "train:600", "--shard-tokens", "300000")

    def heed_interrupts():  # which a shell's background jobs, and their children, are told to ignore
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = {"start_new_session": True, "preexec_fn": heed_interrupts}
    process = start(*arguments, "--workers", "2", **options)
    process.wait_for_line("tokens in the vocabulary")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    assert process.finish() == 130
    assert len(process.errors.splitlines()) == 1, process.errors
    assert not (tmp_path / "out").exists()
    assert run(*arguments).exit_code == 0
    assert contents(tmp_path / "out") == contents(undisturbed[0])


def test_two_at_once_do_not_disturb_each_other(text, tmp_path):
    arguments = (text, "--out", tmp_path / "out", "--tokenizer", "train:600")
    first = start(*arguments)
    try:
        first.wait_for_line("to train the tokenizer")
        first.signal(signal.SIGSTOP)
        second = run(*arguments)
        assert second.exit_code == 2
        assert f"is being prepared by process {first.pid}" in assert_one_line_error(second.errors)
    finally:
        first.kill()


@pytest.mark.slow
def test_a_full_disk_ends_it_in_one_line_and_space_lets_it_continue(text, undisturbed, tmp_path):
    arguments = (text, "--out", tmp_path / "out", "--tokenizer", "train:600", "--shard-tokens", "300000")

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    for workers in ("1", "2"):
        stopped = run(*arguments, "--workers", workers, preexec_fn=limit_file_size)
        assert stopped.exit_code == 2, stopped.errors
        assert "size limit" in assert_one_line_error(stopped.errors)
        assert not (tmp_path / "out").exists()
    assert run(*arguments).exit_code == 0
    assert contents(tmp_path / "out") == contents(undisturbed[0])


def test_strict_ends_it_at_the_first_problem_and_names_the_line(tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text('{"text": "fine"}\n{"text": "cut sho')
    for workers in ("1", "2"):
        (tmp_path / "other.jsonl").write_text('{"text": "fine too"}')
        stopped = run(tmp_path, "--out", tmp_path / "out", "--strict", "--workers", workers)
        assert stopped.exit_code == 2
        assert f"{file}, line 2: invalid JSON" in assert_one_line_error(stopped.errors)
        assert not (tmp_path / "out").exists()


def test_problems_are_counted_in_the_table_and_named_below_it(tmp_path):
    lines = [json.dumps({"text": document}) for document in sentences(0, 100)]
    (tmp_path / "mixed.jsonl").write_text("\n".join([*lines, "no json", '{"body": "x"}', '{"text": ""}']))
    process = run(tmp_path, "--out", tmp_path / "out", "--tokenizer", "train:300")
    assert process.exit_code == 0, process.errors
    for kind, line in (("invalid JSON", 101), ("no text field", 102), ("empty", 103)):
        assert f"skipped: {kind}" in process.output
        assert f"mixed.jsonl, line {line}: {kind}" in process.output


def test_held_out_files_are_held_out_whole(tmp_path):
    for name, seed in (("train", 0), ("valid", 1)):
        lines = [json.dumps({"text": document}) for document in sentences(seed, 50)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    valid = ("--heldout", tmp_path / "valid.jsonl")
    process = run(tmp_path / "train.jsonl", *valid, "--out", out, "--tokenizer", "train:300", "--json")
    splits = json.loads(process.output)["splits"]
    assert (splits["train"]["documents"], splits["heldout"]["documents"]) == (50, 50)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--heldout-fraction", "1"], "--heldout-fraction = 1.0: must be at least 0 and below 1"),
        (["--min-chars", "-1"], "--min-chars = -1: must be 0 or more"),
        (["--workers", "0"], "--workers = 0: must be 1 or more"),
        (["--tokenizer", "train:9"], "257 or more"),
        (["--tokenizer", "train:999999999999"], "16777216 or less"),
        (["--tokenizer", "nowhere.json"], "nowhere.json"),
        (["--out", "gs://bucket/x"], "--out = gs://bucket/x: without --runner it must be a local folder"),
        (["--runner", "NoSuchRunner"], "NoSuchRunner"),
        (["--no-such-flag"], "--no-such-flag"),
        (["nowhere/*.jsonl"], "'nowhere/*.jsonl' matches no file"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, flags, says):
    (tmp_path / "text.txt").write_text("Some text.")
    sources, flags = ([tmp_path / "text.txt"], flags) if flags[0].startswith("-") else (flags, [])
    process = run(*sources, "--out", tmp_path / "out", *flags)
    assert process.exit_code == 2, process.errors
    assert says in assert_one_line_error(process.errors)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "says"),
    [
        (os.fsdecode(b"caf\xe9"), "--out = '.*': must be UTF-8"),
        ("", "--out = '': must not be empty"),
        ("x" * 250, "the name is too long"),
        ("file/out", "a part of the path is a file"),
        ("loop/out", "symbolic links that lead in a circle"),
        ("~nobody-of-this-name/out", None),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys, out, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("Some text.")
    write_documents(tmp_path / "text.jsonl", sentences(0, 30))
    os.symlink("loop", "loop")
    code = errors.guarded(
        lambda: cli.dispatch(["prepare", "text.jsonl", "--out", out, "--tokenizer=train:300"])
    )
    printed = capsys.readouterr()
    if says is None:  # a name as any other
        assert code == 0, printed.err
        return
    assert code == 2
    assert re.search(says, assert_one_line_error(printed.err))
    assert "tokenizer" not in printed.out


def test_files_whose_names_are_no_utf8_are_read(tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    write_documents(folder / os.fsdecode(b"caf\xe9.jsonl"), [*sentences(0, 60), ""])
    arguments = ["prepare", str(folder), "--out", str(tmp_path / "out"), "--tokenizer=train:300"]
    with errors.output_never_ends_it(goes_on=True):
        assert errors.guarded(lambda: cli.dispatch(arguments)) == 0
    assert "skipped: empty" in capsys.readouterr().out


@pytest.mark.slow
def test_a_pipeline_gives_the_bytes_of_the_command_without_one(text, undisturbed, tmp_path):
    arguments = (text, "--tokenizer", "train:600", "--shard-tokens", "300000", "--runner=DirectRunner")
    process = run(*arguments, "--out", tmp_path / "out")
    assert process.exit_code == 0, process.errors
    assert contents(tmp_path / "out") == contents(undisturbed[0])
