"""Whatever comes in as a config is taken, or refused in one line: values, saved text, flags, config files."""

import contextlib
import json

from helpers import CONFIG_FILE
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import ml_collections
import numpy as np
import pytest

from configs import books, paper, small
from topklm import config as config_lib
from topklm.checkpoint import run_folder
from topklm.commands import train
from topklm.config import Config, flatten
from topklm.errors import UserError

FIELDS = flatten(Config())
SECTIONS = [name for name, part in Config().to_dict().items() if isinstance(part, dict)]


class Nasty:
    def __repr__(self):
        raise RuntimeError("no")


def quick_and(many):
    """How many examples: few by day, and by night as many as were once found to be worth it."""
    return pytest.mark.parametrize("examples", [100, pytest.param(many, marks=pytest.mark.slow)])


@contextlib.contextmanager
def only_one_line():
    try:
        yield
    except UserError as e:
        line = str(e)
        assert line.isprintable() and len(line) < 5000, line


ODD_INTEGERS = [0, -1, 1, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 10**5000]
ODD_FLOATS = [5e-324, 1e-45, 1e-38, 1e39, 1.7e308, -0.0, 0.9999999, 0.99999999999, 255.0]
ODD_TEXTS = [
    "\0",
    "\ud800",
    "a\nb",
    "'" * 500,
    "x" * 100_000,
    "~",
    "{}",
    "%s",
    "9" * 5000 + ":1",
    "\u0661:2",
    "-1",
]


def one_of(values):
    """One of values that hypothesis must not print."""
    return st.integers(0, len(values) - 1).map(lambda i: values[i])


integers = st.one_of(st.integers(), st.integers(-3, 70), one_of(ODD_INTEGERS))
floats = st.one_of(st.floats(), st.sampled_from(ODD_FLOATS))
texts = st.one_of(st.text(), st.sampled_from(ODD_TEXTS))
ODD_VALUES = [Nasty(), object(), int, np.bool_(True), 1j, np.array([1, 2]), np.array(3), range(3), [[]], ()]
ODD_VALUES += [np.int64(4), np.uint8(8), np.int64(2**62), np.float32(0.5), np.float64(1e300), np.str_("a")]
ODD_VALUES += [ml_collections.ConfigDict({"a": 1}), {1: 2}, {"d_model": None}]
others = st.one_of(st.none(), st.booleans(), st.binary(max_size=9), one_of(ODD_VALUES))
anything = st.recursive(
    st.one_of(integers, floats, texts, others),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)
OF_KIND = {int: integers, float: floats, str: texts, bool: st.booleans()}


@st.composite
def values_of_a_config(draw):
    """Sections with fields, mostly of names that exist and half of the time of their types."""
    values = {}
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from([*FIELDS, *FIELDS, "model.d_modl", "modl.d_model", "x" * 9999, "model"]))
        section, _, field = name.rpartition(".")
        right = OF_KIND.get(type(FIELDS.get(name)), anything)
        value = draw(st.one_of(right, anything))
        part = values.setdefault(section, {}) if section else values
        if isinstance(part, dict):
            part[field] = value
    if draw(st.integers(0, 9)) == 0:
        values[draw(st.sampled_from([None, 3, 1.5, (), "model", "", b"model"]))] = draw(anything)
    return values


@quick_and(4100)
def test_random_values_of_all_types_resolve_or_are_one_line(examples):
    @settings(max_examples=examples, database=None)
    @given(st.one_of(values_of_a_config(), anything))
    def check(values):
        with only_one_line():
            config = config_lib.resolve(values)
            assert config_lib.from_saved(json.loads(json.dumps(config.to_dict()))) == config
            assert all(isinstance(line, str) for line in config_lib.warnings(config))

    check()


PIECES = [
    b"null",
    b"[" * 20,
    b"}",
    b"\xff",
    b"\0",
    b"9" * 400,
    b"9" * 5000,
    b'"',
    b"1e999",
    b"NaN",
    b"-",
    b"{}",
]


