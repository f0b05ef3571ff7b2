"""The cost of looking at the neurons of a run: to harvest, to store, to measure and to write pages.

python -m benchmarks.bench_neuron_pages RUN [--tokens N] [--peer-python PATH]

- `run_with_cache` over calling the model, on 4,096 tokens.
- Harvest over the plain forward pass: both go over the same batches in turns. Plain means the compiled model
  alone, from token ids on the host to next-token losses on the host; harvest is all of
  `topklm.neurons.harvest.harvest`: cutting and packing documents, the model, fetching, sorting, compressing
  and writing. Documents are held as token ids beforehand.
- Bytes of the store for each activation in it.
- Pages of all neurons a minute, from the store and the statistics, as one HTML file, as JSON and as
  Neuronpedia's files; of the statistics themselves; and of both together.
- The same neurons by `sae-dashboard` (https://pypi.org/project/sae-dashboard/) where a Python that has it is
  given: the same activations and tokens, cut into prompts of 128 (`benchmarks.sae_dashboard_pages`). For a
  page it measures and writes; its figures are fewer, so it is compared with our statistics
  without ablation, and with all of them. In a virtual environment of its own it installs with
  `pip install sae-dashboard "pyarrow<22"`; a torchvision that is not of the same build as torch must go.

Nothing is written into RUN.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import json
from pathlib import Path
import shutil
import tempfile
from typing import Any

import jax

from benchmarks import sae_dashboard_peer
from benchmarks.harness import results, timing
from benchmarks.harness.timing import Samples, Subject
from benchmarks.neuron_harvest import Held, against_forward, capture_against_forward
import topklm
from topklm.checkpoint.run_folder import CONFIG_FILE, TOKENIZER_FILE
from topklm.config import MeshConfig
from topklm.explorer import neuronpedia, views
from topklm.explorer import pages as html
from topklm.explorer.neuron_data import NeuronData
from topklm.inference.language_model import LanguageModel
from topklm.layout import make_layout
from topklm.neurons import MeasureSettings, NeuronsFolder
from topklm.neurons.documents import open_documents
from topklm.neurons.statistics.catalog import Inputs
from topklm.neurons.statistics.table import measure
from topklm.neurons.store import Store
from topklm.progress import Progress

RESULT = results.FOLDER / "neuron_pages.json"
TARGETS = {
    "capture_over_forward": 1.1,
    "harvest_over_forward": 1.15,
    "bytes_per_activation": 4.0,
    "pages_per_minute": 5000.0,
}

_SILENT = Progress(lambda text: None)
_WITHOUT_ABLATION = MeasureSettings(ablation_samples=0)


def main() -> None:
    """Writes benchmarks/results/neuron_pages.json."""
    parser = results.parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder, e.g. runs/small")
    parser.add_argument("--tokens", type=int, default=200_000, help="default %(default)s")
    parser.add_argument(
        "--source", help="text, as of topklm neurons harvest; default the run's held-out text"
    )
    parser.add_argument("--repeats", type=int, default=5, help="default %(default)s")
    parser.add_argument("--measure-repeats", type=int, default=3, help="of statistics; default %(default)s")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has sae-dashboard")
    parser.add_argument("--result", type=Path, default=RESULT, help="default %(default)s")
    arguments = parser.parse_args()
    layout = make_layout(MeshConfig(), jax.local_devices())
    model = topklm.load(arguments.run, mesh=layout.mesh)
    documents = _held(model, arguments.source, arguments.tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = _folder(Path(name), Path(arguments.run), model.step)
        harvested = against_forward(model, layout, documents, folder, arguments.repeats)
        store = Store(folder.store)
        measured = _measure(model, store, folder, arguments.measure_repeats)
        written, facts = _write(model, store, folder, Path(name), arguments.repeats, arguments.peer_python)
        n_neurons = len(store.metadata.layers) * store.metadata.d_model
        result = {
            "model": dataclasses.asdict(model.config.model),
            "text": documents.name,
            "n_tokens": store.n_tokens,
            "n_neurons": n_neurons,
            "targets": TARGETS,
            "capture": capture_against_forward(model, arguments.repeats),
            "harvest": harvested,
            "store": _size(store),
            "pages": _pages(measured, written, n_neurons, facts),
        }
    results.write(arguments.result, result)


def _held(model: LanguageModel, source: str | None, n_tokens: int) -> Held:
    documents = open_documents(model.tokenizer, model.config.data, source)
    ids, n = [], 0
    for document in documents:
        ids.append(document)
        n += len(document)
        if n >= n_tokens:
            break
    return Held(documents.name, n, ids)


def _folder(place: Path, run: Path, step: int) -> NeuronsFolder:
    """Makes a run folder with the files that pages need, and no neurons yet."""
    (place / "run").mkdir()
    for name in (CONFIG_FILE, TOKENIZER_FILE):
        shutil.copy(run / name, place / "run" / name)
    return NeuronsFolder(place / "run", step)


def _size(store: Store) -> dict[str, Any]:
    n_bytes = _bytes_under(store.folder)
    return {
        "bytes": n_bytes,
        "activations": store.n_events,
        "bytes_per_activation": n_bytes / max(store.n_events, 1),
    }


def _measure(model: LanguageModel, store: Store, folder: NeuronsFolder, repeats: int) -> dict[str, Samples]:
    """Measures again and again; the table with all figures stays where it belongs."""

    def side(settings: MeasureSettings, path: Path) -> Subject:
        return timing.timed(
            # New inputs each time, for they keep what they have computed.
            lambda: measure(
                path,
                Inputs(store, model.cfg, model.params, model.tokenizer.separator_id, settings, _SILENT),
            )
        )

    subjects = {
        "without ablation": side(_WITHOUT_ABLATION, folder.path / "less.parquet"),
        "all figures": side(MeasureSettings(), folder.table),
    }
    # A call before the first that counts, for what is compiled.
    return timing.alternate(subjects, repeats, warmup=1, label="statistics")


def _write(
    model: LanguageModel,
    store: Store,
    folder: NeuronsFolder,
    place: Path,
    repeats: int,
    peer_python: str | None,
) -> tuple[dict[str, Samples], dict[str, Any]]:
    """Writes all pages in turns with the peer, if there is one; says what was written."""
    subjects: dict[str, Subject] = {
        "HTML": timing.timed(lambda: html.export(NeuronData(folder), place / "neurons.html")),
        "JSON": timing.timed(functools.partial(_write_json, folder, place / "neurons.jsonl")),
        "Neuronpedia": functools.partial(_write_neuronpedia, folder, place / "neuronpedia"),
    }
    with contextlib.ExitStack() as stack:
        facts: dict[str, Any] = {}
        if peer_python:
            handed = place / "peer"
            expected = sae_dashboard_peer.hand_over(model, store, handed)
            peer = stack.enter_context(sae_dashboard_peer.Peer(peer_python, handed))
            subjects["sae-dashboard"] = peer.run
            facts = {"versions": peer.versions}
        samples = timing.alternate(subjects, repeats, warmup=1, label="pages")
        if peer_python:
            facts |= sae_dashboard_peer.check(handed, expected)
    paths = {
        "HTML": place / "neurons.html",
        "JSON": place / "neurons.jsonl",
        "Neuronpedia": place / "neuronpedia",
        "sae-dashboard": place / "peer" / "pages",
    }
    n_examples = sum(map(len, filter(None, NeuronData(folder).rows["examples"].to_pylist())))
    n_bytes = {name: _bytes_under(paths[name]) for name in subjects}
    return samples, {"n_examples": n_examples, "peer": facts, "bytes": n_bytes}


def _write_json(folder: NeuronsFolder, path: Path) -> None:
    """Writes a line for each neuron, of all that its page shows."""
    source = NeuronData(folder)
    with path.open("w", encoding="utf-8") as file:
        for number in range(source.n_neurons):
            file.write(json.dumps(views.neuron(source, *source.place(number))) + "\n")


def _write_neuronpedia(folder: NeuronsFolder, out: Path, calls: int) -> float:
    def write() -> None:
        neuronpedia.export(NeuronData(folder), out, model_id="benchmark")

    seconds = 0.0
    for _ in range(calls):
        shutil.rmtree(out, ignore_errors=True)
        seconds += timing.timed(write)(1)
    return seconds


def _pages(
    measured: Mapping[str, Samples], written: Mapping[str, Samples], n_neurons: int, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Computes the pages a minute of every way to get them."""
    both = {
        f"statistics ({settings}) and {name}": measured[settings].median + samples.median
        for settings in measured
        for name, samples in written.items()
        if name != "sae-dashboard"
    }
    seconds = {name: samples.median for name, samples in written.items()} | both
    seconds |= {f"statistics ({name})": samples.median for name, samples in measured.items()}
    result: dict[str, Any] = {
        "per_minute": {name: 60 * n_neurons / s for name, s in seconds.items()},
        "seconds": {name: samples.seconds for name, samples in written.items()},
        "statistics_seconds": {name: samples.seconds for name, samples in measured.items()},
        "n_examples": facts["n_examples"],
        "bytes": facts["bytes"],
    }
    if "sae-dashboard" in written:
        theirs = written["sae-dashboard"].median
        result["peer"] = {
            **facts["peer"],
            "times_as_fast": {name: theirs / s for name, s in seconds.items() if name != "sae-dashboard"},
        }
    return result


def _bytes_under(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


if __name__ == "__main__":
    main()
