"""Reads the same held-out tokens through the checkpoints of a run, one compiled program for all of them.

Of a TopK LM neurons are read as they are. A Base LM is compared in a dictionary: its coordinates, positive
and cut to the k largest, or a post-hoc TopK autoencoder for each checkpoint (`DICTIONARIES`).
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from topklm import distributed
from topklm.checkpoint import checksums
from topklm.checkpoint.run_folder import holds_parameters_alone
from topklm.config import Config
from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel
from topklm.inference.load import load, saved_steps
from topklm.layout import Layout
from topklm.model import transformer
from topklm.neurons import documents as documents_lib
from topklm.neurons import harvest as harvest_lib
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.documents import TextModel
from topklm.neurons.harvest import DENSE, TOPK, Flows, harvest
from topklm.neurons.segment import Segment
from topklm.neurons.statistics import embeddings
from topklm.neurons.store import Metadata, NeuronBlock, StoreWriter
from topklm.progress import Progress
from topklm.sae.kinds import SaeConfig
from topklm.sae.text import fit_text
from topklm.storage.files import as_path
from topklm.trace.measure import Reading, Text
from topklm.trace.tables import Settings, TraceFolder, as_facts

COORDINATES = "coordinates"
FRESH, SAME, CHAINED = "sae-fresh", "sae-same-seed", "sae-chained"
DICTIONARIES = {
    COORDINATES: "the coordinates, positive and cut to the k largest",
    FRESH: "an SAE for each checkpoint, each with a seed of its own",
    SAME: "an SAE for each checkpoint, all from one seed",
    CHAINED: "an SAE for each checkpoint, trained on from that of the one before",
}

_AFTER = "after_step"  # of an autoencoder's facts: the step from whose it was trained on


@dataclasses.dataclass(frozen=True)
class Options:
    """How a trace is asked for, beside its steps and reference."""

    n_tokens: int
    min_tokens: int
    dictionary: str = ""
    keep: int | None = None
    layers: tuple[int, ...] | None = None
    sae_tokens: int = 0
    source: str | None = None
    keep_events: bool = False


class Checkpoints:
    """The checkpoints of a run as sources of readings; opened by the model of the reference.

    UserError for options that the run does not suit.
    """

    def __init__(
        self, run: str, reference: LanguageModel, layout: Layout, options: Options, progress: Progress
    ):
        self._run, self._layout, self._options, self._progress = run, layout, options, progress
        config = reference.config
        self._config, self._tokenizer = config, reference.tokenizer
        self.kind, all_layers = harvest_lib.kind_and_layers(config.model)
        _check_dictionary(options, self.kind)
        self.layers = all_layers if options.layers is None else options.layers
        if missing := set(self.layers) - set(all_layers):
            allowed = f"of {', '.join(map(str, all_layers))}"
            raise UserError(field="--layers", value=",".join(map(str, sorted(missing))), allowed=allowed)
        self.keep = options.keep or min(config.model.topk_k, config.model.d_model)
        if self.keep > config.model.d_model:
            raise UserError(field="--topk-k", value=self.keep, allowed=f"at most {config.model.d_model}")
        documents = documents_lib.open_documents(self._tokenizer, config.data, options.source)
        self.source = documents.name
        self._documents, n = list[np.ndarray](), 0
        for ids in documents:
            self._documents.append(ids)
            n += len(ids)
            if n >= options.n_tokens:
                break
        if not n:
            raise documents_lib.no_text(documents, f"--source = {options.source}")
        self.text = self._cut(reference)
        if self.text.n_tokens < options.min_tokens:
            raise UserError(
                f"there are {self.text.n_tokens:,} tokens of text, and --min-tokens = {options.min_tokens}: "
                "give more text, or a smaller number"
            )
        self.clusters = embeddings.cluster_tokens(_unembedding(reference)[1])

    def _cut(self, model: LanguageModel) -> Text:
        """Returns the tokens that a harvest reads: whole windows, of about as many tokens as asked for."""
        text_model = self._text_model(model.params)
        documents, tokens = [], []
        n = 0
        for window in text_model.windows(self._documents):
            if n >= self._options.n_tokens:
                break
            tokens.append(window.inputs[window.n_known :])
            documents += [window.document] * window.n_new
            n += window.n_new
        ids = np.concatenate(tokens)
        first = np.flatnonzero(np.diff(documents, prepend=-1))
        n_bytes = sum(map(len, self._tokenizer.token_bytes(ids)))
        return Text(ids, np.append(first, len(ids)), self._config.model.vocab_size, n_bytes)

    def _text_model(self, params: transformer.Parameters) -> TextModel:
        return TextModel(self._config.model, params, self._layout, self._tokenizer.separator_id)

    def settings(self, reference: int, measures: dict[str, Any]) -> Settings:
        """Returns the settings of a trace of these."""
        digest = hashlib.sha256(self.text.tokens.astype(np.int32).tobytes())
        digest.update(self.text.bounds.astype(np.int64).tobytes())
        options = self._options
        return Settings(
            run=Path(self._run).resolve().name,
            tokenizer_sha256=self._tokenizer.sha256,
            source=self.source,
            text=digest.hexdigest(),
            n_tokens=self.text.n_tokens,
            reference=reference,
            kind=self.kind,
            layers=self.layers,
            width=self._config.model.d_model,
            keep=self.keep,
            dictionary=options.dictionary,
            sae_tokens=options.sae_tokens if options.dictionary.startswith("sae") else 0,
            min_tokens=options.min_tokens,
            measures=measures,
        )

    def check_same_everywhere(self, settings: Settings) -> None:
        """Raises UserError if a process of several is about to trace something else than the first."""
        own = {**as_facts(settings), "clusters": hashlib.sha256(self.clusters.tobytes()).hexdigest()}
        distributed.check_same({name.replace("_", " "): value for name, value in own.items()})

    def load(self, step: int) -> LanguageModel:
        """Loads the model of a step; step 0, where no checkpoint is of it, is made from the seed."""
        return load_step(self._run, step, self._layout, self._config)

    def read(
        self, model: LanguageModel, folder: TraceFolder, report: Callable[[int], None], store: bool = False
    ) -> Reading:
        """Reads the text through a model; `store` keeps its events in the folder.

        UserError, which names the step, for activations that are not finite.
        """
        step, parameters = model.step, checksums.fingerprint(model.params)
        is_written = self._options.dictionary.startswith("sae")
        dictionary = Dictionary.load(folder.dictionary(step)) if is_written else None
        flows = None if is_written else Flows()
        with contextlib.ExitStack() as stack:
            writer = None
            if store:
                metadata = self._metadata(step, parameters, dictionary)
                writer = stack.enter_context(StoreWriter(folder.store(step), metadata))
            collected = _Collected(len(self.layers), self._config.model.d_model, writer)
            harvest(
                self._text_model(model.params),
                self._documents,
                collected,
                n_tokens=self._options.n_tokens,
                keep=self.keep if self.kind == DENSE else None,
                dictionary=dictionary,
                layers=self.layers,
                flows=flows,
                report=lambda tokens, documents: report(tokens),
            )
        if not (np.isfinite(collected.loss) and collected.is_finite):
            raise UserError(
                f"step {step}: activations or losses are NaN or infinite: training diverged before it; leave "
                "it out of --steps"
            )
        assert collected.n_tokens == self.text.n_tokens
        lenses = _lenses(model, len(self.layers), dictionary)
        return Reading(step, parameters, collected.loss, collected.blocks(), lenses, flows)

    def _metadata(self, step: int, parameters: str, dictionary: Dictionary | None) -> Metadata:
        config = self._config.model
        return Metadata(
            run=Path(self._run).resolve().name,
            step=step,
            tokenizer_sha256=self._tokenizer.sha256,
            source=self.source,
            kind=dictionary.kind if dictionary else self.kind,
            layers=self.layers,
            d_model=config.d_model,
            topk_k=config.topk_k if self.kind == TOPK else self.keep,
            topk_activation=config.topk_activation,
            context_length=config.context_length,
            dictionary=dictionary.description if dictionary else "",
            parameters=parameters,
        )

    def prepare(self, steps: Sequence[int], folder: TraceFolder) -> None:
        """Makes the autoencoders that steps, rising, lack; processes share them, unless they are a chain."""
        kind = self._options.dictionary
        if not kind.startswith("sae"):
            return
        missing = distributed.of_first("autoencoders", lambda: self._missing(steps, folder))
        index, count = distributed.process_index(), distributed.process_count()
        own = set(missing[index::count]) if kind != CHAINED else {*missing} if index == 0 else set()
        start: Dictionary | None = None
        for before, step in zip([None, *steps[:-1]], steps, strict=True):
            path = folder.dictionary(step)
            if step in own:
                made = self._fitted(step, step if kind == FRESH else 0, start)
                made = dataclasses.replace(made, facts={**made.facts, _AFTER: before if start else None})
                made.save(path)
                self._progress.say(f"step {step:,}: {made.description}")
            if kind == CHAINED and own:
                start = Dictionary.load(path)
        if count > 1:
            self._progress.say("waiting for the other processes")
        distributed.meet("autoencoders made")
        folder.wait_until_done(lambda: [step for step in steps if not folder.dictionary(step).exists()])

    def _missing(self, steps: Sequence[int], folder: TraceFolder) -> list[int]:
        found = []
        for before, step in zip([None, *steps[:-1]], steps, strict=True):
            path = folder.dictionary(step)
            if not path.exists():
                found.append(step)
            elif self._options.dictionary == CHAINED and Dictionary.load(path).facts.get(_AFTER) != before:
                raise UserError(
                    f"{path} was not trained on from step {before}: no step is added to a chain; give the "
                    "same --steps, or --restart"
                )
        return found

    def _fitted(self, step: int, seed: int, start: Dictionary | None) -> Dictionary:
        fitted = fit_text(
            SaeConfig("topk", self._config.model.d_model, self.keep),
            self._text_model(self.load(step).params),
            self._config.data,
            self._documents,
            n_tokens=self._options.sae_tokens,
            seed=seed,
            start=start,
            layers=self.layers,
            progress=self._progress,
        )
        return fitted.dictionary


def readable(run: str) -> list[int]:
    """Lists the steps of a run that can be read, rising: those saved, and step 0, which the seed makes.

    UserError without a checkpoint. A run that began elsewhere, and holds parameters alone, has no step 0.
    """
    saved = saved_steps(run)
    return saved if holds_parameters_alone(as_path(run, "RUN")) else sorted({0, *saved})


def load_step(run: str, step: int, layout: Layout, config: Config) -> LanguageModel:
    """Loads the model of a step; step 0, where no checkpoint is of it, is made from the config's seed."""
    if step or step in saved_steps(run):
        return load(run, step=step, mesh=layout.mesh)
    first = load(run, mesh=layout.mesh)
    make = jax.jit(
        lambda: transformer.create(first.cfg, config.train.seed), out_shardings=layout.shardings(first.params)
    )
    return dataclasses.replace(first, step=0, params=make())


