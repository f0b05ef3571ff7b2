"""`topklm prepare` against `datasets.map(batched=True, num_proc=2)`: the same text, the same tokenizer.

python -m benchmarks.prepare 'books/*.jsonl.gz'

The peer's figure is that of `map` alone, without loading the text before it and without making shards of its
result after it; ours is the whole command, from the start of Python to a dataset on disk. Memory is the
proportional set size of all processes together. Needs the extras `bench` and `hf`.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import gzip
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import psutil

from benchmarks.harness import results
from topklm.data.documents import Problem
from topklm.data.sources import FileReader, find
from topklm.data.tokenizer import train_bpe

VOCAB_SIZE = 16_384
DOCUMENT_CHARS = 16_384  # about: books are cut at line ends, or 300 documents would be one batch
N_FILES = 8
CORES = 2
RESULT = results.FOLDER / "prepare.json"

_SAMPLE_SECONDS = 0.25  # reading a process's share of memory costs it milliseconds

PEER = """
import json, sys, time
import datasets, pyarrow.compute, tokenizers
datasets.disable_progress_bars()
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
text = datasets.load_dataset("json", data_files=sys.argv[3:], split="train", cache_dir=sys.argv[2])

def encode(batch):
    return {"ids": [e.ids for e in tokenizer.encode_batch_fast(batch["text"])]}

began = time.perf_counter()
ids = text.map(encode, batched=True, num_proc=2, remove_columns=text.column_names)
seconds = time.perf_counter() - began
tokens = pyarrow.compute.sum(pyarrow.compute.list_value_length(ids.data["ids"])).as_py()
print(json.dumps({"seconds": seconds, "tokens": tokens}))
"""


@dataclasses.dataclass(frozen=True)
class _Measured:
    """One run of a command."""

    seconds: float
    peak_bytes: int  # proportional set size summed over the process tree, highest of all samples
    output: str


def main() -> None:
    """Writes benchmarks/results/prepare.json."""
    parser = results.parser(__doc__)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = _cut(arguments.sources, folder)
        tokenizer = folder / "tokenizer.json"
        train_bpe(_texts(files[:1]), VOCAB_SIZE).save(tokenizer)
        runs = []
        for repeat in range(arguments.repeats):
            runs.append(
                {
                    "ours": _ours(files, tokenizer, folder / f"ours-{repeat}"),
                    "peer": _peer(files, tokenizer, folder / f"peer-{repeat}"),
                }
            )
            print(json.dumps(runs[-1]), flush=True)
        ten_times = _ours(_ten_times(files, folder / "ten"), tokenizer, folder / "ours-ten")
    speed = {name: _median(runs, name, "tokens_per_second") for name in ("ours", "peer")}
    memory = {name: _median(runs, name, "peak_bytes") for name in ("ours", "peer")}
    result = {
        "text_bytes": _median(runs, "ours", "utf8_bytes"),
        "cores": CORES,
        "runs": runs,
        "tokens_per_second": speed,
        "peak_bytes": memory,
        "speed_ratio": speed["ours"] / speed["peer"],
        "memory_ratio": memory["ours"] / memory["peer"],
        "ten_times_the_text": ten_times,
        "memory_growth_for_ten_times_the_text": ten_times["peak_bytes"] / memory["ours"],
    }
    results.write(RESULT, result, shown={**result, "runs": None})


def _median(runs: list[dict[str, Any]], name: str, figure: str) -> float:
    return statistics.median(run[name][figure] for run in runs)


def _ours(files: list[Path], tokenizer: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "topklm", "prepare", *map(str, files), "--out", str(out), "--json"]
    options = ["--tokenizer", str(tokenizer), "--workers", str(CORES), "--keep-duplicates"]
    measured = _measure([*command, *options])
    splits = json.loads(measured.output)["splits"].values()
    tokens = sum(split["text_tokens"] for split in splits)
    return {
        "seconds": measured.seconds,
        "tokens": tokens,
        "utf8_bytes": sum(split["utf8_bytes"] for split in splits),
        "tokens_per_second": tokens / measured.seconds,
        "peak_bytes": measured.peak_bytes,
    }


def _peer(files: list[Path], tokenizer: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", PEER, str(tokenizer), str(cache), *map(str, files)]
    measured = _measure(command, {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    map_alone = json.loads(measured.output.splitlines()[-1])
    return {
        "seconds": map_alone["seconds"],
        "seconds_with_loading": measured.seconds,
        "tokens": map_alone["tokens"],
        "tokens_per_second": map_alone["tokens"] / map_alone["seconds"],
        "peak_bytes": measured.peak_bytes,
    }


def _measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> _Measured:
    """Runs a command to its end; raises CalledProcessError if it fails."""
    began = time.perf_counter()
    variables = {**os.environ, **(environment or {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        tree, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            peak = max(peak, _pss(tree))
            time.sleep(_SAMPLE_SECONDS)
        seconds = time.perf_counter() - began
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return _Measured(seconds, peak, output)


def _pss(tree: psutil.Process) -> int:
    total = 0
    try:
        members = [tree, *tree.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in members:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def _cut(sources: list[str], folder: Path) -> list[Path]:
    """Writes the text as N_FILES .jsonl.gz files of short documents."""
    paths = [folder / f"{i}.jsonl.gz" for i in range(N_FILES)]
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(gzip.open(path, "wt", compresslevel=4, encoding="utf-8")) for path in paths
        ]
        for number, text in enumerate(_short(_texts(find(sources)))):
            files[number % N_FILES].write(json.dumps({"text": text}) + "\n")
    return paths


def _ten_times(files: list[Path], folder: Path) -> list[Path]:
    """Links the same files under ten names each."""
    folder.mkdir()
    paths = [folder / f"{copy}-{file.name}" for file in files for copy in range(10)]
    for path in paths:
        path.hardlink_to(files[int(path.name.split("-")[1].split(".")[0])])
    return paths


def _texts(files: Any) -> Any:
    for file in files if not isinstance(files[0], Path) else find([str(file) for file in files]):
        yield from (item.text for item in FileReader(file, "text") if not isinstance(item, Problem))


def _short(texts: Any) -> Any:
    for text in texts:
        start = 0
        while start < len(text):
            cut = text.find("\n", start + DOCUMENT_CHARS)
            stop = len(text) if cut < 0 else cut + 1
            if text[start:stop].strip():
                yield text[start:stop]
            start = stop


if __name__ == "__main__":
    main()
