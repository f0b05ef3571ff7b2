"""Flags, documents and model of the commands that compare two texts."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np

from topklm.commands import shared
from topklm.commands.neurons_pipeline import check_keep
from topklm.config import DataConfig
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel
from topklm.neurons import harvest as harvest_lib
from topklm.neurons.contrast import ORDERS, PERMUTATIONS
from topklm.neurons.documents import COPY, described, no_text, open_documents
from topklm.neurons.harvest import UnitCounts
from topklm.neurons.labels import Labels
from topklm.neurons.paths import NeuronsFolder
from topklm.progress import Progress
from topklm.storage.files import is_bucket

TOKENS = 200_000


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Documents that a user named.

    Attributes:
        flag: With which.
        source: As it was written.
        documents: Token ids of each, int32[n], none empty and no two the same.
        n_repeated: Documents left out because the same had come before.
        unreadable: How many were left out that cannot be read, by reason.
        is_whole: Whether nothing was left out after the limit of tokens.
    """

    flag: str
    source: str
    documents: Sequence[np.ndarray]
    n_repeated: int
    unreadable: Mapping[str, int]
    is_whole: bool

    @property
    def n_tokens(self) -> int:
        """Of all documents."""
        return sum(map(len, self.documents))

    def facts(self) -> dict[str, object]:
        """Returns the text in figures, for --json."""
        return {
            "source": self.source,
            "documents": len(self.documents),
            "tokens": self.n_tokens,
            "repeated_documents_left_out": self.n_repeated,
            "unreadable_documents_left_out": dict(self.unreadable),
            "is_whole": self.is_whole,
        }


def add_arguments(parser: argparse.ArgumentParser, flags: Sequence[tuple[str, str]], tokens: int) -> None:
    """Declares RUN, the flags of the texts, and what goes with them.

    Args:
        parser: Of the verb.
        flags: Of each text, the flag without dashes, and what the text is.
        tokens: Default of --tokens.
    """
    shared.add_run(parser)
    for flag, what in flags:
        parser.add_argument(
            f"--{flag}",
            required=True,
            metavar="TEXT",
            help=f"{what}: files, globs, URLs of text (.txt, .jsonl, .parquet, ...), or a prepared folder",
        )
    parser.add_argument(
        "--tokens",
        type=int,
        default=tokens,
        metavar="N",
        help="read at most so many of each text; default %(default)s",
    )
    parser.add_argument("--layer", type=int, metavar="L", help="only neurons of this layer")
    parser.add_argument(
        "--keep",
        type=int,
        metavar="K",
        help="of a Base LM: a neuron counts as active where it is among the K largest; default: above 0",
    )
    parser.add_argument(
        "--by",
        choices=ORDERS,
        default="difference",
        help="which neurons come first: by the difference of frequencies, or by that in standard deviations "
        "(score), which puts rare neurons before those that are active everywhere; default %(default)s",
    )
    parser.add_argument(
        "--permutations",
        type=int,
        default=PERMUTATIONS,
        metavar="N",
        help="ways to deal the documents to the two texts anew; default %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; default %(default)s")
    shared.add_step(parser)
    shared.add_json(parser)


def check(arguments: argparse.Namespace, flags: Sequence[str], counts: Iterable[str]) -> None:
    """Looks at what can be wrong before anything is loaded.

    Args:
        arguments: Parsed.
        flags: Of the two texts.
        counts: Names of arguments that must be 1 or more.

    Raises:
        UserError: For what is wrong.
    """
    shared.check_at_least(arguments, 1, *counts)
    shared.check_at_least(arguments, 0, "seed")
    one, other = (getattr(arguments, flag) for flag in flags)
    if _resolved(one) == _resolved(other):
        raise UserError(f"--{flags[0]} and --{flags[1]} are both {one}: give two texts that differ")


