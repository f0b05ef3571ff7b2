"""The statistics of a neuron, one entry each: its name, unit, format and definition, and how it is computed.

The table of a run, pages and their tiles, sorting and filters, exports, `--json` and the definitions in
docs/neurons.md all read `STATISTICS`; a statistic is added by adding an entry. Each of their `Inputs` is
computed once, when a statistic first asks for it. The definitions are ours: the paper names its entropies
without giving formulas.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.neurons import MeasureSettings
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.statistics import ablation, activity, embeddings, lenses, selectivity
from topklm.neurons.store import NeuronBlock, Store
from topklm.progress import Progress

# The inputs that take long, in the order in which they are best computed: JAX averages the Jacobian while
# NumPy is busy with clusters and contexts, and nothing waits for it before the lenses.
SLOW = ("jacobians", "clusters", "monosemanticity", "lenses", "ablation")

COMMON = 20  # times that a token has to be seen, so that a lens is not led by rare pieces


@dataclasses.dataclass(eq=False)
class Inputs:
    """The store, the model, and everything that several neurons' statistics share."""

    store: Store  # of activations of this model
    config: ModelConfig
    params: transformer.Parameters  # on one device or a mesh
    separator_id: int  # of the tokenizer
    settings: MeasureSettings
    progress: Progress  # shows how far the slow inputs are
    # The store's activations are written in it. Logit effects are then those of its decoder's directions, and
    # nothing is set to 0. None: the hidden state's own coordinates
    dictionary: Dictionary | None = None
    # Embeddings of the text around each token by a sentence encoder, for semantic entropy and
    # monosemanticity; None: the model's own unembedding rows
    windows: embeddings.EncodedWindows | None = None
    _coactivation: tuple[int, np.ndarray] | None = dataclasses.field(default=None, init=False)

    @functools.cached_property
    def token_ids(self) -> np.ndarray:
        """uint[N], the tokens of the whole store."""
        return self.store.tokens(0, self.store.n_tokens)

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """int64[documents + 1], as `Store.document_bounds` gives them."""
        return self.store.document_bounds()

    @functools.cached_property
    def previous_ids(self) -> np.ndarray:
        """int64[N], the token before each, from `selectivity.previous`."""
        return selectivity.previous(self.token_ids, self.bounds)

    @functools.cached_property
    def common_ids(self) -> np.ndarray:
        """int[M], the tokens that the store holds at least `COMMON` times, rising."""
        counts = np.bincount(self.token_ids, minlength=self.config.vocab_size)
        return np.flatnonzero(counts[: self.config.vocab_size] >= COMMON)

    @functools.cached_property
    def unembedding(self) -> np.ndarray:
        """float32[D, V], without padding."""
        config = self.config
        columns = jax.jit(lambda params: transformer.bind(config, params).unembedding())(self.params)
        return np.asarray(columns)[:, : config.vocab_size]

    @functools.cached_property
    def jacobians(self) -> jax.Array:
        """float32[L, D, D], from `lenses.averaged_jacobians`."""
        n_contexts = self.settings.lens_contexts
        self.progress.say(f"averaging the Jacobian over {n_contexts:,} contexts")
        return lenses.averaged_jacobians(
            self.config,
            self.params,
            self.token_ids,
            self.bounds,
            separator_id=self.separator_id,
            n_contexts=n_contexts,
            seed=self.settings.seed,
        )

    @functools.cached_property
    def clusters(self) -> tuple[np.ndarray, np.ndarray | None]:
        """int[V], the cluster of each token; and int[N], that of each window, where windows are clustered."""
        vocab_size, n_clusters, seed = self.config.vocab_size, self.settings.n_clusters, self.settings.seed
        if self.windows is None:
            self.progress.say(f"clustering {vocab_size:,} tokens")
            return embeddings.cluster_tokens(self.unembedding, n_clusters, seed), None
        self.progress.say(f"clustering {self.store.n_tokens:,} windows")
        n_clusters = n_clusters or embeddings.default_count(vocab_size)
        return np.arange(vocab_size), self.windows.clusters(n_clusters, seed)

    @functools.cached_property
    def monosemanticity(self) -> Mapping[str, np.ndarray]:
        """Columns of all neurons, from `embeddings.monosemanticity`."""
        self.progress.say(f"comparing the contexts of {self.store.n_tokens:,} tokens")
        contexts: embeddings.Embeddings | None = self.windows
        if contexts is None:
            vectors = embeddings.token_vectors(self.unembedding)
            contexts = embeddings.Contexts(self.token_ids, self.bounds, vectors)
        return embeddings.monosemanticity(self.store, contexts, self.settings.seed)

    @functools.cached_property
    def lenses(self) -> lenses.Lenses:
        """Both lenses."""
        directions = None
        if self.dictionary is not None:
            shape = self.config.n_layers, *self.dictionary.decoder.shape[1:]
            directions = np.zeros(shape, np.float32)
            directions[list(self.store.metadata.layers)] = self.dictionary.decoder
        return lenses.make(self.config, self.params, self.jacobians, directions)

    @functools.cached_property
    def ablation(self) -> Mapping[str, np.ndarray]:
        """Columns of all neurons, from `ablation.measure`; NaN where nothing is set to 0."""
        metadata, samples = self.store.metadata, self.settings.ablation_samples
        # Of what was kept of a Base LM, the model does not know: it goes on with all of its hidden state.
        is_part = metadata.kind != "topk" and metadata.topk_k < metadata.d_model
        if not samples or is_part or self.dictionary is not None:
            return dict.fromkeys(ablation.COLUMNS, np.full((len(metadata.layers), metadata.d_model), np.nan))
        with self.progress.phase_by_share("setting neurons to 0") as report:
            return ablation.measure(
                metadata.layers,
                self.token_ids,
                self.bounds,
                self.config,
                self.params,
                separator_id=self.separator_id,
                samples=samples,
                seed=self.settings.seed,
                report=report,
            )

    def coactivation(self, layer: int) -> np.ndarray:
        """Computes the co-activations of a layer, float32[D, D]; those of the last layer are kept."""
        if self._coactivation is None or self._coactivation[0] != layer:
            self._coactivation = layer, activity.coactivation(self.store, layer)
        return self._coactivation[1]


