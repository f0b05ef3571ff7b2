"""Compressors and n-grams on the quickstart's held-out text, in bits per byte.

    python -m benchmarks.text_baselines

Each is given the training text and judged on exactly the documents that the model is judged on. Compressors:
size of training and held-out text together less that of the training text. The n-gram model scores every
text token of every document, the first from the separator, which itself is never scored, as the model does.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import lzma
import math
import pathlib

import numpy as np
import pyppmd
import rich.console
import rich.progress
import rich.table

from benchmarks.harness import results
from benchmarks.kneser_ney import KneserNey
from topklm import config
from topklm.data.building.build import prepare
from topklm.data.dataset import Dataset, SplitInfo

NGRAM_ORDER = 5
PPMD_ORDER = 16
_PPMD_MEMORY_BYTES = 1 << 30


def main() -> None:
    """Measures the three, writes the JSON and prints a table."""
    parser = results.parser(__doc__)
    parser.add_argument("--source", default="quickstart", help="as config.data.source")
    parser.add_argument("--dir", default="datasets", help="as config.data.dir")
    parser.add_argument("--out", type=pathlib.Path, default=results.FOLDER / "text_baselines.json")
    arguments = parser.parse_args()
    data = dataclasses.replace(
        config.resolve(config.default()).data, source=arguments.source, dir=arguments.dir
    )
    (dataset,) = prepare(data).datasets
    train = list(documents(dataset, dataset.train))
    heldout = list(documents(dataset, dataset.heldout))
    train_text, heldout_text = (text_of(dataset, split) for split in (train, heldout))
    n_bytes = dataset.heldout.utf8_bytes
    bits = {
        "xz -9e": compressed_bits(xz_size, train_text, heldout_text) / n_bytes,
        f"Kneser-Ney {NGRAM_ORDER}-gram": ngram_bits(dataset, train, heldout) / n_bytes,
        f"PPMd order {PPMD_ORDER}": compressed_bits(ppmd_size, train_text, heldout_text) / n_bytes,
    }
    content = {
        "bits_per_byte": bits,
        "dataset": {"fingerprint": dataset.fingerprint, "heldout_bytes": n_bytes},
        "heldout_documents": len(heldout),
        "train_documents": len(train),
        "pyppmd": pyppmd.__version__,
    }
    results.write(arguments.out, content, shown={})
    table = rich.table.Table("baseline", "held-out bits per byte")
    for name, value in bits.items():
        table.add_row(name, f"{value:.4f}")
    rich.console.Console().print(table)


def documents(dataset: Dataset, split: SplitInfo) -> Iterator[np.ndarray]:
    """Yields the text tokens of each document of a split, without the separator."""
    stream = dataset.tokens(split)
    tokens = stream.read(0, len(stream))
    starts = np.flatnonzero(tokens == dataset.tokenizer.separator_id)
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        yield tokens[start + 1 : stop]


def text_of(dataset: Dataset, split: Sequence[np.ndarray]) -> bytes:
    """Joins all documents, a newline after each."""
    return "".join(dataset.tokenizer.decode(tokens) + "\n" for tokens in split).encode()


def compressed_bits(size: Callable[[bytes], int], train: bytes, heldout: bytes) -> float:
    """Counts the bits that the held-out text adds to the compressed training text."""
    return 8.0 * (size(train + heldout) - size(train))


def xz_size(text: bytes) -> int:
    """Counts the bytes after `xz -9e`."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def ppmd_size(text: bytes) -> int:
    """Counts the bytes after PPMd variant H (Shkarin 2002), order 16."""
    encoder = pyppmd.Ppmd7Encoder(PPMD_ORDER, _PPMD_MEMORY_BYTES)
    return len(encoder.encode(text)) + len(encoder.flush())


def ngram_bits(dataset: Dataset, train: Iterable[np.ndarray], heldout: Sequence[np.ndarray]) -> float:
    """Counts the bits of all text tokens under a modified Kneser-Ney model of the training documents."""
    separator = dataset.tokenizer.separator_id
    model = KneserNey(NGRAM_ORDER, dataset.tokenizer.vocab_size)
    for tokens in rich.progress.track(list(train), "counting n-grams"):
        model.add([separator, *tokens.tolist()])
    model.finish()
    bits = 0.0
    for tokens in rich.progress.track(heldout, "scoring"):
        sequence = [separator, *tokens.tolist()]
        for i in range(1, len(sequence)):
            context = tuple(sequence[max(0, i - NGRAM_ORDER + 1) : i])
            bits -= math.log2(model.probability(context, sequence[i]))
    return bits


if __name__ == "__main__":
    main()
