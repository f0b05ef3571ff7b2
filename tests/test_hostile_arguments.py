"""Every verb is given paths and values that nobody means: one line and exit code 2, or the usual."""

import argparse
import random

import damage
from helpers import assert_one_line_error
import pytest

from topklm import cli, errors

NUMBERS = [
    "-1",
    "0",
    "1e999",
    "nan",
    "inf",
    "9" * 400,
    "0x10",
    "١٢",
    "1.5",
    "2**3",
    "",
    " ",
    "-9223372036854775809",
]
TEXTS = [
    "",
    "\udcff",
    "a\0b",
    "x" * 100_000,
    "\u2028\u202e",
    "gs://",
    "s3://b/k",
    "~nobody/x",
    "--",
    "[",
    "(?:",
    "{}",
]


def folders(place):
    """Paths that are no run, no dataset and no text, by what they are."""
    (place / "file").write_text("no folder")
    (place / "empty").mkdir()
    (place / "loop").symlink_to("loop")
    (place / "dangling").symlink_to("nowhere")
    (place / "odd" / "checkpoints" / "7").mkdir(parents=True)
    (place / "odd" / "config.json").mkdir()
    (place / "loops" / "checkpoints").mkdir(parents=True)
    (place / "loops" / "checkpoints" / "7").symlink_to("7")
    (place / "loops" / "dataset.json").symlink_to("dataset.json")
    names = [
        "file",
        "empty",
        "loop",
        "dangling",
        "odd",
        "loops",
        "missing",
        "file/under",
        "n" * 300,
        "a\0b",
        "\udcff",
    ]
    return [str(place / name) for name in names] + [
        "",
        "/dev/null",
        "gs://",
        "gs://b",
        "s3://b/c",
        "~",
        "/",
        "%",
    ]


def parsers():
    """Every verb, and verb of a verb, that argparse reads, with what it takes."""
    for verb in cli.VERBS:
        if verb in ("train", "bench", "compile-check"):
            continue
        command = cli._module(verb)
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for name, sub in (inner[0].choices if inner else {"": parser}).items():
            yield [verb, *([name] if name else [])], sub._actions


def odd_commands(places, draw):
    """Command lines: an odd place for each verb, then an odd value for each of its options."""
    for words, actions in parsers():
        positional = [a for a in actions if not a.option_strings]
        needed = [a for a in actions if a.option_strings and a.required]

        def line(place, *more, words=words, positional=positional, needed=needed):
            required = [part for a in needed for part in (a.option_strings[-1], place)]
            return [*words, *([place] * len(positional)), *required, *more]

        for place in places:
            yield line(place)
        for action in actions:
            if not action.option_strings or isinstance(action, argparse._HelpAction):
                continue
            for value in draw.sample(NUMBERS + TEXTS, 5):
                yield line(draw.choice(places), f"{action.option_strings[-1]}={value}")


@pytest.fixture
def outcome(capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")

    def run(arguments):
        capsys.readouterr()
        try:
            code = errors.guarded(lambda: cli.dispatch(arguments))
        except SystemExit as e:
            code = e.code
        except BaseException as e:
            return f"{type(e).__name__}: {e}"
        if code == 2:
            assert_one_line_error(capsys.readouterr().err)
        return "" if code in (0, 2) else f"exit code {code}"

    return run


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 4))])
def test_no_argument_ends_in_a_traceback(tmp_path, monkeypatch, outcome, seed):
    draw = random.Random(seed)
    commands = list(odd_commands(folders(tmp_path), draw))
    if seed == 0:
        commands = draw.sample(commands, 40)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # where a path like "%" leads
    damage.COUNT["tried"] += len(commands)
    bad = [f"{arguments!r:.300}: {said:.300}" for arguments in commands if (said := outcome(arguments))]
    assert not bad, f"{len(bad)} of {len(commands)}:\n" + "\n".join(bad)