def _check_dictionary(options: Options, kind: str) -> None:
    named = options.dictionary
    if kind == TOPK and named:
        text = "is for Base LMs; this model's neurons are its coordinates"
        raise UserError(text, field="--dictionary", value=named)
    if kind == TOPK and options.keep is not None:
        raise UserError("is for Base LMs; leave it out", field="--topk-k", value=options.keep)
    if kind == DENSE and not named:
        raise UserError(
            "this is a Base LM, which has no neurons: give --dictionary "
            f"{', '.join(f'{name} ({text})' for name, text in DICTIONARIES.items())}"
        )


def _unembedding(model: LanguageModel) -> tuple[np.ndarray, np.ndarray]:
    """Returns the final norm's scale, float32[D], and the unembedding, float32[D, V]."""
    bound = transformer.bind(model.cfg, model.params)
    columns = np.asarray(bound.unembedding())[:, : model.cfg.vocab_size]
    return np.asarray(bound.final_norm.scale[...], np.float32), columns.astype(np.float32)


def _lenses(model: LanguageModel, n_layers: int, dictionary: Dictionary | None) -> list[np.ndarray]:
    """Returns the effects of neurons on output tokens by the identity lens, less their mean, by layer."""
    scale, columns = _unembedding(model)
    effects = (columns - columns.mean(axis=1, keepdims=True)) * scale[:, None]
    if dictionary is None:
        return [effects] * n_layers
    return [rows @ effects for rows in dictionary.decoder]


