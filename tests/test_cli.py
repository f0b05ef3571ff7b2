import io
import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import threading

from helpers import CONFIG_FILE, ROOT, STEPS, Process, assert_one_line_error, in_this_process
import jax
import pytest

import topklm
from topklm import cli, errors
from topklm.commands import shared, train
from topklm.config import Config, flatten
from topklm.storage.files import as_path
from topklm.training.metrics import Console, next_commands

RUNS_THE_COMMAND = "import sys; from topklm import cli; sys.exit(cli.run())"
HEAVY = ("jax", "flax", "optax", "orbax", "grain")


@pytest.fixture
def output(finished_run):
    """What the finished run printed; its output went into a pipe."""
    return finished_run.with_suffix(".out").read_text()


def test_a_step_prints_loss_tokens_per_second_mfu_and_time_left(output):
    lines = re.findall(
        r"^step (\d+)/24 \| loss \d+\.\d{3} \| [\d,]+ tokens/s \| MFU \d+% \| \d+:\d\d left$", output, re.M
    )
    assert list(map(int, lines)) == list(range(1, STEPS + 1))


def test_output_that_is_no_terminal_is_plain(output):
    assert "\x1b" not in output
    assert "\r" not in output


def test_a_run_prints_what_it_trains_on_evaluations_samples_and_a_table(output):
    assert re.search(r"^devices: 1 x cpu \(\d+ cores\)$", output, re.M)
    assert re.search(r"^data: wrote .*train: \d+ documents", output, re.M)
    assert re.search(
        r"^new run in .*: [\d,]+ parameters, 2 layers, TopK keeps 8 of 32 \(relu\) in 1", output, re.M
    )
    assert re.findall(r"^held-out at step (\d+): \d\.\d{4} bits/byte", output, re.M) == ["8", "16", "24"]
    assert len(re.findall(r"^sample: The", output, re.M)) == 3
    assert "held-out bits per byte" in output
    assert "dead neurons, per TopK layer" in output


def test_a_run_ends_with_the_commands_that_come_next(finished_run, output):
    *_, said, generate, explore = output.splitlines()
    assert said == "next:"
    assert generate == f'  topklm generate {finished_run} "The city of"'
    assert explore == f"  topklm explore {finished_run}"
    assert "topklm.load" not in output


