"""All shell scripts: clean by shellcheck, helpful, shown rightly in the docs, at one with the trainer."""

import os
from pathlib import Path
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types

from helpers import ROOT
import pytest

from topklm.commands import train
from topklm.training import loop
from topklm.training.metrics import Console

SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "launch").rglob("*.sh"))
STARTED_BY_PEOPLE = ("launch/tpu_vm.sh", "launch/slurm.sh", "launch/gke/submit.sh")
SOURCED = ("common.sh", "tpu_cloud.sh", "tpu_babysit.sh")
DOCS = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Returns the words of every command in the docs that starts something from launch/."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCS, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(launch/\S+\.sh [^`\n]+)`", DOCS)
    words = [shlex.split(line) for line in lines]
    return [w for w in words if "".join(w[:1]).startswith("launch/") or w[1:2] == ["launch/local.py"]]


COMMANDS = commands()


def shell(code: str, text: str = "") -> str:
    """Returns the output of a shell that has the launchers' common functions."""
    script = f". {shlex.quote(str(ROOT / 'launch/common.sh'))}; {code}"
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], input=text, capture_output=True, text=True, check=True
    )
    return result.stdout.rstrip("\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_shellcheck_finds_nothing(script):
    program = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([program, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "launch").rglob("*") if path.is_file())


@pytest.mark.parametrize("file", [f for f in FILES if f.suffix in (".sh", ".py", ".yaml", "")], ids=str)
def test_nothing_is_downloaded_that_names_no_version(file):
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ")
    assert not re.search(r"\b(curl|wget)\b|urlopen", text)
    for install in re.findall(r"\b(?:pip3?|uv(?: tool)?) (?:install|add)\b([^\n|;&]*)", text):
        packages = [word.strip("\"'") for word in install.split() if not word.startswith("-")]
        assert packages
        ours = ("${repository}[", ".[", "$environment/")
        assert all("==" in word or word.startswith(ours) for word in packages), install


def test_a_worker_without_uv_gets_the_one_that_the_script_names(tmp_path):
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    for name in ("bash", "dirname", "mkdir", "ln", "hostname", "cat"):
        (bin_folder / name).symlink_to(shutil.which(name))
    python = bin_folder / "python3"
    python.write_text(f'#!{shutil.which("bash")}\necho "$@" >{calls}\nexit 7\n')
    python.chmod(0o755)
    shutil.copytree(ROOT / "launch", tmp_path / "repository" / "launch")
    done = subprocess.run(
        ["bash", str(tmp_path / "repository/launch/tpu_worker.sh"), "install", "tpu"],
        env={"PATH": str(bin_folder), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert re.fullmatch(r"-m pip install --quiet --user uv==[\d.]+\n", calls.read_text())


def test_the_batch_script_is_clean_too(tree, stage):
    command = [
        tree / "launch/slurm.sh",
        "--nodes=2",
        "--gpus-per-node=4",
        "--dry-run",
        "--",
        "--a=b c",
        "d'e",
    ]
    script = subprocess.check_output(command, env=stage.environment)
    program = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([program, "-"], input=script, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout.decode()


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_scripts_stop_at_the_first_error_and_can_be_executed(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    if script.name in SOURCED:
        assert text.startswith("# shellcheck shell=bash")
    else:
        assert text.startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in text
        assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("script", STARTED_BY_PEOPLE)
def test_help_has_examples_that_work(script, tree, stage):
    helped = subprocess.run(
        [tree / script, "--help"], env=stage.environment, capture_output=True, text=True, check=True
    )
    examples = re.findall(rf"^  ({script} .*)$", helped.stdout.replace("\\\n", ""), flags=re.MULTILINE)
    examples = [example for example in examples if "OPTIONS]" not in example]
    assert examples
    for example in examples:
        dry_run(shlex.split(example), tree, stage)


def dry_run(words: list[str], tree: Path, stage) -> str:
    """Runs a command with --dry-run, and returns what it prints."""
    end = words.index("--") if "--" in words else len(words)
    program = [sys.executable] if words[0] == "python" else [f"./{words[0]}"]
    command = [*program, *words[1:end], "--dry-run", *words[end:]]
    result = subprocess.run(
        command, cwd=tree, env=stage.environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert not (stage.folder / "calls.jsonl").exists()
    return result.stdout


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_commands_in_the_docs_work(words, tree, stage):
    dry_run(words, tree, stage)


def test_the_docs_show_every_launcher_and_verb():
    verbs = {words[1] for words in COMMANDS if words[0] == "launch/tpu_vm.sh"}
    assert verbs == {"create", "setup", "run", "babysit", "logs", "status", "ssh", "stop", "delete"}
    assert {"launch/slurm.sh", "launch/gke/submit.sh", "python"} < {words[0] for words in COMMANDS}


def test_the_trainers_flags_in_the_docs_name_real_configs_and_fields(monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = [w[w.index("--") + 1 :] for w in COMMANDS if "--" in w]
    flags = [f for f in flags if f[0].startswith("--config")]
    assert len(flags) >= 6
    for arguments in flags:
        train.parse(arguments)


# --- what the launchers read in the trainer's output ---


def test_a_run_that_was_stopped_is_told_from_one_that_is_finished(capsys):
    run = types.SimpleNamespace(
        _wait_for_checkpoint=lambda step: None,
        console=Console(),
        stop=types.SimpleNamespace(signal_name="SIGTERM"),
        config=types.SimpleNamespace(train=types.SimpleNamespace(steps=9000)),
        folder="runs/first",
    )
    loop._Loop._say_stopped(run, 1234)
    said = capsys.readouterr().out
    assert shell("outcome 0", f"step 1\n{said}") == "75"
    assert shell("outcome 0", f"  12: {said}") == "75"  # from Slurm
    assert shell("outcome 2", said) == "2"
    assert shell("outcome 0", "sample: SIGTERM: stopped. Resume with the same command\n") == "0"
    assert shell("outcome 0") == "0"


def test_a_run_that_was_stopped_while_it_started_is_told_from_one_that_is_finished():
    code = (
        "import os, signal, time\n"
        "from topklm.runtime.process import stop_on_signal\n"
        "with stop_on_signal():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(300)\n"
    )
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert shell("outcome 0", said) == "75"


def test_the_highest_step_is_read_from_the_progress(capsys):
    console = Console()
    console.start(0, 20_000)
    for step in (20, 12_340, 12_320):
        console.report(step, loss=1.0, tokens_per_second=1.0, mfu=0.1)
    said = capsys.readouterr().out
    assert shell("highest_step", said) == "12340"
    assert shell("highest_step", re.sub("^", " 3: ", said, flags=re.MULTILINE)) == "12340"
    assert shell("highest_step", "steps 3/4\n") == "0"


# --- the common functions ---


@pytest.mark.parametrize(
    "words", [["a", "b c"], [""], ["it's", '"', "$HOME `x` \\"], ["~", "*", "-n"], ["a\nb\t"]]
)
def test_quoted_words_are_read_back_by_shells(words):
    quoted = shell(f"quoted {shlex.join(words)}")
    assert shlex.split(quoted) == words
    printed = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {quoted}"], text=True)
    assert printed.split("\0")[:-1] == words


def test_waiting_survives_signals_and_returns_the_childs_exit_code():
    wait = "code=0; wait_for $child || code=$?; echo $code"
    assert shell(f"trap : TERM; (sleep 0.5; exit 7) & child=$!; (sleep 0.1; kill -TERM $$) & {wait}") == "7"
    assert shell("(exit 3) & child=$!; sleep 0.2; code=0; wait_for $child || code=$?; echo $code") == "3"
    assert shell("(kill -KILL $BASHPID) & code=0; wait_for $! || code=$?; echo $code") == str(
        128 + signal.SIGKILL
    )


def test_the_pauses_between_tries_grow_to_a_limit():
    assert shell("for n in 1 2 3 4 9; do polls_after_failures $n; done").split() == ["1", "2", "4", "8", "20"]
