"""A trace of some steps: its content, the lines for a person, and the files of a run that ends early."""

from helpers import assert_one_line_error
import jax
import jax.numpy as jnp
import pytest

from topklm.config import resolve
from topklm.errors import UserError
from topklm.training.throughput import Profiler


def traced_steps(folder):
    """Returns the step numbers in the newest trace under a folder, in the order of time."""
    [path] = sorted(folder.rglob("*.xplane.pb"))[-1:]
    events = [
        (event.start_ns, dict(event.stats)["step_num"])
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train" and "step_num" in dict(event.stats)
    ]
    return [number for _, number in sorted(events)]


def run_steps(profiler, numbers, upto=None):
    step = jax.jit(lambda x: x @ x)
    for number in numbers:
        with profiler.step(number):
            out = step(jnp.ones((8, 8)))
        if profiler.ends_with(number):
            out.block_until_ready()
            profiler.close()


def test_the_trace_holds_the_steps_asked_for_and_its_place_is_said(tmp_path):
    said = []
    profiler = Profiler(range(3, 6), tmp_path, 0, said.append)
    run_steps(profiler, range(1, 8))
    profiler.close()
    assert traced_steps(tmp_path / "profile") == [3, 4, 5]
    assert len(said) == 1
    assert f"profile of steps 3 to 5 in {tmp_path}/profile" in said[0]
    assert f"xprof --logdir={tmp_path}/profile" in said[0]


def test_a_run_that_ends_early_leaves_what_it_has(tmp_path):
    said = []
    profiler = Profiler(range(3, 6), tmp_path, 0, said.append)
    with pytest.raises(KeyboardInterrupt):
        try:
            with profiler.step(3):
                jnp.ones(3).block_until_ready()
            with profiler.step(4):
                raise KeyboardInterrupt
        finally:
            profiler.close()
    assert traced_steps(tmp_path / "profile") == [3, 4]
    jax.profiler.start_trace(tmp_path / "next")  # nothing is left running
    jax.profiler.stop_trace()


def test_a_resumed_run_traces_what_is_left(tmp_path):
    said = []
    run_steps(Profiler(range(3, 6), tmp_path, 4, said.append), range(5, 8))
    assert traced_steps(tmp_path / "profile") == [5]
    Profiler(range(3, 6), tmp_path, 5, said.append)
    assert said[1:] == ["profile: nothing to trace, step 5 is done already"]


def test_without_steps_nothing_is_written(tmp_path):
    profiler = Profiler(range(0), tmp_path, 0, pytest.fail)
    run_steps(profiler, range(1, 4))
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    said = []
    run_steps(Profiler(range(1, 2), tmp_path, 0, said.append), range(1, 3))
    assert len(said) == 1
    assert said[0].startswith("no profile was written: writing the profile")
    assert (tmp_path / "profile").read_text() == "in the way"


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("10", r"profile = '10': must be \"A:B\" for steps A to B - 1, with A from 1 to train\.steps \(20\)"),
        ("0:3", "must be"),
        ("21:22", "must be"),
        ("a:b", "must be"),
        ("5:5", "profile = '5:5': holds no step"),
    ],
)
def test_a_wrong_range_is_refused(profile, message):
    with pytest.raises(UserError, match=message):
        resolve({"profile": profile, "train": {"steps": 20}})


def test_a_range_counts_like_numpy():
    assert list(resolve({"profile": "10:13"}).profiled_steps) == [10, 11, 12]
    assert not resolve({}).profiled_steps


@pytest.mark.slow
def test_the_command_writes_a_trace_into_the_run_folder(trainer, tmp_path):
    run = trainer.train(tmp_path / "run", {"profile": "2:4", "train.steps": 5})
    assert run.exit_code == 0, run.errors
    assert traced_steps(tmp_path / "run" / "profile") == [2, 3]
    assert "profile of steps 2 to 3 in" in run.output


def test_the_command_refuses_a_wrong_range_in_one_line(trainer, tmp_path):
    run = trainer.train(tmp_path / "run", {"profile": "3-5"})
    assert run.exit_code == 2
    assert "profile = '3-5'" in assert_one_line_error(run.errors)
