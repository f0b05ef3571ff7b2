"""Trains sparse autoencoders on synthetic hidden states, and scores their latents against the features.

    python -m benchmarks.sae_synthetic --scale 4 --samples 6_000_000 --seeds 0,1 --peer saelens/bin/python

The hidden states (`benchmarks.synthetic_features`) are drawn once, into a file, so that all autoencoders
see the same ones in the same order. `--peer` trains SAELens' of the same kinds, widths and k on them too
(`benchmarks.saelens_peer`), with each of its learning rates. Every autoencoder is scored on other
samples than it was trained on. Writes benchmarks/results/sae_synthetic.json after each one; an autoencoder of
the file is not trained again.
"""

from collections.abc import Iterator
import dataclasses
import json
from pathlib import Path
import subprocess
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks import synthetic_features
from benchmarks.harness import results
from benchmarks.synthetic_features import Scores, SyntheticModel
from topklm.neurons.dictionary import Dictionary
from topklm.sae import train
from topklm.sae.kinds import KINDS, SaeConfig

FILE = results.FOLDER / "sae_synthetic.json"
PEER_KINDS = ("topk", "batchtopk", "matryoshka", "jumprelu")
PEER_RATES = (3e-3,)  # better than 1e-3 in 400,000 samples; SynthSAEBench has 3e-4, for 200 million
BATCH, SCORED = 1024, 100  # samples of a batch, and batches
_PEER = Path(__file__).with_name("saelens_peer.py")


def main() -> None:
    """Trains and scores what is not in the file."""
    parser = results.parser(__doc__)
    parser.add_argument("--scale", type=int, default=4, help="1 is SynthSAEBench-16k")
    parser.add_argument("--samples", type=int, default=6_000_000)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--k", type=int, help="default 25 at scale 1")
    parser.add_argument("--states", type=Path, help="file of samples, kept for another time")
    parser.add_argument("--peer", help="a Python that has sae-lens")
    arguments = parser.parse_args()
    model = synthetic_features.make(arguments.scale)
    k = arguments.k or round(25 / arguments.scale)
    kinds, seeds = arguments.kinds.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.states or Path(folder) / "states.npy"
        states = _states(model, path, arguments.samples // BATCH)
        about = {"scale": arguments.scale, "samples": len(states), "width": model.width, "k": k}
        rows = results.read(FILE)["rows"] if FILE.exists() else []
        done = {json.dumps(row["how"], sort_keys=True) for row in rows}

        def add(how: dict[str, Any], made: tuple[Dictionary, float] | None) -> None:
            if made is not None:
                recovery = dataclasses.asdict(_score(model, made[0]))
                rows.append({"how": how, "seconds": made[1], **recovery})
                results.save(FILE, {"machine": results.describe_machine(), "rows": rows})
                print(json.dumps(rows[-1]), flush=True)

        for seed in seeds:
            for kind in kinds:
                config = SaeConfig(kind, model.width, k)
                how = {"system": "topklm", "kind": kind, "seed": seed, **about}
                how["learning_rate"] = config.learning_rate
                add(how, None if json.dumps(how, sort_keys=True) in done else _ours(config, states, seed))
            for kind in kinds if arguments.peer else ():
                for rate in PEER_RATES if kind in PEER_KINDS else ():
                    how = {"system": "sae-lens", "kind": kind, "seed": seed, **about, "learning_rate": rate}
                    if json.dumps(how, sort_keys=True) not in done:
                        add(how, _peers(arguments.peer, path, Path(folder), how))


def _states(model: SyntheticModel, path: Path, n_batches: int) -> np.ndarray:
    """Returns the hidden states of a file, float32[N, D], made where it is not there."""
    shape = n_batches * BATCH, model.vectors.shape[1]
    if not path.exists():
        part = path.with_suffix(".partial")
        to = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        for number in range(n_batches):
            to[number * BATCH : (number + 1) * BATCH] = model.sample(0, number, BATCH)[0]
        to.flush()
        part.rename(path)
    return np.load(path, mmap_mode="r")[: shape[0]]


def _ours(config: SaeConfig, states: np.ndarray, seed: int) -> tuple[Dictionary, float]:
    """Trains one of ours; returns it, and the seconds."""
    n_batches = len(states) // BATCH

    def batches(first: int) -> Iterator[np.ndarray]:
        for number in range(first, n_batches):
            yield states[None, number * BATCH : (number + 1) * BATCH]

    began = time.perf_counter()
    fitted = train.fit(config, batches, n_batches, seed=seed)
    return fitted.dictionary, time.perf_counter() - began


def _peers(python: str, states: Path, folder: Path, how: dict[str, Any]) -> tuple[Dictionary, float]:
    """Trains one of SAELens; returns it, and the seconds."""
    out = folder / "peer.npz"
    names = ("kind", "width", "k", "learning_rate", "samples", "seed")
    task = {**{name: how[name] for name in names}, "minibatch": BATCH, "out": str(out)}
    task["decay_steps"] = how["samples"] // BATCH // 5  # as ours
    ended = subprocess.run(
        [python, "-W", "ignore", str(_PEER), str(states)],
        input=json.dumps(task) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    with np.load(out) as found:
        arrays = {name: np.asarray(found[name], np.float32)[None] for name in found.files}
    made = Dictionary(
        "saelens",
        how["k"],
        arrays["b_dec"],
        arrays["W_enc"],
        arrays["W_dec"],
        bias=arrays["b_enc"],
        threshold=arrays.get("threshold"),
    )
    return made, json.loads(ended.stdout.splitlines()[1])["seconds"]


def _score(model: SyntheticModel, dictionary: Dictionary) -> synthetic_features.Recovery:
    scores = Scores(model, dictionary.decoder[0])
    code = jax.jit(lambda x: (codes := dictionary.encode(x[None]), dictionary.decode(codes))[:2])
    for number in range(SCORED):
        x, values = model.sample(1, number, BATCH)
        codes, reconstructed = (np.asarray(array[0]) for array in code(x))
        scores.add(np.asarray(x), reconstructed, codes, np.asarray(values))
    return scores.recovery()


if __name__ == "__main__":
    main()
