"""Texts with labels, for probing: of whole texts, or of their words.

An example is the mean of a text's tokens, its last token, or the token that ends a word; a word in whose
midst the last of its tokens goes on is left out. Which texts are for fitting and which for scoring is fixed:
a text is never in both.

Parsed sentences are read as tokens too, to see how much attention their words pay to each other.

A causal model looks back, so an arc between two words is looked for from the later one; its name says which
of the two that is: "obj/dependent" where the dependent looks back at its head, "nsubj/head" where the head
looks back at its dependent. Dims: S sentences, B of a batch, T tokens, W words, A arcs, H heads.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
import csv
import dataclasses
import gzip
from importlib import metadata
import io
import json
import lzma
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from topklm.data import sources
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.storage.files import parse_json

if TYPE_CHECKING:
    import scipy.sparse

MEAN, LAST = -1, -2  # instead of the end of a word
MEAN_TOKENS = 127  # of a text's beginning, that are averaged
FIT_SHARE = 0.7  # of texts whose whole has the label; sentences are halved

_PER_TOPIC, _LEAST_CHARACTERS, _NO_TOPIC = 160, 300, "Uncategorized"
_MOST_WORDS = 5000  # of each half
_MOST_TEXTS = 500  # of a file of sae-probes
_SAE_PROBES, _SAE_PROBES_FOLDER = "sae-probes", "cleaned_data"
_NO_TAG = "_"


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledTexts:
    """n examples of labels."""

    name: str  # in a word or two
    source: str  # where they come from, and how many
    texts: Sequence[str]
    text: np.ndarray  # int[n], of which text an example is
    # int[n], UTF-8 bytes of the text up to the end of the word; `MEAN` or `LAST` for the whole text
    end: np.ndarray
    labels: np.ndarray  # str[n]
    families: np.ndarray  # int[n], examples of one family are told from each other
    to_fit: np.ndarray  # bool[n]


@dataclasses.dataclass(frozen=True, eq=False)
class Located:
    """The examples that a tokenizer can show, n of them, in the N tokens of documents."""

    documents: Sequence[np.ndarray]  # int32[tokens] of each, none empty
    pooling: "scipy.sparse.csr_array"  # float32[n, N], the share of each token in each example
    kept: np.ndarray  # int[n], which of `LabelledTexts` they are


class ParsedWord(NamedTuple):
    """A word of a sentence of CoNLL-U."""

    form: str
    tag: str  # universal part of speech, or "_"
    head: int | None  # number of the word that it depends on, from 1; 0: of none; None: not said
    relation: str  # to its head, or "_"


def topics(seed: int = 0) -> LabelledTexts:
    """Returns the quickstart's articles with topics, at most 160 of each; UserError without its package."""
    file = sources.find(["quickstart"], flag="--labels")[0]
    with disk_errors_are_user_errors(f"reading {file.url}"):
        articles = parse_json(Path(file.url).read_bytes()).values()
    rows = [
        (a["extract"], a["topic"])
        for a in articles
        if a["topic"] != _NO_TOPIC and len(a["extract"]) > _LEAST_CHARACTERS
    ]
    order, taken, kept = np.random.default_rng(seed).permutation(len(rows)), dict[str, int](), []
    for number in order:
        topic = rows[number][1]
        taken[topic] = taken.get(topic, 0) + 1
        if taken[topic] <= _PER_TOPIC:
            kept.append(rows[number])
    return _of_whole_texts("topic", "leads of Wikipedia articles (quickstart)", kept, MEAN, seed)


