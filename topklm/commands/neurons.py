"""`topklm neurons`: reads activations off a model, measures its neurons, and finds them."""

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path
import re

import jax
import rich.console

import topklm
from topklm.checkpoint.checksums import fingerprint
from topklm.commands import neurons_ablate, neurons_contrast, neurons_find, neurons_select
from topklm.config import MeshConfig
from topklm.data.dataset import SPLITS
from topklm.distributed import cluster
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.inference.language_model import LanguageModel
from topklm.layout import make_layout
from topklm.neurons import dictionary as dictionary_lib
from topklm.neurons import fit_dictionary
from topklm.neurons import harvest as harvest_lib
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.documents import Documents, described, no_text, open_documents
from topklm.neurons.harvest import ALL, Share
from topklm.neurons.paths import NeuronsFolder
from topklm.neurons.statistics import Settings
from topklm.neurons.store import Metadata, Store, StoreWriter, wait_for_writers
from topklm.progress import Progress, TerminalProgress
from topklm.storage.files import is_bucket

DESCRIPTION = "Reads activations off a model, measures its neurons, and finds them."
EXAMPLE = "topklm neurons harvest runs/small --tokens 500_000"

DEFAULT_TOKENS = 500_000
_MOST_DIGITS = 15  # of a count
_MOST_SAMPLES = 2**31 - 1  # as the table can hold them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="harvest|measure|find|...")
    harvest_verb = verbs.add_parser(
        "harvest",
        help="run held-out text through the model and store what its neurons do",
        description="Runs text through a model and stores the activations of its TopK layers, the tokens and "
        "their losses. Started again it goes on where it stopped.",
        epilog=f"example: {EXAMPLE}",
    )
    harvest_verb.add_argument(
        "--tokens", type=_count, default=DEFAULT_TOKENS, metavar="N", help="default %(default)s"
    )
    harvest_verb.add_argument(
        "--source",
        metavar="TEXT",
        help="prepared folder, or files, globs, URLs of text; default the run's data",
    )
    harvest_verb.add_argument(
        "--split", choices=SPLITS, default="heldout", help="of prepared data; default %(default)s"
    )
    harvest_verb.add_argument(
        "--keep",
        type=_count,
        metavar="K",
        help="of a Base LM, only the K largest entries of each token, to compare it with a TopK model; "
        "default all that are positive",
    )
    harvest_verb.add_argument(
        "--dictionary",
        choices=dictionary_lib.KINDS,
        help="of a Base LM, the hidden state written in this dictionary, of as many codes, of which the K "
        "largest are kept (default the config's topk_k); made first, from the run's training text",
    )
    harvest_verb.add_argument(
        "--dictionary-tokens",
        type=_count,
        default=fit_dictionary.DEFAULT_TOKENS,
        metavar="N",
        help="of training text, from which the dictionary is made; default %(default)s",
    )
    harvest_verb.add_argument("--batch-size", type=_count, metavar="B", help="rows; default by device")
    harvest_verb.add_argument(
        "--part",
        type=_share,
        metavar="I/N",
        help="every N-th document, from the I-th, 0/4 to 3/4 say; default by the launcher's environment",
    )
    measure_verb = verbs.add_parser(
        "measure",
        help="compute the statistics of all neurons from what was harvested",
        description="Computes density, entropies, logit effects, ablation effects, nearest neurons and "
        "examples of every neuron, and writes them as neurons.parquet.",
        epilog="example: topklm neurons measure runs/small",
    )
    measure_verb.add_argument(
        "--ablation-samples",
        type=int,
        default=Settings.ablation_samples,
        metavar="N",
        help="tokens at which each neuron is set to 0; 0: none; default %(default)s",
    )
    measure_verb.add_argument(
        "--lens-contexts",
        type=_count,
        default=Settings.lens_contexts,
        metavar="N",
        help="over which the Jacobian is averaged; default %(default)s",
    )
    measure_verb.add_argument(
        "--encoder",
        metavar="MODEL",
        help="folder, name or NAME@REVISION of a sentence encoder, for the package sentence-transformers: "
        "semantic entropy and monosemanticity compare tokens by the text around them, not by the model's own "
        "unembedding",
    )
    find_verb = verbs.add_parser(
        "find",
        help="which neurons fire on a text, a token or a pattern",
        description=neurons_find.DESCRIPTION,
        epilog=f"example: {neurons_find.EXAMPLE}",
    )
    for verb, call in ((harvest_verb, _harvest), (measure_verb, _measure)):
        verb.add_argument("run", metavar="RUN", help="run folder, e.g. runs/small")
        verb.add_argument("--step", type=int, help="which checkpoint; default the newest")
        verb.add_argument("--json", action="store_true", help="print one JSON object")
        verb.set_defaults(call=call)
    neurons_find.add_arguments(find_verb)
    find_verb.set_defaults(call=neurons_find.run)
    for name, command, summary in (
        ("contrast", neurons_contrast, "which neurons are more often active in one text than in another"),
        ("select", neurons_select, "write a set of neurons as interventions"),
        ("ablate-set", neurons_ablate, "what a model loses of two texts without some neurons"),
    ):
        verb = verbs.add_parser(
            name, help=summary, description=command.DESCRIPTION, epilog=f"example: {command.EXAMPLE}"
        )
        command.add_arguments(verb)
        verb.set_defaults(call=command.run)


