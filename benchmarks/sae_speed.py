"""Times the training of sparse autoencoders against SAELens': the same hidden states, shapes and minibatches.

    python -m benchmarks.sae_speed --peer saelens/bin/python

Both train one autoencoder on the same float32 hidden states, which lie in memory (of a language model's layer
they would have to be computed first, by both). The two take turns; a round of ours is `train.fit` on so many
samples, its start included, after one that compiles; one of SAELens is its trainer's `fit`. AuxK idles in
both. Writes benchmarks/results/sae_speed.json: samples a second, and the ratio of each round.
"""

import json
from pathlib import Path
import subprocess
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.harness import results, timing
from topklm.sae import train
from topklm.sae.kinds import SaeConfig

KINDS = ("topk", "batchtopk", "matryoshka", "jumprelu")
# D, M, k.
SHAPES = ((256, 1024, 32), (512, 2048, 32))
MINIBATCH = 1024
_NEVER = 10**9  # tokens after which a code is dead: AuxK idles, as that of SAELens does for 1,000 steps
_PEER = Path(__file__).with_name("saelens_peer.py")


def main() -> None:
    """Times every kind in every shape, and writes the JSON."""
    parser = results.parser(__doc__)
    parser.add_argument("--peer", required=True, help="a Python that has sae-lens")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--minibatches", type=int, default=48, help="of a round")
    arguments = parser.parse_args()
    rows, versions = list[dict[str, Any]](), {}
    for d, width, k in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "states.npy"
            np.save(path, _states(arguments.minibatches * MINIBATCH, d, width))
            states = np.load(path)
            command = [arguments.peer, "-W", "ignore", str(_PEER), str(path)]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as peer:
                assert peer.stdin and peer.stdout
                versions = json.loads(peer.stdout.readline())
                for kind in KINDS:
                    seconds: dict[str, list[float]] = {"topklm": [], "sae-lens": []}
                    for number in range(arguments.rounds + 1):
                        config = SaeConfig(kind, width, k, minibatch=MINIBATCH, dead_tokens=_NEVER)
                        ours = _ours(config, states, number)
                        theirs = _theirs(peer, kind, width, k, len(states), number)
                        if number:  # the first of ours compiles
                            seconds["topklm"].append(ours)
                            seconds["sae-lens"].append(theirs)
                    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
                    rates = {name: len(states) / float(np.median(x)) for name, x in seconds.items()}
                    rows.append(
                        {
                            "kind": kind,
                            "d": d,
                            "width": width,
                            "k": k,
                            "samples": len(states),
                            "samples_per_second": rates,
                            "ratio": float(np.median(ratios)),
                            "ratio_quartiles": timing.quartiles(ratios),
                            "seconds": seconds,
                        }
                    )
                    print(json.dumps({name: rows[-1][name] for name in ("kind", "d", "ratio")}), flush=True)
                peer.stdin.close()
    results.write(results.FOLDER / "sae_speed.json", {"peer": versions, "rows": rows}, shown={})


def _states(n: int, d: int, width: int) -> np.ndarray:
    """Draws hidden states float32[N, D] that sums of a few of so many directions make."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((width, d)).astype(np.float32) / np.sqrt(d)
    codes = rng.exponential(size=(n, 8)).astype(np.float32)
    return np.einsum("nk,nkd->nd", codes, rows[rng.integers(width, size=(n, 8))])


def _ours(config: SaeConfig, states: np.ndarray, seed: int) -> float:
    batches = [states[None, at : at + MINIBATCH] for at in range(0, len(states), MINIBATCH)]
    began = time.perf_counter()
    train.fit(config, batches, len(batches), seed=seed)
    return time.perf_counter() - began


def _theirs(peer: Any, kind: str, width: int, k: int, samples: int, seed: int) -> float:
    task = {"kind": kind, "width": width, "k": k, "samples": samples, "seed": seed}
    print(json.dumps({**task, "minibatch": MINIBATCH, "learning_rate": 1e-3}), file=peer.stdin, flush=True)
    return json.loads(peer.stdout.readline())["seconds"]


if __name__ == "__main__":
    main()