class _Collected:
    """Collects the segments of a harvest in memory; a store gets the ones it lacks."""

    def __init__(self, n_layers: int, width: int, store: StoreWriter | None):
        self.n_tokens, self.is_finite, self._store = 0, True, store
        self._nats, self._shape = 0.0, (n_layers, width)
        self._segments: list[tuple[int, Segment]] = []

    def append(self, segment: Segment) -> None:
        values = segment.values.astype(np.float32)
        self.is_finite &= bool(np.isfinite(values).all())
        if self._store is not None and self._store.n_tokens <= self.n_tokens:
            self._store.append(segment)
        small = dataclasses.replace(segment, values=values, token_index=segment.token_index.astype(np.int32))
        self._segments.append((self.n_tokens, small))
        self._nats += float(segment.losses.astype(np.float64).sum())
        self.n_tokens += len(segment.tokens)

    @property
    def loss(self) -> float:
        """Mean over the tokens, nats."""
        return self._nats / max(self.n_tokens, 1)

    def blocks(self) -> list[NeuronBlock]:
        """Returns the events of each layer; the segments are let go of."""
        n_layers, width = self._shape
        found = []
        for layer in range(n_layers):
            counts, tokens, values = [], [], []
            for begin, segment in self._segments:
                offsets = segment.offsets[layer * width : (layer + 1) * width + 1]
                events = slice(offsets[0], offsets[-1])
                counts.append(np.diff(offsets))
                tokens.append(segment.token_index[events] + np.int32(begin))
                values.append(segment.values[events])
            owners = np.concatenate([np.repeat(np.arange(width, dtype=np.uint32), c) for c in counts])
            order = np.argsort(owners, kind="stable")  # so that tokens go on rising
            offsets = np.concatenate([[0], np.cumsum(np.sum(counts, axis=0))])
            found.append(NeuronBlock(offsets, np.concatenate(tokens)[order], np.concatenate(values)[order]))
        self._segments.clear()
        return found
