"""From a checkpoint to the statistics of its neurons: harvests into the run folder, and measures."""

import importlib.util
from pathlib import Path

import jax

from topklm.checkpoint.checksums import fingerprint
from topklm.config import ModelConfig
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.inference.language_model import LanguageModel
from topklm.neurons import fit_dictionary
from topklm.neurons import harvest as harvest_lib
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.documents import Documents, batch_rows, described, no_text, open_documents
from topklm.neurons.harvest import ALL, Share
from topklm.neurons.paths import NeuronsFolder
from topklm.neurons.statistics import MeasureSettings
from topklm.neurons.store import Metadata, Store, StoreWriter, wait_for_writers
from topklm.progress import Progress

DEFAULT_TOKENS = 500_000


def ensure_measured(model: LanguageModel, mesh: jax.sharding.Mesh, progress: Progress) -> NeuronsFolder:
    """Harvests and measures what has not been, so that there is something to look at.

    Args:
        model: Of a run on a disk.
        mesh: On which its parameters are.
        progress: Is told of both.
    """
    folder = NeuronsFolder(Path(model.run), model.step)
    if not folder.store.exists():
        harvest_into(folder, model, mesh, progress)
    if not folder.table.exists():
        wait_for_writers(folder.store, progress.say)
        measure_into(folder, model, progress, MeasureSettings())
    else:
        _extend(folder, model, progress)
    return folder


def harvest_into(
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
    """Runs text through a model and stores what its neurons do.

    Args:
        folder: Of the run and its step.
        model: Of the run.
        mesh: On which its parameters are.
        progress: Is told of the tokens.
        n_tokens: To be stored, about, by all shares together.
        source: Prepared folder, or text; None for the run's own data.
        split: "heldout" or "train", of prepared data.
        rows: Of a batch; None: by the device.
        keep: Of a Base LM, the number of entries of a token; None: all that are positive.
        dictionary: In which the hidden state of a Base LM is written, one of `dictionary.KINDS`.
        dictionary_tokens: Of training text, from which that is made if there is none.
        share: Which of the documents.

    Raises:
        UserError: For what does not fit the model or the store, and text that cannot be read.
    """
    config = model.config.model
    rows = rows or batch_rows(config, mesh)
    if rows % mesh.size:
        raise UserError(field="--batch-size", value=rows, allowed=f"a multiple of the {mesh.size} devices")
    check_keep(config, keep)
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


def check_keep(config: ModelConfig, keep: int | None) -> None:
    """Raises UserError for a --keep that the model's layers do not have."""
    if keep is not None and config.n_topk_layers:
        text = f"is for Base LMs; this model's layers keep {config.topk_k} already"
        raise UserError(text, field="--keep", value=keep)
    if keep is not None and keep > config.d_model:
        raise UserError(field="--keep", value=keep, allowed=f"at most d_model = {config.d_model}")


def _check_kind(folder: NeuronsFolder, kind: str) -> None:
    """Raises UserError for a store of another kind, before minutes are spent on a dictionary."""
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
    """Loads the dictionary beside the store, or makes it."""
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


def measure_into(
    folder: NeuronsFolder,
    model: LanguageModel,
    progress: Progress,
    settings: MeasureSettings,
    encoder: str | None = None,
) -> None:
    """Computes the statistics of all neurons from what was harvested, and writes the table.

    Args:
        folder: With a store of the model's activations.
        model: Of the run.
        progress: Is told of each phase.
        settings: Of the statistics.
        encoder: Of sentences, a name or folder; None: the model's own unembedding stands for tokens.

    Raises:
        UserError: For a store of another model, and without pyarrow.
    """
    store = _store_of(folder, model)
    # Parquet needs a package of the extra, and the other one is slow to import.
    from topklm.neurons.statistics import embeddings  # noqa: PLC0415
    from topklm.neurons.statistics.measure import measure  # noqa: PLC0415

    dictionary = Dictionary.load(folder.dictionary) if store.metadata.dictionary else None
    windows = None
    if encoder is not None:
        loaded = embeddings.load_encoder(encoder)
        with progress.phase("embedding the text around each token", store.n_tokens) as report:
            windows = embeddings.embed_windows(
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
    """Adds to the table the statistics that an earlier version did not measure, if there are any."""
    from topklm.neurons.statistics import table  # noqa: PLC0415 - see `measure_into`
    from topklm.neurons.statistics.measure import extend  # noqa: PLC0415

    if table.is_complete(folder.table):
        return
    store = _store_of(folder, model)
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
