"""A run folder for Python and notebooks: `topklm.open("runs/small")`."""

from collections.abc import Iterator, Mapping, Sequence
import functools
import html
import os
from pathlib import Path
from typing import Any

import numpy as np

from topklm.checkpoint import checksums, run_folder
from topklm.config import Config
from topklm.data.dataset import SPLITS
from topklm.data.tokenizer import Tokenizer
from topklm.errors import ArgumentError, UserError, visible
from topklm.imports import optional_module, when_used
from topklm.inference.interventions import neuron_of
from topklm.inference.language_model import LanguageModel
from topklm.inference.load import load
from topklm.layout import one_device
from topklm.neurons import NeuronsFolder, ablate_targets, documents, harvested_steps, search
from topklm.neurons.dictionary import check_coordinates
from topklm.neurons.display import Columns
from topklm.neurons.store import NeuronBlock, Store
from topklm.storage.files import as_path, is_bucket
from topklm.training import metrics

with when_used():  # they need packages of the extra
    from topklm.explorer import neuron_data, pages, plots, views
    from topklm.neurons.statistics import catalog

_NEEDED = ("pyarrow", "jinja2")
_TOKENS = 5  # of a neuron, in a table
_SHOWN_EXAMPLES = 5
_SHOWN_CHARACTERS = 60  # of an example, on either side of its token
_CURVES = ("train/loss", "eval/loss")


def open_run(run: str | os.PathLike[str], step: int | None = None) -> "Run":
    """Opens a run folder, local or in a bucket; its files are read when something of them is asked for.

    Neurons need one on a disk. The step is by default the newest of which activations were harvested, or the
    newest. UserError if it is no run folder.
    """
    folder = as_path(run, "run")
    steps = run_folder.complete_steps(folder)
    if not steps:
        raise UserError(f"{folder} is not a run folder with checkpoints: train first, or check the path")
    harvested = [] if is_bucket(folder) else [n for n in harvested_steps(Path(folder)) if n in steps]
    return Run(str(run), (harvested or steps)[-1] if step is None else step)