def of_json_lines(path: Path, seed: int = 0) -> LabelledTexts:
    """Reads lines {"text": ..., "label": ...}; UserError for anything else, or an unreadable file."""
    rows = []
    for number, line in enumerate(lines(path, "--labels"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        is_right = isinstance(record, dict) and isinstance(record.get("text"), str) and record["text"]
        if not is_right or not isinstance(record.get("label"), str | int):
            text = f'line {number} must be a JSON object with "text" and "label"'
            raise UserError(text, field="--labels", value=str(path))
        rows.append((record["text"], str(record["label"])))
    if not rows:
        raise UserError("holds no line; give one for each text", field="--labels", value=str(path))
    return _of_whole_texts("labels", path.name, rows, MEAN, seed)


def of_conllu(path: Path) -> LabelledTexts:
    """Reads the words of CoNLL-U (also .gz) with their universal part of speech, at most 5,000 of a half."""
    texts, rows = list[str](), list[tuple[int, int, str]]()
    for sentence, words in parsed(path, "--conllu"):
        at, tagged = 0, [word for word in words if word.tag != _NO_TAG]
        if not tagged:
            continue
        for word in tagged:
            if (found := sentence.find(word.form, at)) >= 0:
                at = found + len(word.form)
                rows.append((len(texts), len(sentence[:at].encode()), word.tag))
        texts.append(sentence)
    if not rows:
        advice = "must be CoNLL-U: ten columns with tabs between, and '# text = ' before each sentence"
        raise UserError("holds no word with a tag", field="--conllu", value=str(path), advice=advice)
    text, end, labels = (np.array(column) for column in zip(*rows, strict=True))
    to_fit = text < len(texts) / 2
    kept = np.sort(np.concatenate([np.flatnonzero(part)[:_MOST_WORDS] for part in (to_fit, ~to_fit)]))
    text, end, labels, to_fit = text[kept], end[kept], labels[kept], to_fit[kept]
    source = f"{path.name}: {len(kept):,} words of {len(np.unique(text)):,} sentences"
    return LabelledTexts("part of speech", source, texts, text, end, labels, np.zeros(len(kept), int), to_fit)


def of_sae_probes(seed: int = 0) -> LabelledTexts:
    """Reads the data files with two labels of the package sae-probes, at most 500 texts of each.

    Kantamneni et al. 2025, arXiv:2502.16681. The package is read as data, never imported. UserError if it is
    not installed.
    """
    try:
        files = metadata.files(_SAE_PROBES) or []
    except metadata.PackageNotFoundError:
        files = []
    parts = []
    for file in sorted(files, key=str):
        if file.parent.name == _SAE_PROBES_FOLDER and ".csv" in file.suffixes:
            rows = _read_csv(Path(str(file.locate())))
            if len({label for _, label in rows}) == 2:
                name = file.name.partition(".csv")[0]
                chosen = np.random.default_rng(seed).permutation(len(rows))[:_MOST_TEXTS]
                parts.append([(rows[i][0], f"{name}: {rows[i][1]}") for i in chosen])
    if not parts:
        raise UserError("--sae-probes: its data are not installed; run pip install --no-deps sae-probes")
    sets = [_of_whole_texts("", "", rows, LAST, seed) for rows in parts]
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    return LabelledTexts(
        "sae-probes",
        f"{len(parts)} files of the package sae-probes {metadata.version(_SAE_PROBES)}",
        [text for one in sets for text in one.texts],
        np.concatenate([one.text + start for one, start in zip(sets, starts, strict=True)]),
        np.concatenate([one.end for one in sets]),
        np.concatenate([one.labels for one in sets]),
        np.repeat(np.arange(len(parts)), list(map(len, parts))),
        np.concatenate([one.to_fit for one in sets]),
    )


def locate(given: LabelledTexts, tokenizer: Tokenizer, context_length: int) -> Located:
    """Finds the tokens of examples in texts cut to the context, before the last token where it counts."""
    most = context_length - 1  # the separator stands first
    order = np.argsort(given.text, kind="stable")
    examples = np.split(order, np.searchsorted(given.text[order], np.arange(1, len(given.texts))))
    documents, rows, kept, n_tokens = [], [], [], 0
    for text, of_text, ids in zip(given.texts, examples, tokenizer.encode_batch(given.texts), strict=True):
        if not len(ids) or not len(of_text):
            continue
        ends = given.end[of_text]
        n_read = min(most, MEAN_TOKENS) if max(ends) == MEAN else most
        read = ids[-most:] if ends[0] == LAST else ids[:n_read]
        spans = list(_spans(ends.tolist(), text, tokenizer.token_bytes(read), len(read)))
        documents.append(read)
        for example, span in zip(of_text, spans, strict=True):
            if span is not None:
                kept.append(example)
                rows.append(range(n_tokens + span[0], n_tokens + span[1]))
        n_tokens += len(read)
    lengths = [len(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    columns = np.fromiter((token for row in rows for token in row), np.int64, offsets[-1])
    shares = np.repeat(1 / np.array(lengths, np.float32), lengths)
    import scipy.sparse  # noqa: PLC0415 - the trainer, which reads tasks, does without

    pooling = scipy.sparse.csr_array((shares, columns, offsets), (len(rows), n_tokens))
    return Located(documents, pooling, np.array(kept, np.int64))


def _spans(
    ends: Sequence[int], text: str, pieces: Sequence[bytes], n_tokens: int
) -> Iterator[tuple[int, int] | None]:
    """Yields the tokens of each example of a text, from first to one after the last; None if none ends it."""
    spelled = np.cumsum([len(piece) for piece in pieces])
    # Other tokenizers change the text: then nobody knows where a word ends.
    is_text = min(ends) < 0 or text.encode().startswith(b"".join(pieces))
    for end in ends:
        if end == MEAN:
            yield 0, min(n_tokens, MEAN_TOKENS)
        elif end == LAST:
            yield n_tokens - 1, n_tokens
        else:
            at = int(np.searchsorted(spelled, end))
            found = is_text and at < n_tokens and spelled[at] == end
            yield (at, at + 1) if found else None


def _of_whole_texts(
    name: str, source: str, rows: Sequence[tuple[str, str]], end: int, seed: int
) -> LabelledTexts:
    n = len(rows)
    to_fit = np.zeros(n, bool)
    to_fit[np.random.default_rng(seed).permutation(n)[: round(FIT_SHARE * n)]] = True
    return LabelledTexts(
        name,
        f"{source}: {n:,} texts",
        [text for text, _ in rows],
        np.arange(n),
        np.full(n, end),
        np.array([label for _, label in rows]),
        np.zeros(n, int),
        to_fit,
    )


def lines(path: Path, flag: str) -> Iterator[str]:
    """Yields the lines of a text file, plain, .gz or .xz."""
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with disk_errors_are_user_errors(f"{flag} = {path}: reading it"):
        try:
            with opened(path, "rt", encoding="utf-8") as file:
                yield from (line.rstrip("\n") for line in file)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
            raise UserError(f"{e.strerror}; check the path", field=flag, value=str(path)) from e
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as e:
            raise UserError(f"is damaged, or no UTF-8 ({e})", field=flag, value=str(path)) from e


def parsed(path: Path, flag: str) -> Iterator[tuple[str, list[ParsedWord]]]:
    """Yields text and words of sentences of CoNLL-U (.gz, .xz) that have a text; UserError if unreadable."""
    text, words = "", list[ParsedWord]()
    for line in (*lines(path, flag), ""):
        if line.startswith("# text = "):
            text = line.removeprefix("# text = ")
        elif line and not line.startswith("#"):
            columns = line.split("\t")
            # 3-4 are two words in one, and 3.1 one that is not there.
            if len(columns) == 10 and columns[0].isdigit():
                head = int(columns[6]) if columns[6].isdigit() else None
                words.append(ParsedWord(columns[1], columns[3], head, columns[7]))
        elif not line:
            if text and words:
                yield text, words
            text, words = "", []


def _read_csv(path: Path) -> list[tuple[str, str]]:
    """Returns prompt and target of each row; .gz and .zst are unpacked."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    elif path.suffix == ".zst":
        import pyarrow as pa  # noqa: PLC0415  (of the extra)

        content = pa.input_stream(pa.BufferReader(content), compression="zstd").read()
    rows = csv.DictReader(io.StringIO(content.decode("utf-8", "replace"), newline=""))
    if not {"prompt", "target"} <= set(rows.fieldnames or ()):
        return []
    return [(row["prompt"], row["target"]) for row in rows if row["prompt"]]


LONGEST = 96  # tokens of a sentence, its separator included; attention takes the square

_NO_ARC = ("punct", "root")
_TOO_LONG, _TOO_SHORT = "longer than {} tokens", "without an arc"
_NOT_SPELLED = "whose words are not found in their text"


@dataclasses.dataclass(frozen=True, eq=False)
class Trees:
    """Sentences in rows of T tokens, a separator first, filled up with separators."""

    tokens: np.ndarray  # int32[S, T]
    segment_ids: np.ndarray  # int32[S, T], 1 in the sentence and at its separator, 0 after it
    words: np.ndarray  # int32[S, T], which word a token belongs to; -1: none
    arcs: np.ndarray  # int32[S, A, 2], the later and the earlier word of each arc; -1: no arc
    relations: np.ndarray  # str[S, A], universal relation with the later word; "" for no arc
    left_out: Mapping[str, int]  # sentences and arcs that a model cannot be asked about, by reason


def read_trees(
    path: Path, tokenizer: Tokenizer, context_length: int, most: int | None = None, flag: str = "--conllu"
) -> Trees:
    """Reads the sentences of a CoNLL-U file that fit into the context, and into `LONGEST` tokens.

    At most the first `most` of them. Relations lose their subtypes; punctuation and roots are no arcs. A word
    is the tokens whose last byte is in it, and an arc of a word without any is left out. UserError if the
    file cannot be read, has no heads, or no sentence is left.
    """
    length, left_out = min(LONGEST, context_length), Counter[str]()
    too_long = _TOO_LONG.format(length)
    rows = list[tuple[np.ndarray, np.ndarray, list[tuple[int, int, str]]]]()
    for text, words in parsed(path, flag):
        if any(word.head is None or not 0 <= word.head <= len(words) for word in words):
            sentence = f"{text[:40]!r}"
            advice = "give a treebank with the column HEAD, such as one of Universal Dependencies"
            why = f"the sentence {sentence} has no heads: {advice}"
            raise UserError(why, field=flag, value=str(path))
        arcs = _arcs(words)
        if not arcs:
            left_out[_TOO_SHORT] += 1
            continue
        ids = tokenizer.encode(text)
        if len(ids) + 1 > length:
            left_out[too_long] += 1
            continue
        of_words = _words_of_tokens(text, words, tokenizer.token_bytes(ids))
        if of_words is None:
            left_out[_NOT_SPELLED] += 1
            continue
        there = set(of_words.tolist())
        kept = [arc for arc in arcs if arc[0] in there and arc[1] in there]
        if len(kept) < len(arcs):
            left_out["arcs of words that share a token with the next"] += len(arcs) - len(kept)
        if kept:
            rows.append((ids, of_words, kept))
        if len(rows) == most:
            break
    if not rows:
        why = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
        advice = "must be CoNLL-U with '# text = ' before each sentence, and sentences that fit"
        raise UserError(
            f"no sentence is left{f' ({why})' if why else ''}", field=flag, value=str(path), advice=advice
        )
    return _in_rows(rows, tokenizer.separator_id, left_out)


def _arcs(words: Sequence[ParsedWord]) -> list[tuple[int, int, str]]:
    """Lists later word, earlier word and relation of each arc; words are counted from 0."""
    arcs = []
    for dependent, word in enumerate(words):
        relation = word.relation.partition(":")[0]
        if not word.head or relation in _NO_ARC or (head := word.head - 1) == dependent:
            continue
        later = "dependent" if dependent > head else "head"
        arcs.append((max(head, dependent), min(head, dependent), f"{relation}/{later}"))
    return arcs


def _words_of_tokens(text: str, words: Sequence[ParsedWord], pieces: Sequence[bytes]) -> np.ndarray | None:
    """Returns which word the last byte of each token is in, int32[tokens]; -1: in none; None: not known."""
    encoded, ends, starts, at = text.encode(), [], [], 0
    if b"".join(pieces) != encoded:  # other tokenizers change the text
        return None
    for word in words:
        form = word.form.encode()
        if (found := encoded.find(form, at)) < 0:
            return None
        at = found + len(form)
        starts.append(found)
        ends.append(at)
    last = np.cumsum([len(piece) for piece in pieces]) - 1
    word_of = np.searchsorted(ends, last, side="right")
    inside = (word_of < len(words)) & (last >= np.append(starts, len(encoded))[word_of])
    return np.where(inside, word_of, -1).astype(np.int32)


def _in_rows(
    rows: Sequence[tuple[np.ndarray, np.ndarray, list]], separator_id: int, left_out: Mapping[str, int]
) -> Trees:
    length = 1 + max(len(ids) for ids, _, _ in rows)
    n_arcs = max(len(arcs) for _, _, arcs in rows)
    tokens = np.full((len(rows), length), separator_id, np.int32)
    segment_ids, words = np.zeros(tokens.shape, np.int32), np.full(tokens.shape, -1, np.int32)
    arcs = np.full((len(rows), n_arcs, 2), -1, np.int32)
    relations = np.full((len(rows), n_arcs), "", object)
    for row, (ids, of_words, of_row) in enumerate(rows):
        stop = 1 + len(ids)
        tokens[row, 1:stop], words[row, 1:stop], segment_ids[row, :stop] = ids, of_words, 1
        for n, (later, earlier, relation) in enumerate(of_row):
            arcs[row, n], relations[row, n] = (later, earlier), relation
    return Trees(tokens, segment_ids, words, arcs, relations.astype(str), dict(left_out))


def word_attention(weights_BHTT: jax.Array, words_BT: jax.Array) -> jax.Array:
    """Computes the attention of words to words, float32[B, H, W, W], with W = T, of weights from heads.

    That of a word to another is the sum over the other's tokens, averaged over its own; 0 where there is no
    such word.
    """
    length = words_BT.shape[1]
    belongs_BTW = (words_BT[..., None] == jnp.arange(length)).astype(weights_BHTT.dtype)
    n_tokens_BW = jnp.maximum(belongs_BTW.sum(axis=1), 1)
    to_words = jnp.einsum("bhts,bsw->bhtw", weights_BHTT, belongs_BTW)
    of_words = jnp.einsum("bhtw,btv->bhvw", to_words, belongs_BTW)
    return of_words / n_tokens_BW[:, None, :, None]
