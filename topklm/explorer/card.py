"""One run on the readability card: its bases, all measures of them, what the model costs; and charts.

Charts are figures with intervals, as dots in rows, in one file of SVG: of the readability card a chart is a
measure, a row a basis, a dot a layer; of the claims a chart is a figure, a row a model or a baseline, a dot a
seed.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
import operator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from markupsafe import escape
import numpy as np

from topklm.checkpoint.checksums import fingerprint
from topklm.config import Config, ModelConfig
from topklm.data.building.build import prepare
from topklm.data.stream import heldout_part
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.explorer.plots import Axis
from topklm.inference.language_model import LanguageModel
from topklm.layout import Layout
from topklm.model.block import NO_HOOKS, LayerHooks
from topklm.neurons import NeuronsFolder, card, labelled_texts, probing
from topklm.neurons import bases as bases_lib
from topklm.neurons.bases import TITLES, Basis
from topklm.neurons.card import MEASURES, CardText, Figures, Neuron
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.documents import TextModel, open_documents
from topklm.neurons.harvest import kind_and_layers
from topklm.neurons.labelled_texts import LabelledTexts
from topklm.neurons.statistics import embeddings, selectivity
from topklm.neurons.store import NeuronBlock
from topklm.progress import Progress
from topklm.sae import folder as sae_folder
from topklm.sae.kinds import SaeConfig
from topklm.sae.text import fit_text
from topklm.steering import concepts as concept_lib
from topklm.steering import dose
from topklm.steering.concepts import NeuronFacts
from topklm.steering.dose import Response, Sampled
from topklm.training.evaluation import evaluate, heldout_feed, make_eval_step
from topklm.training.throughput import flops_per_token, parameter_count

LARGEST_PART = 16  # of which a document is at most one
_STRENGTHS = (0.5, 1.0, 2.0)  # in the neuron's largest activation on the text
_MOST_PERPLEXITY = 2.0  # times that of the unsteered texts
_ABLATION_SAMPLES = 256  # of each neuron


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A model on the card."""

    name: str  # as it was given
    model: LanguageModel
    layout: Layout

    @property
    def text_model(self) -> TextModel:
        """Reads text."""
        model = self.model
        return TextModel(model.cfg, model.params, self.layout, model.tokenizer.separator_id)

    @property
    def n_layers(self) -> int:
        """Returns S."""
        return len(kind_and_layers(self.model.cfg)[1])


@dataclasses.dataclass(frozen=True, eq=False)
class Common:
    """All that the runs of a card share."""

    runs: Sequence[Run]  # all of them; the first gives text and clusters
    documents: Sequence[np.ndarray]  # token ids of each, int32[n], by the first run's tokenizer
    clusters: np.ndarray  # int[V], the cluster of each of its tokens
    sets: Sequence[LabelledTexts]  # texts to probe with
    seed: int  # of all that is drawn
    dictionary_tokens: int  # of training text, for the SAE of a Base LM
    saes: Sequence[tuple[str, Dictionary, tuple[int, ...]]]  # that are given, their folders and layers
    steers: bool  # whether neurons are steered
    progress: Progress  # shows how far it is


def labelled(labels: str | None, conllu: str | None, sae_probes: bool, seed: int) -> list[LabelledTexts]:
    """Reads the texts to probe with that flags name."""
    sets = []
    if labels is not None:
        sets.append(labelled_texts.of_json_lines(Path(labels), seed))
    if conllu is not None:
        sets.append(labelled_texts.of_conllu(Path(conllu)))
    if sae_probes:
        sets.append(labelled_texts.of_sae_probes(seed))
    return sets