@st.composite
def damaged_json(draw):
    """The text of a config.json with bits flipped, and parts cut out, put in, or there twice."""
    content = bytearray(json.dumps(Config().to_dict(), indent=draw(st.sampled_from([None, 2]))).encode())
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content) - 1))
        match draw(st.sampled_from(["flip", "cut", "insert", "again", "value"])):
            case "flip":
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[place : place + draw(st.sampled_from([1, 30, 10_000]))]
                content += b" "
            case "insert":
                content[place:place] = draw(st.sampled_from(PIECES))
            case "again":
                content[place:place] = content[place : place + 40]
            case "value":  # of the next field
                start = content.find(b": ", place) + 2
                ends = [end for end in (content.find(b",", start), content.find(b"}", start)) if end > 0]
                content[start : min(ends, default=start)] = draw(st.sampled_from(PIECES))
    return bytes(content)


def saved_config(folder, content):
    (folder / "config.json").write_bytes(content)
    return run_folder.saved_config(folder)


@quick_and(700)
def test_a_damaged_saved_config_is_read_or_is_one_line(tmp_path, examples):
    @settings(max_examples=examples, database=None)
    @given(damaged_json())
    def check(content):
        with only_one_line():
            assert isinstance(saved_config(tmp_path, content), Config)

    check()


NO_CONFIGS = [
    "",
    "[]",
    "null",
    "1",
    "true",
    '"a"',
    "[" * 100_000,
    '{"model":' * 100_000,
    "NaN",
    '{"model": 3}',
]
NO_CONFIGS += ['{"model": []}', '{"train": {"seed": ' + "9" * 5000 + "}}", '{"data": {"dir": "\\u0000"}}']
NO_CONFIGS += [
    '{"optim": {"z_loss": ' + "9" * 400 + "}}",
    '{"data": {"text_field": "\\ud800"}}',
    b"\xff{}",
]


@pytest.mark.parametrize(
    "content",
    NO_CONFIGS,
    ids=lambda content: repr(content[:30]),
)
def test_text_that_holds_no_config_is_one_line(tmp_path, content):
    with pytest.raises(UserError) as refusal:
        saved_config(tmp_path, content if isinstance(content, bytes) else content.encode())
    assert len(str(refusal.value)) < 5000


def test_a_saved_config_may_begin_with_a_byte_order_mark(tmp_path):
    assert saved_config(tmp_path, "\ufeff{}".encode()) == Config()


FLAGS = [f"--config.{name}" for name in FIELDS]
WORDS = [
    "-h",
    "--help",
    "--",
    "-",
    "",
    "-config",
    "--config.",
    "--config.model",
    "--config.model.",
    "--config",
]
WORDS += [
    "--flagfile",
    "--flagfile=/nope",
    "--fromenv=PATH",
    "--tryfromenv=x",
    "--undefok=x",
    "--helpfull",
    "@x",
]
WORDS += [
    "--noconfig.model.tie_embeddings",
    "--config.modl.x=1",
    "--config.model.d_modl",
    "--config..",
    "--workdir",
]
WORDS += [
    f"--config={CONFIG_FILE}:base",
    f"--config={CONFIG_FILE}:\0",
    "--config=/",
    "--config=\0",
    "--workdir=\ud800",
]


@st.composite
def command_line(draw):
    arguments = draw(st.sampled_from([[f"--config={CONFIG_FILE}"], ["--config", str(CONFIG_FILE)], []]))
    arguments = list(arguments)
    for _ in range(draw(st.integers(0, 4))):
        flag = draw(st.one_of(st.sampled_from(FLAGS), st.sampled_from(WORDS), texts))
        value = draw(
            st.one_of(texts, st.integers(-3, 3000).map(str), floats.map(str), st.sampled_from(ODD_TEXTS))
        )
        arguments += draw(st.sampled_from([[flag], [f"{flag}={value}"], [flag, value]]))
    return arguments


def test_a_variant_longer_than_a_file_name_may_be_is_one_line():
    with only_one_line(), pytest.raises(UserError, match="the variants are"):
        train.parse([f"--config={CONFIG_FILE}:{'0' * 5000}"])


