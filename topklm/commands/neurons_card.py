"""`topklm neurons card`: how readable a model's neurons are, beside other bases and other models."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from topklm.commands import shared
from topklm.commands.shared import Output, Verb
from topklm.config import Config
from topklm.data.building.build import prepare
from topklm.data.formats import QUICKSTART
from topklm.data.stream import heldout_part
from topklm.errors import disk_errors_are_user_errors
from topklm.inference.language_model import LanguageModel
from topklm.layout import Layout
from topklm.neurons import fit_dictionary, labelled_texts, probing
from topklm.neurons.dictionary import TITLES, Dictionary
from topklm.neurons.documents import TextModel, open_documents
from topklm.neurons.harvest import kind_and_layers
from topklm.neurons.labelled_texts import LabelledTexts
from topklm.progress import Progress
from topklm.steering import concepts as concept_lib
from topklm.steering import dose
from topklm.steering.concepts import NeuronFacts
from topklm.steering.dose import Response, Sampled
from topklm.steering.survey import without_nan
from topklm.storage.files import local_path, write_atomically
from topklm.training.evaluation import evaluate, heldout_feed, make_eval_step
from topklm.training.throughput import flops_per_token, parameter_count

_TITLES = {
    "own": "own neurons",
    "coordinates": "coordinates, cut",
    "sae": TITLES["sae"],
    "random": "random rotation",
    "pca": TITLES["pca"],
}
_STRENGTHS = (0.5, 1.0, 2.0)  # in the neuron's largest activation on the text
_MOST_PERPLEXITY = 2.0  # times that of the unsteered texts
_ABLATION_SAMPLES = 256  # of each neuron
_NOTHING = "-"


def _add_card(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run", "step", "seed")
    add("--against RUN", "other runs, measured on the same text", nargs="+", default=[])
    add("--tokens N", "of held-out text of RUN, on which neurons are measured", 25_000)
    text = (
        "word vectors (a word and its numbers a line), whose clusters semantic entropy is of; default RUN's "
    )
    add("--vectors FILE", text + "unembedding")
    text = (
        'texts with labels to probe for, a line {"text": ..., "label": ...} each; default the topics of the '
    )
    add("--labels FILE", text + "quickstart's articles, where RUN was trained on these")
    add("--conllu FILE", "sentences as CoNLL-U (also .gz): probes for the part of speech of words")
    add("--sae-probes", "probe on the data of the package sae-probes", False)
    add("--dictionary-tokens N", "of training text, for the SAE of a Base LM", fit_dictionary.DEFAULT_TOKENS)
    add("--no-steering", "leave out how many neurons turn text, which takes longest", False)
    add("--json FILE", "print one JSON object, or write it to a file", nargs="?", const="-")
    add("--out FILE.svg", "draw the measures")


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """A model on the card."""

    name: str  # as it was given
    model: LanguageModel
    layout: Layout

    @property
    def text_model(self) -> TextModel:
        """Reads text."""
        return TextModel(self.model.cfg, self.model.params, self.layout, self.model.tokenizer.separator_id)

    @property
    def n_layers(self) -> int:
        """Returns S."""
        return len(kind_and_layers(self.model.cfg)[1])


def _card(arguments: argparse.Namespace) -> None:
    shared.check_at_least(arguments, 1, "tokens", "dictionary_tokens")
    shared.check_at_least(arguments, 0, "seed")
    shared.check_installed("topklm neurons card", ["pyarrow"])
    names = [arguments.run, *arguments.against]
    for name in names:
        shared.check_on_disk(name)
    if arguments.out is not None and not arguments.out.endswith(".svg"):
        raise shared.wrong(arguments, "out", allowed="a file that ends in .svg")
    output = Output(arguments.json == "-")
    sets = _labelled(arguments)
    runs = [_load(name, arguments.step if name == arguments.run else None) for name in names]
    first, notes = runs[0], list[str]()
    if arguments.labels is None and first.model.config.data.source == QUICKSTART:
        sets = [labelled_texts.topics(arguments.seed), *sets]
    if not sets:
        notes.append("no text with labels was given (--labels, --conllu, --sae-probes): nothing is probed")
    clusters, resource = _clusters(arguments, first.model, output.progress)
    documents = _documents(first, arguments.tokens)
    measured = []
    for run in runs:
        output.progress.say(f"{run.name}:")
        measured.append(_measure(arguments, run, runs, documents, clusters, sets, output.progress, notes))
    facts = without_nan(
        {
            "tokens": sum(map(len, documents)) - len(documents),
            "documents": len(documents),
            "seed": arguments.seed,
            "clusters": resource,
            "probing": {
                "selection": probing.SELECTION,
                "sets": [{"name": given.name, "source": given.source} for given in sets],
            },
            "runs": measured,
            "seeds": _over_seeds(runs, measured),
            "notes": notes,
        }
    )
    if arguments.out is not None:
        from topklm.explorer import card_picture  # noqa: PLC0415 - needs a package of the extra

        with disk_errors_are_user_errors(f"writing {arguments.out}"):
            path = local_path(arguments.out, "--out")
            write_atomically(path, card_picture.draw(facts, _TITLES).encode())
    output.give(facts, lambda: _show(output, facts))
    output.keep(facts, arguments.json)


def _labelled(arguments: argparse.Namespace) -> list[LabelledTexts]:
    sets = []
    if arguments.labels is not None:
        sets.append(labelled_texts.of_json_lines(Path(arguments.labels), arguments.seed))
    if arguments.conllu is not None:
        sets.append(labelled_texts.of_conllu(Path(arguments.conllu)))
    if arguments.sae_probes:
        sets.append(labelled_texts.of_sae_probes(arguments.seed))
    return sets


def _load(name: str, step: int | None) -> _Run:
    return _Run(name, *shared.load(argparse.Namespace(run=name, step=step)))


def _documents(run: _Run, n_tokens: int) -> list[np.ndarray]:
    """Reads the first held-out tokens of a run, in documents of two or more; the last one is cut."""
    found, left = list[np.ndarray](), n_tokens
    for ids in open_documents(run.model.tokenizer, run.model.config.data):
        if left < 2:
            break
        if len(ids) > 1:
            found.append(ids[:left])
            left -= len(found[-1])
    return found


def _clusters(
    arguments: argparse.Namespace, model: LanguageModel, progress: Progress
) -> tuple[np.ndarray, dict[str, Any]]:
    """Groups the tokens of the vocabulary, int[V], and says by which resource."""
    from topklm.neurons.statistics import embeddings  # noqa: PLC0415 - slow to import

    vocab_size = model.cfg.vocab_size
    if arguments.vectors is None:
        progress.say(f"clustering {vocab_size:,} tokens")
        found = embeddings.cluster_tokens(np.asarray(model.W_U, np.float32), None, arguments.seed)
        resource = f"k-means of the unembedding rows of {arguments.run}"
        return found, {"resource": resource, "n_clusters": int(found.max()) + 1, "tokens_without": 0.0}
    from topklm.neurons import card  # noqa: PLC0415

    strings = model.tokenizer.token_strings(range(vocab_size))
    found = card.clusters_of_vectors(Path(arguments.vectors), strings, arguments.seed)
    share = float((found == card.NO_CLUSTER).mean())
    resource = f"k-means of the vectors of {arguments.vectors}, of tokens' text without spaces"
    return found, {"resource": resource, "n_clusters": int(found.max()) + 1, "tokens_without": share}


def _measure(
    arguments: argparse.Namespace,
    run: _Run,
    runs: Sequence[_Run],
    documents: Sequence[np.ndarray],
    clusters: np.ndarray,
    sets: Sequence[LabelledTexts],
    progress: Progress,
    notes: list[str],
) -> dict[str, Any]:
    """Measures one run."""
    from topklm.neurons import card  # noqa: PLC0415 - its table needs a package of the extra

    model, config, first = run.model, run.model.cfg, runs[0].model
    is_same = model.tokenizer.sha256 == first.tokenizer.sha256
    if not is_same:
        documents = [model.tokenizer.encode(first.tokenizer.decode(ids)) for ids in documents]
        documents = [ids for ids in documents if len(ids) > 1]
        line = f"{run.name} has another tokenizer than {runs[0].name}: its entropies, by_token, by_context"
        notes.append(f"{line}, detectors and ablation are left out")
    text = card.make_text(documents, config.vocab_size, clusters if is_same else None, seed=arguments.seed)
    text_model, n_layers, n = run.text_model, run.n_layers, sum(map(len, documents))

    def phase(name: str, total: int, work: Callable[[Callable[[int], None]], Any]) -> Any:
        with progress.phase(name, total) as report:
            return work(lambda tokens: report(tokens, 0, tokens))

    width, keep = _size(runs, run)
    sae = None if config.n_topk_layers else _sae(arguments, run, width, keep, documents, progress)
    mean, covariance = phase(
        "reading hidden states", n, functools.partial(card.moments, text_model, n_layers, text)
    )
    bases = card.bases(config, mean, covariance, keep, sae, arguments.seed)
    blocks = phase("reading codes", n, functools.partial(card.read_blocks, text_model, n_layers, bases, text))
    entries: list[dict[str, Any]] = []
    figures_of = []
    for basis, of_basis in zip(bases, blocks, strict=True):
        with progress.phase(
            f"measuring: {_TITLES[basis.name]}", sum(len(b.offsets) - 1 for b in of_basis)
        ) as report:
            figures = [card.measure(block, text, lambda done: report(done, 0, 0)) for block in of_basis]
        figures_of.append(figures)
        layers = []
        for layer, of_layer in enumerate(figures):
            summaries = {name: card.with_interval(x) for name, x in of_layer.summaries().items()}
            n_counted = int(of_layer.is_counted.sum())
            layers.append(
                {"layer": layer, "n_neurons": len(of_layer.n_active), "n_counted": n_counted, **summaries}
            )
        entries.append({"name": basis.name, "layers": layers})
    for given in sets:
        _probe(arguments, run, bases, entries, given, progress)
    fluent = None
    if is_same:
        search = card.detector_search(text, model.tokenizer.token_bytes(range(config.vocab_size)))
        for entry, figures, of_basis in zip(entries, figures_of, blocks, strict=True):
            chosen = card.readable(figures)
            with progress.phase(f"seeking detectors: {_TITLES[entry['name']]}", len(chosen)) as report:
                entry["detectors"] = _detectors(chosen, of_basis, search, text, report)
            if entry["name"] == "own":
                entry["ablation"] = _ablation(arguments, run, text, chosen, progress)
                if not arguments.no_steering:
                    fluent = _steering(run, chosen, of_basis, text, progress)
    return {
        "run": run.name,
        "step": model.step,
        "train_seed": model.config.train.seed,
        "kind": "topk" if config.n_topk_layers else "base",
        **_costs(run, progress),
        "bases": entries,
        "steering": fluent,
    }


def _size(runs: Sequence[_Run], run: _Run) -> tuple[int, int]:
    """Returns codes of a layer and how many are kept; a Base LM's are as those of the first TopK LM."""
    like = next((r for r in (run, *runs) if r.model.cfg.n_topk_layers), run).model.cfg
    return like.d_model, min(like.topk_k, run.model.cfg.d_model)


