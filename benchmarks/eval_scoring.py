"""Sentences of BLiMP a second: topklm's packed scoring beside lm-evaluation-harness' own model `hf`.

    python -m benchmarks.eval_scoring runs/small

Both get the same requests through the harness' adapter, take turns in one process on the same cores, and
start from text. `hf` has the same weights, float32, its batch size the best of some. Their log-likelihoods
are compared item by item. Needs the extras eval, peers and test. Writes
benchmarks/results/eval_scoring.json.
"""

import itertools
import pathlib
import time
from typing import Any

from lm_eval.api.instance import Instance
import numpy as np
import torch

from benchmarks.harness import results, timing
from benchmarks.peers import harness_model
import topklm
from topklm.eval import tasks
from topklm.eval.lm_eval import TopKLM

RESULT = results.FOLDER / "eval_scoring.json"
_BATCHES = (1, 8, 16, 32, 64, 128)  # 1 is the default of the harness


def main() -> None:
    """Measures, compares and writes the JSON."""
    parser = results.parser(__doc__)
    parser.add_argument("run", type=pathlib.Path, metavar="RUN")
    parser.add_argument(
        "--pairs", type=int, default=20, metavar="N", help="of a paradigm; default %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=RESULT, metavar="FILE")
    arguments = parser.parse_args()
    items = tasks.find("blimp", limit=arguments.pairs).items
    # In the order of the task: sorting them is a part of the work.
    pairs = [(item.context, choice) for item in items for choice in item.choices]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    lm = topklm.load(arguments.run)
    ours, seconds = TopKLM(model=lm), {}
    for batch_size in _BATCHES:
        theirs = harness_model.build(lm, batch_size)
        _score(theirs, requests[:64])
        began = time.perf_counter()
        _score(theirs, requests[:512])
        seconds[batch_size] = time.perf_counter() - began
    best = min(seconds, key=lambda size: seconds[size])
    theirs = harness_model.build(lm, best)
    found = [_score(model, requests) for model in (ours, theirs)]
    subjects = {
        "topklm": timing.timed(lambda: _score(ours, requests)),
        "hf": timing.timed(lambda: _score(theirs, requests)),
    }
    samples = timing.alternate(subjects, arguments.rounds, warmup=1, label="scoring")
    ratios = samples["topklm"].speedup_over(samples["hf"])
    nats = [np.array([one for one, _ in answers]) for answers in found]
    results.write(
        arguments.out,
        {
            "run": arguments.run.name,
            "settings": {
                "sentences": len(pairs),
                "tokens": sum(len(lm.tokenizer.encode(text)) for text in itertools.chain(*pairs)),
                "rounds": arguments.rounds,
                "hf_batch_size": best,
                "hf_seconds_of_512_by_batch_size": seconds,
                "torch": torch.__version__,
                "torch_threads": torch.get_num_threads(),
            },
            "sentences_per_second": {
                name: {"median": float(np.median(rates)), "rounds": rates}
                for name, sample in samples.items()
                for rates in [sample.rates(len(pairs))]
            },
            "times_as_fast": {"median": float(np.median(ratios)), "quartiles": timing.quartiles(ratios)},
            "largest_difference_nats": float(np.abs(nats[0] - nats[1]).max()),
            "differing_greedy": sum(a[1] != b[1] for a, b in zip(*found, strict=True)),
        },
    )


def _score(model: Any, requests: list[Instance]) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests, disable_tqdm=True)


if __name__ == "__main__":
    main()