def run(arguments: argparse.Namespace) -> None:
    """Carries the verb out."""
    arguments.call(arguments)


def ensure_measured(run_folder: str, step: int | None, console: rich.console.Console) -> NeuronsFolder:
    """Harvests and measures what has not been, so that there is something to look at.

    Args:
        run_folder: As the user wrote it.
        step: Which checkpoint; None: the newest.
        console: For progress.
    """
    progress = TerminalProgress(console)
    model, mesh = _load(run_folder, step)
    folder = NeuronsFolder(Path(model.run), model.step)
    if not folder.store.exists():
        _harvest_into(folder, model, mesh, progress)
    if not folder.table.exists():
        wait_for_writers(folder.store, progress.say)
        _measure_into(folder, model, progress, Settings())
    else:
        _extend(folder, model, progress)
    return folder


def _harvest(arguments: argparse.Namespace) -> None:
    console = rich.console.Console(stderr=arguments.json)
    model, mesh = _load(arguments.run, arguments.step)
    folder = NeuronsFolder(Path(model.run), model.step)
    place = cluster.find() if arguments.part is None else None
    share = arguments.part or (Share(place.index, place.count) if place else ALL)
    _harvest_into(
        folder,
        model,
        mesh,
        TerminalProgress(console),
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
    if arguments.json:
        facts = dataclasses.asdict(store.metadata)
        print(json.dumps({"store": str(folder.store), "tokens": store.n_tokens, **facts}))
    else:
        console.print(_summary(folder, store), highlight=False, markup=False, soft_wrap=True)


def _harvest_into(
    folder: NeuronsFolder,
    model: LanguageModel,
    mesh: jax.sharding.Mesh,
    progress: Progress,
    *,
    n_tokens: int = DEFAULT_TOKENS,
    source: str | None = None,
    split: str = "heldout",
    rows: int | None = None,
    keep: int | None = None,
    dictionary: str | None = None,
    dictionary_tokens: int = fit_dictionary.DEFAULT_TOKENS,
    share: Share = ALL,
) -> None:
    config = model.config.model
    rows = rows or harvest_lib.batch_rows(config, mesh)
    if rows % mesh.size:
        raise UserError(f"--batch-size = {rows}: must be a multiple of the {mesh.size} devices")
    if keep is not None and config.n_topk_layers:
        raise UserError(f"--keep = {keep}: is for Base LMs; this model's layers keep {config.topk_k} already")
    if keep is not None and keep > config.d_model:
        raise UserError(f"--keep = {keep}: must be at most d_model = {config.d_model}")
    if dictionary is not None and config.n_topk_layers:
        raise UserError(
            f"--dictionary = {dictionary}: is for Base LMs; this model's neurons are its coordinates"
        )
    documents = open_documents(model.tokenizer, model.config.data, source, split)
    kind, layers = harvest_lib.kind_and_layers(config)
    written_in = None
    if dictionary is not None:
        kind, keep = dictionary, keep or min(config.topk_k, config.d_model)
        _check_kind(folder, kind)
        written_in = _dictionary(
            folder, model, mesh, progress, documents, kind, keep, dictionary_tokens, share
        )
    metadata = Metadata(
        run=folder.run.resolve().name,
        step=model.step,
        tokenizer_sha256=model.tokenizer.sha256,
        source=documents.name,
        kind=kind,
        layers=layers,
        d_model=config.d_model,
        topk_k=config.topk_k if kind == harvest_lib.TOPK else keep or config.d_model,
        topk_activation=config.topk_activation,
        context_length=config.context_length,
        parts=share.count,
        dictionary=written_in.description if written_in else "",
        parameters=fingerprint(model.params),
    )

    def wait(owner: str) -> None:
        progress.say(f"process {owner} is harvesting into {folder.store}: waiting for its end")

    with (
        disk_errors_are_user_errors(f"writing {folder.store}"),
        StoreWriter(folder.store, metadata, share.index, wait) as writer,
    ):
        before = done = writer.n_tokens
        begun = 0
        wanted = 0  # nobody knows
        if documents.n_tokens is not None:
            wanted = max(min(n_tokens, documents.n_tokens) // share.count - before, 0)
        with progress.phase(f"harvesting {documents.name}", wanted) as report:

            def tell(tokens: int, documents_begun: int) -> None:
                nonlocal done, begun
                report(tokens - done, documents_begun - begun, tokens - done)
                done, begun = tokens, documents_begun

            harvest_lib.harvest(
                config,
                model.params,
                mesh,
                documents,
                writer,
                separator_id=model.tokenizer.separator_id,
                n_tokens=-(-n_tokens // share.count),
                rows=rows,
                keep=keep,
                dictionary=written_in,
                share=share,
                report=tell,
            )
    if not writer.n_tokens and share.count == 1:
        raise no_text(documents, f"--source = {source}")
    if documents.left_out:
        progress.say(f"left out of {documents.name}: {described(documents.left_out)}")


def _check_kind(folder: NeuronsFolder, kind: str) -> None:
    """Before minutes are spent on a dictionary: a store of something else would refuse it."""
    if folder.store.exists() and (there := Store(folder.store).metadata.kind) != kind:
        raise UserError(
            f"--dictionary = {kind}: {folder.store} holds activations of another kind ({there}): delete "
            f"{folder.path}, or harvest in a copy of the run folder"
        )


def _dictionary(
    folder: NeuronsFolder,
    model: LanguageModel,
    mesh: jax.sharding.Mesh,
    progress: Progress,
    documents: Documents,
    kind: str,
    keep: int,
    n_tokens: int,
    share: Share,
) -> Dictionary:
    """The dictionary beside the store; it is made if there is none."""
    if there := fit_dictionary.load_fitting(folder.dictionary, kind, keep, n_tokens):
        return there
    data = model.config.data
    if documents.name == open_documents(model.tokenizer, data, split="train").name:
        raise UserError(
            "--split = train: a dictionary is made from the training text: harvest text that is held out"
        )
    if share.index:
        raise UserError(f"{folder.dictionary} is missing: part 0 makes it; start the others when it is there")
    made = fit_dictionary.fit(
        kind,
        model.config.model,
        model.params,
        mesh,
        data,
        documents,
        keep=keep,
        n_tokens=n_tokens,
        progress=progress,
    )
    with disk_errors_are_user_errors(f"writing {folder.dictionary}"):
        made.save(folder.dictionary)
    progress.say(f"{folder.dictionary}: {made.description}")
    return made


def _measure(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.ablation_samples <= _MOST_SAMPLES:
        raise UserError(
            f"--ablation-samples = {arguments.ablation_samples}: must be from 0 to {_MOST_SAMPLES}"
        )
    console = rich.console.Console(stderr=arguments.json)
    model, _ = _load(arguments.run, arguments.step)
    folder = NeuronsFolder(Path(model.run), model.step)
    settings = Settings(ablation_samples=arguments.ablation_samples, lens_contexts=arguments.lens_contexts)
    _measure_into(folder, model, TerminalProgress(console), settings, arguments.encoder)
    if arguments.json:
        from topklm.neurons.statistics import catalog  # noqa: PLC0415  (see `_measure_into`)

        described = [statistic.described() for statistic in catalog.STATISTICS]
        print(json.dumps({"table": str(folder.table), "statistics": described}))
    else:
        console.print(f"wrote {folder.table}", highlight=False, markup=False, soft_wrap=True)


def _measure_into(
    folder: NeuronsFolder,
    model: LanguageModel,
    progress: Progress,
    settings: Settings,
    encoder: str | None = None,
) -> None:
    store = _store_of(folder, model)
    # Parquet needs a package of the extra, and the other one is slow to import.
    from topklm.neurons.statistics import sentences  # noqa: PLC0415
    from topklm.neurons.statistics.measure import measure  # noqa: PLC0415

    dictionary = Dictionary.load(folder.dictionary) if store.metadata.dictionary else None
    windows = None
    if encoder is not None:
        loaded = sentences.load(encoder)
        with progress.phase("embedding the text around each token", store.n_tokens) as report:
            windows = sentences.embed(
                store, model.tokenizer, loaded, Path(encoder).name, lambda n: report(n, 0, n)
            )
    with disk_errors_are_user_errors(f"writing {folder.table}"):
        measure(
            folder.table,
            store,
            model.config.model,
            model.params,
            separator_id=model.tokenizer.separator_id,
            settings=settings,
            progress=progress,
            dictionary=dictionary,
            windows=windows,
        )


def _extend(folder: NeuronsFolder, model: LanguageModel, progress: Progress) -> None:
    """Adds to the table what an earlier version did not measure."""
    store = _store_of(folder, model)
    from topklm.neurons.statistics.measure import extend  # noqa: PLC0415  (see `_measure_into`)

    with disk_errors_are_user_errors(f"writing {folder.table}"):
        extend(
            folder.table,
            store,
            model.config.model,
            model.params,
            separator_id=model.tokenizer.separator_id,
            progress=progress,
            dictionary=Dictionary.load(folder.dictionary) if store.metadata.dictionary else None,
        )


def _store_of(folder: NeuronsFolder, model: LanguageModel) -> Store:
    """Opens the model's store, and makes sure that there is a package to write the table with."""
    store = Store(folder.store)
    of_model = {
        "tokenizer_sha256": model.tokenizer.sha256,
        "step": model.step,
        "parameters": store.metadata.parameters and fingerprint(model.params),
    }
    if any(getattr(store.metadata, name) != value for name, value in of_model.items()):
        raise UserError(f"{folder.store} is of another model: delete it, and harvest again")
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("topklm neurons measure needs pyarrow: run pip install 'topklm[explore]'")
    return store


def _load(run_folder: str, step: int | None) -> tuple[LanguageModel, jax.sharding.Mesh]:
    """The model on all devices of this host."""
    if is_bucket(run_folder):
        raise UserError(
            f"RUN = {run_folder}: activations are kept on a disk: copy the run folder to one first"
        )
    mesh = make_layout(MeshConfig(), jax.local_devices()).mesh
    return topklm.load(run_folder, step=step, mesh=mesh), mesh


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
    """A number of 1 or more, also written 2_000_000."""
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