def _sae(
    arguments: argparse.Namespace,
    run: _Run,
    width: int,
    keep: int,
    documents: Sequence[np.ndarray],
    progress: Progress,
) -> Dictionary:
    """Returns the SAE of a Base LM; it is made once, and kept beside the run."""
    folder = shared.folder_of(run.model)
    path = folder.path / f"card-sae-{width}-{keep}.npz"
    there = fit_dictionary.load_fitting(path, "sae", keep, arguments.dictionary_tokens)
    if there is not None:
        return there
    made = fit_dictionary.fit(
        "sae",
        run.text_model,
        run.model.config.data,
        documents,
        keep=keep,
        width=width,
        n_tokens=arguments.dictionary_tokens,
        progress=progress,
    )
    with disk_errors_are_user_errors(f"writing {path}"):
        made.save(path)
    return made


def _probe(
    arguments: argparse.Namespace,
    run: _Run,
    bases: Sequence[Any],
    entries: Sequence[dict[str, Any]],
    given: LabelledTexts,
    progress: Progress,
) -> None:
    """Adds the probes of a set of texts to the entries of all bases."""
    from topklm.neurons import card  # noqa: PLC0415 - see `_measure`

    model = run.model
    located = labelled_texts.locate(given, model.tokenizer, model.cfg.context_length)
    kept = located.kept
    questions, left_out = probing.ask(given.labels[kept], given.families[kept], given.to_fit[kept])
    with progress.phase(f"reading {given.name}", sum(map(len, located.documents))) as report:
        pooled = card.pool(
            run.text_model, run.n_layers, bases, located, lambda tokens: report(tokens, 0, tokens)
        )
    weights = card.text_weights(given.text[kept], arguments.seed)
    facts = {"n_labels": len(questions), "left_out": left_out, "examples": len(kept)}
    n_layers = run.n_layers
    with progress.phase(f"probing {given.name}", len(bases) * n_layers * len(questions)) as report:
        for layer in range(n_layers):
            scores = {
                basis.name: probing.probe(x[layer], questions, weights, report=lambda: report(1, 0, 0))
                for basis, x in zip(bases, pooled, strict=True)
            }
            for entry in entries:
                name = entry["name"]
                random = None if name == "random" else scores["random"]
                found = card.probing_entry(scores[name], random) if questions else {}
                entry["layers"][layer].setdefault("probing", {})[given.name] = {**facts, **found}