@quick_and(3100)
def test_a_random_command_line_is_parsed_or_is_one_line(examples, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    @settings(max_examples=examples, database=None)
    @given(command_line())
    def check(arguments):
        with only_one_line():
            try:
                config, _ = train.parse(arguments)
                assert isinstance(config, Config)
            except SystemExit as e:  # the help
                assert e.code == 0

    check()


GET = "from topklm import config\ndef get_config(arg=None):\n    c = config.default()\n    {}\n    return c\n"
RAISES = [
    "BaseException()",
    'Exception("a\\nb")',
    'ImportError("x")',
    'RuntimeError("x"*9999)',
    "AssertionError()",
    'OSError(13,"no")',
    'FileNotFoundError(2,"gone","y")',
    'KeyError("x")',
    "AttributeError(\"'a'\")",
    'NameError("a")',
    'TypeError("t")',
    'ValueError("v")',
    "IndexError()",
    "ZeroDivisionError()",
    "RecursionError()",
    "MemoryError()",
    "SystemExit(0)",
    'SystemExit("no")',
    "StopIteration()",
    "GeneratorExit()",
    "UnicodeError()",
    "TimeoutError()",
    "EOFError()",
    "ArithmeticError()",
    'ExceptionGroup("g",[KeyError(1)])',
]
RETURNS = [
    "None",
    "3",
    "'x'",
    "[]",
    "()",
    "config",
    "config.Config",
    "object()",
    "lambda: 0",
    "{3: 4}",
    "{'a': {}}",
]
RETURNS += [
    "{'model': None}",
    "{'model': {'d_model': None}}",
    "{'train': {None: 1}}",
    "config.default().model",
]
RETURNS += ["{'model': config.default().model, 'x': 1}", "config.default().train.steps", "print", "iter([])"]
ASSIGNS = [
    "c.train.steps = 1e4 / 8",
    "c.train.seed = 2**64",
    "c.train.steps = None",
    "c.model = 3",
    "c.x.y = 3",
]
ASSIGNS += [
    "c.model.d_modl = 3",
    "c['model']['d_model'] = '3'",
    "c.train = []",
    "c.lock(); c.new = 1",
    "c.a = c",
]
ASSIGNS += ["import numpy; c.train.steps = numpy.int64(5)", "c.optim.beta1 = 10**400", "c.data.dir = 'a\\0b'"]
ASSIGNS += ["c.model.d_model = 2**40", "c.data.vocab_size = 2**53", "c.optim.epsilon = 1e-50"]
ASSIGNS += ["c.model.unlock(); c.model[3] = 3", "c.data.source = '\\ud800'", "c.update({'model': None})"]
FILES = {
    **{f"raise {error}": f"raise {error}\n" for error in RAISES},
    **{f"get_config: raise {error}": GET.format(f"raise {error}") for error in RAISES},
    **{f"return {value}": GET.format(f"return {value}") for value in RETURNS},
    **{assign: GET.format(assign) for assign in ASSIGNS},
    "empty": "",
    "no get_config": "x = 1\n",
    "misspelled": "def get_cofnig():\n    pass\n",
    "no function": "get_config = 3\n",
    "a class": "class get_config:\n    def __init__(self, variant=None):\n        pass\n",
    "two variants": "def get_config(a, b):\n    pass\n",
    "a generator": GET.format("yield 3"),
    "syntax": "def get_config(:\n",
    "tabs": "if True:\n        a = 1\n\tb = 2\n",
    "open bracket": "(" * 300,
    "deep": "x = " + "(" * 3000 + ")" * 3000,
    "deeper": "x = " + "-" * 100_000 + "1",
    "a long number": "x = " + "1" * 5000,
    "zero": b"x = 1\0\n",
    "latin": b"x = '\xe9'\n",
    "coding": b"# coding: nonsense\nx = 1\n",
    "utf-16": "x = 1".encode("utf-16"),
    "binary": bytes(range(256)),
    "json": '{"model": {"d_model": null}}',
    "endless": "def f():\n    f()\nf()\n",
    "bad text of an error": "class E(Exception):\n    def __str__(self):\n        raise KeyError\nraise E\n",
    "import of itself": "import mine\nmine.get_config()\n",
}


@pytest.mark.parametrize("variant", ["", ":", ":base"])
@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_hostile_config_file_is_one_line_that_names_it(content, variant, tmp_path):
    file = tmp_path / "mine.py"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refusal:
        train.parse([f"--config={file}{variant}"])
    line = str(refusal.value)
    assert len(line) < 5000
    assert str(file) in line or line.startswith(("config", *(f"{section}." for section in SECTIONS))), line


def test_the_line_of_a_mistake_is_that_in_the_config_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import json\n\ndef get_config():\n    return json.loads('{')\n")
    with pytest.raises(UserError, match=rf"{file}, line 4: JSONDecodeError: Expecting property name"):
        train.load(str(file))


def test_a_config_file_that_returns_a_dict_is_taken(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy\ndef get_config():\n  return {'train': {'steps': numpy.int32(7)}, 'profile': '1:2'}\n"
    )
    config, _ = train.parse([f"--config={file}", "--config.train.seed=9", "--config.model.topk_k=3"])
    assert (config.train.steps, config.train.seed, config.model.topk_k, config.profile) == (7, 9, 3, "1:2")
    assert type(config.train.steps) is int


def test_a_second_config_file_sees_nothing_of_the_first(tmp_path):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text(GET.format("pass"))
    second.write_text("x = 1")
    train.load(str(first))
    with pytest.raises(UserError, match="has no function get_config"):
        train.load(str(second))


@pytest.mark.parametrize(
    "flag", ["--flagfile=/nope", "--fromenv=PATH", "--tryfromenv=x", "--undefok=x", "-config=x"]
)
def test_only_the_documented_flags_are_flags(flag):
    with pytest.raises(UserError, match="is not a flag"):
        train.parse([f"--config={CONFIG_FILE}", flag])


@pytest.mark.parametrize("text", ["true", "True", "t", "1", None])
def test_a_switch_is_set_with_and_without_a_value(text):
    flag = "--config.model.tie_embeddings" + (f"={text}" if text else "")
    assert train.parse([f"--config={CONFIG_FILE}", flag])[0].model.tie_embeddings


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("train.seed", 2**63, "at most 9223372036854775807"),
        ("model.d_model", 2**40, "at most 2147483647"),
        ("model.n_layers", 2**31, "at most 2147483647"),
        ("data.vocab_size", 2**24 + 1, "at most 16777216"),
        ("model.vocab_size", 2**53, "at most 16777216"),
        ("mesh.fsdp", 2**31, "at most 2147483647"),
        ("train.batch_size", 2**24, "at most 8388607"),
        ("eval.batch_size", 2**31 - 1, "at most 8388607"),
        ("optim.epsilon", 1e-45, "float32 holds"),
        ("model.norm_eps", 5e-324, "float32 holds"),
        ("model.rope_theta", 1e39, "float32 holds"),
        ("optim.weight_decay", 10**400, "float32 holds"),
        ("optim.beta2", 0.99999999, "below 1, in float32 too"),
        ("data.dir", "a\0b", "must not hold a NUL"),
        ("data.mixture", "a\0b:1", "must not hold a NUL"),
        ("eval.sample_prompt", "\ud800", "UTF-8"),
        ("profile", "1:" + "9" * 5000, "profile = '1:999"),
    ],
)
def test_a_value_beyond_what_can_be_computed_with_is_refused(field, value, allowed):
    section, _, name = field.rpartition(".")
    with pytest.raises(UserError, match=allowed):
        config_lib.resolve({section: {name: value}} if section else {name: value})


