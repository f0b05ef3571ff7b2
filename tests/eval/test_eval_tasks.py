"""Tasks as data: prompts against lm-evaluation-harness, measures against loops, and files that are wrong."""

import ast
import collections
import gzip
import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import saved_runs

import topklm
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.eval import scoring, tasks
from topklm.layout import one_device
from topklm.neurons.documents import TextModel

DOCS = {
    "blimp": {
        "sentence_good": "She runs.",
        "sentence_bad": "She run.",
        "UID": "agreement",
        "field": "syntax",
    },
    "lambada_openai": {"text": "the old miller went to the mill"},
    "piqa": {"goal": "open a jar", "sol1": "turn it", "sol2": "hit it hard", "label": 0},
    "arc_easy": {
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire", "rain"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "arc_challenge": {
        "question": "What sinks?",
        "choices": {"text": ["cork", "lead"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "hellaswag": {
        "activity_label": "Mending",
        "ctx_a": "A man sits. [title] He looks  around",
        "ctx_b": "he",
        "endings": ["takes a needle. [substeps] Then rests.", "flies"],
        "label": "1",
    },
    "sciq": {
        "support": " Water boils.",
        "question": "At how many degrees?",
        "distractor1": "5",
        "distractor2": "7",
        "distractor3": "9",
        "correct_answer": "100",
    },
}


class Rows(list):
    """As a data set of the library datasets."""

    def map(self, function):
        return Rows({**row, **function(row)} for row in self)


def write(folder, name, records, opened=open, ending=".jsonl"):
    with opened(folder / f"{name}{ending}", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return folder


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    saved_runs.save(folder, [5])
    return topklm.load(folder)


@pytest.fixture(scope="module")
def model(lm):
    return TextModel(lm.cfg, lm.params, one_device(), lm.tokenizer.separator_id)


def evaluate(task, model, lm):
    return tasks.tokenize(task, model, lm.tokenizer).evaluate(model)


def test_every_task_has_a_document_here():
    assert set(DOCS) == set(tasks.TASKS)


@pytest.mark.parametrize("name", DOCS)
def test_prompts_are_those_of_lm_evaluation_harness(tmp_path, name):
    lm_eval = pytest.importorskip("lm_eval")
    utils = pytest.importorskip("lm_eval.utils")
    loader = pytest.importorskip("lm_eval.tasks._yaml_loader")
    folder = next(iter(lm_eval.__path__))
    files = {
        "blimp": "blimp/_template_yaml",
        "lambada_openai": "lambada/lambada_openai.yaml",
        "arc_easy": "arc/arc_easy.yaml",
        "arc_challenge": "arc/arc_challenge.yaml",
    }
    path = Path(folder) / "tasks" / files.get(name, f"{name}/{name}.yaml")
    stock, doc = loader.load_yaml(path), DOCS[name]
    if process := stock.get("process_docs"):
        doc = process(Rows([doc]))[0]

    def rendered(template):
        return utils.apply_template(template, doc)

    (item,) = tasks.find(name, write(tmp_path, name, [DOCS[name]])).items
    assert item.context == rendered(stock["doc_to_text"])
    if stock["output_type"] == "loglikelihood":
        assert item.choices == (rendered(stock["doc_to_target"]),)
        return
    choices = stock["doc_to_choice"]
    choices = doc[choices] if choices in doc else ast.literal_eval(rendered(choices))
    assert item.choices == tuple(f" {choice}" for choice in choices)
    target = stock["doc_to_target"]
    gold = doc[target] if isinstance(target, str) and target in doc else target
    assert item.gold == int(rendered(gold) if isinstance(gold, str) else gold)


def test_the_blimp_that_ships_has_its_paradigms_and_fields():
    task = tasks.find("blimp")
    sizes = collections.Counter(item.group for item in task.items)
    assert (len(sizes), set(sizes.values())) == (51, {1000})
    fields = {item.group: item.part for item in task.items}
    assert collections.Counter(fields.values()) == {
        "syntax": 21,
        "morphology": 15,
        "syntax_semantics": 10,
        "semantics": 5,
    }
    assert len({(item.group, item.part) for item in task.items}) == 51
    assert task.notes == ("7 items have equal choices, and count as right where the first is",)
    first = tasks.find("blimp", limit=2)
    assert list(first.items) == [
        item for at, item in enumerate(task.items) if at % 1000 < 2
    ]  # paradigms lie together


def test_accuracies_and_bits_of_choices_are_those_of_a_loop(tmp_path, lm, model):
    rng = np.random.default_rng(0)
    words = ["a", "bc", "d\u00e9f", "ghij", "k"]
    records = [
        {
            "query": " ".join(rng.choice(words, 3)) + " " * int(rng.integers(0, 2)),
            "choices": [" ".join(rng.choice(words, n + 1)) for n in range(int(rng.integers(2, 5)))],
            "gold": 1,
        }
        for _ in range(12)
    ]
    task = tasks.find("mine", write(tmp_path, "mine", records))
    found = evaluate(task, model, lm)
    right, right_by_byte, bits, n_bytes = [], [], [], []
    for record in records:
        nats = []
        for choice in record["choices"]:
            context = record["query"].rstrip()
            blanks = record["query"][len(context) :]
            ids = np.concatenate([[model.separator_id], lm.tokenizer.encode(context + blanks + " " + choice)])
            n = len(ids) - 1 - len(lm.tokenizer.encode(context))
            nats.append(float(np.asarray(lm.loss(ids, per_token=True), np.float64)[0, -n:].sum()))
        sizes = [len(choice.encode()) for choice in record["choices"]]
        right.append(np.argmin(nats) == 1)
        right_by_byte.append(np.argmin(np.array(nats) / sizes) == 1)
        bits.append(nats[1] / math.log(2))
        n_bytes.append(1 + sizes[1])
    assert set(found.ratios) == {"acc", "acc_bytes", "bits_per_byte"}
    np.testing.assert_array_equal(found.ratios["acc"][0], right)
    np.testing.assert_array_equal(found.ratios["acc_bytes"][0], right_by_byte)
    assert right != right_by_byte
    np.testing.assert_allclose(found.ratios["bits_per_byte"][0], bits, rtol=1e-4)
    np.testing.assert_array_equal(found.ratios["bits_per_byte"][1], n_bytes)


def test_a_last_word_is_right_if_it_is_the_likeliest(tmp_path, lm, model):
    text = "the sea"
    ids = np.concatenate([[model.separator_id], lm.tokenizer.encode(text + " ")])
    follows = lm.tokenizer.decode([int(np.asarray(lm(ids))[0, -1].argmax())])
    words = [follows if follows.strip() else "x", "\u00e9\u00e9"]
    folder = write(tmp_path, "lambada_openai", [{"text": f"{text} {word}"} for word in words])
    found = evaluate(tasks.find("lambada_openai", folder), model, lm)
    assert set(found.ratios) == {"acc", "nats", "bits_per_byte"}
    assert found.ratios["acc"][0][1] == 0
    request = tasks.requests_of(lm.tokenizer, found.task.items)[1]
    alone = scoring.score(model, [request])
    np.testing.assert_allclose(found.ratios["nats"][0][1], alone.nats[0], rtol=1e-5)
    np.testing.assert_array_equal(found.ratios["bits_per_byte"][1], [1 + len(w.encode()) for w in words])


def test_contexts_that_do_not_fit_are_counted(tmp_path, lm, model):
    records = [{"query": "x" * n, "choices": ["a", "bb"], "gold": 0} for n in (3, 29, 30, 40)]
    found = evaluate(tasks.find("mine", write(tmp_path, "mine", records)), model, lm)
    assert found.n_cut == 2  # a separator, 29 and the 3 of " bb" but the last are 32, which fit
    assert len(found.nats) == 4


def test_a_continuation_that_does_not_fit_is_one_line(tmp_path, lm, model):
    folder = write(tmp_path, "mine", [{"query": "x", "choices": ["a", "b" * 40], "gold": 0}])
    with pytest.raises(UserError, match=r"mine.jsonl: item 0 has a choice of 41 tokens: must be at most 32"):
        tasks.tokenize(tasks.find("mine", folder), model, lm.tokenizer)


def test_text_is_scored_by_documents(lm, model):
    texts = ["the sea", "a very long text, longer than the context of the model", "\u00e9"]
    found = evaluate(tasks.of_text("books", texts, "books"), model, lm)
    bits, n_bytes = found.ratios["bits_per_byte"]
    np.testing.assert_array_equal(n_bytes, [len(text.encode()) for text in texts])
    for text, own in list(zip(texts, bits, strict=True))[::2]:
        ids = np.concatenate([[model.separator_id], lm.tokenizer.encode(text)])
        assert own == pytest.approx(float(lm.loss(ids)) * (len(ids) - 1) / math.log(2), rel=1e-4)


def test_a_text_begins_with_so_many_tokens_and_no_document_gives_most_of_them():
    tokenizer = saved_runs.tokenizer()
    documents = [tokenizer.encode(text) for text in ("abc", "", "defghij", "k" * 50, "xyz")]
    assert tasks.beginning(documents, tokenizer, None) == ["abc", "defghij", "k" * 50, "xyz"]
    assert tasks.beginning(documents, tokenizer, 12) == ["abc", "defghij", "kk"]
    assert tasks.beginning(documents, tokenizer, 20, 0.25) == ["abc", "defgh", "kkkkk", "xyz"]


def test_a_token_across_the_border_leaves_the_continuation_something():
    tokenizer = train_bpe(["ab ab ab ab"] * 20, 259)
    assert len(tokenizer.encode("ab")) == 1
    (request,) = tasks.requests_of(tokenizer, [tasks.Item("a", ("b",), 0)])
    assert [tokenizer.decode(ids) for ids in request] == ["a", "b"]


def test_files_may_be_compressed_or_a_folder(tmp_path):
    write(tmp_path, "piqa", [DOCS["piqa"]], gzip.open, ".jsonl.gz")
    write(tmp_path, "sciq", [DOCS["sciq"]], lzma.open, ".jsonl.xz")
    (tmp_path / "blimp").mkdir()
    for name in ("one", "two"):
        write(tmp_path / "blimp", name, [{**DOCS["blimp"], "UID": name}])
    assert tasks.names_in(tmp_path) == ["blimp", "piqa", "sciq"]
    assert [item.group for item in tasks.find("blimp", tmp_path).items] == ["one", "two"]
    assert (
        tasks.find("piqa", tmp_path).items
        == tasks.find("piqa", write(tmp_path, "piqa", [DOCS["piqa"]])).items
    )


GOOD = {"sentence_good": "a", "sentence_bad": "b"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "piqa",
            {"goal": "a", "sol1": "b", "label": 0},
            "line 1: lacks the field 'sol2'; its task needs goal,",
        ),
        ("piqa", {**DOCS["piqa"], "label": 2}, "line 1: of 2 choices number 2 cannot be right"),
        ("piqa", {**DOCS["piqa"], "label": "x"}, "line 1: invalid literal for int"),
        ("piqa", {**DOCS["piqa"], "sol1": ""}, "line 1: a choice is empty; give text"),
        ("sciq", {**DOCS["sciq"], "support": 3}, "line 1: a field of support, question, .* has another type"),
        ("arc_easy", {**DOCS["arc_easy"], "answerKey": "D"}, "line 1: 'D' is not in list"),
        ("arc_easy", {**DOCS["arc_easy"], "choices": ["a"]}, "line 1: a field of question, .* another type"),
        ("lambada_openai", {"text": "word"}, "line 1: text must be several words, and end with one"),
        ("lambada_openai", {"text": 5}, "line 1: a field of text has another type"),
        (
            "mine",
            {"a": 1},
            "line 1: must have the fields sentence_good, sentence_bad .minimal pairs., or query",
        ),
        ("mine", "not JSON", "line 1: is no JSON"),
        ("mine", [1], "line 1: must be a JSON object"),
        ("mine", "", "holds no line; give one for each item"),
        ("blimp", {"sentence_good": "a", "sentence_bad": "a"}, "the choices of every item are equal"),
    ],
)
def test_lines_that_are_no_items_are_one_line_of_error(tmp_path, name, content, said):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / f"{name}.jsonl").write_text(text)
    with pytest.raises(UserError, match=rf"{name}.jsonl: {said}") as caught:
        tasks.find(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_later_line_is_named_by_its_number(tmp_path):
    (tmp_path / "mine.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{{}}\n")
    with pytest.raises(UserError, match="line 3: lacks the field 'sentence_good'"):
        tasks.find("mine", tmp_path)


def test_damaged_and_binary_files_are_one_line(tmp_path):
    (tmp_path / "mine.jsonl.xz").write_bytes(b"no xz")
    (tmp_path / "other.jsonl.gz").write_bytes(gzip.compress(b"{}" * 99)[:-9])
    (tmp_path / "third.jsonl").write_bytes(b"\xff\xfe\x00")
    for name in ("mine", "other", "third"):
        with pytest.raises(UserError, match="is damaged, or no UTF-8"):
            tasks.find(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blinp", "there is no such task; did you mean blimp?"),
        ("zzz", "there is no such task; there are blimp"),
        (
            "piqa",
            "its data do not ship with topklm; give a folder that holds it with --data: piqa.jsonl, lines",
        ),
        ("../x", "there is no such task"),
    ],
)
def test_unknown_tasks_say_what_there_is(name, said):
    with pytest.raises(UserError, match=f"--tasks = {name}: {said}"):
        tasks.find(name)


def test_tokenizers_that_change_text_are_found():
    task = tasks.of_text("t", ["The Sea"], "t")
    assert tasks.keeps(saved_runs.tokenizer(), task)

    class Lower:
        def encode_batch(self, texts):
            return [np.frombuffer(text.lower().encode(), np.uint8) for text in texts]

        def decode(self, ids):
            return bytes(ids).decode()

    assert not tasks.keeps(Lower(), task)
