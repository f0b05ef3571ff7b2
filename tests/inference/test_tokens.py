"""Everything that people give for tokens: what is the same, and what is refused in one line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from plain_loop import CONFIG, byte_model, params_of, whole
import pytest

from benchmarks.adaptive_losses import token_losses
from topklm.inference.adaptive import AdaptiveK
from topklm.inference.scheduler import generate_tokens
from topklm.inference.tokens import documents, positions_in, read

TEXT = "The sea"


@pytest.fixture(scope="module")
def model():
    return byte_model()


@pytest.fixture(scope="module")
def ids(model):
    """Of the text, as a list."""
    return [0, *model.tokenizer.encode(TEXT).tolist()]


def torch_tensor(ids):
    return pytest.importorskip("torch").tensor(ids)


ONE_ROW = {
    "text": lambda ids: TEXT,
    "NumPy's text": lambda ids: np.str_(TEXT),
    "list": lambda ids: ids,
    "tuple": tuple,
    "NumPy": np.array,
    "NumPy, bytes": lambda ids: np.array(ids, np.uint8),
    "JAX": jnp.array,
    "PyTorch": torch_tensor,
    "NumPy's numbers": lambda ids: [np.int16(token) for token in ids],
    "arrays of no axis": lambda ids: [jnp.array(ids[0]), np.array(ids[1]), *ids[2:]],
}
A_BATCH = {
    "list of a text": lambda ids: [TEXT],
    "tuple of a text": lambda ids: (TEXT,),
    "array of texts": lambda ids: np.array([TEXT]),
    "objects": lambda ids: np.array([TEXT], object),
    "nested list": lambda ids: [ids],
    "list of an array": lambda ids: [np.array(ids)],
    "[1, T]": lambda ids: np.array([ids]),
    "PyTorch [1, T]": lambda ids: torch_tensor([ids]),
}


@pytest.mark.parametrize(
    "form",
    # PyTorch takes long to import.
    [
        pytest.param(form, marks=pytest.mark.slow if "PyTorch" in form else ())
        for form in [*ONE_ROW, *A_BATCH]
    ],
)
def test_every_form_of_one_text_is_the_same_tokens(model, ids, form):
    given = {**ONE_ROW, **A_BATCH}[form](ids)
    np.testing.assert_array_equal(model.to_tokens(given), [ids])
    assert model.to_tokens(given).dtype == np.int32
    assert model.lengths(given).tolist() == [len(ids)]
    pieces = model.tokenizer.token_strings(ids)
    as_texts = form in ("list of a text", "tuple of a text", "array of texts", "objects")
    assert model.to_str_tokens(given) == ([pieces] if as_texts else pieces)


TEXTS = ["A king", "The sea was red", "", "ü"]


def test_texts_of_a_batch_are_what_they_are_alone(model):
    together, lengths = np.asarray(model(TEXTS)), model.lengths(TEXTS)
    assert lengths.tolist() == [1 + len(text.encode()) for text in TEXTS]
    assert together.shape == (4, 16, 257)
    for row, text in enumerate(TEXTS):
        ids = [0, *model.tokenizer.encode(text)]
        alone = whole(model, [ids + [77] * (16 - len(ids))])[0]
        np.testing.assert_allclose(
            together[row, : len(ids)], alone[: len(ids)], rtol=1e-4, atol=1e-4, err_msg=text
        )


def test_rows_of_different_lengths_are_filled_up_in_every_form(model):
    rows = [[0, *model.tokenizer.encode(text).tolist()] for text in TEXTS]
    expected = np.asarray(model.to_tokens(TEXTS))
    for row, ids in zip(expected, rows, strict=True):
        assert row[: len(ids)].tolist() == ids
        assert (row[len(ids) :] == 0).all()
    forms = [rows, tuple(map(tuple, rows)), [np.array(r) for r in rows], np.array(rows, object)]
    for given in [*forms, [TEXTS[0], *rows[1:]], np.array(TEXTS)]:
        np.testing.assert_array_equal(model.to_tokens(given), expected)
        assert model.lengths(given).tolist() == [len(row) for row in rows]
    assert model.to_str_tokens(TEXTS) == [model.tokenizer.token_strings(row) for row in rows]


def test_the_separator_before_texts_can_be_left_out_by_either_name(model, ids):
    for left_out in (
        model.to_tokens(TEXT, False),
        model.to_tokens([TEXT], prepend_separator=False),
        model.to_tokens(TEXT, prepend_bos=False),
        model.to_tokens(ids[1:]),
    ):
        np.testing.assert_array_equal(left_out, [ids[1:]])
    np.testing.assert_array_equal(model.to_tokens(TEXT, prepend_bos=True), [ids])
    assert model.to_str_tokens(TEXT, prepend_bos=False) == list(TEXT)
    assert model.lengths(["", "a"], prepend_bos=False).tolist() == [0, 1]


def test_ids_become_text_and_a_piece_becomes_an_id(model, ids):
    assert model.to_string(ids) == model.to_string(jnp.array(ids)) == TEXT
    assert model.to_string([ids, ids[:3]]) == [TEXT, TEXT[:2]]
    assert model.to_string(model.to_tokens([TEXT])) == [TEXT]
    assert model.to_string(ids[1]) == model.to_string(np.int64(ids[1])) == model.to_single_str_token(ids[1])
    assert model.to_string([]) == ""
    assert model.to_single_token("T") == ids[1]
    for text, pieces in {"Th": 2, "": 0, "ü": 2}.items():
        with pytest.raises(ValueError, match=f"text = '{text}': must be one token, not {pieces}"):
            model.to_single_token(text)


REFUSED = [
    (1.7, "must be a text"),
    (3, "must be a text"),
    (None, "must be a text"),
    (b"abc", "must be a text"),
    (bytearray(b"abc"), "must be a text"),
    ({1, 2}, "must be a text"),
    ({"input_ids": [1, 2]}, "must be a text"),
    (iter([1, 2]), "must be a text"),
    (np.array(3), r"has shape \(\): must be \[T\] or \[B, T\]"),
    (np.zeros((1, 2, 3), int), r"has shape \(1, 2, 3\): must be"),
    ([[[1]]], r"\[1\] is no token id"),
    ([1.0, 2], "1.0 is no token id: must be an integer"),
    ([[1, 2], [3, 4.5]], "4.5 is no token id"),
    ([True, 2], "True is no token id"),
    ([[np.bool_(True)]], "True is no token id"),
    ([np.float32(1)], "1.0 is no token id"),
    ([1j], "1j is no token id"),
    (["a", 5], "5 is no row of token ids"),
    ([5, "a"], "5 is no row of token ids"),
    ([[1], None], "None is no row of token ids"),
    (["a", b"b"], "b'b' is no row of token ids"),
    ([["a"]], "'a' is no token id"),
    (np.array([1.0]), "has dtype float64: must be integers"),
    (np.array([[True]]), "has dtype bool: must be integers"),
    (jnp.array([[1.0]]), "has dtype float32: must be integers"),
    ([np.array([1]), np.array([2.0])], "has dtype float64: must be integers"),
    ([[257]], "token 257 must be from 0 to 256"),
    (np.array([-1]), "token -1 must be from 0 to 256"),
    (np.array([2**32 + 5]), "token 4294967301 must be"),
    (np.array([[2**63]], np.uint64), "token 9223372036854775808 must be"),
    ([2**70], "must be from 0 to 256"),
    ([2**63, -1], "must be from 0 to 256"),
    ([], "is empty: every row must hold at least one token"),
    ([[]], "is empty"),
    ([[1], []], "is empty"),
    (np.zeros((1, 0), int), "is empty"),
    (np.zeros((0, 3), int), "is empty"),
    (jnp.zeros((0,), int), "is empty"),
    ("\ud800", "half of a surrogate pair"),
    (["a", "b\udc00"], "half of a surrogate pair"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[type(given).__name__ for given, _ in REFUSED])
def test_what_is_no_text_and_no_ids_is_refused_in_one_line(model, given, message):
    with pytest.raises(ValueError, match=f"^tokens.*{message}") as refused:
        model(given)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("ids", [[1.7, 2], [True, 2], [2**32 + 5, 2], np.array([1.0, 2.0])])
def test_no_function_takes_for_an_id_what_is_none(model, ids):
    params = params_of(CONFIG)
    settings = {"max_new_tokens": 1, "temperature": 0, "seed": 0, "stop_token": -1}
    for takes in (
        model.loss,
        model.run_with_cache,
        model.run_with_hooks,
        model.to_string,
        model.active_neurons,
        functools.partial(token_losses, CONFIG, params, adaptive=AdaptiveK(8, 1.0)),
        functools.partial(generate_tokens, CONFIG, params, **settings),
    ):
        with pytest.raises(ValueError, match=r"tokens|prompt"):
            takes(ids)


def test_rows_beyond_the_context_are_refused_wherever_they_are_run_whole(model):
    fits, beyond = "x" * 31, "x" * 32  # behind a separator, in a context of 32
    takes = (model, model.loss, model.run_with_cache, model.run_with_hooks, model.active_neurons)
    for run in takes:
        for given in (beyond, [0] * 33, np.zeros((1, 40), int)):
            with pytest.raises(
                ValueError, match=r"a row has \d+ tokens: must be at most 32, the model's cont"
            ):
                run(given)
    with pytest.raises(ValueError, match="at most 32"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((2, 33), np.int32))
    assert jax.eval_shape(lambda: model(fits)).shape == (1, 32, 257)
    assert model.generate(beyond, 0) == beyond  # which lets the beginning go


def test_traced_ids_are_checked_as_far_as_they_are_known():
    for shape, dtype, message in [
        ((2, 3), np.float32, "has dtype float32: must be integers"),
        ((2, 3), bool, "has dtype bool"),
        ((), np.int32, r"has shape \(\)"),
        ((1, 2, 3), np.int32, r"has shape \(1, 2, 3\)"),
        ((1, 0), np.int32, "is empty"),
    ]:
        with pytest.raises(ValueError, match=f"tokens {message}"):
            jax.eval_shape(lambda x: read(x, 9, None, 0).ids, jax.ShapeDtypeStruct(shape, dtype))


def test_positions_begin_anew_in_each_document():
    segments = np.array([[3, 3, 3, 5, 5, 1], [0, 7, 7, 7, 7, 7]])
    assert positions_in(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("segment_ids", "message"),
    [
        ([1, 2, 1], "must stand together"),
        ([[1, 1, 2, 1]], r"has shape \(1, 4\): must be that of the tokens, \(1, 3\)"),
        ([1, 1], r"has shape \(1, 2\)"),
        ([[1], [1, 2]], "rows must have the same length"),
        ([1.0, 1.0, 2.0], "has dtype float64: must be integers"),
        ([True, True, False], "has dtype bool"),
        ([2**40] * 3, "must be from -2147483647 to 2147483647"),
        ("abc", "has dtype <U3"),
    ],
)
def test_segments_that_cannot_be_are_refused(segment_ids, message):
    with pytest.raises(ValueError, match=f"segment_ids.*{message}") as refused:
        documents(segment_ids, (1, 3))
    assert "\n" not in str(refused.value)