def test_commands_to_copy_are_whole_at_any_width(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    commands = next_commands(Path("runs/with a space"))
    assert commands[0] == "topklm generate 'runs/with a space' \"The city of\""
    for command in commands:
        Console().say(command)
    assert sys.stdout.getvalue().splitlines() == commands
    assert next_commands(as_path("gs://bucket/run")) == ['topklm generate gs://bucket/run "The city of"']


def test_a_table_of_training_is_whole_at_any_width(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    Console().table("run: trained", {"a figure with a name": "x" * 90})
    out = capsys.readouterr().out
    assert out.count("x") == 90 and "…" not in out
    assert max(map(len, out.splitlines())) <= 40


@pytest.mark.parametrize("is_terminal", [True, False])
def test_who_waits_for_compilation_is_told(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(shared, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    said = threading.Event()
    monkeypatch.setattr(sys.stderr, "flush", said.set)
    with shared.compiling():
        assert not is_terminal or said.wait(60)
    assert ("compiling, some 10 s; kept" in capsys.readouterr().err) == is_terminal


def test_a_longer_run_says_what_changes_and_an_evaluation_of_a_part_that_it_is_one(trainer, run_copy):
    changes = {"train.steps": STEPS + 6, "eval.max_tokens": 100, "checkpoint.every_steps": 99}
    process = trainer.train(run_copy, changes)
    assert process.exit_code == 0, process.errors
    output = process.output
    assert re.search(
        rf"^train.steps was {STEPS} and is {STEPS + 6}: the learning rate goes from \S+ to \S+, ",
        output,
        re.M,
    )
    assert (
        f"warning: checkpoint.every_steps = 99 of train.steps = {STEPS + 6}: the run is saved only" in output
    )
    assert re.search(
        r"^held-out at step 30 \(the first 100 of [\d,]+ tokens\): \d\.\d+ bits/byte", output, re.M
    )
    assert "held-out figures are of 100 tokens of" in output
    last = json.loads((run_copy / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/tokens"] == 100 < last["eval/of_tokens"]


UNWINDS = """
import sys, time
from pathlib import Path
from topklm import cli
from topklm.storage.files import new_folder

def make(argv):
    with new_folder(Path("made")) as folder:
        (folder / "half").touch()
        print("half made", flush=True)
        time.sleep(600)

cli.dispatch = make
sys.exit(cli.run(["export"]))
"""


def test_sigterm_leaves_nothing_half_made(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = Process([sys.executable, "-c", UNWINDS], cwd=tmp_path, env=environment)
    process.wait_for_line("half made")
    assert len(list(tmp_path.iterdir())) == 1
    process.signal(signal.SIGTERM)
    assert process.finish() == errors.EXIT_TERMINATED
    assert process.errors == "SIGTERM: what was saved before stays\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("platform", ["cuda", "gpu", "nonsense"])
def test_a_device_that_jax_does_not_find_is_one_line(platform, trainer, tmp_path, finished_run):
    arguments = ["generate", str(finished_run), "The"] if platform == "gpu" else []
    arguments = arguments or ["train", *map(str, trainer.arguments(tmp_path / "run"))]
    process = trainer.start_python(
        "-c", RUNS_THE_COMMAND, *arguments, environment={"JAX_PLATFORMS": platform}
    )
    assert process.finish() == errors.EXIT_USER_ERROR
    line = assert_one_line_error(process.errors)
    assert f"JAX_PLATFORMS={platform}: JAX finds no such device" in line
    assert "pip install 'topklm[cuda]'" in line


def test_generate_prints_one_json_object(trainer, finished_run):
    arguments = ["generate", str(finished_run), "The old", "--max-new-tokens", "5", "--json"]
    process = trainer.start_python("-c", RUNS_THE_COMMAND, *arguments)
    assert process.finish() == 0, process.errors
    assert process.errors == ""
    printed = json.loads(process.output)
    assert printed["run"] == str(finished_run)
    assert printed["step"] == STEPS
    assert printed["text"].startswith("The old")


WITHOUT_EXTRAS = """
import importlib, pkgutil, sys
for name in ("pyarrow", "scipy", "regex", "starlette", "anyio", "uvicorn", "jinja2", "torch", "transformers"):
    sys.modules[name] = None  # as if it were not installed
import topklm.commands
for module in pkgutil.iter_modules(topklm.commands.__path__):
    importlib.import_module(f"topklm.commands.{module.name}")
    print(module.name)
"""


def test_every_verb_starts_without_the_extras(trainer):
    process = trainer.start_python("-c", WITHOUT_EXTRAS)
    assert process.finish() == 0, process.errors
    assert {"generate", "steer", "serve", "explore", "neurons_find", "neurons_compare"} <= set(
        process.output.split()
    )


@pytest.mark.parametrize(
    ("words", "run", "file"),
    [
        (["runs/x", "--json"], "runs/x", "-"),
        (["--json", "runs/x"], "runs/x", "-"),
        (["--json", "--step", "3", "runs/x"], "runs/x", "-"),
        (["--json", "found.json", "runs/x"], "runs/x", "found.json"),
        (["runs/x", "--json", "-"], "runs/x", "-"),
        (["runs/x", "--json=found"], "runs/x", "found"),
        (["runs/x"], "runs/x", None),
    ],
)
def test_json_is_printed_or_written_to_a_file(monkeypatch, words, run, file):
    asked = []
    monkeypatch.setattr("topklm.commands.neurons.run", asked.append)
    cli.dispatch(["neurons", "measure", *words])
    assert [(one.run, one.json) for one in asked] == [(run, file)]


def test_text_that_is_read_is_never_what_json_writes(monkeypatch):
    asked = []
    monkeypatch.setattr("topklm.commands.prepare.run", asked.append)
    cli.dispatch(["prepare", "--json", "mine.json", "more.json", "--out", "there"])
    assert [(one.sources, one.json) for one in asked] == [(["mine.json", "more.json"], "-")]


def test_json_in_a_file_goes_with_what_a_person_reads(finished_run, tmp_path):
    arguments = ["generate", finished_run, "The old", "--max-new-tokens", "3"]
    process = in_this_process(*arguments, "--json", tmp_path / "text.json")
    assert process.exit_code == 0, process.errors
    text = json.loads((tmp_path / "text.json").read_text())["text"]
    assert process.output == f"{text}\n"
    refused = in_this_process(*arguments, "--json", tmp_path / "no/text.json")
    assert refused.exit_code == 2
    assert "there is no folder" in assert_one_line_error(refused.errors)


def test_generate_refuses_in_one_line(finished_run):
    process = in_this_process("generate", finished_run, "The old", "--step", "6")
    assert process.exit_code == 2
    line = assert_one_line_error(process.errors)
    assert "step = 6" in line
    assert "5, 10, 15, 20, 24" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["genrate"], "'genrate'; did you mean generate?"),
        (["xyz"], "'xyz'; choose from train, prepare, "),
        (["neurons", "fnd"], "'fnd'; did you mean find?"),
        (["neurons", "harvest", "runs/x", "--split", "heldot"], "--split: invalid choice: 'heldot'; did you"),
        (["--verbose"], "VERB"),
        (["generate"], "RUN, prompt"),
        (["data"], "show|verify"),
        (["data", "shwo"], "'shwo'"),
        (["data", "show"], "DIR"),
        (["data", "show", "nowhere"], "nowhere: there is no such folder: check the path"),
        (["data", "show", "nowhere", "--windows", "0"], "--windows = 0: must be 1 or more"),
        (["data", "show", "nowhere", "--context-length", "0"], "--context-length = 0: must be 1 or more"),
        (["data", "show", "nowhere", "--split", "test"], "--split"),
        (["data", "verify", "nowhere"], "nowhere: there is no such folder: check the path"),
        (["data", "verify", "gs://bucket/data"], "DIR = gs://bucket/data: must be a local or mounted"),
        (["generate", "nowhere", "The"], "nowhere is not a run folder"),
        (["generate", "nowhere", "The", "--seed", "x"], "--seed"),
        (["generate", "nowhere", "The", "--sed", "1"], "--sed"),
        (["generate", "nowhere", "The", "--temperature", "-1"], "--temperature = -1.0: must be 0 or more"),
        (["generate", "nowhere", "The", "--temperature", "nan"], "--temperature = nan"),
        (["generate", "nowhere", "The", "--max-new-tokens", "-1"], "--max-new-tokens = -1: must be 0 or"),
        (["train", f"--config={CONFIG_FILE}", "--config.model.topk_k=0"], "model.topk_k = 0"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, words):
    assert errors.guarded(lambda: cli.dispatch(arguments)) == 2
    captured = capsys.readouterr()
    assert words in assert_one_line_error(captured.err)
    assert captured.out == ""


def help_of(capsys, call):
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_command_lists_its_verbs(capsys, words):
    text = help_of(capsys, lambda: cli.dispatch(words))
    for verb, summary in cli.VERBS.items():
        assert re.search(rf"^ +{verb}\s+{re.escape(summary)}$", text, re.M)


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "train"])
def test_every_verb_explains_itself_with_an_example(capsys, verb):
    text = help_of(capsys, lambda: cli.dispatch([verb, "--help"]))
    assert f"example: topklm {verb} " in text


def heavy_modules_after(code):
    """Which of `HEAVY` a new interpreter has imported after running `code`."""
    code = f"{code}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize("imported", ["topklm", "topklm.cli", "topklm.__main__ as cli"])
def test_importing_the_command_imports_no_jax(imported):
    code = f"import sys; sys.argv = ['topklm', '--help']\ntry: import {imported}\nexcept SystemExit: pass"
    assert heavy_modules_after(code) == "[]"


# Tasks, statistics, checkpoints, and kernels for other devices: half of the time to the first step.
UNUSED_BEFORE_THE_FIRST_STEP = ("scipy", "orbax", "torch", "transformers", "topklm.model.topk_pallas")
TO_THE_FIRST_STEP = f"""
import os, sys
from topklm import cli
from topklm.training import metrics
def report(self, step, **figures):
    print(step, [name for name in {UNUSED_BEFORE_THE_FIRST_STEP} if name in sys.modules], flush=True)
    os._exit(0)
metrics.Console.report = report
cli.dispatch(["train", *sys.argv[1:]])
"""


def test_a_run_imports_nothing_before_its_first_step_that_the_step_does_not_need(trainer, tmp_path):
    arguments = trainer.arguments(tmp_path / "run", {"checkpoint.trace": "log", "log.every_steps": 1})
    process = trainer.start_python("-c", TO_THE_FIRST_STEP, *arguments)
    assert process.finish() == 0, process.errors
    assert process.output.splitlines()[-1] == "1 []"


LOADS_THE_TRAINER = """
import gc
begun = []
from topklm.commands import train
gc.callbacks.append(lambda phase, about: begun.append(phase))
train.load_modules()
n = len(begun)
train.load_modules()
print(n, gc.isenabled(), gc.get_freeze_count() > 100_000, gc.get_count()[0] < 100_000)
"""


def test_modules_of_the_trainer_are_loaded_without_searches_for_garbage(trainer):
    process = trainer.start_python("-c", LOADS_THE_TRAINER)
    assert process.finish() == 0, process.errors
    assert process.output.split() == ["0", "True", "True", "True"]


@pytest.mark.parametrize(
    "verb", [*cli.VERBS, "data show", "neurons harvest", "neurons find", "neurons card", "neurons contrast"]
)
def test_help_is_shown_without_jax(verb):
    code = f"from topklm import cli\ntry: cli.dispatch([*{verb.split()}, '--help'])\nexcept SystemExit: pass"
    assert heavy_modules_after(code) == "[]"


def test_versions_and_devices_are_a_line_each(trainer):
    process = trainer.start_python("-m", "topklm", "--version")
    assert process.finish() == 0, process.errors
    names = [line.split()[0] for line in process.output.splitlines()]
    assert names == ["topklm", "jax", "jaxlib", "flax", "devices:"]
    assert f"jax {jax.__version__}\n" in process.output
    assert re.search(r"^devices: 1 x cpu \(\d+ cores\)$", process.output, re.M)


@pytest.mark.parametrize(
    ("program", "environment", "words"),
    [
        (RUNS_THE_COMMAND, {"JAX_PLATFORMS": "nonsense"}, "JAX finds no such device"),
        (f"import sys; sys.modules['jax'] = None; {RUNS_THE_COMMAND}", {}, "JAX cannot be imported"),
    ],
)
def test_versions_are_shown_where_jax_does_not_start(trainer, program, environment, words):
    process = trainer.start_python("-c", program, "--version", environment=environment)
    assert process.finish() == errors.EXIT_USER_ERROR
    assert words in assert_one_line_error(process.errors)
    assert f"jax {jax.__version__}\n" in process.output


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("topklm exp", ["explore", "export"]),
        ("topklm show runs/s", ["runs/small", "runs/second"]),
        ("topklm generate ", ["runs/second", "runs/small"]),
        ("topklm generate oth", ["other"]),
        ("topklm neurons har", ["harvest "]),
        ("topklm data export --spl", ["--split "]),
        ("topklm train --config sm", ["small "]),
        ("topklm train --config.model.topk_k", ["--config.model.topk_k "]),
        ("topklm steer runs/small --against runs/se", ["runs/second "]),
    ],
)
def test_a_shell_completes_command_lines(trainer, tmp_path, line, expected):
    packages = Path(pytest.importorskip("argcomplete").__file__).parents[1]
    for name in ("runs/small", "runs/second", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/second.log").write_text("no folder")
    found = tmp_path / "found"
    variables = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, packages))),
        "_ARGCOMPLETE_IFS": "|",
    }
    variables |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(found), "_ARGCOMPLETE_SHELL": "bash"}
    process = trainer.start_python("-m", "topklm", environment=variables, cwd=tmp_path)
    assert process.finish() == 0, process.errors
    assert sorted(part.strip() for part in found.read_text().split("|")) == sorted(
        part.strip() for part in expected
    )


