"""The statistics of a neuron as pages name, define and write them.

The definitions are ours: the paper names its entropies without giving formulas. What computes the figures is
`topklm.neurons.statistics`; this is the text beside them.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

MISSING = "\N{EN DASH}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One statistic.

    Attributes:
        name: Column of the statistics table.
        title: What pages call it.
        unit: Behind the value; empty for a plain number.
        kind: How it is written: "count", "share", "effect" (with a sign) or "number".
        definition: What it is, a sentence or two.
        first: Whether it stands in the overview's table unless all columns are asked for.
    """

    name: str
    title: str
    unit: str
    kind: str
    definition: str
    first: bool = False


_PLUG_IN = "Plug-in entropies are biased low where few activations were seen, which this adds back."

FIGURES: tuple[Figure, ...] = (
    Figure(
        "density",
        "Density",
        "of tokens",
        "share",
        "Share of the tokens at which the neuron is active. Over the neurons of a layer these add up to k at "
        "most.",
        first=True,
    ),
    Figure("n_active", "Active tokens", "tokens", "count", "Number of tokens at which the neuron is active."),
    Figure(
        "token_entropy_corrected",
        "Token entropy",
        "nats",
        "number",
        "Entropy of the input tokens, each weighted by its share of the neuron's whole activation, with "
        f"the Miller-Madow correction. {_PLUG_IN} exp of it is an effective number of tokens. "
        "0: one token only.",
        first=True,
    ),
    Figure(
        "semantic_entropy_corrected",
        "Semantic entropy",
        "nats",
        "number",
        "The same entropy after tokens with similar meaning are merged into clusters of an embedding, with "
        "the Miller-Madow correction. High token entropy with low semantic entropy: many words, one idea.",
        first=True,
    ),
    Figure(
        "monosemanticity",
        "Monosemanticity",
        "",
        "number",
        "Mean similarity of the contexts of two activations, weighted by both activations (scaled from 0 to "
        "1). To be read beside the shuffled value, which is what chance gives.",
        first=True,
    ),
    Figure(
        "monosemanticity_shuffled",
        "Monosemanticity, shuffled",
        "",
        "number",
        "The same score with the contexts dealt out anew: what chance gives.",
    ),
    Figure(
        "ablation_effect",
        "Ablation effect",
        "nats",
        "effect",
        "Measured mean change of the next token's loss when the neuron is set to 0 at a token at which it is "
        "active. Above 0: the model is worse without it.",
        first=True,
    ),
    Figure(
        "ablation_standard_error",
        "Ablation effect, standard error",
        "nats",
        "number",
        "Standard error of the mean of the ablation effect.",
    ),
    Figure(
        "ablation_samples",
        "Ablation samples",
        "tokens",
        "count",
        "At how many tokens the ablation effect was measured.",
    ),
    Figure(
        "max_activation",
        "Highest activation",
        "",
        "number",
        "The largest activation seen, in units of the hidden state.",
        first=True,
    ),
    Figure("mean_activation", "Mean activation", "", "number", "Mean over the tokens at which it is active."),
    Figure(
        "n_distinct_tokens",
        "Distinct tokens",
        "tokens",
        "count",
        "How many different input tokens it is active at.",
    ),
    Figure(
        "token_entropy",
        "Token entropy, plug-in",
        "nats",
        "number",
        "Token entropy without the correction for few activations: too low where few were seen.",
    ),
    Figure(
        "semantic_entropy",
        "Semantic entropy, plug-in",
        "nats",
        "number",
        "Semantic entropy without the correction for few activations: too low where few were seen.",
    ),
)
BY_NAME: Mapping[str, Figure] = {figure.name: figure for figure in FIGURES}

# What pages show besides the statistics of `FIGURES`, in the same words everywhere.
DEFINITIONS: Mapping[str, str] = {
    "Activation": "What the TopK layer hands on for this neuron at a token; 0 where the neuron is not among "
    "the k that are kept.",
    "Dead": "Never active on the sample; a rare neuron may be dead on a small one.",
    "Activation histogram": "Tokens at which the neuron is active, by activation: parts of equal width from "
    "0 to the highest.",
    "Input tokens": "Tokens at which it is active, by their share of its whole activation.",
    "Identity lens": "The output tokens that it raises and lowers most if what it writes went "
    "straight to the output: its row of the unembedding behind the final norm.",
    "Jacobian lens": "The same through the layers in between, linearised and averaged over tokens "
    "of the sample.",
    "Examples": "The strongest activations, then some from each fifth of the range from 0 to the highest, "
    "from different documents where there are enough.",
    "Similar by co-activation": "Neurons of the same layer that are active at the same tokens: cosine "
    "similarity.",
    "Similar by effect": "Neurons of the same layer that change the output alike: cosine similarity of their "
    "effects on the output tokens.",
}


def written(name: str, value: Any) -> str:
    """A value of a figure as pages show it, without its unit."""
    return write_as(BY_NAME[name].kind, value)


def write_as(kind: str, value: Any) -> str:
    """A value as text; a dash for one that there is not."""
    if value is None or not math.isfinite(value):
        return MISSING
    if kind == "count":
        return f"{int(value):,}"
    if kind == "share":
        return percent(value)
    if kind == "effect":
        digits = 4 if abs(value) < 1 else 2
        return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return short(value)


def percent(share: float) -> str:
    """0.0123 -> "1.23 %"."""
    return f"{_three_digits(100 * share)}\N{NO-BREAK SPACE}%"


def short(value: float) -> str:
    """Three digits, in a way that columns of such numbers can be compared by eye."""
    return _three_digits(value).replace("-", "\N{MINUS SIGN}")


def effective_number(entropy: float | None) -> float | None:
    """exp(H): over how many equally likely things an entropy of H nats would be."""
    return None if entropy is None else math.exp(entropy)


def _three_digits(value: float) -> str:
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 0.01:
        return f"{value:.2f}" if size >= 1 else f"{value:.3f}"
    return f"{value:.4f}" if size >= 0.001 else f"{value:.1e}"
