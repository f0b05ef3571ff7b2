"""Functions called while a model runs: what they see, what they may change, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
from plain_loop import byte_model, whole
import pytest

from topklm.inference.interventions import Intervention

TEXT = "some text"


@pytest.fixture(scope="module")
def model():
    return byte_model()


def test_hooks_see_arrays_in_order_and_may_change_them(model):
    text, seen = "some text", {}

    def look(array, name):
        seen[name] = np.asarray(array)

    names = model.hook_names
    logits = model.run_with_hooks(text, fwd_hooks=[(name, look) for name in names[::-1]])
    assert list(seen) == list(names)
    np.testing.assert_allclose(logits, model(text), rtol=1e-4, atol=1e-4)
    _, cache = model.run_with_cache(text, names)
    for name in names:
        np.testing.assert_allclose(seen[name], cache[name], rtol=1e-4, atol=1e-5)

    def ablated(array, name):
        return array.at[..., 3].set(0)

    changed = model.run_with_hooks(text, [("blocks.0.hook_topk", ablated)])
    steered = model(text, steer={(0, 3): 0.0}, steer_mode="ablate")
    np.testing.assert_allclose(changed, steered, rtol=1e-4, atol=1e-4)
    # Another function of the same name is not mistaken for it.
    doubled = model.run_with_hooks(text, [("blocks.0.hook_topk", lambda array, name: 2 * array)])
    assert np.abs(doubled - changed).max() > 0.01


def test_hooks_that_cannot_be_are_refused(model):
    for name in ("blocks.1.hook_topk", "blocks.2.hook_resid_post", "hook_embed", "h"):
        with pytest.raises(ValueError, match=f"fwd_hooks: '{name}' is none of this model's names; close: "):
            model.run_with_hooks("a", [(name, lambda array, name: None)])
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_topk gave \(2, 24\): must be \(1, 2, 24\)"):
        model.run_with_hooks("a", [("blocks.0.hook_topk", lambda array, name: array[0])])


@pytest.mark.parametrize("hook", ["resid_pre", "topk_pre", "topk", "resid_post"])
def test_a_hook_changes_all_that_is_computed_behind_it_and_nothing_before(model, hook):
    array = np.random.default_rng(0).normal(size=(1, len(TEXT) + 1, 24)).astype(np.float32)
    seen = {}
    fwd_hooks = [(f"blocks.0.hook_{hook}", lambda h, name: array)]
    fwd_hooks += [(name, lambda h, name: seen.update({name: np.asarray(h)})) for name in model.hook_names]
    model.run_with_hooks(TEXT, fwd_hooks)
    _, cache = model.run_with_cache(TEXT, lambda name: True)
    place = model.hook_names.index(f"blocks.0.hook_{hook}")
    for number, name in enumerate(model.hook_names):
        same = np.allclose(seen[name], cache[name], atol=1e-4)
        assert same == (number < place), name
    np.testing.assert_array_equal(seen[f"blocks.0.hook_{hook}"], array)
    kept = np.maximum(array, 0) * (array >= np.sort(array)[..., -6:][..., :1])
    expected = {"topk_pre": kept, "topk": array, "resid_post": array}
    if hook in expected:
        np.testing.assert_array_equal(seen["blocks.1.hook_resid_pre"], expected[hook])


def test_what_enters_the_first_layer_is_the_embedding(model):
    other = np.asarray(model.W_E)[np.asarray(model.to_tokens("other one"))]
    found = model.run_with_hooks("some text", [("blocks.0.hook_resid_pre", lambda h, hook: other)])
    np.testing.assert_allclose(found, whole(model, model.to_tokens("other one")), rtol=1e-4, atol=1e-4)


def test_the_name_tells_its_layer_as_in_transformerlens(model):
    told = []

    def tell(value, hook):
        told.append((hook, hook.name, hook.layer()))

    model.run_with_hooks(TEXT, [("blocks.1.hook_resid_pre", tell), ("blocks.0.hook_topk_pre", tell)])
    assert told == [(name, name, layer) for layer, name in enumerate(["blocks.0.hook_topk_pre", told[1][0]])]
    assert told[1][0] == "blocks.1.hook_resid_pre"


def test_a_function_of_names_stands_for_those_that_it_chooses(model):
    called = []
    model.run_with_hooks(TEXT, [(lambda name: "resid" in name, lambda h, hook: called.append(hook))])
    assert called == [name for name in model.hook_names if "resid" in name]


@pytest.mark.slow
def test_hooks_see_what_interventions_leave_and_come_last(model):
    steer, seen = [Intervention(0, 3, 7.0), Intervention(0, 5, 2.5, "force"), Intervention(1, 2, 9.0)], []
    logits = model.run_with_hooks(TEXT, [("blocks.0.hook_topk", lambda h, hook: seen.append(h))], steer)
    np.testing.assert_allclose(logits, model(TEXT, steer), rtol=1e-4, atol=1e-4)
    _, cache = model.run_with_cache(TEXT, steer=steer)
    np.testing.assert_allclose(seen[0], cache["topk", 0], atol=1e-5)
    undone = [("blocks.1.hook_resid_post", lambda h, hook: h.at[..., 2].set(0))]
    ablated = [*steer[:2], Intervention(1, 2, mode="ablate")]
    np.testing.assert_allclose(
        model.run_with_hooks(TEXT, undone, steer), model(TEXT, ablated), rtol=1e-4, atol=1e-4
    )


def test_documents_of_a_row_are_hooked_as_they_are_alone(model):
    tokens, segments, seen = np.arange(40, 50), np.repeat([1, 2], [4, 6]), []
    look = [("blocks.1.hook_resid_post", lambda h, hook: seen.append(h))]
    steer = Intervention(0, 3, 3.0, "add", positions=(1, 3))
    logits = model.run_with_hooks(tokens, look, steer, segment_ids=segments)
    for document in (slice(0, 4), slice(4, 10)):
        alone, cache = model.run_with_cache(tokens[document], lambda name: True, steer)
        np.testing.assert_allclose(logits[:, document], alone, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(seen[0][:, document], cache["resid_post", 1], rtol=1e-4, atol=1e-4)


def test_a_gradient_through_hooks_is_that_of_finite_differences(model):
    def logit(d):
        return model.run_with_hooks(TEXT, [("blocks.0.hook_topk_pre", lambda h, hook: h + d)])[0, -2, 17]

    zero = jnp.zeros((1, len(TEXT) + 1, 24))
    direction = jnp.asarray(np.random.default_rng(1).normal(size=zero.shape), jnp.float32)
    found = jnp.sum(jax.jit(jax.grad(logit))(zero) * direction)
    step = 1e-3 * direction
    quotient = (logit(step) - logit(-step)) / 2e-3
    np.testing.assert_allclose(found, quotient, rtol=0.05)
    assert abs(found) > 1e-3


def nothing(h, hook):
    return None


@pytest.mark.parametrize(
    ("fwd_hooks", "message"),
    [
        ({"blocks.0.hook_topk": nothing}, "fwd_hooks = {.*}: must be a list of"),
        (("blocks.0.hook_topk", nothing), "fwd_hooks: 'blocks.0.hook_topk' is no "),
        ([("blocks.0.hook_topk",)], r"fwd_hooks: \('blocks.0.hook_topk',\) is no "),
        ([("blocks.0.hook_topk", nothing, 3)], "fwd_hooks: .* is no "),
        ([("blocks.0.hook_topk", 3)], "fwd_hooks: .* is no "),
        ([nothing], "fwd_hooks: .* is no "),
        (None, "fwd_hooks = None: must be a list"),
        ("blocks.0.hook_topk", "fwd_hooks = 'blocks.0.hook_topk': must be a list"),
        ([(7, nothing)], "fwd_hooks: 7 is none of this model's names"),
        ([("blocks.0.hook_mlp_out", nothing)], "close: blocks.0.hook_topk, "),
        ([("blocks.0.attn.hook_pattern", nothing)], "close: blocks.0.hook_"),
        ([(lambda name: "mlp" in name, nothing)], "a function of names chooses none"),
        ([("blocks.0.hook_topk", lambda h, hook: (h, hook))], "gave a tuple: must give an array, or None"),
        ([("blocks.0.hook_topk", lambda h, hook: 0.0)], r"gave \(\): must be \(1, 10, 24\), or None"),
    ],
)
def test_what_is_no_list_of_names_and_functions_is_refused_in_one_line(model, fwd_hooks, message):
    with pytest.raises(ValueError, match=message) as refused:
        model.run_with_hooks(TEXT, fwd_hooks)
    assert "\n" not in str(refused.value)