def test_a_shell_is_told_nothing_without_the_package(trainer, tmp_path):
    code = f"import sys; sys.modules['argcomplete'] = None; {RUNS_THE_COMMAND}"
    process = trainer.start_python("-c", code, environment={"_ARGCOMPLETE": "1", "COMP_LINE": "topklm "})
    assert (process.finish(), process.output, process.errors) == (0, "", "")


def test_the_python_interface_is_there_when_it_is_asked_for():
    assert {"LanguageModel", "load"} <= set(dir(topklm))
    assert topklm.load.__module__ == "topklm.inference.load"
    assert topklm.LanguageModel.__module__ == "topklm.inference.language_model"
    with pytest.raises(AttributeError, match="module 'topklm' has no attribute 'lod'"):
        topklm.lod  # noqa: B018


def test_generate_explains_itself_with_an_example(capsys):
    text = help_of(capsys, lambda: cli.dispatch(["generate", "--help"]))
    assert "example: topklm generate runs/small" in text
    assert "--temperature" in text


def test_train_explains_itself_with_an_example_and_every_field(capsys):
    text = help_of(capsys, lambda: cli.dispatch(["train", "--help"]))
    assert train.EXAMPLE in " ".join(text.split())
    assert "--workdir" in text
    for name, value in flatten(Config()).items():
        assert f"{name} = {value!r}" in text
    assert {"books", "paper", "small"} == train.shipped_configs().keys()
    for words in ("--config=small:hour ", "--config=books:laptop ", "--config=paper:130m-base "):
        assert words in text


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ([], "runs/small"),
        (["--config=small"], "runs/small"),
        ([f"--config={CONFIG_FILE}"], "runs/small"),
        ([f"--config={CONFIG_FILE}:base"], "runs/small-base"),
        (["--config=small:base"], "runs/small-base"),
        (["--config=configs/small.py:base"], "runs/small-base"),
        (["--config=paper:1.4b"], "runs/paper-1.4b"),
    ],
)
def test_a_run_is_named_after_its_config_which_is_found_from_any_folder(monkeypatch, tmp_path, flags, folder):
    monkeypatch.chdir(tmp_path)
    config, workdir = train.parse(flags)
    assert str(workdir) == folder
    assert (config.model.n_topk_layers == 0) == folder.endswith("base")
    assert (config.model.d_model == 2048) == ("paper" in folder)


@pytest.mark.parametrize("name", ["small", "configs/small.py"])
def test_a_file_of_the_user_comes_before_one_of_the_package(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("def get_config():\n    return {'train': {'seed': 77}}\n")
    assert train.parse([f"--config={name}"])[0].train.seed == 77


def test_a_folder_of_that_name_is_no_config(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert train.parse(["--config=small"])[0].train.seed == 0


def test_flags_override_the_file():
    config, workdir = train.parse(
        [
            f"--config={CONFIG_FILE}",
            "--config.model.topk_k=5",
            "--config.optim.learning_rate=1e-3",
            "--workdir=w",
        ]
    )
    assert (config.model.topk_k, config.optim.learning_rate, str(workdir)) == (5, 1e-3, "w")
