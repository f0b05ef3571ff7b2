"""What several test files share: a small corpus, the tiny model's trainer, and one finished run of it."""

import collections
import json
import os
from pathlib import Path
import shutil
import signal

import damage
from helpers import FAST_COMPILATION, Trainer, made_once, sentences, write_documents
import hypothesis
import jax
import pytest

from topklm.runtime import compilation_cache

# Where libtpu is installed to compile for TPUs, JAX would look for one, in processes that tests start too.
jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))

# Before JAX looks for devices, which is when XLA reads it. Empty: as for users.
os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)

# A shell lets its background jobs ignore Ctrl-C, and what is tested would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests assert no wall-clock times, and a busy disk may take longer than hypothesis's 200 ms.
hypothesis.settings.register_profile("by day", deadline=None, max_examples=40)
hypothesis.settings.register_profile("at night", deadline=None)


# Seconds that each file took when it was last recorded, with `pytest -n 2 --record-durations`.
DURATIONS_FILE = Path(__file__).with_name("durations.json")


def pytest_addoption(parser):
    """Adds the option that records durations."""
    parser.addoption(
        "--record-durations", action="store_true", help=f"write what each file took to {DURATIONS_FILE.name}"
    )


def pytest_configure(config):
    """Chooses how much is tried, and records durations in the process that hears of all tests."""
    hypothesis.settings.load_profile("at night" if config.option.markexpr else "by day")
    if config.option.record_durations and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(DurationsRecorder(config.rootpath))


def pytest_xdist_auto_num_workers():
    """Starts one worker more than there are cores with `-n auto`: tests of processes wait for them."""
    return len(os.sched_getaffinity(0)) + 1


class DurationsRecorder:
    """Sums up what the tests of each file took; files that did not run keep what they had."""

    def __init__(self, root: Path):
        self._root = root
        self._seconds: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report):
        """Adds the setup, call or teardown of a test."""
        self._seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_sessionfinish(self):
        """Writes the sums, without the files that there are no more."""
        recorded = json.loads(DURATIONS_FILE.read_text()) | {k: round(s, 1) for k, s in self._seconds.items()}
        kept = {name: seconds for name, seconds in recorded.items() if (self._root / name).exists()}
        DURATIONS_FILE.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def pytest_collection_modifyitems(config, items):
    """Begins with the files that take longest; leaves tests marked slow out, unless asked for a mark.

    A worker that comes to a long file last would work alone for minutes.
    """
    seconds = json.loads(DURATIONS_FILE.read_text())
    items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], 0.0))
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
def session_folder(tmp_path_factory) -> Path:
    """The folder that all workers of a session share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(session_folder) -> Path:
    """The XDG_CACHE_HOME in which all workers, and trainers that they start, find what one has compiled.

    The user's own is neither read nor written.
    """
    cache = session_folder / "compiled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        compilation_cache.enable()
    return cache


@pytest.fixture(scope="session")
def corpus(session_folder) -> Path:
    """A .jsonl file of 300 documents, some 75 kB, and one more that is not valid UTF-8."""

    def make(folder: Path) -> None:
        with write_documents(folder / "village.jsonl", sentences(0, 300)).open("ab") as file:
            file.write(b'\n{"text": "The miller\xff smiled\xfe."}\n')

    return made_once(session_folder / "corpus", make) / "village.jsonl"


@pytest.fixture(scope="session")
def trainer(session_folder, compiled_programs, corpus) -> Trainer:
    """Trains the tiny model. Programs compiled by one process are reused by the next."""
    return Trainer(corpus, session_folder / "datasets", compiled_programs)


@pytest.fixture(scope="session")
def finished_run(session_folder, trainer) -> Path:
    """A run that nobody disturbed, with all its checkpoints; not to be changed. Its output lies beside."""

    def make(folder: Path) -> None:
        run = folder / "undisturbed"
        process = trainer.run(run, {"data.dir": folder / "datasets"})
        assert process.exit_code == 0, process.errors
        assert process.errors == ""
        run.with_suffix(".out").write_text(process.output)

    return made_once(session_folder / "finished", make) / "undisturbed"


@pytest.fixture
def run_copy(tmp_path, finished_run) -> Path:
    """The finished run, to be changed at will."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


@pytest.fixture(scope="module")
def small_batches():
    """Batches of 256 tokens, so that a few texts are several of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("topklm.neurons.documents._BATCH_TOKENS", 256)
        yield
