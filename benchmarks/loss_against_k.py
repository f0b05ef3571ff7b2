"""Held-out loss against the number of neurons kept at inference: one k for all tokens, and k by uncertainty.

python -m benchmarks.loss_against_k RUN... [--documents N] [--out docs/images/loss_against_k.svg]

A text is the beginning of a held-out document, as long as the context. "One k" runs the trained model with
another k in every TopK layer. "By uncertainty" is `topklm.inference.adaptive`: a token is run with the lower
k, and once more with the higher where the next token's entropy is above a threshold; its place on the axis is
the mean number of neurons kept. Intervals are of the mean over documents (bootstrap, 95 %).
"""

from collections.abc import Sequence
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress

from benchmarks.adaptive_losses import token_losses
from benchmarks.harness import pictures, results
from benchmarks.harness.pictures import COLOURS
import topklm
from topklm.inference.adaptive import AdaptiveK
from topklm.inference.language_model import LanguageModel
from topklm.neurons.documents import open_documents

RESULT = results.FOLDER / "loss_against_k.json"
THRESHOLDS = (0.5, 1.5, 2.5, 3.5, 4.5, 5.5)  # nats
RATIOS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2, 4)  # of the k in training
_ADAPTIVE = ((1 / 2, 1), (1, 2))  # lower and higher k, of the k in training
_RESAMPLES = 1000
_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Point:
    """One way to run the model."""

    k: float  # neurons kept at a token, on average
    loss: float  # nats per token, the mean over tokens
    low: float  # ends of the interval
    high: float
    threshold: float | None = None  # of the rule, in nats; None for one k


def main() -> None:
    """Writes benchmarks/results/loss_against_k.json and the picture."""
    parser = results.parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of TopK LMs, e.g. runs/small")
    parser.add_argument("--documents", type=int, default=32, help="of each run; default %(default)s")
    parser.add_argument("--out", type=Path, help="a picture, e.g. docs/images/loss_against_k.svg")
    parser.add_argument("--json", type=Path, default=RESULT, help="default %(default)s")
    arguments = parser.parse_args()
    found = {Path(run).name: measure(topklm.load(run), arguments.documents) for run in arguments.runs}
    result = {"benchmark": "loss_against_k", "runs": found}
    results.write(arguments.json, result, shown={})
    if arguments.out:
        draw(found, arguments.out)


def measure(model: LanguageModel, n_documents: int) -> dict[str, Any]:
    """Measures the points of a model."""
    trained_k, d = model.config.model.topk_k, model.config.model.d_model
    texts = beginnings(model, n_documents)
    ks = sorted({min(d, max(1, round(ratio * trained_k))) for ratio in RATIOS})
    rules = [
        (round(low * trained_k), AdaptiveK(min(d, round(high * trained_k)), threshold))
        for low, high in _ADAPTIVE
        for threshold in THRESHOLDS
    ]
    one_k, by_uncertainty = [], []
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loss against k", total=len(ks) + len(rules))
        for k in ks:
            one_k.append(_point(_losses(model, texts, k), float(k)))
            progress.advance(task)
        for low, rule in rules:
            config = dataclasses.replace(model.config.model, topk_k=low)
            parts = [token_losses(config, model.params, part, rule) for part in _batches(texts)]
            losses, kept = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
            by_uncertainty.append(_point(losses, float(kept.mean()), rule.entropy))
            progress.advance(task)
    return {
        "trained_k": trained_k,
        "d_model": d,
        "step": model.step,
        "tokens": int(texts[:, 1:].size),
        "documents": len(texts),
        "one_k": [dataclasses.asdict(point) for point in one_k],
        "by_uncertainty": [
            {**dataclasses.asdict(point), "low_k": low, "high_k": rule.high_k}
            for point, (low, rule) in zip(by_uncertainty, rules, strict=True)
        ],
    }


def beginnings(model: LanguageModel, n_documents: int) -> np.ndarray:
    """Returns a separator and the beginnings of held-out documents long enough, int32[n, context]."""
    context = model.config.model.context_length
    documents = open_documents(model.tokenizer, model.config.data)
    long_enough = (ids[: context - 1] for ids in documents if len(ids) >= context - 1)
    found = list(itertools.islice(long_enough, n_documents))
    if not found:
        raise SystemExit(f"{model.run}: no held-out document has {context - 1} tokens")
    separators = np.full((len(found), 1), model.tokenizer.separator_id)
    return np.concatenate([separators, np.stack(found)], axis=1).astype(np.int32)


def _losses(model: LanguageModel, texts: np.ndarray, k: int) -> np.ndarray:
    found = []
    for part in _batches(texts):
        log_p = jax.nn.log_softmax(model(part[:, :-1], topk_k=k), axis=-1)
        found.append(-np.take_along_axis(np.asarray(log_p), part[:, 1:, None], axis=-1)[..., 0])
    return np.concatenate(found)


def _batches(texts: np.ndarray) -> Sequence[np.ndarray]:
    return [texts[begin : begin + _BATCH] for begin in range(0, len(texts), _BATCH)]


def _point(losses: np.ndarray, k: float, threshold: float | None = None) -> Point:
    of_documents = losses.mean(axis=1)
    picks = np.random.default_rng(0).integers(0, len(of_documents), (_RESAMPLES, len(of_documents)))
    low, high = np.quantile(of_documents[picks].mean(axis=1), [0.025, 0.975])
    return Point(k, float(of_documents.mean()), float(low), float(high), threshold)


def draw(found: dict[str, dict[str, Any]], out: Path) -> None:
    """Writes the picture; its format is that of the file's ending."""
    figure, axes = pictures.panels(
        1, len(found), figsize=(4.8 * len(found), 3.8), layout="constrained", squeeze=False
    )
    for axis, (run, of_run) in zip(axes[0], found.items(), strict=True):
        k, loss, low, high = (
            np.array([p[name] for p in of_run["one_k"]]) for name in ("k", "loss", "low", "high")
        )
        axis.plot(k, loss, color=COLOURS[0], marker="o", markersize=4, label="one k for all tokens")
        axis.fill_between(k, low, high, color=COLOURS[0], alpha=0.12, linewidth=0)
        pairs = sorted({(p["low_k"], p["high_k"]) for p in of_run["by_uncertainty"]})
        for (low_k, high_k), colour in zip(pairs, COLOURS[1:3], strict=True):
            mine = [p for p in of_run["by_uncertainty"] if (p["low_k"], p["high_k"]) == (low_k, high_k)]
            axis.plot(
                *np.array([(p["k"], p["loss"]) for p in mine]).T,
                color=colour,
                marker="s",
                markersize=4,
                label=f"{low_k}, or {high_k} where uncertain",
            )
        axis.axvline(of_run["trained_k"], color="#888888", linewidth=0.8, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_xticks(k, [f"{x:g}" for x in k])
        axis.minorticks_off()
        axis.set(title=f"{run} (trained with k = {of_run['trained_k']})")
        axis.set(xlabel="neurons kept at a token, mean", ylabel="held-out loss (nats per token)")
        axis.grid(axis="y", color="#e6e6e6")
        axis.legend(frameon=False)
    pictures.save(figure, out)


if __name__ == "__main__":
    main()
