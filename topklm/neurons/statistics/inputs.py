"""The inputs of statistics. Each is computed once, when a statistic first asks for it."""

from collections.abc import Mapping
import dataclasses
import functools

import jax
import numpy as np

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.statistics import MeasureSettings, ablation, activity, embeddings, lenses, variance
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
        """int64[N], the token before each, from `variance.previous`."""
        return variance.previous(self.token_ids, self.bounds)

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
