"""`topklm neurons`: reads activations off a model (`harvest`), measures its neurons, and finds them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
import dataclasses
import importlib.util
from pathlib import Path
import re
from typing import TYPE_CHECKING

from topklm.commands import neurons_card, neurons_compare, neurons_find, shared
from topklm.commands.shared import Output, Verb
from topklm.data.dataset import SPLITS
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.imports import when_used
from topklm.neurons import DICTIONARIES, DICTIONARY_TOKENS, FITTED, MeasureSettings, NeuronsFolder
from topklm.progress import Progress
from topklm.storage.files import local_path

with when_used():
    from topklm.checkpoint import checksums
    from topklm.neurons import dictionary as dictionary_lib
    from topklm.neurons import documents as documents_lib
    from topklm.neurons import fit_dictionary
    from topklm.neurons import harvest as harvest_lib
    from topklm.neurons import store as store_lib
    from topklm.sae import folder as sae_folder
    from topklm.sae import kinds
    from topklm.sae import text as sae_text

if TYPE_CHECKING:
    from topklm.inference.language_model import LanguageModel
    from topklm.layout import Layout
    from topklm.neurons.dictionary import Dictionary
    from topklm.neurons.documents import Documents
    from topklm.neurons.harvest import Share
    from topklm.neurons.store import Store

DESCRIPTION = "Reads activations off a model, measures its neurons, and finds them."
EXAMPLE = "topklm neurons harvest runs/small --tokens 500_000"

_MOST_DIGITS = 15  # of a count
_MOST_SAMPLES = 2**31 - 1  # as the table can hold them


@dataclasses.dataclass(frozen=True)
class HarvestSettings:
    """The flags of `harvest`, whose help says more."""

    tokens: int = 500_000  # about, by all parts together
    source: str | None = None
    split: str = "heldout"
    batch_size: int | None = None
    keep: int | None = None
    dictionary: str | None = None
    dictionary_tokens: int = DICTIONARY_TOKENS
    part: Share | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        "find": neurons_find.FIND,
        "contrast": neurons_compare.CONTRAST,
        "select": neurons_find.SELECT,
        "ablate": neurons_find.ABLATE,
        "ablate-set": neurons_compare.ABLATE_SET,
        "card": neurons_card.CARD,
    }
    shared.add_verbs(parser, verbs, "harvest|measure|find|...")


def _add_harvest(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run", "step", "json")
    add("--tokens N", "", HarvestSettings.tokens, type=_count)
    add("--source TEXT", "prepared folder, or files, globs, URLs of text; default the run's data")
    add("--split", "of prepared data", "heldout", choices=SPLITS)
    text = (
        "of a Base LM, only the K largest entries of each token, to compare it with a TopK model; default "
        "all that are positive"
    )
    add("--keep K", text, type=_count)
    text = (
        "of a Base LM, the hidden state written in this dictionary, of which the K largest codes "
        f"are kept (default the config's topk_k): {', '.join(FITTED)}, made first, from the run's training "
        "text; or a folder of topklm sae train, or of SAELens, with its own K"
    )
    add("--dictionary KIND|DIR", text)
    text = "of training text, from which the dictionary is made"
    add("--dictionary-tokens N", text, DICTIONARY_TOKENS, type=_count)
    add("--batch-size B", "rows; default by device", type=_count)
    text = "every N-th document, from the I-th, 0/4 to 3/4 say; default by the launcher's environment"
    add("--part I/N", text, type=_share)


def _add_measure(parser: argparse.ArgumentParser) -> None:
    add = shared.flags(parser, "run", "step", "json")
    text = "tokens at which each neuron is set to 0; 0: none"
    add("--ablation-samples N", text, MeasureSettings.ablation_samples)
    text = "over which the Jacobian is averaged"
    add("--lens-contexts N", text, MeasureSettings.lens_contexts, type=_count)
    text = (
        "folder, name or NAME@REVISION of a sentence encoder, for the package sentence-transformers: "
        "semantic entropy and monosemanticity compare tokens by the text around them, not by the model's own "
        "unembedding"
    )
    add("--encoder MODEL", text)


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
    return harvest_lib.Share(int(found[1]), int(found[2]))


def run(arguments: argparse.Namespace) -> None:
    arguments.call(arguments)


def _harvest(arguments: argparse.Namespace) -> None:
    from topklm.distributed import coordination  # noqa: PLC0415 - imports JAX, which --help does without

    shared.check_on_disk(arguments.run)
    output = Output(arguments.json)
    model, layout = shared.load(arguments)
    folder = shared.folder_of(model)
    if arguments.part is None and (process := coordination.find_process()):
        arguments.part = harvest_lib.Share(process.index, process.count)
    names = (field.name for field in dataclasses.fields(HarvestSettings))
    settings = HarvestSettings(**{name: getattr(arguments, name) for name in names})
    harvest_into(folder, model, layout, output.progress, settings)
    store = store_lib.Store(folder.store)
    facts = {"store": str(folder.store), "tokens": store.n_tokens, **dataclasses.asdict(store.metadata)}
    output.give(facts, lambda: output.say(_summary(store)))


def _summary(store: Store) -> str:
    metadata = store.metadata
    size = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
    what = "positive entries of a Base LM's hidden state"
    if metadata.kind == harvest_lib.TOPK:
        what = "activations"
    elif metadata.dictionary:
        what = f"codes of a Base LM's hidden state ({DICTIONARIES[metadata.kind]})"
    return (
        f"{store.folder}: {store.n_events:,} {what} of {len(metadata.layers)} layers at {store.n_tokens:,} "
        f"tokens, {size / 2**20:,.0f} MiB ({size / max(store.n_events, 1):.2f} bytes each)"
    )


def _measure(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.ablation_samples <= _MOST_SAMPLES:
        raise shared.wrong(arguments, "ablation_samples", allowed=f"from 0 to {_MOST_SAMPLES}")
    shared.check_on_disk(arguments.run)
    output = Output(arguments.json)
    model, _ = shared.load(arguments)
    folder = shared.folder_of(model)
    settings = MeasureSettings(
        ablation_samples=arguments.ablation_samples, lens_contexts=arguments.lens_contexts
    )
    measure_into(folder, model, output.progress, settings, arguments.encoder)
    from topklm.neurons.statistics import catalog  # noqa: PLC0415 - its table needs a package of the extra

    described = [statistic.described() for statistic in catalog.STATISTICS]
    facts = {"table": str(folder.table), "statistics": described}
    output.give(facts, lambda: output.say(f"wrote {folder.table}"))


def is_measured(folder: NeuronsFolder) -> bool:
    """Returns whether everything that pages show of a checkpoint is there."""
    from topklm.neurons.statistics import table  # noqa: PLC0415 - see `measure_into`

    harvested = folder.store.exists() and not folder.unfinished.exists()
    return harvested and folder.table.exists() and table.is_complete(folder.table)


def ensure_measured(
    model: LanguageModel,
    layout: Layout,
    progress: Progress,
    ready: Callable[[NeuronsFolder], None] | None = None,
) -> NeuronsFolder:
    """Harvests and measures what has not been, so that there is something to look at.

    Statistics that an earlier version did not measure are added to the table. `ready` is told once there is
    a table, which lacks ablation effects at first.
    """
    folder = shared.folder_of(model)
    if not folder.store.exists() or folder.unfinished.exists():
        with disk_errors_are_user_errors(f"writing {folder.path}"):
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.unfinished.touch()
        harvest_into(folder, model, layout, progress, HarvestSettings())
        folder.unfinished.unlink(missing_ok=True)
    if not folder.table.exists():
        store_lib.wait_for_writers(folder.store, progress.say)
        without = () if ready is None else ("ablation",)
        measure_into(folder, model, progress, MeasureSettings(), without=without)
    if ready is not None:
        ready(folder)
    if not is_measured(folder):
        measure_into(folder, model, progress, MeasureSettings(), only_missing=True)
    return folder


def harvest_into(
    folder: NeuronsFolder,
    model: LanguageModel,
    layout: Layout,
    progress: Progress,
    settings: HarvestSettings,
) -> None:
    """Runs text through a model, whose parameters are on the devices, and stores what its neurons do."""
    keep, share = settings.keep, settings.part or harvest_lib.ALL
    config = model.cfg
    separator_id, rows = model.tokenizer.separator_id, settings.batch_size
    if rows is not None and rows % layout.size:
        raise UserError(field="--batch-size", value=rows, allowed=f"a multiple of the {layout.size} devices")
    text_model = documents_lib.TextModel(config, model.params, layout, separator_id, batch_rows=rows)
    shared.check_keep(config, keep)
    if settings.dictionary is not None and config.n_topk_layers:
        text = "is for Base LMs; this model's neurons are its coordinates"
        raise UserError(text, field="--dictionary", value=settings.dictionary)
    documents = documents_lib.open_documents(
        model.tokenizer, model.config.data, settings.source, settings.split
    )
    kind, layers = harvest_lib.kind_and_layers(config)
    dictionary: Dictionary | None = None
    if settings.dictionary is not None:
        if settings.dictionary in FITTED:
            kind = settings.dictionary
        else:
            dictionary, layers = _given_dictionary(model, settings)
            kind = dictionary.kind
        if folder.store.exists() and (there := store_lib.Store(folder.store).metadata.kind) != kind:
            raise UserError(
                f"--dictionary = {settings.dictionary}: {folder.store} holds activations of another kind "
                f"({there}): delete {folder.path}, or harvest in a copy of the run folder"
            )
        if dictionary is not None:
            _keep_given(folder, dictionary, settings.dictionary)
        else:
            keep = keep or min(config.topk_k, config.d_model)
            tokens = settings.dictionary_tokens
            dictionary = fit_dictionary.load_fitting(folder.dictionary, kind, keep, tokens)
        if dictionary is None:
            assert keep is not None
            _check_can_fit(folder, model, documents, share)
            given = text_model, model.config.data, documents
            if kind == "sae":
                autoencoder = kinds.SaeConfig("topk", config.d_model, keep)
                dictionary = sae_text.fit_text(
                    autoencoder, *given, n_tokens=tokens, progress=progress
                ).dictionary
            else:
                dictionary = fit_dictionary.fit(kind, *given, keep=keep, n_tokens=tokens, progress=progress)
            with disk_errors_are_user_errors(f"writing {folder.dictionary}"):
                dictionary.save(folder.dictionary)
            progress.say(f"{folder.dictionary}: {dictionary.description}")
    kept = dictionary.keep if dictionary else keep or config.d_model
    metadata = store_lib.Metadata(
        run=folder.run.resolve().name,
        step=model.step,
        tokenizer_sha256=model.tokenizer.sha256,
        source=documents.name,
        kind=kind,
        layers=layers,
        d_model=dictionary.width if dictionary else config.d_model,
        topk_k=config.topk_k if kind == harvest_lib.TOPK else kept,
        topk_activation=config.topk_activation,
        context_length=config.context_length,
        parts=share.count,
        dictionary=dictionary.description if dictionary else "",
        parameters=checksums.fingerprint(model.params),
    )

    def wait(owner: str) -> None:
        progress.say(f"process {owner} is harvesting into {folder.store}: waiting for its end")

    with (
        disk_errors_are_user_errors(f"writing {folder.store}"),
        store_lib.StoreWriter(folder.store, metadata, share.index, wait) as writer,
    ):
        wanted = 0  # nobody knows
        if documents.n_tokens is not None:
            wanted = max(min(settings.tokens, documents.n_tokens) // share.count - writer.n_tokens, 0)
        with progress.phase(f"harvesting {documents.name}", wanted) as report:
            harvest_lib.harvest(
                text_model,
                documents,
                writer,
                n_tokens=-(-settings.tokens // share.count),
                keep=keep,
                dictionary=dictionary,
                layers=layers,
                share=share,
                report=lambda tokens, documents: report(tokens, documents, tokens),
            )
    if not writer.n_tokens and share.count == 1:
        raise documents_lib.no_text(documents, f"--source = {settings.source}")
    if documents.left_out:
        progress.say(f"left out of {documents.name}: {documents_lib.described(documents.left_out)}")


def _given_dictionary(model: LanguageModel, settings: HarvestSettings) -> tuple[Dictionary, tuple[int, ...]]:
    """Returns the dictionary of --dictionary DIR, and the layers that it is of."""
    name = settings.dictionary or ""
    given = local_path(name, "--dictionary")
    if not given.is_dir():
        allowed = f"{', '.join(FITTED)}, or a folder of topklm sae train or of SAELens"
        raise UserError(field="--dictionary", value=name, allowed=allowed)
    dictionary, layers = sae_folder.load(given, model, "--dictionary")
    if settings.keep not in (None, dictionary.keep):
        text = f"its SAEs keep {dictionary.keep}: leave --keep out"
        raise UserError(text, field="--dictionary", value=name)
    return dictionary, layers


def _keep_given(folder: NeuronsFolder, dictionary: Dictionary, name: str) -> None:
    """Keeps a dictionary with the activations; UserError if another one is there."""
    if not folder.dictionary.exists():
        with disk_errors_are_user_errors(f"writing {folder.dictionary}"):
            dictionary.save(folder.dictionary)
    elif dictionary_lib.Dictionary.load(folder.dictionary).sha256 != dictionary.sha256:
        raise UserError(
            f"--dictionary = {name}: {folder.dictionary} is another one: delete {folder.path}, and harvest "
            "again"
        )


def _check_can_fit(folder: NeuronsFolder, model: LanguageModel, documents: Documents, share: Share) -> None:
    """Raises UserError if no dictionary may be made for this text, or not by this share."""
    if documents.name == documents_lib.open_documents(model.tokenizer, model.config.data, split="train").name:
        raise UserError(
            "--split = train: a dictionary is made from the training text: harvest text that is held out"
        )
    if share.index:
        raise UserError(f"{folder.dictionary} is missing: part 0 makes it; start the others when it is there")


def measure_into(
    folder: NeuronsFolder,
    model: LanguageModel,
    progress: Progress,
    settings: MeasureSettings,
    encoder: str | None = None,
    *,
    only_missing: bool = False,
    without: Collection[str] = (),
) -> None:
    """Computes statistics of all neurons from what was harvested, and writes the table, or what it lacks.

    Statistics are left out that need an input of `statistics.catalog.SLOW` named in `without`. The encoder is
    one of sentences, a name or folder; None: the model's own unembedding stands for tokens.
    """
    store = shared.open_store(folder, model)
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("topklm neurons measure needs pyarrow: run pip install 'topklm[explore]'")
    # Parquet needs a package of the extra, and the others are slow to import.
    from topklm.neurons.statistics import embeddings  # noqa: PLC0415
    from topklm.neurons.statistics.catalog import Inputs  # noqa: PLC0415
    from topklm.neurons.statistics.table import extend, measure  # noqa: PLC0415

    windows = None
    if encoder is not None:
        loaded = embeddings.load_encoder(encoder)
        with progress.phase_of_tokens("embedding the text around each token", store.n_tokens) as report:
            windows = embeddings.embed_windows(store, model.tokenizer, loaded, Path(encoder).name, report)
    dictionary = dictionary_lib.Dictionary.load(folder.dictionary) if store.metadata.dictionary else None
    separator_id = model.tokenizer.separator_id
    inputs = Inputs(store, model.cfg, model.params, separator_id, settings, progress, dictionary, windows)
    with disk_errors_are_user_errors(f"writing {folder.table}"):
        if only_missing:
            extend(folder.table, inputs)
        else:
            measure(folder.table, inputs, without)