class Run:
    """A run: its model, its neurons, its text and its metrics.

    Attributes:
        path: Of the folder, as it was given.
        step: Of the checkpoint.
    """

    def __init__(self, path: str, step: int):
        self.path, self.step = path, step

    def __repr__(self) -> str:
        return f"Run({self.path}, step {self.step:,})"

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The model of the checkpoint, as `topklm.load` gives it."""
        return load(self.path, step=self.step)

    @functools.cached_property
    def config(self) -> Config:
        """The settings that the run was started with."""
        config = run_folder.saved_config(as_path(self.path, "run"))
        if config is None:
            raise UserError(f"{self.path} holds no config: copy the whole run folder")
        return config

    @functools.cached_property
    def metrics(self) -> "Metrics":
        """The lines of the training log, a column for each metric, NaN where a line does not have it."""
        lines = metrics.read(as_path(self.path, "run"))
        names = dict.fromkeys(name for line in lines for name in line)
        return Metrics({name: [line.get(name) for line in lines] for name in names})

    def documents(self, split: str = "heldout") -> Iterator[str]:
        """Yields texts of the run's split, "heldout" or "train"; UserError if the data are gone."""
        if split not in SPLITS:
            raise ArgumentError(field="split", value=split, allowed=f"one of {', '.join(SPLITS)}")
        for ids in documents.open_documents(self._tokenizer, self.config.data, None, split):
            yield self._tokenizer.decode(ids)

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        if is_bucket(self.path):
            return self.model.tokenizer
        return Tokenizer.load(Path(self.path) / run_folder.TOKENIZER_FILE)

    @functools.cached_property
    def _folder(self) -> NeuronsFolder:
        if is_bucket(self.path):
            text = "activations are kept on a disk; copy the run folder to one"
            raise ArgumentError(text, field="run", value=self.path)
        return NeuronsFolder(Path(self.path), self.step)

    @functools.cached_property
    def _store(self) -> Store:
        return Store.of_step(self._folder)

    @functools.cached_property
    def _source(self) -> "neuron_data.NeuronData":
        for package in _NEEDED:
            optional_module(package, "explore", "neurons")
        if not self._folder.table.exists():
            raise UserError(
                f"{self.path}: neurons of step {self.step} are not measured: run topklm explore {self.path}"
            )
        return neuron_data.NeuronData(self._folder)

    @property
    def neurons(self) -> Columns:
        """The statistics of all neurons (docs/neurons.md), with labels and strongest input tokens as text."""
        source, labels = self._source, self._source.named()
        places = [source.place(number) for number in range(source.n_neurons)]
        columns = {
            "layer": [layer for layer, _ in places],
            "neuron": [neuron for _, neuron in places],
            "label": [labels.get(place, "") for place in places],
            "input_tokens": [source.texts((ids or [])[:_TOKENS]) for ids in _values(source, "top_tokens")],
        }
        rest = (name for name in source.rows.schema.names if name not in columns)
        columns |= {name: _values(source, name) for name in rest}
        first = (statistic.name for statistic in catalog.numbers().values() if statistic.first)
        return Columns(columns, ["layer", "neuron", "label", "input_tokens", *first])

    def neuron(self, layer: int | str | tuple[int, int], neuron: int | None = None) -> "Neuron":
        """Returns `run.neuron(2, 106)` or `run.neuron("2:106")`; UserError if there is none measured."""
        place = neuron_of((layer, neuron) if neuron is not None else layer)
        self._source.number(*place)
        return Neuron(self._source, *place)

    def find(
        self,
        regex: str,
        *,
        limit: int = 20,
        layers: Sequence[int] | None = None,
        case: bool = False,
        ends: bool = False,
    ) -> Columns:
        """Ranks neurons by how well they tell the tokens that match from all others, as `neurons find`.

        Args:
            regex: A pattern of the package `regex`.
            limit: Neurons, at most.
            layers: Of the neurons; None: all.
            case: Whether capitals are other letters.
            ends: Whether only the token counts at which a match ends.

        Raises:
            UserError: If nothing was harvested, or for a pattern that is none.
        """
        matches = self._text.matches(regex, ignore_case=not case)
        matched = matches.ends if ends else matches.touched
        found = search.rank(self._store, matched, limit, layers)
        names = ("layer", "neuron", "f1", "precision", "recall", "threshold", "n_active")
        columns: dict[str, Any] = {name: [getattr(one, name) for one in found] for name in names}
        if self._folder.table.exists():
            rows = [self._source.number(one.layer, one.neuron) for one in found]
            known = self.neurons
            columns |= {name: known[name][rows] for name in ("label", "input_tokens")}
        return Columns(columns)

    @functools.cached_property
    def _text(self) -> search.StoredText:
        return search.StoredText(self._store, self._tokenizer)

    def ablate(
        self,
        neurons: Sequence[tuple[int, int] | str] | None = None,
        *,
        regex: str | None = None,
        targets: str | None = None,
        count: int = 4,
        layers: Sequence[int] | None = None,
        tokens: int = 50_000,
        random_sets: int = 10,
        seed: int = 0,
    ) -> Columns:
        """Measures the loss at the tokens of a pattern, and elsewhere, without some neurons.

        See `topklm neurons ablate` and docs/neurons.md.

        Args:
            neurons: To ablate, (2, 106) or "2:106" each; None: `regex` chooses them.
            regex: Chooses neurons on one half of the documents; losses are of the other half.
            targets: Pattern of the tokens to look at; default `regex`.
            count: Neurons that `regex` chooses.
            layers: Of these neurons; None: all.
            tokens: That are measured, at most.
            random_sets: Of as many neurons of the same layers and densities, beside the set.
            seed: Of all that is drawn.

        Returns:
            A row for each group of tokens: change of the mean loss, nats, with its 95 % interval, and mean
            and middle 95 % of the random sets. `neurons` of each row is the set.

        Raises:
            UserError: For what is not allowed, and where nothing was harvested.
        """
        if (neurons is None) == (regex is None):
            raise UserError("give one of neurons and regex")
        if targets is None and regex is None:
            raise ArgumentError("is missing: give a pattern of the tokens to look at", field="targets")
        check_coordinates(self._store.metadata.dictionary, "ablation")
        self._store.check_model(self.model.tokenizer.sha256, checksums.fingerprint(self.model.params))
        found = self._text.matches(regex if targets is None else targets)  # type: ignore[arg-type]
        if neurons is not None:
            named = [neuron_of(name) for name in neurons]
            plan = ablate_targets.given(self._store, [named], found, tokens=tokens)
        else:
            matched = self._text.matches(regex).touched  # type: ignore[arg-type]
            plan = ablate_targets.chosen(
                self._store, matched, found, counts=[count], tokens=tokens, layers=layers, seed=seed
            )
        model = self.model
        text_model = documents.TextModel(model.cfg, model.params, one_device(), model.tokenizer.separator_id)
        before, (outcome,) = plan.measure(text_model, n_random=random_sets, seed=seed)
        names = " ".join(f"{layer}:{neuron}" for layer, neuron in outcome.chosen.neurons)
        spreads = {name: outcome.spread(name) for name in before}
        groups = outcome.chosen.groups
        return Columns(
            {
                "group": list(before),
                "neurons": [names] * len(before),
                "tokens": [int(plan.groups[name].sum()) for name in before],
                "loss": list(before.values()),
                "change": [groups[name].value for name in before],
                "low": [groups[name].low for name in before],
                "high": [groups[name].high for name in before],
                "random": [spreads[name].mean for name in before],
                "random_low": [spreads[name].low for name in before],
                "random_high": [spreads[name].high for name in before],
            }
        )


