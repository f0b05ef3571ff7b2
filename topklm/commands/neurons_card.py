"""`topklm neurons card`: how readable a model's neurons are, beside other bases and other models."""

import argparse
from typing import Any

from topklm.commands import shared
from topklm.commands.shared import Output, Verb
from topklm.data.formats import QUICKSTART
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.imports import when_used
from topklm.neurons import DICTIONARY_TOKENS
from topklm.storage.files import local_path, write_atomically

with when_used():
    from topklm.steering import survey


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
    from topklm.commands.card import of_run, tables  # noqa: PLC0415
    from topklm.explorer import card_picture  # noqa: PLC0415
    from topklm.neurons import labelled_texts, probing  # noqa: PLC0415
    from topklm.sae import folder as sae_folder  # noqa: PLC0415

    sets = of_run.labelled(arguments.labels, arguments.conllu, arguments.sae_probes, arguments.seed)
    runs = [of_run.load(name, arguments.step if name == arguments.run else None) for name in names]
    notes = list[str]()
    if arguments.labels is None and runs[0].model.config.data.source == QUICKSTART:
        try:
            sets = [labelled_texts.topics(arguments.seed), *sets]
        except UserError as e:  # its text is not where the run was trained
            notes.append(f"topics of articles are not probed: {e}")
    if not sets:
        notes.append("no text with labels was given (--labels, --conllu, --sae-probes): nothing is probed")
    output.progress.say("clustering tokens")
    documents = of_run.documents(runs[0], arguments.tokens)
    clusters, resource = of_run.clusters(runs[0], documents, arguments.vectors, arguments.seed)
    common = of_run.Common(
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
        found, more = of_run.measure(common, run)
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
            "seeds": tables.over_seeds([run.model for run in runs], measured),
            "notes": notes,
        }
    )
    if arguments.out is not None:
        with disk_errors_are_user_errors(f"writing {arguments.out}"):
            write_atomically(local_path(arguments.out, "--out"), card_picture.draw(facts).encode())
    output.give(facts, lambda: tables.show(output, facts))


CARD = Verb(
    "how readable a model's neurons are, beside other bases and models",
    "Measures on the same text how readable the neurons of models are: density, entropies, how much of them "
    "the token explains, sparse probes, rules that find them, effects of their ablation, and text that they "
    "turn; beside a random rotation, principal components and, of a Base LM, a post-hoc TopK SAE.",
    "topklm neurons card runs/small --against runs/small-base --conllu ud.conllu --out card.svg",
    _add_card,
    _card,
)
