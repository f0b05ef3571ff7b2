import dataclasses
import itertools
import os
import random
import re
import signal
import time

from helpers import (
    STEPS,
    assert_same_bits,
    checkpoint_steps,
    final_arrays,
    metrics,
    wait_until,
)
import pytest

import topklm

# Sends itself a signal right after a step's figures are shown: `SCRIPT STEP FLAGS...`.
ASKS_ITSELF_TO_STOP = """
import signal, sys, time
from topklm import main
from topklm.training.metrics import Console

stop_after, report = int(sys.argv.pop(1)), Console.report

def report_and_ask(self, step, **figures):
    report(self, step, **figures)
    if step == stop_after:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.5)  # a thread hears it

Console.report = report_and_ask
sys.exit(main.run())
"""

# Rests after every step, so that a signal meant for one step arrives before the next few: `SCRIPT FLAGS...`.
REST_SECONDS = 0.2
RESTS_AFTER_EACH_STEP = f"""
import sys, time
from topklm import main
from topklm.training.metrics import Console

report = Console.report

def report_and_rest(self, step, **figures):
    report(self, step, **figures)
    time.sleep({REST_SECONDS})

Console.report = report_and_rest
sys.exit(main.run())
"""


# As steps with large temporaries do on CPUs: `SCRIPT FLAGS...`.
TAKES_TURNS = """
import sys
from topklm import main
from topklm.training import step

step._LARGE_BYTES = -1
sys.exit(main.run())
"""


def start_slowly(trainer, run, settings=None):
    return trainer.start_python("-c", RESTS_AFTER_EACH_STEP, *trainer.arguments(run, settings))


def assert_as_if_undisturbed(run, finished_run):
    assert metrics(run) == metrics(finished_run)
    assert_same_bits(topklm.load(run).params, topklm.load(finished_run).params)
    assert_same_bits(final_arrays(run), final_arrays(finished_run))


def newest_step(run):
    return max(checkpoint_steps(run), default=0)


def files_being_written(run):
    folder = run / "checkpoints"
    return [name for name in os.listdir(folder) if "tmp" in name] if folder.exists() else []


def kill_while_starting(process, run, chance):
    deadline = time.monotonic() + chance.uniform(0, 6)
    wait_until(lambda: time.monotonic() > deadline or "step 1/" in process.output, process)
    process.kill()


def kill_while_compiling(process, run, chance):
    process.wait_for_line("checkpoint of step" if newest_step(run) else "new run in")
    time.sleep(chance.uniform(0, 0.2))
    process.kill()


def kill_between_checkpoints(process, run, chance):
    process.wait_for_line(f"step {newest_step(run) + chance.randint(1, 3)}/")
    process.kill()


def kill_in_an_evaluation(process, run, chance):
    next_evaluation = (newest_step(run) // 8 + 1) * 8
    process.wait_for_line(f"step {next_evaluation}/")  # evaluated as soon as this is printed
    time.sleep(REST_SECONDS + chance.uniform(0, 0.1))
    process.kill()


def kill_while_a_checkpoint_is_written(process, run, chance):
    process.wait_for_line("compiled the train step")
    assert wait_until(lambda: not files_being_written(run), process)  # what an earlier kill has left
    assert wait_until(lambda: files_being_written(run), process)
    process.kill()


def test_a_run_killed_again_and_again_ends_as_if_undisturbed(trainer, finished_run, tmp_path):
    chance, run = random.Random(0), tmp_path / "killed"
    half_written = 0
    for kill in (
        kill_while_starting,
        kill_while_compiling,
        kill_between_checkpoints,
        kill_while_a_checkpoint_is_written,
        kill_in_an_evaluation,
    ):
        kill(start_slowly(trainer, run, {"data.dir": tmp_path / "datasets"}), run, chance)
        half_written += bool(files_being_written(run))
    assert half_written  # a folder that is still being written stays behind under its temporary name
    assert newest_step(run) < STEPS
    last = trainer.train(run, {"data.dir": tmp_path / "datasets"})
    assert last.exit_code == 0, last.errors
    assert_as_if_undisturbed(run, finished_run)
    assert files_being_written(run) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(2))