def _detectors(
    chosen: Sequence[tuple[int, int]], blocks: Sequence[Any], search: Any, text: Any, report: Any
) -> dict[str, Any]:
    from topklm.neurons import card  # noqa: PLC0415 - see `_measure`

    found = []
    for layer, number in chosen:
        best = card.detect(search, blocks[layer], number, len(text.token_ids))
        found.append({"layer": layer, "neuron": number, "rule": best.rule, "f1": best.f1})
        report(1, 0, 0)
    scores = [one["f1"] for one in found]
    n_fair = sum(score >= card.FAIR_F1 for score in scores)
    median = float(np.nanmedian(scores)) if np.isfinite(scores).any() else None
    return {"n_fair": n_fair, "median_f1": median, "neurons": found}


def _ablation(
    arguments: argparse.Namespace, run: _Run, text: Any, chosen: Sequence[tuple[int, int]], progress: Progress
) -> dict[str, Any] | None:
    from topklm.neurons import card  # noqa: PLC0415 - see `_measure`

    if not chosen:
        return None
    model = run.model
    targets = [concept_lib.raised_tokens(model.cfg, model.params, number) for _, number in chosen]
    with progress.phase("setting neurons to 0", 1000) as report:
        done = 0

        def tell(share: float) -> None:
            nonlocal done
            report(round(1000 * share) - done, 0, 0)
            done = round(1000 * share)

        return card.specificity(
            model.cfg,
            model.params,
            text,
            chosen,
            targets,
            separator_id=model.tokenizer.separator_id,
            samples=_ABLATION_SAMPLES,
            seed=arguments.seed,
            report=tell,
        )