@dataclasses.dataclass(frozen=True)
class Neurons:
    """Neighbouring neurons of a layer, which are measured together."""

    inputs: Inputs  # of all neurons
    layer: int  # of the model
    begin: int  # the first neuron
    end: int  # one after the last

    @functools.cached_property
    def block(self) -> NeuronBlock:
        """All their events."""
        return self.inputs.store.block(self.layer, self.begin, self.end)

    def of_all(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Takes their part out of columns of all neurons, [S, D] each."""
        number = self.inputs.store.metadata.layers.index(self.layer)
        return {name: figures[number, self.begin : self.end] for name, figures in columns.items()}


_F64, _I32, _I64 = pa.float64(), pa.int32(), pa.int64()
_NAME = re.compile(r"[a-z][a-z0-9_]*")

# Columns that say which neuron a row is of.
KEYS: Mapping[str, pa.DataType] = {"layer": _I32, "neuron": _I32}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A column of a table of neurons, as pages show it."""

    name: str  # its column in the table
    title: str  # its name on pages
    definition: str  # a few sentences
    _: dataclasses.KW_ONLY
    # How its number is written: "count", "share", "effect" (with a sign) or "number"; "" if it is no single
    # number, and then it stands in no table of neurons
    kind: str = ""
    unit: str = ""  # stands after the number; "" for none
    # Whether it is a tile of a neuron's page, and a column of the overview's table unless all are asked for
    first: bool = False
    # Stands below the number in its tile. {NAME} is the number of another statistic; n_tokens, n_clusters,
    # effective_tokens and effective_clusters are known too
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Statistic(Figure):
    """A statistic of a neuron."""

    # Computes columns of neighbouring neurons, by name, one value for each neuron; None or NaN where there is
    # none. Statistics that share this function share one call of it
    compute: Callable[[Neurons], Mapping[str, Any]]
    type: pa.DataType = _F64  # of its column
    # Further columns that belong to it, and their types
    more: Mapping[str, pa.DataType] = dataclasses.field(default_factory=dict)
    # Which of `SLOW` it reads, so that they are computed first and in their order
    needs: tuple[str, ...] = ()

    @property
    def columns(self) -> Mapping[str, pa.DataType]:
        """All its columns and their types."""
        return {self.name: self.type, **self.more}

    def described(self) -> dict[str, Any]:
        """Returns its names and definition, for programs."""
        return {
            "name": self.name,
            "columns": list(self.columns),
            "title": self.title,
            "unit": self.unit,
            "definition": self.definition,
        }


def _activity(neurons: Neurons) -> Mapping[str, Any]:
    return activity.columns(neurons.block, neurons.inputs.store.n_tokens)


def _entropy(neurons: Neurons) -> Mapping[str, Any]:
    return selectivity.columns(neurons.block, neurons.inputs.token_ids, *neurons.inputs.clusters)


def _variance(neurons: Neurons) -> Mapping[str, Any]:
    inputs = neurons.inputs
    return selectivity.variance_columns(
        neurons.block, inputs.token_ids, inputs.previous_ids, inputs.config.vocab_size
    )


def _monosemanticity(neurons: Neurons) -> Mapping[str, Any]:
    return neurons.of_all(neurons.inputs.monosemanticity)


def _ablation(neurons: Neurons) -> Mapping[str, Any]:
    return neurons.of_all(neurons.inputs.ablation)


def _lenses(neurons: Neurons) -> Mapping[str, Any]:
    return lenses.columns(neurons.inputs.lenses, neurons.layer, neurons.begin, neurons.end)


def _common_lenses(neurons: Neurons) -> Mapping[str, Any]:
    inputs = neurons.inputs
    return lenses.columns(inputs.lenses, neurons.layer, neurons.begin, neurons.end, inputs.common_ids)


def _similar_effect(neurons: Neurons) -> Mapping[str, Any]:
    return lenses.similar_columns(neurons.inputs.lenses, neurons.layer, neurons.begin, neurons.end)


def _coactivation(neurons: Neurons) -> Mapping[str, Any]:
    similarities = neurons.inputs.coactivation(neurons.layer)
    return activity.coactive_columns(similarities, neurons.begin, neurons.end)


def _examples(neurons: Neurons) -> Mapping[str, Any]:
    bounds, seed = neurons.inputs.bounds, neurons.inputs.settings.seed
    return activity.example_columns(neurons.block, bounds, neurons.layer, neurons.begin, seed)


_PLUG_IN = "without the correction for few activations: too low where few were seen."
_CONTEXT = "a context is the mean unembedding of the last 16 tokens, unless a sentence encoder was given"

# One computation each, with the slow inputs that it reads.
_of_activity = functools.partial(Statistic, compute=_activity)
_of_tokens = functools.partial(Statistic, compute=_entropy, needs=("clusters",))
_of_variance = functools.partial(Statistic, compute=_variance, kind="share", unit="of variance")
_of_contexts = functools.partial(Statistic, compute=_monosemanticity, needs=("monosemanticity",))
_of_ablation = functools.partial(Statistic, compute=_ablation, needs=("ablation",))
_of_common = functools.partial(
    Statistic, compute=_common_lenses, type=pa.list_(_I32), needs=("jacobians", "lenses")
)
_of_lenses = functools.partial(Statistic, compute=_lenses, type=pa.list_(_I32), needs=("jacobians", "lenses"))

STATISTICS: Sequence[Statistic] = (
    _of_activity(
        "density",
        "Density",
        "Share of the tokens at which the neuron is active. Over the neurons of a layer these add up to k at "
        "most.",
        kind="share",
        unit="of tokens",
        first=True,
        note="active at {n_active} of {n_tokens} tokens",
    ),
    _of_activity(
        "n_active",
        "Active tokens",
        "Number of tokens at which the neuron is active.",
        type=_I64,
        kind="count",
        unit="tokens",
    ),
    _of_tokens(
        "token_entropy_corrected",
        "Token entropy",
        "Entropy of the input tokens, each weighted by its share of the neuron's whole activation. exp of it "
        "is an effective number of tokens; 0: one token only. Plug-in entropies are biased low where few "
        "activations were seen; the Miller-Madow correction adds (m - 1) / 2n for m tokens seen in n "
        "activations.",
        kind="number",
        unit="nats",
        first=True,
        note="≈ {effective_tokens} tokens · plug-in {token_entropy}",
    ),
    _of_tokens(
        "semantic_entropy_corrected",
        "Semantic entropy",
        "The same entropy after tokens with similar meaning are merged into clusters of an embedding, with "
        "the same correction; by default clusters are k-means of the model's own unembedding rows, V / 16 of "
        "them. High token entropy with low semantic entropy: many words, one idea.",
        kind="number",
        unit="nats",
        first=True,
        note="≈ {effective_clusters} of {n_clusters} clusters · plug-in {semantic_entropy}",
    ),
    _of_variance(
        "by_token",
        "Explained by the token",
        "Share of the variance of the activation over tokens, zeros included, that the token read explains: "
        "one-way analysis of variance over tokens that occur at least "
        f"{selectivity.LEAST_IN_GROUP} times, corrected for their number. 1: the neuron is a lookup table of "
        "tokens; 0: it does not depend on the token. Of neurons active at "
        f"{selectivity.LEAST_ACTIVE} of these tokens or more.",
    ),
    _of_variance(
        "by_context",
        "Explained by the token before",
        "The same for the token before, in the same document.",
    ),
    _of_contexts(
        "monosemanticity",
        "Monosemanticity",
        "Mean cosine of the contexts of all pairs of tokens, weighted by the activations at both; "
        f"{_CONTEXT}. To be read beside the shuffled value, which chance gives.",
        kind="number",
        first=True,
        note="shuffled contexts: {monosemanticity_shuffled}",
    ),
    _of_contexts(
        "monosemanticity_shuffled",
        "Monosemanticity, shuffled",
        "The same score with the contexts permuted over the text: the value by chance.",
        kind="number",
    ),
    _of_ablation(
        "ablation_effect",
        "Ablation effect",
        "Measured mean change of the next token's loss when the neuron is set to 0 at one token at which it "
        "is active, over a sample of such tokens. Above 0: the model is worse without it.",
        kind="effect",
        unit="nats",
        first=True,
        note="± {ablation_standard_error} standard error, {ablation_samples} tokens",
    ),
    _of_ablation(
        "ablation_standard_error",
        "Ablation effect, standard error",
        "Standard error of the mean of the ablation effect.",
        kind="number",
        unit="nats",
    ),
    _of_ablation(
        "ablation_samples",
        "Ablation samples",
        "At how many tokens the ablation effect was measured.",
        type=_I32,
        kind="count",
        unit="tokens",
    ),
    _of_activity(
        "max_activation",
        "Highest activation",
        "The largest activation seen, in units of the hidden state.",
        kind="number",
        first=True,
        note="mean {mean_activation}",
    ),
    _of_activity(
        "mean_activation", "Mean activation", "Mean over the tokens at which it is active.", kind="number"
    ),
    _of_tokens(
        "n_distinct_tokens",
        "Distinct tokens",
        "How many different input tokens it is active at.",
        type=_I64,
        kind="count",
        unit="tokens",
    ),
    _of_tokens(
        "token_entropy", "Token entropy, plug-in", f"Token entropy {_PLUG_IN}", kind="number", unit="nats"
    ),
    _of_tokens(
        "semantic_entropy",
        "Semantic entropy, plug-in",
        f"Semantic entropy {_PLUG_IN}",
        kind="number",
        unit="nats",
    ),
    _of_activity(
        "histogram",
        "Activation histogram",
        "Tokens at which the neuron is active, by activation: "
        f"{activity.HISTOGRAM_BINS} parts of equal width from 0 to the highest.",
        type=pa.list_(_I64),
    ),
    _of_tokens(
        "top_tokens",
        "Input tokens",
        "Tokens at which it is active, by their share of its whole activation.",
        type=pa.list_(_I32),
        more={"top_token_shares": pa.list_(_F64)},
    ),
    _of_lenses(
        "identity_top",
        "Identity lens",
        "The output tokens that it raises and lowers most if what it writes went straight to the output: its "
        "row of the unembedding after the final norm's scale, per unit of activation.",
        more={
            "identity_top_effects": pa.list_(_F64),
            "identity_bottom": pa.list_(_I32),
            "identity_bottom_effects": pa.list_(_F64),
        },
    ),
    _of_lenses(
        "jacobian_top",
        "Jacobian lens",
        "The same through the layers in between, linearised and averaged over contexts of the sample (64 by "
        "default).",
        more={
            "jacobian_top_effects": pa.list_(_F64),
            "jacobian_bottom": pa.list_(_I32),
            "jacobian_bottom_effects": pa.list_(_F64),
        },
    ),
    *(
        _of_common(
            f"{lens}_common_top",
            f"{lens.capitalize()} lens, common tokens",
            f"The same of the tokens alone that were harvested at least {COMMON} times: rare pieces, which "
            "the model hardly learned, lead the lists of all.",
            more={
                f"{lens}_common_top_effects": pa.list_(_F64),
                f"{lens}_common_bottom": pa.list_(_I32),
                f"{lens}_common_bottom_effects": pa.list_(_F64),
            },
        )
        for lens in ("identity", "jacobian")
    ),
    Statistic(
        "coactive",
        "Similar by co-activation",
        "Neurons of the same layer that are active at the same tokens: cosine similarity of the activations "
        "over tokens.",
        _coactivation,
        pa.list_(_I32),
        {"coactive_similarity": pa.list_(_F64)},
    ),
    Statistic(
        "similar_effect",
        "Similar by effect",
        "Neurons of the same layer that change the output alike: cosine similarity of their effects on the "
        "output tokens by the Jacobian lens.",
        _similar_effect,
        pa.list_(_I32),
        {"similar_effect_similarity": pa.list_(_F64)},
        needs=("jacobians", "lenses"),
    ),
    Statistic(
        "examples",
        "Examples",
        f"The {activity.STRONGEST} strongest activations, then {activity.FROM_EACH_PART} from each fifth of "
        "the range from 0 to the highest, from different documents where there are enough.",
        _examples,
        pa.list_(_I64),
        # Parts: 0 of the strongest, then 1 to RANGE_PARTS, rising.
        {"example_activations": pa.list_(_F64), "example_parts": pa.list_(pa.int8())},
    ),
)

# Words that definitions and pages use.
TERMS: Mapping[str, str] = {
    "Activation": "What the TopK layer hands on for this neuron at a token; 0 where the neuron is not among "
    "the k that are kept.",
    "Dead": "Never active on the sample; a rare neuron may be dead on a small one.",
}


def schema() -> pa.Schema:
    """Returns the columns of a table of all statistics."""
    columns = dict(KEYS)
    for statistic in STATISTICS:
        if not _NAME.fullmatch(statistic.name) or columns.keys() & statistic.columns.keys():
            raise ValueError(f"statistic {statistic.name!r}: its columns must be new words of a-z, 0-9 and _")
        columns |= statistic.columns
    return pa.schema(list(columns.items()))


def numbers() -> dict[str, Statistic]:
    """Returns the statistics that are single numbers, by name; tables of neurons hold these."""
    return {statistic.name: statistic for statistic in STATISTICS if statistic.kind}


def others() -> dict[str, str]:
    """Returns the definitions of everything else that pages show, by title."""
    return {**TERMS, **{s.title: s.definition for s in STATISTICS if not s.kind}}


def as_markdown() -> str:
    """Returns all definitions as a table, as docs/neurons.md holds it."""
    rows = [(title, "", "", definition) for title, definition in TERMS.items()]
    rows += [
        (s.title, ", ".join(f"`{name}`" for name in s.columns), s.unit, s.definition) for s in STATISTICS
    ]
    head = ("statistic", "columns", "unit", "definition")
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * 4, *rows))


def put_into(page: str) -> str:
    """Returns a page of Markdown with `as_markdown` between its two marks."""
    begin, end = "<!-- statistics: python -m topklm.neurons.statistics.catalog FILE -->", "<!-- end -->"
    first, last = page.index(begin) + len(begin), page.index(end)
    return f"{page[:first]}\n\n{as_markdown()}\n\n{page[last:]}"


if __name__ == "__main__":
    import pathlib
    import sys

    for name in sys.argv[1:]:
        path = pathlib.Path(name)
        path.write_text(put_into(path.read_text("utf-8")), "utf-8")
