"""Tasks as data: minimal pairs, last words, multiple choice, text by domain; their figures, and differences.

Files are JSON lines in the field names that lm-evaluation-harness reads, and prompts are its prompts, so its
figures are these (`TASKS`, docs/evaluation.md). A file of another name is read by its fields (`KINDS`).
Nothing here knows of runs or of the command line.

A figure is a ratio of sums over units: documents, items, or groups of items (BLiMP's paradigms), of which
each group's mean counts the same. Differences are taken unit by unit, since units are easy or hard for both.

With one run on each side the interval is by bootstrap over units (`ablate_set.estimate`). With S runs on each
side, paired by their order, both units and runs are samples. Their variances are added,

    v = v_units + v_runs,   v_runs = s^2 / S,   v_units = n / (n - 1) sum_i (d_i - r w_i)^2 / (sum_i w_i)^2

s^2 being the variance of the S differences, d_i the mean difference of unit i, w_i its weight and r their
ratio. The interval is r +- t sqrt(v), t with Satterthwaite's degrees of freedom, v^2 / sum v_x^2 / df_x. The
sum counts what runs and units do together twice, so the interval is rather too wide, as the one of Owen's
pigeonhole bootstrap (2007, Annals of Applied Statistics 1, 386).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import difflib
import hashlib
import json
import math
from pathlib import Path
import re
from typing import Any, NamedTuple

import numpy as np

from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.eval import scoring
from topklm.eval.scoring import Request
from topklm.inference.intervention_batch import InterventionBatch
from topklm.neurons.ablate_set import Estimate, estimate
from topklm.neurons.documents import TextModel
from topklm.neurons.labelled_texts import lines

SHIPPED = Path(__file__).with_name("data")
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz")

Record = Mapping[str, Any]


class Item(NamedTuple):
    """A question: continuations of one context, of which one is right."""

    context: str  # "" begins a document
    choices: tuple[str, ...]  # continuations, with the blank before them
    gold: int  # number of the right one
    group: str = ""  # of items that are averaged first, a paradigm
    part: str = ""  # of groups that have a figure of their own, a field of linguistics


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of items: the fields of a line, how it becomes an item, and what is measured."""

    title: str
    fields: tuple[str, ...]  # that a line must have
    read: Callable[[Record], Item]
    measures: tuple[str, ...]  # names in `MEASURES`, the first one is the task's figure


def _pair(record: Record) -> Item:
    good, bad = record["sentence_good"], record["sentence_bad"]
    # Upstream spells a field with a slash in one paradigm.
    part = str(record.get("field", "")).replace("/", "_")
    return Item("", (f" {good}", f" {bad}"), 0, str(record.get("UID", "")), part)


def _last_word(record: Record) -> Item:
    context, blank, word = record["text"].rpartition(" ")
    if not blank or not word:
        raise ValueError("text must be several words, and end with one")
    return Item(context, (f" {word}",), 0)


def _chosen(context: str, choices: Sequence[str], gold: int) -> Item:
    if not 0 <= gold < len(choices):
        raise ValueError(f"of {len(choices)} choices number {gold} cannot be right")
    return Item(context, tuple(f" {choice}" for choice in choices), gold)