def test_the_largest_seed_is_one():
    seed = config_lib.resolve({"train": {"seed": 2**63 - 1}}).train.seed
    assert jax.random.key_data(jax.random.key(seed)).size


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"train": {"steps": 30}},
            ["optim.warmup_steps = 50 of train.steps = 30", "checkpoint.every_steps = 200"],
        ),
        ({"optim": {"learning_rate": 255.0}}, ["a step of AdamW moves a weight", "turns matrices round"]),
        ({"optim": {"weight_decay": 2.0**31}}, ["optim.weight_decay = 2147483648.0"]),
        ({"optim": {"beta1": 0.9999999}}, ["they average over 10,000,000 steps"]),
        ({"optim": {"epsilon": 255.0}}, ["optim.epsilon = 255.0"]),
        ({"model": {"norm_eps": 255.0}}, ["model.norm_eps = 255.0"]),
        ({"model": {"init_embed_std": 1e30}}, ["model.init_embed_std = 1e+30"]),
        ({"model": {"rope_theta": 1e-30}}, ["model.rope_theta = 1e-30"]),
        ({"model": {"context_length": 1}}, ["no token sees another"]),
        ({"data": {"mixture": "a:1", "source": "b"}}, ["data.mixture replaces it"]),
        ({}, []),
    ],
)
def test_settings_that_nobody_means_are_named(values, words):
    lines = list(config_lib.warnings(config_lib.resolve(values)))
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_no_recipe_is_warned_of():
    for recipes in (books, paper, small):
        for variant in recipes.VARIANTS:
            assert not list(config_lib.warnings(config_lib.resolve(recipes.get_config(variant))))
