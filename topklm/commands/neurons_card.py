"""`topklm neurons card`: how readable a model's neurons are, beside other bases and models; its tables."""

import argparse
from collections.abc import Mapping, Sequence
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from topklm.commands import shared
from topklm.commands.shared import Output, Verb
from topklm.data.formats import QUICKSTART
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.imports import when_used
from topklm.neurons import DICTIONARY_TOKENS
from topklm.storage.files import local_path, write_atomically

with when_used():
    from topklm.neurons import bases, card, probing
    from topklm.steering import survey

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel


def _add_card(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run", "step", "seed", "json")
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
    add("--dictionary-tokens N", "of training text, for the SAE of a Base LM", DICTIONARY_TOKENS)
    add(
        "--sae DIR", "of topklm sae train, in place of the SAE that a Base LM is given", nargs="+", default=[]
    )
    add("--no-steering", "leave out how many neurons turn text, which takes longest", False)
    add("--out FILE.svg", "draw the measures")


def _card(arguments: argparse.Namespace) -> None:
    shared.check_at_least(arguments, 1, "tokens", "dictionary_tokens")
    shared.check_at_least(arguments, 0, "seed")
    shared.check_installed("topklm neurons card", ["pyarrow", "scipy", "markupsafe"])
    names = [arguments.run, *arguments.against]
    for name in names:
        shared.check_on_disk(name)
    if arguments.out is not None and not arguments.out.endswith(".svg"):
        raise shared.wrong(arguments, "out", allowed="a file that ends in .svg")
    shared.check_can_write(arguments, "out")
    output = Output(arguments.json)
    # They need packages of the extra.
    from topklm.explorer import card as card_lib  # noqa: PLC0415
    from topklm.neurons import labelled_texts  # noqa: PLC0415
    from topklm.sae import folder as sae_folder  # noqa: PLC0415

    sets = card_lib.labelled(arguments.labels, arguments.conllu, arguments.sae_probes, arguments.seed)
    steps = [arguments.step if name == arguments.run else None for name in names]
    asked = [argparse.Namespace(run=name, step=step) for name, step in zip(names, steps, strict=True)]
    runs = [card_lib.Run(one.run, *shared.load(one)) for one in asked]
    notes = list[str]()
    if arguments.labels is None and runs[0].model.config.data.source == QUICKSTART:
        try:
            sets = [labelled_texts.topics(arguments.seed), *sets]
        except UserError as e:  # its text is not where the run was trained
            notes.append(f"topics of articles are not probed: {e}")
    if not sets:
        notes.append("no text with labels was given (--labels, --conllu, --sae-probes): nothing is probed")
    output.progress.say("clustering tokens")
    documents = card_lib.documents(runs[0], arguments.tokens)
    clusters, resource = card_lib.clusters(runs[0], documents, arguments.vectors, arguments.seed)
    common = card_lib.Common(
        runs,
        documents,
        clusters,
        sets,
        seed=arguments.seed,
        dictionary_tokens=arguments.dictionary_tokens,
        saes=[(name, *sae_folder.load_of_any(local_path(name, "--sae"), "--sae")) for name in arguments.sae],
        steers=not arguments.no_steering,
        progress=output.progress,
    )
    measured = list[dict[str, Any]]()
    for run in runs:
        output.progress.say(f"{run.name}:")
        found, more = card_lib.measure(common, run)
        measured.append(found)
        notes += more
    facts = survey.without_nan(
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
            "seeds": over_seeds([run.model for run in runs], measured),
            "notes": notes,
        }
    )
    if arguments.out is not None:
        with disk_errors_are_user_errors(f"writing {arguments.out}"):
            write_atomically(local_path(arguments.out, "--out"), card_lib.draw(facts).encode())
    output.give(facts, lambda: show(output, facts))


CARD = Verb(
    "how readable a model's neurons are, beside other bases and models",
    "Measures on the same text how readable the neurons of models are: density, entropies, how much of them "
    "the token explains, sparse probes, rules that find them, effects of their ablation, and text that they "
    "turn; beside a random rotation, principal components and, of a Base LM, a post-hoc TopK SAE.",
    "topklm neurons card runs/small --against runs/small-base --conllu ud.conllu --out card.svg",
    _add_card,
    _card,
)


_NOTHING = "-"

_Rows = list[Sequence[Any] | None]