def _values(source: "neuron_data.NeuronData", name: str) -> list[Any]:
    return source.rows[name].to_pylist()


class Neuron:
    """One neuron; a notebook shows its page.

    Attributes:
        layer: Of the model.
        neuron: Its number there.
        data: All that its page shows, as plain values.
    """

    def __init__(self, source: "neuron_data.NeuronData", layer: int, neuron: int):
        self._source, self.layer, self.neuron = source, layer, neuron
        self.data: Mapping[str, Any] = views.neuron(source, layer, neuron)

    @property
    def label(self) -> str:
        """The name that a person gave it; empty without one."""
        return self.data["label"]

    @property
    def figures(self) -> Mapping[str, Any]:
        """Its statistics that are single numbers, None where there is none."""
        return self.data["figures"]

    @property
    def activations(self) -> NeuronBlock:
        """Tokens of the store at which it is active, int64[E], and its activations there, float32[E]."""
        return self._source.events(self.layer, self.neuron)

    def __repr__(self) -> str:
        data, figures = self.data, self.figures
        lines = [
            f"neuron {self.layer}:{self.neuron} of {data['run']}" + f" ({self.label})" * bool(self.label)
        ]
        if data["dead"]:
            return visible(f"{lines[0]}: dead, active at none of {data['n_tokens']:,} tokens")
        lines.append(
            f"active at {figures['density']:.2%} of {data['n_tokens']:,} tokens, at most "
            f"{figures['max_activation']:.4g}"
        )
        raised = data["output_tokens"]["jacobian"]["top"] or data["output_tokens"]["identity"]["top"]
        for said, found in (("input tokens", data["input_tokens"]), ("raises", raised)):
            lines.append(f"{said}: {', '.join(one['token'] for one in found)}")
        for example in data["examples"][:_SHOWN_EXAMPLES]:
            tokens, at = example["tokens"], example["example"]
            before, token, after = "".join(tokens[:at]), tokens[at], "".join(tokens[at + 1 :])
            text = f"{before[-_SHOWN_CHARACTERS:]}[{token}]{after[:_SHOWN_CHARACTERS]}"
            lines.append(f"{example['activation']:8.4g}  {' '.join(text.split())}")
        return "\n".join(map(visible, lines))

    def _repr_html_(self) -> str:
        templates = pages.environment(self._source)
        templates.globals["link"] = lambda layer, neuron: None
        page = templates.get_template("export_neuron.html")
        return _framed(page.render(data=self.data, own_text=False), 900)


class Metrics(Columns):
    """The metrics of a run by step."""

    def plot(self, *names: str) -> "Plot":
        """Draws metrics over steps; by default the loss of training and of held-out text, nats.

        UserError if there is no such metric, it has no value yet, or the extra is not installed.
        """
        optional_module("markupsafe", "explore", "plot")
        asked = names or tuple(name for name in _CURVES if name in self.columns)
        curves = {}
        for name in asked:
            kept = np.isfinite(self[name].astype(np.float64))
            curves[name] = list(zip(self["step"][kept].tolist(), self[name][kept].tolist(), strict=True))
        if not curves or not all(curves.values()):
            raise UserError(f"there is nothing to plot yet: {', '.join(asked or _CURVES)}")
        return Plot(curves)


class Plot:
    """Curves over steps; a notebook shows them, `svg` is the picture."""

    def __init__(self, curves: Mapping[str, Sequence[tuple[float, float]]]):
        (xs, ys) = zip(*(point for points in curves.values() for point in points), strict=True)
        name = ", ".join(curves)
        x, y = plots.Axis("step", min(0, *xs), max(xs)), plots.Axis(name, min(ys), max(ys))
        self.svg = str(plots.lines(curves, x, y, f"{name} by step"))

    def _repr_html_(self) -> str:
        return _framed(self.svg, 430)


def _framed(body: str, height: int) -> str:
    """Returns HTML in a frame of its own, so that its styles and the notebook's do not meet; runs nothing."""
    # Buttons need scripts; without, everything is shown.
    style = pages.static_files()["style.css"].decode() + "button { display: none }"
    page = f'<!doctype html><meta charset="utf-8"><style>{style}</style><main>{body}</main>'
    size = f"border:0;width:100%;height:{height}px"
    return f'<iframe sandbox srcdoc="{html.escape(page)}" style="{size}"></iframe>'