def _question(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _arc(record: Record) -> Item:
    choices = record["choices"]
    gold = choices["label"].index(record["answerKey"])
    return _chosen(_question(record["question"]), choices["text"], gold)


def _hellaswag(record: Record) -> Item:
    def mended(text: str) -> str:  # brackets are left from WikiHow
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return _chosen(mended(context), [mended(ending) for ending in record["endings"]], int(record["label"]))


def _sciq(record: Record) -> Item:
    choices = [record[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return _chosen(f"{record['support'].lstrip()}\n{_question(record['question'])}", choices, 3)


_CHOICE = ("acc", "acc_bytes", "bits_per_byte")
_OF_ARC = Kind("multiple choice", ("question", "choices", "answerKey"), _arc, _CHOICE)
PAIRS = Kind("minimal pairs", ("sentence_good", "sentence_bad"), _pair, ("acc", "bits_per_byte"))
CHOICE = Kind(
    "multiple choice",
    ("query", "choices", "gold"),
    lambda record: _chosen(record["query"], record["choices"], int(record["gold"])),
    _CHOICE,
)
# Kinds of files that have none of the names in `TASKS`; the first whose fields a line has.
KINDS = (PAIRS, CHOICE)
# By the name of a file NAME.jsonl, or of a folder of such files; names as in lm-evaluation-harness.
TASKS: dict[str, Kind] = {
    "blimp": PAIRS,
    "lambada_openai": Kind("last word", ("text",), _last_word, ("acc", "nats", "bits_per_byte")),
    "piqa": Kind(
        "multiple choice",
        ("goal", "sol1", "sol2", "label"),
        lambda r: _chosen(_question(r["goal"]), (r["sol1"], r["sol2"]), int(r["label"])),
        _CHOICE,
    ),
    "arc_easy": _OF_ARC,
    "arc_challenge": _OF_ARC,
    "hellaswag": Kind(
        "multiple choice", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag, _CHOICE
    ),
    "sciq": Kind(
        "multiple choice",
        ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"),
        _sciq,
        _CHOICE,
    ),
}
TEXT_MEASURES = ("bits_per_byte",)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Items, or documents, ready for any model."""

    name: str
    title: str  # of its kind
    measures: tuple[str, ...]
    source: str  # where it comes from
    sha256: str  # of its items or documents
    items: Sequence[Item] = ()
    documents: Sequence[str] = ()  # of text by domain, none empty
    notes: tuple[str, ...] = ()  # that a reader of its figures should know


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """Results of a model at a task of n items or documents."""

    task: Task
    # Of each measure a numerator and a denominator, float64[n]; the figure is the ratio of their sums.
    ratios: Mapping[str, tuple[np.ndarray, np.ndarray]]
    nats: Sequence[np.ndarray]  # of each item, float64[choices]; of text, [1]
    n_cut: int  # items whose context did not fit, and lost its beginning


def of_text(name: str, documents: Sequence[str], source: str) -> Task:
    """Makes a task of a domain's text; raises UserError if there is none."""
    kept = [text for text in documents if text]
    if not kept:
        raise UserError(f"{source}: there is no text in it; give other text")
    return Task(name, "text", TEXT_MEASURES, source, _digest(kept), documents=kept)


def beginning(
    documents: Iterable[np.ndarray], tokenizer: Tokenizer, n_tokens: int | None, share: float = 1.0
) -> list[str]:
    """Returns texts of the first `n_tokens` tokens of documents (None: all); of one at most a share."""
    texts, left = list[str](), math.inf if n_tokens is None else n_tokens
    of_one = max(1, int(share * left)) if n_tokens is not None else math.inf
    for ids in documents:
        if not left:
            break
        taken = ids[: int(min(len(ids), left, of_one))]
        texts.append(tokenizer.decode(taken))
        left -= len(taken)
    return [text for text in texts if text]


def find(
    name: str,
    folder: Path | None = None,
    limit: int | None = None,
    *,
    field: str = "--tasks",
    flag: str = "--data",
) -> Task:
    """Reads a task by its name: from the folder, or as it ships with topklm.

    A name is that of a file NAME.jsonl, also .gz or .xz, or of a folder of such files; `limit` takes the
    first so many items of each group (None: all). Errors name the task by `field`, the folder by `flag`.
    UserError if there is none of this name, or a line is no item of its kind.
    """
    places = [(folder, flag)] if folder is not None else []
    for place, called in (*places, (SHIPPED, "blimp")):
        if files := files_of(place, name):
            return _read(name, files, limit, called)
    known = sorted({*names_in(SHIPPED), *(names_in(folder) if folder is not None else ())})
    if name in TASKS:
        needed = ", ".join(TASKS[name].fields)
        where = "give a folder that holds it with" if folder is None else f"is not in {folder}, given with"
        advice = f"{where} {flag}: {name}.jsonl, lines with {needed}"
        raise UserError("its data do not ship with topklm", field=field, value=name, advice=advice)
    near = difflib.get_close_matches(name, {*known, *TASKS}, n=1, cutoff=0.5)
    there = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise UserError(f"there is no such task; {there}", field=field, value=name)


def names_in(folder: Path) -> list[str]:
    """Lists the tasks that a folder holds, by name."""
    found = {name for path in folder.iterdir() if (name := _name(path)) and files_of(folder, name)}
    return sorted(found)


def _name(path: Path) -> str:
    ending = next((e for e in sorted(ENDINGS, key=len, reverse=True) if path.name.endswith(e)), "")
    return path.name.removesuffix(ending) if ending or path.is_dir() else ""


def files_of(folder: Path, name: str) -> list[Path]:
    """Lists the files of a task; none where the folder has none."""
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        return []
    single = [path for ending in ENDINGS if (path := folder / f"{name}{ending}").is_file()]
    several = folder / name
    if single or not several.is_dir():
        return single[:1]
    return sorted(path for path in several.iterdir() if path.name.endswith(ENDINGS))


def _read(name: str, files: Sequence[Path], limit: int | None, flag: str) -> Task:
    items, kind, n_of = list[Item](), TASKS.get(name), dict[str, int]()
    for path in files:
        for number, line in enumerate(lines(path, flag), 1):
            if not line.strip():
                continue
            kind, item = _item(kind, line, path, number)
            n_of[item.group] = n_of.get(item.group, 0) + 1
            if limit is None or n_of[item.group] <= limit:
                items.append(item)
    if kind is None or not items:
        raise UserError(f"{files[0]}: holds no line; give one for each item")
    path = files[0] if len(files) == 1 else files[0].parent
    source = path.name if path.parent == SHIPPED else str(path)
    n_equal = sum(len(item.choices) > 1 and len(set(item.choices)) == 1 for item in items)
    if n_equal == len(items):
        raise UserError(f"{path}: the choices of every item are equal; give some that differ")
    # BLiMP has a few; lm-evaluation-harness takes the first of equal choices.
    notes = (f"{n_equal} items have equal choices, and count as right where the first is",) if n_equal else ()
    return Task(name, kind.title, kind.measures, source, _digest(items), items, notes=notes)


def _item(kind: Kind | None, line: str, path: Path, number: int) -> tuple[Kind, Item]:
    """Reads a line; the kind is found by its fields where it is not known."""

    def wrong(text: str) -> UserError:
        return UserError(f"{path}: line {number}: {text}")

    try:
        record = json.loads(line)
    except ValueError as e:
        raise wrong(f"is no JSON ({e}); give one object a line") from e
    if not isinstance(record, dict):
        raise wrong("must be a JSON object")
    if kind is None:
        kind = next((k for k in KINDS if record.keys() >= set(k.fields)), None)
    if kind is None:
        allowed = ", or ".join(f"{', '.join(k.fields)} ({k.title})" for k in KINDS)
        raise wrong(f"must have the fields {allowed}; text is given with --text")
    if missing := [field for field in kind.fields if field not in record]:
        raise wrong(f"lacks the field {missing[0]!r}; its task needs {', '.join(kind.fields)}")
    try:
        item = kind.read(record)
    except (TypeError, AttributeError, KeyError, IndexError) as e:
        raise wrong(f"a field of {', '.join(kind.fields)} has another type than its task needs ({e})") from e
    except ValueError as e:
        raise wrong(str(e)) from e
    if not all(isinstance(text, str) and text.strip() for text in item.choices):
        raise wrong("a choice is empty; give text")
    return kind, item


def _digest(content: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode(errors="surrogatepass")).hexdigest()


def requests_of(tokenizer: Tokenizer, items: Iterable[Item]) -> list[Request]:
    """Makes a request of each choice of each item, in order, as lm-evaluation-harness makes them.

    Context and continuation are encoded together, and cut where the context, encoded alone, ends; blanks at
    the end of a context belong to the continuation.
    """
    pairs = list[tuple[str, str]]()
    for item in items:
        context = item.context.rstrip()
        blanks = item.context[len(context) :]
        pairs += [(context, blanks + choice) for choice in item.choices]
    contexts = dict.fromkeys(context for context, _ in pairs)
    encoded = dict(zip(contexts, tokenizer.encode_batch(list(contexts)), strict=True))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    separator = np.array([tokenizer.separator_id], np.int32)
    requests = []
    for (context, continuation), whole in zip(pairs, wholes, strict=True):
        n = len(encoded[context])
        rest = whole[n:]
        if not len(rest):  # it became a part of the context's last token
            rest = tokenizer.encode(continuation)
        if not len(rest):
            raise UserError(f"the tokenizer makes no token of {continuation!r}; leave the item out")
        before = whole[:n] if len(whole) > n else encoded[context]
        requests.append(Request(np.concatenate([separator, before]), rest))
    return requests


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedTask:
    """A task as a tokenizer and a context length make requests of it."""

    task: Task
    requests: Sequence[Request]
    owners: np.ndarray  # int64[R], rising, of which item or document a request is

    @property
    def n_tokens(self) -> int:
        """Tokens that a model reads for it, if no context is cut."""
        return sum(len(r.context) + len(r.continuation) - 1 for r in self.requests)

    def evaluate(
        self, model: TextModel, interventions: InterventionBatch | None = None, **options: Any
    ) -> Outcome | None:
        """Runs a model over the task; options are those of `scoring.score`; None if it was given up."""
        task = self.task
        scores = scoring.score(model, self.requests, interventions, **options)
        if scores is None:
            return None
        if task.documents:
            nats = np.bincount(self.owners, scores.nats, len(task.documents))
            n_bytes = np.array([len(text.encode()) for text in task.documents], np.float64)
            ratios = {"bits_per_byte": (nats / math.log(2), n_bytes)}
            return Outcome(task, ratios, list(nats[:, None]), 0)
        bounds = np.searchsorted(self.owners, np.arange(len(task.items)))
        of_items = np.split(scores.nats, bounds[1:])
        n_cut = np.bincount(self.owners, scores.n_cut > 0, len(task.items))
        ratios = _ratios(task, of_items, scores.is_greedy[bounds])
        return Outcome(task, ratios, of_items, int(np.count_nonzero(n_cut)))


def tokenize(task: Task, model: TextModel, tokenizer: Tokenizer) -> TokenizedTask:
    """Makes the requests of a task; UserError for a choice without tokens, or too long for the context."""
    if task.documents:
        return TokenizedTask(task, *scoring.window_requests(model, tokenizer.encode_batch(task.documents)))
    owners = np.repeat(np.arange(len(task.items)), [len(item.choices) for item in task.items])
    requests, length = requests_of(tokenizer, task.items), model.config.context_length
    for number, request in zip(owners, requests, strict=True):
        if (n := len(request.continuation)) > length:
            text = (
                f"item {number} has a choice of {n:,} tokens: must be at most {length:,}, the model's context"
            )
            raise UserError(f"{task.source}: {text}; leave it out")
    return TokenizedTask(task, requests, owners)


def keeps(tokenizer: Tokenizer, task: Task) -> bool:
    """Tells whether a tokenizer's tokens of the texts of a task spell these texts."""
    texts = task.documents or [item.context + item.choices[item.gold] for item in task.items]
    encoded = tokenizer.encode_batch(texts)
    return all(tokenizer.decode(ids) == text for ids, text in zip(encoded, texts, strict=True))


def _ratios(
    task: Task, nats: Sequence[np.ndarray], greedy: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Computes the measures of items from their nats, and whether their first choice is greedy, bool[n]."""
    gold = np.array([of[item.gold] for of, item in zip(nats, task.items, strict=True)])
    # lm-evaluation-harness does not count the blank before a choice where it divides by lengths.
    sizes = [np.array([len(choice[1:].encode()) for choice in item.choices]) for item in task.items]
    n_bytes = np.array([len(item.choices[item.gold].encode()) for item in task.items], np.float64)
    ones = np.ones(len(gold))

    def right(costs: Iterable[np.ndarray]) -> np.ndarray:
        chosen = zip(costs, task.items, strict=True)
        return np.array([float(np.argmin(of) == item.gold) for of, item in chosen])

    makers: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "acc": lambda: (greedy.astype(float) if task.title == "last word" else right(nats), ones),
        "acc_bytes": lambda: (right(of / size for of, size in zip(nats, sizes, strict=True)), ones),
        "nats": lambda: (gold, ones),
        "bits_per_byte": lambda: (gold / math.log(2), n_bytes),
    }
    return {name: makers[name]() for name in task.measures}


LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Measure:
    """One thing that is measured of tasks."""

    title: str
    is_better_up: bool
    margin: float  # by which a run may be worse and still counts as no worse


MEASURES = {
    "acc": Measure("accuracy", True, 0.005),
    "acc_bytes": Measure("accuracy by byte", True, 0.005),
    "nats": Measure("nats", False, 0.02),
    "bits_per_byte": Measure("bits per byte", False, 0.01),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
    """A figure of one run, as sums over n units."""

    task: str
    part: str  # of the task: a field of linguistics; "" for all of it
    measure: str  # in `MEASURES`
    unit: str  # "paradigm" and the like
    sums: np.ndarray  # float64[n]
    weights: np.ndarray  # float64[n]

    @property
    def key(self) -> tuple[str, str, str]:
        """Identifies the same figure of other runs."""
        return self.task, self.part, self.measure

    def estimate(self, seed: int = 0) -> Estimate:
        """Returns the figure with its interval by bootstrap over units."""
        return estimate(self.sums, self.weights, np.random.default_rng(seed))


@dataclasses.dataclass(frozen=True)
class Difference:
    """A figure of runs less that of others, with its 95 % interval; NaN where there is one unit only."""

    value: float
    low: float
    high: float
    by_run: tuple[float, ...]  # of each pair of runs
    margin: float
    verdict: str  # "no worse", "worse" or "open"


def figures_of(outcome: Outcome) -> Iterator[Figure]:
    """Yields the figures of an outcome: of its measures, and its first measure for each part."""
    task, items = outcome.task, outcome.task.items
    unit = "document" if task.documents else "item"
    groups = np.array([item.group for item in items])
    if len(items) == 0 or not all(item.group for item in items):
        for measure, (sums, weights) in outcome.ratios.items():
            yield Figure(task.name, "", measure, unit, sums, weights)
        return
    _, first, of_group = np.unique(groups, return_index=True, return_inverse=True)
    parts = np.array([items[number].part for number in first])

    def grouped(measure: str) -> tuple[np.ndarray, np.ndarray]:
        sums, weights = (np.bincount(of_group, values) for values in outcome.ratios[measure])
        return (sums, weights) if measure == "bits_per_byte" else (sums / weights, np.ones(len(sums)))

    for measure in outcome.ratios:
        yield Figure(task.name, "", measure, "paradigm", *grouped(measure))
    main = task.measures[0]
    sums, weights = grouped(main)
    for part in sorted(set(parts.tolist()) - {""}):
        is_in = parts == part
        yield Figure(task.name, part, main, "paradigm", sums[is_in], weights[is_in])


def difference(
    ours: Sequence[Figure], theirs: Sequence[Figure], margin: float | None = None, seed: int = 0
) -> Difference:
    """Computes the difference of the same figure of runs and others, one or more, paired by their order.

    They are of the same units with the same weights; the margin is by default that of the measure.
    """
    weights, measure = ours[0].weights, MEASURES[ours[0].measure]
    gaps = np.array([one.sums - other.sums for one, other in zip(ours, theirs, strict=True)])
    by_run = gaps.sum(axis=1) / weights.sum()
    if len(ours) == 1:
        found = estimate(gaps[0], weights, np.random.default_rng(seed))
        value, low, high = found.value, found.low, found.high
    else:
        value, low, high = _over_both(gaps, weights)
    if len(weights) < 2:
        low = high = math.nan
    margin = measure.margin if margin is None else margin
    sign = 1 if measure.is_better_up else -1
    worst, best = sorted((sign * low, sign * high))
    verdict = "no worse" if worst > -margin else "worse" if best < -margin else "open"
    return Difference(value, low, high, tuple(by_run.tolist()), margin, verdict)


def mean_over_runs(figures: Sequence[Figure], seed: int = 0) -> Estimate:
    """Returns the mean of the same figure over runs, with its interval over runs and units."""
    if len(figures) == 1:
        return figures[0].estimate(seed)
    return Estimate(*_over_both(np.array([one.sums for one in figures]), figures[0].weights))


def _over_both(values: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Returns the mean of float64[S, n] over n weights, and its interval over runs and units."""
    n_runs, n = values.shape
    of_units = values.mean(axis=0)
    ratio = of_units.sum() / weights.sum()
    if n < 2:
        return ratio, math.nan, math.nan
    v_units = n / (n - 1) * np.sum((of_units - ratio * weights) ** 2) / weights.sum() ** 2
    v_runs = np.var(values.sum(axis=1) / weights.sum(), ddof=1) / n_runs
    variance = v_units + v_runs
    if variance == 0:
        return ratio, ratio, ratio
    degrees = variance**2 / (v_units**2 / (n - 1) + v_runs**2 / (n_runs - 1))
    import scipy.stats  # noqa: PLC0415 - a third of a second, which the trainer does without

    reach = scipy.stats.t.ppf((1 + LEVEL) / 2, degrees) * math.sqrt(variance)
    return float(ratio), float(ratio - reach), float(ratio + reach)


def margins(text: str | None) -> Mapping[str, float]:
    """Reads margins by measure, "acc=0.01,bits_per_byte=0.02"; UserError for another form or measure."""
    found = {}
    for part in (text or "").split(",") if text else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in MEASURES or not equals or not 0 <= number < math.inf:
            allowed = f"MEASURE=NUMBER with commas between, of {', '.join(MEASURES)}, each 0 or more"
            raise UserError(field="--margin", value=text, allowed=allowed)
        found[name] = number
    return found