def _steering(
    run: _Run, chosen: Sequence[tuple[int, int]], blocks: Sequence[Any], text: Any, progress: Progress
) -> dict[str, Any]:
    """Counts the neurons that raise a concept of their own while the text stays fluent."""
    from topklm.neurons.statistics import entropy  # noqa: PLC0415 - slow to import

    model, sampled = run.model, Sampled()
    found = []
    total = len(chosen) * (1 + len(_STRENGTHS)) * len(sampled.prompts) * sampled.samples
    with progress.phase("steering", total) as report:
        for layer, number in chosen:
            events = blocks[layer].one(number)
            largest = float(events.values.max())
            by_token = entropy.by_group(events, text.token_ids, text.vocab_size)
            inputs = tuple(entropy.top_tokens(by_token)[0][0].tolist())
            facts = NeuronFacts(len(events.tokens), len(text.token_ids), largest, inputs, ())
            concepts = concept_lib.own_concepts(model, None, facts, layer, number)
            values = [strength * largest for strength in _STRENGTHS]
            responses = dose.respond(
                model, (layer, number), values, concepts, sampled, report=lambda texts: report(texts, 0, 0)
            )
            turned = [
                strength
                for strength, response in zip(_STRENGTHS, responses[1:], strict=True)
                if _turns(responses[0], response)
            ]
            found.append({"layer": layer, "neuron": number, "strengths": turned})
    n_fluent = sum(bool(one["strengths"]) for one in found)
    return {"strengths": list(_STRENGTHS), "n_fluent": n_fluent, "neurons": found}


