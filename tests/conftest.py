"""What several test files share: a small corpus, the tiny model's trainer, and one finished run of it."""

import os
from pathlib import Path
import shutil
import signal

import damage
from helpers import FAST_COMPILATION, Trainer, sentences, write_documents
import hypothesis
import jax
import pytest

# Where libtpu is installed to compile for TPUs, JAX would look for one, in processes that tests start too.
jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))

# Before JAX looks for devices, which is when XLA reads it. Empty: as for users.
os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)

# A shell lets its background jobs ignore Ctrl-C, and what is tested would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests assert no wall-clock times, and a busy disk may take longer than hypothesis's 200 ms.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


# Files that take longest begin first: a worker that comes to one last would work alone for minutes.
LONGEST_FIRST = (
    "test_kill_and_resume.py",
    "test_step.py",
    "test_code_quality.py",
    "test_transformer.py",
    "test_prepare_command.py",
    "test_browser.py",
    "test_neurons_command.py",
    "test_restore_in_colab.py",
    "test_steer.py",
    "test_engine.py",
    "test_readme.py",
    "test_generation.py",
)


def pytest_collection_modifyitems(config, items):
    """Orders files by how long they take; leaves tests marked slow out, unless asked for a mark."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    if not config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))


def pytest_runtest_teardown(item):
    """Notes in the report how many things a test has tried: damages, or examples."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    tried = damage.COUNT.pop("tried", 0) + parameters.get("examples", 0)
    if tried:
        item.user_properties.append(("tried", tried))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A .jsonl file of 300 documents, some 75 kB, and one more that is not valid UTF-8."""
    path = write_documents(tmp_path_factory.mktemp("corpus") / "village.jsonl", sentences(0, 300))
    with path.open("ab") as file:
        file.write(b'\n{"text": "The miller\xff smiled\xfe."}\n')
    return path


@pytest.fixture(scope="session")
def trainer(tmp_path_factory, corpus) -> Trainer:
    """Trains the tiny model. Programs compiled by one process are reused by the next."""
    place = tmp_path_factory.mktemp("trainer")
    return Trainer(corpus, place / "datasets", place / "compiled")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, trainer) -> Path:
    """A run that nobody disturbed, with all its checkpoints; not to be changed. Its output lies beside."""
    place = tmp_path_factory.mktemp("runs")
    run = place / "undisturbed"
    process = trainer.run(run, {"data.dir": place / "datasets"})
    assert process.exit_code == 0, process.errors
    assert process.errors == ""
    run.with_suffix(".out").write_text(process.output)
    return run


@pytest.fixture
def run_copy(tmp_path, finished_run) -> Path:
    """The finished run, to be changed at will."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))
