"""`topklm neurons`: reads activations off a model, measures its neurons, and finds them."""

import argparse
import dataclasses
from pathlib import Path
import re

from topklm.commands import (
    neurons_ablate,
    neurons_contrast,
    neurons_find,
    neurons_pipeline,
    neurons_select,
    shared,
)
from topklm.commands.shared import Output, Verb
from topklm.data.dataset import SPLITS
from topklm.distributed import cluster
from topklm.neurons import dictionary as dictionary_lib
from topklm.neurons import fit_dictionary
from topklm.neurons import harvest as harvest_lib
from topklm.neurons.harvest import ALL, Share
from topklm.neurons.paths import NeuronsFolder
from topklm.neurons.statistics import MeasureSettings
from topklm.neurons.store import Store

DESCRIPTION = "Reads activations off a model, measures its neurons, and finds them."
EXAMPLE = "topklm neurons harvest runs/small --tokens 500_000"

_MOST_DIGITS = 15  # of a count
_MOST_SAMPLES = 2**31 - 1  # as the table can hold them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    verbs = {
        "harvest": Verb(
            "run held-out text through the model and store what its neurons do",
            "Runs text through a model and stores the activations of its TopK layers, the tokens and their "
            "losses. Started again it goes on where it stopped.",
            EXAMPLE,
            _add_harvest,
            _harvest,
        ),
        "measure": Verb(
            "compute the statistics of all neurons from what was harvested",
            "Computes density, entropies, logit effects, ablation effects, nearest neurons and examples of "
            "every neuron, and writes them as neurons.parquet.",
            "topklm neurons measure runs/small",
            _add_measure,
            _measure,
        ),
    }
    for name, command, summary in (
        ("find", neurons_find, "which neurons fire on a text, a token or a pattern"),
        ("contrast", neurons_contrast, "which neurons are more often active in one text than in another"),
        ("select", neurons_select, "write a set of neurons as interventions"),
        ("ablate-set", neurons_ablate, "what a model loses of two texts without some neurons"),
    ):
        verbs[name] = Verb(summary, command.DESCRIPTION, command.EXAMPLE, command.add_arguments, command.run)
    shared.add_verbs(parser, verbs, "harvest|measure|find|...")


def _add_harvest(parser: argparse.ArgumentParser) -> None:
    shared.add_run(parser)
    parser.add_argument(
        "--tokens",
        type=_count,
        default=neurons_pipeline.DEFAULT_TOKENS,
        metavar="N",
        help="default %(default)s",
    )
    parser.add_argument(
        "--source",
        metavar="TEXT",
        help="prepared folder, or files, globs, URLs of text; default the run's data",
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="heldout", help="of prepared data; default %(default)s"
    )
    parser.add_argument(
        "--keep",
        type=_count,
        metavar="K",
        help="of a Base LM, only the K largest entries of each token, to compare it with a TopK model; "
        "default all that are positive",
    )
    parser.add_argument(
        "--dictionary",
        choices=dictionary_lib.KINDS,
        help="of a Base LM, the hidden state written in this dictionary, of as many codes, of which the K "
        "largest are kept (default the config's topk_k); made first, from the run's training text",
    )
    parser.add_argument(
        "--dictionary-tokens",
        type=_count,
        default=fit_dictionary.DEFAULT_TOKENS,
        metavar="N",
        help="of training text, from which the dictionary is made; default %(default)s",
    )
    parser.add_argument("--batch-size", type=_count, metavar="B", help="rows; default by device")
    parser.add_argument(
        "--part",
        type=_share,
        metavar="I/N",
        help="every N-th document, from the I-th, 0/4 to 3/4 say; default by the launcher's environment",
    )
    shared.add_step(parser)
    shared.add_json(parser)


def _add_measure(parser: argparse.ArgumentParser) -> None:
    shared.add_run(parser)
    parser.add_argument(
        "--ablation-samples",
        type=int,
        default=MeasureSettings.ablation_samples,
        metavar="N",
        help="tokens at which each neuron is set to 0; 0: none; default %(default)s",
    )
    parser.add_argument(
        "--lens-contexts",
        type=_count,
        default=MeasureSettings.lens_contexts,
        metavar="N",
        help="over which the Jacobian is averaged; default %(default)s",
    )
    parser.add_argument(
        "--encoder",
        metavar="MODEL",
        help="folder, name or NAME@REVISION of a sentence encoder, for the package sentence-transformers: "
        "semantic entropy and monosemanticity compare tokens by the text around them, not by the model's own "
        "unembedding",
    )
    shared.add_step(parser)
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    arguments.call(arguments)


def _harvest(arguments: argparse.Namespace) -> None:
    shared.check_on_disk(arguments.run)
    output = Output(arguments.json)
    model, mesh = shared.load(arguments)
    folder = NeuronsFolder(Path(model.run), model.step)
    place = cluster.find() if arguments.part is None else None
    share = arguments.part or (Share(place.index, place.count) if place else ALL)
    neurons_pipeline.harvest_into(
        folder,
        model,
        mesh,
        output.progress,
        n_tokens=arguments.tokens,
        source=arguments.source,
        split=arguments.split,
        rows=arguments.batch_size,
        keep=arguments.keep,
        dictionary=arguments.dictionary,
        dictionary_tokens=arguments.dictionary_tokens,
        share=share,
    )
    store = Store(folder.store)
    facts = {"store": str(folder.store), "tokens": store.n_tokens, **dataclasses.asdict(store.metadata)}
    output.give(facts, lambda: output.say(_summary(folder, store)))


def _measure(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.ablation_samples <= _MOST_SAMPLES:
        raise shared.wrong(arguments, "ablation_samples", allowed=f"from 0 to {_MOST_SAMPLES}")
    shared.check_on_disk(arguments.run)
    output = Output(arguments.json)
    model, _ = shared.load(arguments)
    folder = NeuronsFolder(Path(model.run), model.step)
    settings = MeasureSettings(
        ablation_samples=arguments.ablation_samples, lens_contexts=arguments.lens_contexts
    )
    neurons_pipeline.measure_into(folder, model, output.progress, settings, arguments.encoder)
    from topklm.neurons.statistics import catalog  # noqa: PLC0415 - its table needs a package of the extra

    described = [statistic.described() for statistic in catalog.STATISTICS]
    facts = {"table": str(folder.table), "statistics": described}
    output.give(facts, lambda: output.say(f"wrote {folder.table}"))


def _summary(folder: NeuronsFolder, store: Store) -> str:
    metadata = store.metadata
    size = sum(path.stat().st_size for path in folder.store.rglob("*") if path.is_file())
    what = "positive entries of a Base LM's hidden state"
    if metadata.kind == harvest_lib.TOPK:
        what = "activations"
    elif metadata.dictionary:
        what = f"codes of a Base LM's hidden state ({dictionary_lib.TITLES[metadata.kind]})"
    return (
        f"{folder.store}: {store.n_events:,} {what} of {len(metadata.layers)} layers at {store.n_tokens:,} "
        f"tokens, {size / 2**20:,.0f} MiB ({size / max(store.n_events, 1):.2f} bytes each)"
    )


def _count(text: str) -> int:
    """Reads a number of 1 or more, also written 2_000_000."""
    digits = text.replace("_", "").lstrip("0")
    if not re.fullmatch(r"[0-9][0-9_]*", text) or not digits:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 1 or more")
    if len(digits) > _MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"{text!r}: must have at most {_MOST_DIGITS} digits")
    return int(digits)


def _share(text: str) -> Share:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: must be I/N with I from 0 to N - 1, e.g. 0/4")
    return Share(int(found[1]), int(found[2]))