def _turns(unsteered: Response, steered: Response) -> bool:
    """Tells whether the rate of a concept is up, interval above interval, and perplexity at most doubled."""
    rises = any(steered.rates[name].low > rate.high for name, rate in unsteered.rates.items())
    return rises and steered.perplexity.value <= _MOST_PERPLEXITY * unsteered.perplexity.value


def _costs(run: _Run, progress: Progress) -> dict[str, Any]:
    """Returns bits per byte of all held-out text of the run, and what the model costs."""
    config: Config = run.model.config
    progress.say("evaluating")
    mixture = prepare(config.data, lambda line: None)
    part = heldout_part(mixture, max_tokens=0)
    found = evaluate(
        make_eval_step(config, run.layout),
        run.model.params,
        heldout_feed(config, mixture, run.layout, part),
        n_bytes=part.utf8_bytes,
        n_topk_layers=config.model.n_topk_layers,
    )
    assert found is not None  # nobody stops it
    per_token = flops_per_token(config.model)
    trained_on = run.model.step * config.train.batch_size * config.model.context_length
    return {
        "bits_per_byte": found["bits_per_byte"],
        "parameters": parameter_count(run.model.params),
        "training_tokens": trained_on,
        "training_flops": per_token * trained_on,
        # Training is the forward pass and twice as much for the pass back.
        "flops_per_generated_token": per_token / 3,
    }


