"""What the README tells people to type works as written."""

import argparse
import importlib
import os
from pathlib import Path
import re
import shlex
import shutil
import subprocess
import sys

from helpers import in_this_process
import pytest

from topklm import config
from topklm.commands import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def training_flags():
    """The arguments of each command in the README that trains."""
    commands = re.findall(r"python -m topklm\.main (--config=.*)", README)
    return [shlex.split(command, comments=True) for command in commands]


def test_the_training_commands_name_real_configs_and_fields(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(training_flags()) >= 2
    for flags in training_flags():
        train.parse(flags)


def commands_of(verbs, *docs):
    """(verb, arguments) of each command with one of the verbs in the README and some docs."""
    texts = [README, *((ROOT / "docs" / name).read_text(encoding="utf-8") for name in docs)]
    lines = [line.partition(" > ")[0] for line in "\n".join(texts).replace("\\\n", " ").splitlines()]
    commands = [re.fullmatch(rf"\s*topklm ({verbs}) (.*)", line) for line in lines]
    return [(command[1], shlex.split(command[2], comments=True)) for command in commands if command]


@pytest.mark.parametrize(
    ("verbs", "doc", "at_least"),
    [
        ("prepare|data", "data.md", 8),
        ("neurons|explore", "neurons.md", 8),
        ("neurons", "contrast.md", 5),
        ("trace", "formation.md", 4),
        ("steer|generate", "steering.md", 4),
        ("serve|generate", "serving.md", 2),
    ],
)
def test_commands_have_the_flags_that_there_are(verbs, doc, at_least):
    commands = commands_of(verbs, doc)
    assert len(commands) >= at_least
    for verb, arguments in commands:
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"topklm.commands.{verb}").add_arguments(parser)
        parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("name", "end"), [("run", "-m topklm.main --config=configs/small.py"), ("test", "-m pytest -n auto")]
)
def test_the_two_commands_are_what_continuous_integration_runs(name, end):
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    function = re.search(r"^command_of_readme\(\) \{\n.*?^\}\n", script, re.M | re.S).group(0)
    assert f"command_of_readme {name})" in script
    command = ["bash", "-c", f"{function} command_of_readme {name}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert found in "".join(blocks("bash")[:2])
    assert found.endswith(end)


@pytest.mark.parametrize(
    ("train", "tests", "types", "exit_code"),
    [(0, 0, 0, 0), (3, 0, 0, 3), (0, 1, 0, 1), (0, 2, 0, 2), (0, 0, 1, 1)],
    ids=["all pass", "training fails", "a test fails", "the tests are interrupted", "types disagree"],
)
def test_continuous_integration_passes_exactly_if_each_of_its_steps_does(
    tmp_path, train, tests, types, exit_code
):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    # The test command makes an environment whose Python stands in for mypy's test.
    python = tmp_path / ".venv-test/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nsleep 0.2\nexit {types}\n")
    python.chmod(0o755)
    steps = {
        "run": f"sh -c 'exit {train}'",
        "test": f"mkdir -p .venv-test && mv kept .venv-test/bin && exit {tests}",
    }
    (tmp_path / "README.md").write_text(
        "".join(f"<!-- {name} command -->\n```bash\n{step}\n```\n" for name, step in steps.items())
    )
    for newer in ("python3.13", "python3.12"):  # as on a machine that has none
        (python.parent / newer).symlink_to("/bin/false")
    python.parent.rename(tmp_path / "kept")  # .venv-test goes first
    environment = {"PATH": f"{tmp_path}/kept:/usr/bin:/bin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [".ci/run"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == exit_code, ended.stderr
    assert not list(tmp_path.glob("tmp.*"))


def test_every_field_that_the_pages_name_exists():
    fields = config.flatten(config.Config())
    sections = "|".join(config.Config().to_dict())
    named = [
        field
        for page in PAGES
        for field in re.findall(
            rf"(?:`|--config\.)((?:{sections})\.[a-z_0-9]+)[`=,]", page.read_text("utf-8")
        )
        if page.name not in ("steering.md", "serving.md")  # where `model` is an object
    ]
    assert len(named) > 30
    assert not set(named) - set(fields)


def test_every_file_that_the_pages_link_to_exists():
    missing = [
        (page.name, link)
        for page in PAGES
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert not missing


def test_the_readme_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 120


@pytest.mark.slow
def test_the_python_example_runs(run_copy, tmp_path):
    (tmp_path / "runs").mkdir()
    run_copy.rename(tmp_path / "runs/small")
    harvest = ["neurons", "harvest", str(tmp_path / "runs/small"), "--tokens", "500"]
    assert in_this_process(*harvest).exit_code == 0  # as `topklm explore` has done by then
    for number, block in enumerate(blocks("python")):
        script = tmp_path / f"example{number}.py"
        script.write_text(block)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize("suffix", [".txt", pytest.param(".jsonl", marks=pytest.mark.slow)])
def test_your_own_text_trains(trainer, tmp_path, suffix):
    source = tmp_path / f"mine{suffix}"
    words = trainer.corpus.read_text(encoding="utf-8", errors="replace").splitlines()
    source.write_text("\n\n".join(words * 3) if suffix == ".txt" else "\n".join(words), encoding="utf-8")
    settings = {"data.source": source, "data.dir": tmp_path / "datasets", "train.steps": 2}
    process = trainer.train(tmp_path / "run", {**settings, "data.heldout_fraction": 0.2})
    assert process.exit_code == 0, process.errors
    assert (tmp_path / "run/metrics.jsonl").exists()