def documents(run: Run, n_tokens: int) -> list[np.ndarray]:
    """Reads so many held-out tokens of a run, if it has them: the first documents of two tokens or more.

    The last one is cut, and so are long ones: none gives more than a sixteenth, or there is no interval over
    documents; more only where all documents together would give too few.
    """
    found, most, n = list[np.ndarray](), max(2, n_tokens // LARGEST_PART), 0
    for ids in open_documents(run.model.tokenizer, run.model.config.data):
        if n_tokens - n < 2:
            break
        if len(ids) > 1:
            found.append(ids[:n_tokens])
            n += min(len(ids), most)
    longest = max(map(len, found), default=0)
    while sum(min(len(ids), most) for ids in found) < n_tokens - 1 and most < longest:
        most *= 2
    cut, left = list[np.ndarray](), n_tokens
    for ids in found:
        if left > 1:
            cut.append(ids[: min(left, most)])
            left -= len(cut[-1])
    return cut


def clusters(
    run: Run, documents: Sequence[np.ndarray], vectors: str | None, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Groups the tokens of the vocabulary, int[V], by a file of vectors, or by the run's own unembedding.

    The second is a JSON object: the resource, and which share of the documents' tokens is in no cluster.
    """
    model = run.model
    if vectors is None:
        found = embeddings.cluster_tokens(np.asarray(model.W_U, np.float32), None, seed)
        resource = f"k-means of the unembedding rows of {run.name}"
    else:
        strings = model.tokenizer.token_strings(range(model.cfg.vocab_size))
        found = card.clusters_of_vectors(Path(vectors), strings, seed)
        resource = f"k-means of the vectors of {vectors}, by the text of tokens without spaces around it"
    without = float((found[np.concatenate(documents)] == card.NO_CLUSTER).mean()) if documents else 0.0
    return found, {"resource": resource, "n_clusters": int(found.max()) + 1, "tokens_without": without}


def measure(common: Common, run: Run) -> tuple[dict[str, Any], list[str]]:
    """Measures one run; returns it as a JSON object, and notes on what is left out."""
    model, config, notes = run.model, run.model.cfg, list[str]()
    first, texts = common.runs[0], common.documents
    is_same = model.tokenizer.sha256 == first.model.tokenizer.sha256
    if not is_same:
        texts = [model.tokenizer.encode(first.model.tokenizer.decode(ids)) for ids in texts]
        notes.append(
            f"{run.name} has another tokenizer than {first.name}: its entropies, by_token, by_context, "
            "detectors, ablation and steering are left out"
        )
    text = card.make_text(
        [ids for ids in texts if len(ids) > 1],
        config.vocab_size,
        common.clusters if is_same else None,
        card.DRAWS,
        common.seed,
    )
    n_tokens = sum(map(len, text.documents))
    width, keep = _size(common, run)
    saes = [] if config.n_topk_layers else _saes(common, run, text.documents, width, keep)
    reading = run.text_model, run.n_layers
    with common.progress.phase("reading hidden states", n_tokens) as report:
        mean, covariance = bases_lib.moments(*reading, text.documents, report)
    bases = bases_lib.make(config, mean, covariance, keep, saes, common.seed)
    of_kind = {sae.kind: sae for sae in saes}
    with common.progress.phase("reading codes", n_tokens) as report:
        blocks = bases_lib.read_blocks(*reading, bases, text.documents, report)
    entries, figures = list[dict[str, Any]](), list[list[Figures]]()
    for basis, of_basis in zip(bases, blocks, strict=True):
        n_neurons = sum(len(block.offsets) - 1 for block in of_basis)
        with common.progress.phase(f"measuring {TITLES[basis.name]}", n_neurons) as report:
            figures.append([card.measure(block, text, report) for block in of_basis])
        layers = [{"layer": number, **card.layer_entry(x)} for number, x in enumerate(figures[-1])]
        entries.append({"name": basis.name, "layers": layers})
        if sae := of_kind.get(basis.name):
            flops = _sae_flops(config, run.n_layers, sae.width) * sae.facts["tokens"]
            entries[-1]["dictionary"] = {**sae.facts, "keep": sae.keep, "training_flops": flops}
    for given in common.sets:
        _probe(common, run, bases, entries, given)
    if is_same:
        search = card.detector_search(text, model.tokenizer.token_bytes(range(config.vocab_size)))
        for entry, of_layers, of_basis in zip(entries, figures, blocks, strict=True):
            chosen = card.readable(of_layers, card.READABLE)
            with common.progress.phase(f"seeking rules for {TITLES[entry['name']]}", len(chosen)) as report:
                entry["detectors"] = card.detectors_entry(
                    search, chosen, of_basis, len(text.token_ids), report
                )
            if entry["name"] == "own" and chosen:
                entry["ablation"] = _ablation(common, run, text, chosen)
                if common.steers:
                    entry["steering"] = _steering(common, run, text, chosen, of_basis)
    found = {
        "run": run.name,
        "step": model.step,
        "train_seed": model.config.train.seed,
        "kind": "topk" if config.n_topk_layers else "base",
        **_costs(common, run),
        "bases": entries,
    }
    return found, notes


def _size(common: Common, run: Run) -> tuple[int, int]:
    """Returns codes of a layer and how many are kept; a Base LM's are as those of the first TopK LM."""
    like = next((r for r in (run, *common.runs) if r.model.cfg.n_topk_layers), run).model.cfg
    return like.d_model, min(like.topk_k, run.model.cfg.d_model)


def _saes(
    common: Common, run: Run, documents: Sequence[np.ndarray], width: int, keep: int
) -> list[Dictionary]:
    """Returns the given SAEs of a Base LM, or its own; UserError for two of a kind, or not of all layers."""
    if not common.saes:
        return [_sae(common, run, documents, width, keep)]
    of_run = sae_folder.facts_of(run.model, tuple(range(run.n_layers)))
    found: dict[str, Dictionary] = {}
    for name, dictionary, layers in common.saes:
        if dictionary.facts[sae_folder.PARAMETERS] != of_run[sae_folder.PARAMETERS]:
            continue
        if list(layers) != of_run[sae_folder.LAYERS]:
            text = f"is of the layers {', '.join(map(str, layers))}: the card needs all of {run.name}"
            raise UserError(text, field="--sae", value=name)
        if dictionary.kind in found:
            raise UserError(f"is the second of its kind, of {run.name}", field="--sae", value=name)
        found[dictionary.kind] = dictionary
    if not found:
        advice = f"train them on it, topklm sae train {run.name}"
        raise UserError(f"none is of {run.name}", field="--sae", advice=advice)
    return [*found.values()]


def _sae(common: Common, run: Run, documents: Sequence[np.ndarray], width: int, keep: int) -> Dictionary:
    """Returns a Base LM's SAE, made once and kept beside the run; documents tell its explained variance."""
    path = NeuronsFolder(Path(run.model.run), run.model.step).path / f"card-sae-{width}-{keep}.npz"
    parameters = fingerprint(run.model.params)
    if path.exists():
        there = Dictionary.load(path)
        if (there.facts["tokens"], there.facts["parameters"]) == (common.dictionary_tokens, parameters):
            return there
    made = fit_text(
        SaeConfig("topk", width, keep),
        run.text_model,
        run.model.config.data,
        documents,
        n_tokens=common.dictionary_tokens,
        progress=common.progress,
    ).dictionary
    made = dataclasses.replace(made, facts={**made.facts, "parameters": parameters})
    with disk_errors_are_user_errors(f"writing {path}"):
        made.save(path)
    return made


def _sae_flops(config: ModelConfig, n_layers: int, width: int) -> float:
    """Computes the FLOPs of a token in the training of SAEs: a forward pass and five products a layer.

    These are encoder and decoder, their gradients, and the gradient of the codes, each 2 D M; TopK counts as
    nothing, and zeros among the codes as numbers, for they are multiplied.
    """
    return flops_per_token(config) / 3 + 10 * n_layers * config.d_model * width


def _probe(
    common: Common,
    run: Run,
    bases: Sequence[Basis],
    entries: Sequence[dict[str, Any]],
    given: LabelledTexts,
) -> None:
    """Adds the probes of a set of texts to the entries of all bases."""
    model, n_layers = run.model, run.n_layers
    located = labelled_texts.locate(given, model.tokenizer, model.cfg.context_length)
    kept = located.kept
    questions, left_out = probing.ask(given.labels[kept], given.families[kept], given.to_fit[kept])
    facts = {"n_labels": len(questions), "left_out": left_out, "examples": len(kept)}
    if not questions:
        for layer in itertools.chain.from_iterable(entry["layers"] for entry in entries):
            layer.setdefault("probing", {})[given.name] = facts
        return
    # A rotation is probed whole, and with as few active codes as the other bases have.
    rotation = next(basis for basis in bases if basis.name == "random")
    probed = [*bases, Basis(f"{rotation.name}_cut", rotation.encode)]
    with common.progress.phase(f"reading {given.name}", sum(map(len, located.documents))) as report:
        pooled = bases_lib.pool(run.text_model, n_layers, probed, located, report)
    is_scored = ~given.to_fit[kept]
    weights = np.zeros((len(kept), 1 + card.DRAWS))
    weights[is_scored] = card.text_weights(given.text[kept][is_scored], card.DRAWS, common.seed)
    with common.progress.phase(f"probing {given.name}", len(probed) * n_layers * len(questions)) as report:
        scores = [
            {
                basis.name: probing.probe(x[layer], questions, weights, report=report)
                for basis, x in zip(probed, pooled, strict=True)
            }
            for layer in range(n_layers)
        ]
    for entry in entries:
        for layer, by_basis in zip(entry["layers"], scores, strict=True):
            controls = {name: x for name, x in by_basis.items() if name.startswith(rotation.name)}
            controls.pop(entry["name"], None)
            found = card.probing_entry(by_basis[entry["name"]], controls)
            layer.setdefault("probing", {})[given.name] = {**facts, **found}


def _ablation(common: Common, run: Run, text: CardText, chosen: Sequence[Neuron]) -> dict[str, Any]:
    """Measures whether neurons matter at the tokens that they raise, by the identity lens."""
    model = run.model
    targets = [concept_lib.raised_tokens(model.cfg, model.params, number) for _, number in chosen]
    with common.progress.phase_by_share("setting neurons to 0") as report:
        return card.specificity(
            model.cfg,
            model.params,
            text,
            chosen,
            targets,
            separator_id=model.tokenizer.separator_id,
            samples=_ABLATION_SAMPLES,
            seed=common.seed,
            report=report,
        )


def _steering(
    common: Common, run: Run, text: CardText, chosen: Sequence[Neuron], blocks: Sequence[NeuronBlock]
) -> dict[str, Any]:
    """Counts neurons that raise a concept of their own in fluent text; input tokens alone are evidence."""
    model, found = run.model, list[dict[str, Any]]()
    longest = int(model.lengths(Sampled().prompts).max())
    sampled = Sampled(max_new_tokens=min(Sampled.max_new_tokens, model.cfg.context_length - longest))
    total = len(chosen) * (1 + len(_STRENGTHS)) * len(sampled.prompts) * sampled.samples
    with common.progress.phase("steering", total) as report:
        for layer, number in chosen:
            events = blocks[layer].one(number)
            largest = float(events.values.max())
            by_token = selectivity.by_group(events, text.token_ids, text.vocab_size)
            inputs = tuple(selectivity.top_tokens(by_token)[0][0].tolist())
            facts = NeuronFacts(len(events.tokens), len(text.token_ids), largest, inputs, ())
            responses = dose.respond(
                model,
                (layer, number),
                [strength * largest for strength in _STRENGTHS],
                concept_lib.own_concepts(model, None, facts, layer, number),
                sampled,
                report=report,
            )
            turned = {
                concept: [
                    strength
                    for strength, steered in zip(_STRENGTHS, responses[1:], strict=True)
                    if turns(responses[0], steered, concept)
                ]
                for concept in responses[0].rates
            }
            found.append({"layer": layer, "neuron": number, "strengths": turned})
    by_concept = {
        concept: sum(bool(one["strengths"].get(concept)) for one in found) for concept in ("input", "raised")
    }
    n_fluent = sum(any(one["strengths"].values()) for one in found)
    counts = {"n": len(found), "n_fluent": n_fluent, "n_by_concept": by_concept}
    return {"strengths": list(_STRENGTHS), **counts, "neurons": found}


def turns(unsteered: Response, steered: Response, concept: str) -> bool:
    """Tells whether the rate of a concept is up, interval above interval, and perplexity at most doubled."""
    rises = steered.rates[concept].low > unsteered.rates[concept].high
    return rises and steered.perplexity.value <= _MOST_PERPLEXITY * unsteered.perplexity.value


def _costs(common: Common, run: Run) -> dict[str, Any]:
    """Returns bits per byte of all held-out text, also without neurons, and the costs of the model."""
    config: Config = run.model.config
    common.progress.say("evaluating")
    mixture = prepare(config.data, lambda line: None)
    part = heldout_part(mixture, max_tokens=0)
    n_topk_layers = config.model.n_topk_layers

    def bits_per_byte(hooks: LayerHooks) -> float:
        found = evaluate(
            make_eval_step(config, run.layout, hooks),
            run.model.params,
            heldout_feed(config, mixture, run.layout, part),
            n_bytes=part.utf8_bytes,
            n_topk_layers=n_topk_layers,
        )
        assert found is not None  # nobody stops it
        return found["bits_per_byte"]

    def silence(h_BTD: jax.Array, layer: jax.Array) -> jax.Array:
        return jnp.where(layer == n_topk_layers - 1, 0, h_BTD)

    per_token = flops_per_token(config.model)
    trained_on = run.model.step * config.train.batch_size * config.model.context_length
    return {
        "bits_per_byte": bits_per_byte(NO_HOOKS),
        # Of the last layer with TopK; without them only what goes around them is left.
        "bits_per_byte_without_neurons": (
            bits_per_byte(LayerHooks(output=silence)) if n_topk_layers else None
        ),
        "parameters": parameter_count(run.model.params),
        "training_tokens": trained_on,
        "training_flops": per_token * trained_on,
        # Training is the forward pass and twice as much for the pass back.
        "flops_per_generated_token": per_token / 3,
    }


# Of the colour-blind-safe palette of Okabe and Ito; one for each run.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#666666")
_LONGEST_NAME = 20  # of a run; its end is shown
_COLUMNS = 2
_WIDTH, _LEFT, _RIGHT = 640, 236, 20  # of a chart, in pixels
_ROW, _SPREAD, _DOT, _HEAD, _FOOT = 24, 16, 5, 26, 30  # heights, in pixels


@dataclasses.dataclass(frozen=True)
class _Row:
    colour: str
    label: str  # run and basis
    figures: Mapping[int, Mapping[str, Any]]  # by layer: value, low, high


def draw(facts: Mapping[str, Any]) -> str:
    """Returns the picture of a card, the JSON object; figures that are null are left out."""

    def rows(get: Any) -> list[_Row]:
        found = []
        for number, run in enumerate(facts["runs"]):
            name = run["run"].rstrip("/").rpartition("/")[2][-_LONGEST_NAME:]
            for basis in run["bases"]:
                figures = {layer["layer"]: get(layer) for layer in basis["layers"]}
                known = {at: x for at, x in figures.items() if x is not None and x["value"] is not None}
                if known:
                    colour = _COLOURS[number % len(_COLOURS)]
                    found.append(_Row(colour, f"{name}: {TITLES[basis['name']]}", known))
        return found

    charts = [
        (
            ", ".join(filter(None, (measure.title, measure.unit))),
            rows(operator.methodcaller("get", measure.name)),
        )
        for measure in MEASURES
    ]
    for given in facts["probing"]["sets"]:
        for k in ("1", "16"):

            def auc(layer: Mapping[str, Any], name: str = given["name"], k: str = k) -> Any:
                return layer.get("probing", {}).get(name, {}).get("auc", {}).get(k)

            charts.append((f"{given['name']}: AUC of probes of {k}", rows(auc)))
    runs = ", ".join(run["run"] for run in facts["runs"])
    return _charts([chart for chart in charts if chart[1]], f"Readability of {runs}", "layers")


def draw_claims(study: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Returns the picture of the claims of a study, the JSON object; `titles` name bases."""
    charts = []
    for figure in (figure for claim in study["claims"] for figure in claim["figures"]):
        rows = {"TopK LM": figure["ours"], **figure["others"]}
        charts.append(
            (
                ", ".join(filter(None, (figure["name"], figure["unit"]))),
                [
                    _Row(
                        _COLOURS[0 if place == 0 else 1 if name == figure["rival"] else -1],
                        titles.get(name, name),
                        {n: {"value": x, "low": None, "high": None} for n, x in enumerate(values)},
                    )
                    for place, (name, values) in enumerate(rows.items())
                ],
            )
        )
    return _charts(charts, "The claims, figure by figure", "seeds")


def _charts(charts: Sequence[tuple[str, Sequence[_Row]]], about: str, dots: str) -> str:
    """Lays charts out side by side; `dots` says what their numbers count."""
    top, content = 8.0, list[str]()
    for first in range(0, len(charts), _COLUMNS):
        side_by_side = charts[first : first + _COLUMNS]
        for column, (title, of_measure) in enumerate(side_by_side):
            content.append(f'<g transform="translate({_WIDTH * column} {top})">')
            content += [*_chart(title, of_measure, dots), "</g>"]
        top += _HEAD + _ROW * max(len(of_measure) for _, of_measure in side_by_side) + _FOOT
    style = "text{font:12px sans-serif;fill:#222}.title{font-weight:600}.grid{stroke:#ddd}"
    style += ".layer{font:8px sans-serif;fill:#fff;text-anchor:middle}"
    width = _WIDTH * _COLUMNS
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" role="img" '
        f'aria-label="{escape(about)}">'
        f'<style>{style}</style><rect width="{width}" height="{top}" fill="#fff"/>'
        f"{''.join(content)}</svg>\n"
    )


def _chart(title: str, rows: Sequence[_Row], dots: str) -> Iterator[str]:
    ends = [end for row in rows for figure in row.figures.values() for end in _ends(figure)]
    low, high = min(ends), max(ends)
    margin = 0.04 * ((high - low) or abs(high) or 1.0)
    x = Axis(title, max(low - margin, 0.0) if low >= 0 else low - margin, high + margin)
    base = _HEAD + _ROW * len(rows)

    def at(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * x.share(value)

    yield f'<text class="title" x="{_LEFT}" y="14">{escape(title)} (numbers: {dots})</text>'
    for tick in x.ticks():
        yield (
            f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{_HEAD - 4}" y2="{base}"/>'
            f'<text x="{at(tick):.1f}" y="{base + 14}" text-anchor="middle">{x.text(round(tick, 10))}</text>'
        )
    for number, row in enumerate(rows):
        middle = _HEAD + _ROW * (number + 0.5)
        yield f'<text x="{_LEFT - 10}" y="{middle + 4:.1f}" text-anchor="end">{escape(row.label)}</text>'
        for place, (layer, figure) in enumerate(row.figures.items()):
            y = middle + _SPREAD * ((place + 0.5) / len(row.figures) - 0.5)
            begin, end = _ends(figure)
            centre = at(figure["value"])
            yield (
                f'<line x1="{at(begin):.1f}" x2="{at(end):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="{row.colour}" stroke-width="1.5"/><circle cx="{centre:.1f}" cy="{y:.1f}" '
                f'r="{_DOT}" fill="{row.colour}" stroke="#fff" stroke-width="0.5"><title>'
                f"{escape(row.label)}, {dots[:-1]} {layer}: {figure['value']:.4g}</title></circle>"
                f'<text class="layer" x="{centre:.1f}" y="{y + 2.8:.1f}">{layer}</text>'
            )


def _ends(figure: Mapping[str, Any]) -> tuple[float, float]:
    """Returns both ends of an interval, or the figure twice where there is none."""
    value, given = figure["value"], (figure["low"], figure["high"])
    low, high = (value if end is None else end for end in given)
    return low, high