def over_seeds(models: Sequence["LanguageModel"], runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups runs with the same config but for the seed; a group has their names and their mean.

    The mean is a run as the others, of the same form. Of a figure with an interval it has the mean of the
    values, and these; lists of single neurons are left out.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for model, measured in zip(models, runs, strict=True):
        config = model.config.to_dict()
        config["train"] = {name: value for name, value in config["train"].items() if name != "seed"}
        key = json.dumps([model.step, config], sort_keys=True, default=str)
        groups.setdefault(key, []).append(measured)
    found = []
    for members in groups.values():
        if len(members) > 1:
            mean = {**_mean(members), "run": f"mean of {len(members)} seeds"}
            found.append({"runs": [one["run"] for one in members], "mean": mean})
    return found


def _mean(trees: Sequence[Any]) -> Any:
    """Returns the mean of JSON of one form; None of what some of them do not have."""
    first = trees[0]
    if any(tree is None for tree in trees) or isinstance(first, str | bool):
        return first if all(tree == first for tree in trees) else None
    if isinstance(first, int | float):
        return float(np.mean(trees))
    if isinstance(first, list):
        return [_mean(parts) for parts in zip(*trees, strict=True)]
    if {"value", "low", "high"} <= first.keys():
        values = [tree["value"] for tree in trees]
        return {"value": _mean(values), "values": values, "low": None, "high": None}
    names = [name for name in first if name != "neurons" and all(name in tree for tree in trees)]
    return {name: _mean([tree[name] for tree in trees]) for name in names}


def show(output: Output, facts: Mapping[str, Any]) -> None:
    """Prints tables of a card."""
    runs = [*facts["runs"], *(group["mean"] for group in facts["seeds"])]
    heads = ["run", "basis", "layer", *(measure.title for measure in card.MEASURES)]
    output.console.print(shared.table(heads, _rows(runs), left=["run", "basis"]))
    output.say(
        "medians over codes active at 30 tokens or more, entropies in nats; ±: half of a 95 % interval over "
        "documents"
    )
    for given in facts["probing"]["sets"]:
        rows, n_labels = _probing_rows(runs, given["name"])
        heads = ["run", "basis", "layer", *(f"AUC, k = {k}" for k in probing.KS), "less rotation, k = 1"]
        heads.append("less cut rotation, k = 1")
        heads.append("accuracy, k = 1")
        output.console.print(shared.table(heads, rows, title=given["name"], left=["run", "basis"]))
        output.say(f"{given['source']}; {n_labels}; {facts['probing']['selection']}")
    heads = [
        "run",
        "bits per byte",
        "without neurons",
        "parameters",
        "training FLOPs",
        "FLOPs a token",
        "detectors",
        "fluent",
    ]
    output.console.print(shared.table(heads, map(_run_row, runs), left=["run"]))
    output.say(
        "without neurons: bits per byte when the last TopK layer hands on 0; later layers then have only the "
        "text that they read by themselves; "
        f"detectors: of the first {card.READABLE} neurons, those that a rule on the text finds with F1 of "
        f"{card.FAIR_F1} or more, and the median; fluent: of the same, those that raise a concept of their "
        "own (in parentheses: their input tokens) while perplexity is at most doubled"
    )
    for run in facts["runs"]:
        for basis in run["bases"]:
            if "ablation" in basis:
                output.say(_ablation_line(run["run"], basis["ablation"]))
    clusters = facts["clusters"]
    without = clusters["tokens_without"]
    left_out = f"; {without:.1%} of the text's tokens are in none" if without else ""
    output.say(f"clusters: {clusters['n_clusters']:,}, {clusters['resource']}{left_out}")
    for group in facts["seeds"]:
        output.say(f"{group['mean']['run']}: {', '.join(group['runs'])}")
    for line in facts["notes"]:
        output.say(f"note: {line}")


def _rows(runs: Sequence[Mapping[str, Any]]) -> _Rows:
    rows: _Rows = []
    for run in runs:
        for basis in run["bases"]:
            for layer in basis["layers"]:
                cells = [cell(layer.get(m.name), m.text) for m in card.MEASURES]
                rows.append([run["run"], bases.TITLES[basis["name"]], str(layer["layer"]), *cells])
            rows.append(None)
    return rows


def cell(figure: Mapping[str, Any] | None, text: str) -> str:
    """Returns a figure with half the width of its interval."""
    if figure is None or figure["value"] is None:
        return _NOTHING
    value = text.format(figure["value"])
    if figure["low"] is None:
        return value
    return f"{value} ± {text.replace('+', '').format((figure['high'] - figure['low']) / 2)}"


def _probing_rows(runs: Sequence[Mapping[str, Any]], name: str) -> tuple[_Rows, str]:
    rows: _Rows = []
    said = ""
    for run in runs:
        for basis in run["bases"]:
            for layer in basis["layers"]:
                found = layer["probing"][name]
                said = f"{found['n_labels']} labels, {found['left_out']} with too few examples left out"
                auc = [cell(found.get("auc", {}).get(str(k)), "{:.3f}") for k in probing.KS]
                gaps = [
                    cell(found.get(f"less_{control}", {}).get("auc", {}).get("1"), "{:+.3f}")
                    for control in ("random", "random_cut")
                ]
                accuracy = cell(found.get("balanced_accuracy", {}).get("1"), "{:.3f}")
                rows.append(
                    [run["run"], bases.TITLES[basis["name"]], str(layer["layer"]), *auc, *gaps, accuracy]
                )
            rows.append(None)
    return rows, said


def _run_row(run: Mapping[str, Any]) -> Sequence[str]:
    detectors, fluent, flops = [], _NOTHING, f"{run['training_flops']:.3g}"
    for basis in run["bases"]:
        if found := basis.get("dictionary"):
            flops += f"\n+ SAE {found['training_flops']:.3g}"
        if found := basis.get("detectors"):
            median = _NOTHING if found["median_f1"] is None else f"{found['median_f1']:.2f}"
            detectors.append(f"{basis['name']}: {found['n_fair']:g} of {found['n']:g}, F1 {median}")
        if found := basis.get("steering"):
            fluent = f"{found['n_fluent']:g} of {found['n']:g} ({found['n_by_concept']['input']:g})"
    return [
        run["run"],
        f"{run['bits_per_byte']:.4f}",
        _NOTHING if (without := run["bits_per_byte_without_neurons"]) is None else f"{without:.4f}",
        f"{run['parameters']:,.0f}",
        flops,
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