def _over_seeds(runs: Sequence[_Run], measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups runs with the same config but for the seed: the mean of each figure, and each run's own."""
    groups: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        content = run.model.config.to_dict()
        content["train"] = {name: x for name, x in content["train"].items() if name != "seed"}
        groups.setdefault(json.dumps([run.model.step, content], sort_keys=True, default=str), []).append(
            number
        )
    return [
        {
            "runs": [measured[i]["run"] for i in members],
            "figures": _means([dict(_flat(measured[i])) for i in members]),
        }
        for members in groups.values()
        if len(members) > 1
    ]


def _flat(measured: Mapping[str, Any]) -> Any:
    """Yields the figures that are compared over seeds, with their names."""
    yield "bits_per_byte", measured["bits_per_byte"]
    for basis in measured["bases"]:
        for layer in basis["layers"]:
            where = f"{basis['name']}.{layer['layer']}"
            for name, figure in layer.items():
                if isinstance(figure, dict) and "value" in figure:
                    yield f"{where}.{name}", figure["value"]
            for given, probes in layer.get("probing", {}).items():
                for score in ("auc", "balanced_accuracy"):
                    for k, figure in probes.get(score, {}).items():
                        yield f"{where}.{given}.{score}.{k}", figure["value"]
                    for k, figure in probes.get("less_random", {}).get(score, {}).items():
                        yield f"{where}.{given}.{score}_less_random.{k}", figure["value"]


def _means(figures: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    found = {}
    for name in figures[0]:
        values = [each.get(name) for each in figures]
        there = [value for value in values if value is not None]
        found[name] = {"mean": float(np.mean(there)) if there else None, "values": values}
    return found


# Output for a person.


def _show(output: Output, facts: Mapping[str, Any]) -> None:
    from topklm.neurons import card  # noqa: PLC0415 - see `_measure`

    heads = ["run", "basis", "layer", *(measure.title for measure in card.MEASURES)]
    output.console.print(shared.table(heads, _rows(facts, card.MEASURES), left=["run", "basis"]))
    output.say("medians over codes active at 30 tokens or more, with 95 % intervals over documents; nats")
    for given in facts["probing"]["sets"]:
        rows, n_labels = _probing_rows(facts, given["name"])
        heads = ["run", "basis", "layer", *(f"AUC, k = {k}" for k in probing.KS), "less rotation, k = 1"]
        heads += [f"accuracy, k = {probing.KS[0]}"]
        output.console.print(shared.table(heads, rows, title=given["name"], left=["run", "basis"]))
        output.say(f"{given['source']}; {n_labels}; {facts['probing']['selection']}")
    heads = ["run", "bits per byte", "parameters", "training FLOPs", "FLOPs a token", "detectors", "fluent"]
    output.console.print(shared.table(heads, map(_run_row, facts["runs"]), left=["run"]))
    output.say(
        f"detectors: of the first {card.READABLE} neurons, those that a rule on the text finds with F1 of "
        f"{card.FAIR_F1} or more; fluent: of the same, those that raise a concept of their own while "
        "perplexity is at most doubled"
    )
    for run in facts["runs"]:
        for basis in run["bases"]:
            if basis.get("ablation"):
                output.say(_ablation_line(run["run"], basis["ablation"]))
    output.say(f"clusters: {facts['clusters']['resource']}")
    for group in facts["seeds"]:
        spread = group["figures"]["bits_per_byte"]
        output.say(f"same but for the seed: {', '.join(group['runs'])}: {spread['mean']:.4f} bits per byte")
    for line in facts["notes"]:
        output.say(f"note: {line}")


def _rows(facts: Mapping[str, Any], measures: Sequence[Any]) -> list[Sequence[Any] | None]:
    rows: list[Sequence[Any] | None] = []
    for run in facts["runs"]:
        for basis in run["bases"]:
            for layer in basis["layers"]:
                cells = [_cell(layer.get(m.name), m.text) for m in measures]
                rows.append([run["run"], _TITLES[basis["name"]], str(layer["layer"]), *cells])
            rows.append(None)
    return rows


def _cell(figure: Mapping[str, Any] | None, text: str) -> str:
    if figure is None or figure["value"] is None:
        return _NOTHING
    value = text.format(figure["value"])
    if figure["low"] is None:
        return value
    return f"{value} [{text.format(figure['low'])}, {text.format(figure['high'])}]"


def _probing_rows(facts: Mapping[str, Any], name: str) -> tuple[list[Sequence[Any] | None], str]:
    rows: list[Sequence[Any] | None] = []
    said = ""
    for run in facts["runs"]:
        for basis in run["bases"]:
            for layer in basis["layers"]:
                found = layer["probing"][name]
                said = f"{found['n_labels']} labels, {found['left_out']} with too few examples left out"
                auc = [_cell(found.get("auc", {}).get(str(k)), "{:.3f}") for k in probing.KS]
                less = found.get("less_random", {}).get("auc", {}).get("1")
                gap = _cell(less, "{:+.3f}")
                if less and less["standard_error"] is not None:
                    gap += f" ± {less['standard_error']:.3f}"
                accuracy = _cell(found.get("balanced_accuracy", {}).get("1"), "{:.3f}")
                rows.append([run["run"], _TITLES[basis["name"]], str(layer["layer"]), *auc, gap, accuracy])
            rows.append(None)
    return rows, said


def _run_row(run: Mapping[str, Any]) -> Sequence[str]:
    detectors = [
        f"{basis['detectors']['n_fair']} of {len(basis['detectors']['neurons'])} ({basis['name']})"
        for basis in run["bases"]
        if "detectors" in basis
    ]
    steering = run["steering"]
    fluent = f"{steering['n_fluent']} of {len(steering['neurons'])}" if steering else _NOTHING
    return [
        run["run"],
        f"{run['bits_per_byte']:.4f}",
        f"{run['parameters']:,}",
        f"{run['training_flops']:.3g}",
        f"{run['flops_per_generated_token']:.3g}",
        "\n".join(detectors) or _NOTHING,
        fluent,
    ]


def _ablation_line(name: str, found: Mapping[str, Any]) -> str:
    parts = []
    for where in ("own", "elsewhere"):
        one = found[where]
        if one["effect"] is not None:
            error = f" ± {one['standard_error']:.4f}" if one["standard_error"] is not None else ""
            parts.append(f"{one['effect']:+.4f}{error} nats {where} ({one['samples']:,} tokens)")
    return f"{name}: loss without a neuron, at its own targets and elsewhere: {', '.join(parts)}"


CARD = Verb(
    "how readable a model's neurons are, beside other bases and models",
    "Measures on the same text how readable the neurons of models are: density, entropies, how much of them "
    "the token explains, sparse probes, rules that find them, effects of their ablation, and text that they "
    "turn; beside a random rotation, principal components and, of a Base LM, a post-hoc TopK SAE.",
    "topklm neurons card runs/small --against runs/small-base --conllu ud.conllu --out card.svg",
    _add_card,
    _card,
)
