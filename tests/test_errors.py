"""The parts of an error, and the line that they make."""

import os
import pickle
import signal

import pytest

from topklm.errors import ArgumentError, Terminated, UserError, signals_wait, sigterm_unwinds


def test_a_value_stands_with_its_field_the_allowed_values_and_advice():
    error = UserError(field="--port", value=99_999, allowed="from 0 to 65535", advice="choose another")
    assert str(error) == "--port = 99999: must be from 0 to 65535; choose another"
    assert (error.field, error.text) == ("--port", "must be from 0 to 65535; choose another")


def test_none_is_a_value_like_others():
    assert str(UserError("cannot be read", field="seed", value=None)) == "seed = None: cannot be read"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("is empty: type a few words", "prompt is empty: type a few words"),
        ("has 33 tokens: must be at most 32", "prompt has 33 tokens: must be at most 32"),
        ("token 257 must be below 257", "prompt: token 257 must be below 257"),
    ],
)
def test_without_a_value_the_text_reads_on_from_the_field(text, line):
    assert str(UserError(text, field="prompt")) == line


def test_a_sentence_stands_alone():
    error = UserError("give one of TEXT, --regex and --token")
    assert (str(error), error.field) == ("give one of TEXT, --regex and --token", "")


def test_a_field_has_another_name_for_another_reader():
    error = ArgumentError(field="top_p", value=7.0, allowed="above 0, and at most 1")
    assert str(error.named("--top-p")) == "--top-p = 7.0: must be above 0, and at most 1"
    assert str(ArgumentError("is empty", field="prompt").named("PROMPT")) == "PROMPT is empty"


def test_what_is_wrong_inside_of_a_field_is_said_of_the_field_and_named_once():
    inner = UserError("b was prepared with another tokenizer", field="data.mixture")
    assert str(inner.within("data.mixture", "'a:1,b:1'")) == (
        "data.mixture = 'a:1,b:1': b was prepared with another tokenizer"
    )
    other = UserError("there is no such folder", field="b")
    assert str(other.within("data.mixture")) == "data.mixture: b: there is no such folder"


def test_an_error_of_an_argument_is_a_value_error_for_python_and_a_mistake_for_commands():
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ArgumentError, UserError)


@pytest.mark.parametrize("kind", [UserError, ArgumentError])
def test_an_error_of_a_worker_arrives_with_its_parts(kind):
    error = pickle.loads(pickle.dumps(kind(field="a", value=1, allowed="2", advice="give 2")))
    assert (type(error), str(error)) == (kind, "a = 1: must be 2; give 2")
    assert str(error.named("b")) == "b = 1: must be 2; give 2"
    assert str(pickle.loads(pickle.dumps(kind("is empty", field="a"))).named("b")) == "b is empty"


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_signals_wait_until_the_end_of_a_block(number, raised):
    done = False
    with sigterm_unwinds():
        with pytest.raises(raised) as caught, signals_wait():
            os.kill(os.getpid(), number)
            done = True
        assert done and caught.type is raised
        with pytest.raises(raised):  # handlers are there again
            signal.raise_signal(number)