def load(arguments: argparse.Namespace) -> tuple[LanguageModel, jax.sharding.Mesh]:
    """Loads the model onto all devices of this host.

    Raises:
        UserError: If there is none, or it does not have the layer that was asked for.
    """
    model, mesh = shared.load(arguments)
    _, layers = harvest_lib.kind_and_layers(model.config.model)
    if arguments.layer is not None and arguments.layer not in layers:
        what = "a TopK layer" if model.config.model.n_topk_layers else "a layer"
        raise shared.wrong(arguments, "layer", allowed=f"{what}, from {layers[0]} to {layers[-1]}")
    check_keep(model.config.model, arguments.keep)
    return model, mesh


def read(arguments: argparse.Namespace, flags: Sequence[str], model: LanguageModel) -> tuple[Text, Text]:
    """Reads both texts.

    Raises:
        UserError: For text that cannot be read or is empty, or a document that both hold.
    """
    data = model.config.data
    one, other = (
        _read(flag, getattr(arguments, flag), model.tokenizer, data, arguments.tokens) for flag in flags
    )
    common = {ids.tobytes() for ids in one.documents} & {ids.tobytes() for ids in other.documents}
    if common:
        raise UserError(
            f"--{flags[0]} and --{flags[1]} have {len(common):,} documents in common: each must be in one "
            "text only; leave them out of the other"
        )
    return one, other


def count(
    model: LanguageModel,
    mesh: jax.sharding.Mesh,
    documents: Sequence[np.ndarray],
    progress: Progress,
    keep: int | None = None,
    piece: int | None = None,
) -> UnitCounts:
    """Calls `harvest.count` with progress."""
    with progress.phase("reading activations", sum(map(len, documents))) as report:
        done = 0

        def tell(tokens: int) -> None:
            nonlocal done
            report(tokens - done, 0, tokens - done)
            done = tokens

        return harvest_lib.count(
            model.config.model,
            model.params,
            mesh,
            documents,
            separator_id=model.tokenizer.separator_id,
            keep=keep,
            piece=piece,
            report=tell,
        )


def labels(arguments: argparse.Namespace, model: LanguageModel) -> dict[tuple[int, int], str]:
    """Reads the labels of the run's neurons."""
    if is_bucket(arguments.run):
        return {}
    return Labels(NeuronsFolder(Path(model.run), model.step).labels).all()


def warnings(texts: Sequence[Text]) -> list[str]:
    """Lists the parts of the texts that were not read, a line each."""
    lines = []
    for text in texts:
        if text.n_repeated:
            lines.append(f"--{text.flag}: {text.n_repeated:,} repeated documents are left out")
        if text.unreadable:
            lines.append(f"--{text.flag}: left out: {described(text.unreadable)}")
        if not text.is_whole:
            lines.append(f"--{text.flag}: only the first {text.n_tokens:,} tokens are read (--tokens)")
    return lines


def _resolved(source: str) -> str:
    with contextlib.suppress(OSError, RuntimeError):  # too long for a name; nobody's home is known
        path = Path(source).expanduser()
        return str(path.resolve()) if path.exists() else source
    return source


def _read(flag: str, source: str, tokenizer: Tokenizer, data: DataConfig, n_tokens: int) -> Text:
    seen: set[bytes] = set()
    taken, left, n_repeated, is_whole = list[np.ndarray](), n_tokens, 0, True
    documents = open_documents(tokenizer, data, source, flag=f"--{flag}")
    for ids in documents:
        if not len(ids):
            continue
        if not left:
            is_whole = False
            break
        part = np.asarray(ids[:left], np.int32)
        is_whole &= len(part) == len(ids)
        if part.tobytes() in seen:
            n_repeated += 1
            continue
        seen.add(part.tobytes())
        taken.append(part)
        left -= len(part)
    if not taken:
        raise no_text(documents, f"--{flag} = {source}")
    unreadable = {reason: n for reason, n in documents.left_out.items() if reason != COPY}
    n_repeated += documents.left_out.get(COPY, 0)
    return Text(flag, source, taken, n_repeated, unreadable, is_whole)
