"""What a run came to, from what is on disk: the rows of the table that is printed at its end."""

from collections.abc import Callable
from typing import Any

from topklm.config import Config
from topklm.storage.files import AnyPath
from topklm.training import metrics
from topklm.training.console import duration, percentages


def summary(folder: AnyPath, step: int) -> dict[str, Any]:
    """Label -> text, of the newest figures of a run whose newest checkpoint is that of `step`."""
    newest: dict[str, Any] = {}
    for line in metrics.read(folder):
        newest |= line
    formats: dict[str, tuple[str, Callable[[Any], str]]] = {
        "tokens_seen": ("tokens seen", "{:,}".format),
        "seconds_trained": ("time in training steps", duration),
        "goodput": ("share of the time since the run began", "{:.1%}".format),
        "train/loss": ("last train loss, nats/token", "{:.4f}".format),
        "eval/loss": ("held-out loss, nats/token", "{:.4f}".format),
        "eval/perplexity": ("held-out perplexity", "{:.2f}".format),
        "eval/bits_per_byte": ("held-out bits per byte", "{:.4f}".format),
        "eval/of_tokens": (
            f"held-out figures are of {newest.get('eval/tokens', 0):,} tokens of",
            "{:,}".format,
        ),
        "eval/dead_neurons": ("dead neurons, per TopK layer", percentages),
        "eval/norm_kept": ("squared norm kept, per TopK layer", percentages),
        "eval/overlap_below": ("active in the layer below too", percentages),
    }
    rows = {label: show(newest[key]) for key, (label, show) in formats.items() if key in newest}
    example = f'topklm.load("{folder}").generate("The", max_new_tokens=40)'
    return {"steps": f"{step:,}", **rows, "read it": example}


def describe_model(config: Config) -> str:
    """Such as "4 layers, TopK keeps 32 of 256 (relu) in 3 of them"."""
    m = config.model
    sparse = f"TopK keeps {m.topk_k} of {m.d_model} ({m.topk_activation}) in {m.n_topk_layers}"
    return f"{m.n_layers} layers, {sparse if m.n_topk_layers else 'TopK in none'} of them"