def test_kills_at_any_time_change_nothing(trainer, finished_run, tmp_path, seed):
    chance, run = random.Random(seed), tmp_path / "killed"
    compiling_anew = dataclasses.replace(trainer, compilation_cache=None)
    for _ in range(20):
        process = compiling_anew.start(run, {"data.dir": tmp_path / "datasets"})
        deadline = time.monotonic() + chance.uniform(0, 25)
        wait_until(lambda deadline=deadline: time.monotonic() > deadline, process)
        process.kill()
    last = compiling_anew.run(run, {"data.dir": tmp_path / "datasets"})
    assert last.exit_code == 0, last.errors
    assert_as_if_undisturbed(run, finished_run)


@pytest.mark.slow
def test_a_run_asked_to_stop_saves_and_continues_as_if_undisturbed(trainer, finished_run, tmp_path):
    run = tmp_path / "stopped"
    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 11)):
        process = start_slowly(trainer, run)
        process.wait_for_line(f"step {step}/")
        process.signal(number)
        assert process.finish() == 0
        assert process.errors == ""
        stopped = re.search(r"(\w+): stopped after step (\d+) of 24; saved in .*Resume", process.output)
        assert stopped[1] == number.name
        assert newest_step(run) == int(stopped[2]) < STEPS
        assert "Resume with the same command" in process.output
    assert trainer.train(run).exit_code == 0
    assert_as_if_undisturbed(run, finished_run)


@pytest.mark.slow
def test_steps_that_take_turns_train_the_same_model(trainer, finished_run, tmp_path):
    run = tmp_path / "in-turns"
    process = trainer.start_python("-c", TAKES_TURNS, *trainer.arguments(run))
    process.wait_for_line("step 7/")
    process.signal(signal.SIGTERM)
    assert process.finish() == 0, process.errors
    process = trainer.start_python("-c", TAKES_TURNS, *trainer.arguments(run))
    assert process.finish() == 0, process.errors
    assert_as_if_undisturbed(run, finished_run)


@pytest.mark.slow
def test_an_evaluation_that_a_stop_came_before_is_made_up_for(trainer, finished_run, tmp_path):
    run = tmp_path / "stopped"

    def train_asking_to_stop_after(step):
        process = trainer.start_python("-c", ASKS_ITSELF_TO_STOP, str(step), *trainer.arguments(run))
        assert process.finish() == 0, process.errors

    def evaluated_steps():
        return [line["step"] for line in metrics(run) if "eval/loss" in line]

    # A step's figures are shown while the next step runs; those of step 8 as its evaluation begins.
    train_asking_to_stop_after(7)
    assert (newest_step(run), evaluated_steps()) == (8, [])
    train_asking_to_stop_after(16)
    assert (newest_step(run), evaluated_steps()) == (16, [8])  # it was given up
    train_asking_to_stop_after(STEPS - 1)
    assert (newest_step(run), evaluated_steps()) == (STEPS, [8, 16])
    assert trainer.train(run).exit_code == 0
    assert_as_if_undisturbed(run, finished_run)


def test_a_second_signal_ends_the_process_at_once(trainer, tmp_path):
    process = trainer.start(tmp_path / "run", {"eval.sample_tokens": 1_000_000})
    process.wait_for_line("step 8/")  # an evaluation begins, and draws a long sample
    for _ in itertools.takewhile(lambda _: process.exit_code is None, range(6000)):
        process.signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.finish() == 128 + signal.SIGINT
    assert "held-out at step 8" not in process.output
    assert process.errors == ""
    assert set(checkpoint_steps(tmp_path / "run")) <= {5}  # it may still have been being written


def test_a_finished_run_started_again_says_so_and_changes_nothing(trainer, run_copy):
    before = (run_copy / "metrics.jsonl").read_bytes()
    again = trainer.train(run_copy)
    assert again.exit_code == 0, again.errors
    assert "is finished at step 24: nothing to train" in again.output
    assert "compiled" not in again.output
    assert (run_copy / "metrics.jsonl").read_bytes() == before
    assert newest_step(run_copy) == STEPS


def test_more_steps_continue_a_finished_run(trainer, run_copy):
    before = metrics(run_copy)
    longer = trainer.train(run_copy, {"train.steps": STEPS + 2})
    assert longer.exit_code == 0, longer.errors
    assert re.search(r"continuing .* from its checkpoint of step 24", longer.output)
    after = metrics(run_copy)
    assert after[: len(before)] == before
    assert [line["step"] for line in after[len(before) :]] == [STEPS + 1, STEPS + 2, STEPS + 2]
    assert newest_step(run_copy) == STEPS + 2
