"""The stack: what is sparse, what sees what, and how parameters are laid out."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from references import attention_in_float64

from topklm.config import ModelConfig
from topklm.layout import scans_layers
from topklm.model import transformer
from topklm.model.attention import rotation_angles
from topklm.model.block import LayerHooks, TokenInput
from topklm.parallel import ALONE

CONFIG = ModelConfig(
    d_model=24,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_mlp=32,
    vocab_size=50,
    vocab_multiple=1,
    topk_k=6,
    n_nontopk=1,
    init_embed_std=0.5,
    init_residual_scale=3.0,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 12)), jnp.int32)


def variant(**changes):
    return dataclasses.replace(CONFIG, **changes)


def create(config, seed):
    return jax.jit(transformer.create, static_argnums=(0, 1))(config, seed)


@functools.cache
def program(config):
    """Compiled: (params, tokens, segments) -> final hidden state, (h, u, h') of every layer."""

    @jax.jit
    def run(params, tokens, segment_ids):
        return transformer.bind(config, params).hidden(tokens, segment_ids, capture=lambda *seen: seen)

    return run


def final_hidden(config, params, tokens=TOKENS, segment_ids=None):
    return np.asarray(program(config)(params, tokens, segment_ids)[0])


def layer_states(config, params):
    """(h, u, h'), each [L, B, T, D]."""
    states = [np.asarray(x) for x in program(config)(params, TOKENS, None)[1]]
    assert {x.shape for x in states} == {(config.n_layers, *TOKENS.shape, config.d_model)}
    return states


@pytest.fixture(scope="module")
def params():
    return create(CONFIG, seed=0)


def shapes_of(config):
    made = jax.eval_shape(lambda: transformer.create(config, seed=0))
    leaves = jax.tree_util.tree_leaves_with_path(made)
    return {".".join(entry.key for entry in path): (leaf.shape, leaf.dtype) for path, leaf in leaves}


def test_parameters_are_float32_and_those_of_blocks_have_a_leading_layer_axis():
    shapes = {
        "embed.embedding": (50, 24),
        "blocks.attention_norm.scale": (3, 24),
        "blocks.attention.query.kernel": (3, 24, 24),
        "blocks.attention.key.kernel": (3, 24, 12),
        "blocks.attention.value.kernel": (3, 24, 12),
        "blocks.attention.out.kernel": (3, 24, 24),
        "blocks.mlp_norm.scale": (3, 24),
        "blocks.mlp.gate.kernel": (3, 24, 32),
        "blocks.mlp.up.kernel": (3, 24, 32),
        "blocks.mlp.down.kernel": (3, 32, 24),
        "final_norm.scale": (24,),
        "unembed.kernel": (24, 50),
    }
    want = {name: (shape, jnp.float32) for name, shape in shapes.items()}
    assert shapes_of(CONFIG) == shapes_of(variant(layer_stack="scanned", dtype="bfloat16")) == want
    del want["unembed.kernel"]
    assert shapes_of(variant(tie_embeddings=True)) == want


def test_layers_are_initialised_differently_and_seeds_matter(params):
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    assert not np.allclose(kernel, create(CONFIG, seed=1)["blocks"]["mlp"]["up"]["kernel"])


def test_the_initial_scale_of_what_is_written_to_the_stream_is_as_set(params):
    blocks = params["blocks"]
    for kernel, fan_in in [(blocks["attention"]["out"], 24), (blocks["mlp"]["down"], 32)]:
        assert np.std(kernel["kernel"]) == pytest.approx(3 / np.sqrt(6) / np.sqrt(fan_in), rel=0.1)
    assert np.std(blocks["mlp"]["up"]["kernel"]) == pytest.approx(24**-0.5, rel=0.1)
    assert np.std(params["embed"]["embedding"]) == pytest.approx(0.5, rel=0.1)
    assert (np.asarray(blocks["mlp_norm"]["scale"]) == 1).all()


def test_scanned_and_unrolled_layers_are_the_same_model(params):
    for config in (CONFIG, variant(n_nontopk=3)):
        scanned = dataclasses.replace(config, layer_stack="scanned")
        ours, theirs = final_hidden(scanned, params), final_hidden(config, params)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        for a, b in zip(layer_states(scanned, params), layer_states(config, params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"topk_activation": "abs"}, marks=pytest.mark.slow),
        {"remat": "minimal", "n_nontopk": 2},
        pytest.param({"remat": "full", "n_nontopk": 0}, marks=pytest.mark.slow),
        {"remat": "full", "token_input": "every", "topk_groups": "8:2,16:4"},
        {"remat": "full", "topk_centred": True, "topk_groups": "8:2,16:4"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_scanned_and_unrolled_layers_have_the_same_gradient(params, changes):
    config = variant(**changes)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(config, params):
        return jax.grad(lambda params: jnp.sin(program(config)(params, TOKENS, None)[0]).sum())(params)

    expected = gradient(dataclasses.replace(config, remat="none"), params)
    for other in (config, dataclasses.replace(config, layer_stack="scanned")):
        for a, b in zip(*map(jax.tree.leaves, (gradient(other, params), expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("activation", "exactly"), [("relu", False), ("identity", True), ("abs", True)])
def test_every_topk_layer_leaves_k_entries_and_the_last_is_dense(params, activation, exactly):
    _, u, h_next = layer_states(variant(topk_activation=activation), params)
    active = (h_next != 0).sum(axis=-1)
    assert active[:2].max() == CONFIG.topk_k
    if exactly:
        assert active[:2].min() == CONFIG.topk_k
    np.testing.assert_array_equal(h_next[2], u[2])
    assert (active[2] == CONFIG.d_model).all()


@pytest.mark.parametrize("layer_stack", ["scanned", "unrolled"])
def test_a_shift_of_all_neurons_is_taken_off_before_topk(params, layer_stack):
    """What TopK reads is the plain sum less the mean of each group, in NumPy's float64."""
    plain = variant(layer_stack=layer_stack, topk_groups="8:2,16:4")
    config = dataclasses.replace(plain, topk_centred=True)
    _, u, h_next = layer_states(config, params)
    of_first = layer_states(plain, params)[1][0].astype(np.float64)  # later layers read other states
    expected = np.concatenate([x - x.mean(-1, keepdims=True) for x in np.split(of_first, [8], -1)], -1)
    np.testing.assert_allclose(u[0], expected, atol=1e-6)
    np.testing.assert_allclose(np.stack([u[:2, ..., :8].sum(-1), u[:2, ..., 8:].sum(-1)]), 0, atol=1e-5)
    assert np.abs(u[2].mean(-1)).max() > 0.01  # without TopK a layer is as it was
    np.testing.assert_array_equal(h_next[2], u[2])
    # More than k of any row of which half is above its mean are above 0, so none of the k is cut off.
    is_above = [(part > 0).sum(-1) >= k for part, k in ((u[:2, ..., :8], 2), (u[:2, ..., 8:], 4))]
    active = [(part != 0).sum(-1) == k for part, k in ((h_next[:2, ..., :8], 2), (h_next[:2, ..., 8:], 4))]
    np.testing.assert_array_equal(is_above, active)
    np.testing.assert_allclose(h_next[:2][h_next[:2] != 0], u[:2][h_next[:2] != 0])


def test_the_sparse_vector_is_all_that_enters_the_next_layer(params):
    h, _, h_next = layer_states(CONFIG, params)
    np.testing.assert_array_equal(h[1:], h_next[:-1])


def test_the_base_model_equals_keeping_everything(params):
    base = final_hidden(variant(n_nontopk=3), params)
    everything = final_hidden(variant(topk_k=24, topk_activation="identity"), params)
    np.testing.assert_allclose(everything, base, atol=1e-6)


def test_tokens_do_not_see_the_future_or_other_segments(params):
    segments = jnp.asarray([[1] * 5 + [2] * 7] * 2, jnp.int32)
    before = final_hidden(CONFIG, params, TOKENS, segments)
    after = final_hidden(CONFIG, params, TOKENS.at[:, 3].set((TOKENS[:, 3] + 1) % 50), segments)
    changed = np.abs(after - before).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(changed, [False] * 3 + [True] * 2 + [False] * 7)


def test_both_backends_give_the_same_model(params):
    outputs = [final_hidden(variant(topk_backend=backend), params) for backend in ("lax", "threshold")]
    np.testing.assert_allclose(*outputs, atol=1e-5)


def loss_gradient(config, parallel=ALONE):
    """params -> gradient of a number that depends on every entry of the final hidden state."""

    def loss(params):
        h, _ = transformer.bind(config, params).hidden(TOKENS, parallel=parallel)
        return jnp.sum(h**3)

    return jax.grad(loss)


def primitives(jaxpr):
    """Names of all operations, those of inner functions too, each as often as it stands there."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from primitives(inner)


@pytest.mark.parametrize(
    ("remat", "layer_stack", "activation"),
    [("full", "scanned", "relu"), pytest.param("minimal", "unrolled", "abs", marks=pytest.mark.slow)],
)
def test_what_is_computed_again_gives_the_same_gradient(params, remat, layer_stack, activation):
    want = jax.jit(loss_gradient(variant(topk_activation=activation)))(params)
    config = variant(remat=remat, layer_stack=layer_stack, topk_activation=activation)
    got = jax.jit(loss_gradient(config))(params)
    for ours, plain in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4 * np.abs(plain).max())


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_no_layer_is_searched_twice_and_no_product_computed_again_for_its_mask(params, activation):
    """The jaxpr of a gradient, with a backend whose search is one operation."""
    counts = {}
    for remat in ("none", "minimal", "full"):
        for n_nontopk in (1, 3):
            settings = {"n_nontopk": n_nontopk, "topk_backend": "lax", "topk_activation": activation}
            config = variant(remat=remat, **settings)
            names = list(primitives(jax.make_jaxpr(loss_gradient(config))(params).jaxpr))
            counts[remat, n_nontopk] = names.count("dot_general")
            assert names.count("top_k") == 3 - n_nontopk
    for remat in ("none", "minimal", "full"):
        assert counts[remat, 1] == counts[remat, 3]
    assert counts["none", 1] < counts["full", 1]


def test_a_program_for_a_tpu_holds_its_kernel_and_not_the_scores(params):
    config = variant(layer_stack="scanned")
    parallel = dataclasses.replace(ALONE, attention="splash")
    traced = jax.jit(loss_gradient(config, parallel)).trace(params)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "splash_mha_fwd" in text
    assert "2x2x2x12x12" not in text  # [B, K, H / K, T, T]


def test_logits_are_the_final_hidden_state_times_the_unembedding(params):
    positions = jnp.broadcast_to(jnp.arange(12), TOKENS.shape)
    said = jax.jit(lambda p, *x: transformer.bind(CONFIG, p)(*x))(
        params, TOKENS, jnp.full_like(TOKENS, 7), positions
    )
    # No segments and no positions given: one document that starts at position 0.
    want = final_hidden(CONFIG, params) @ np.asarray(params["unembed"]["kernel"])
    np.testing.assert_allclose(said, want, atol=1e-5)


def test_bfloat16_activations_give_float32_logits(params):
    config = variant(dtype="bfloat16")
    h, (_, _, h_next) = program(config)(params, TOKENS, None)
    assert h.dtype == h_next.dtype == jnp.bfloat16
    assert (np.asarray(h_next[:2]) != 0).sum(axis=-1).max() == CONFIG.topk_k
    assert jax.eval_shape(transformer.bind(config, params), TOKENS).dtype == jnp.float32


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size = 0"):
        transformer.create(variant(vocab_size=0), seed=0)


def test_layers_are_scanned_on_accelerators_and_unrolled_on_cpus(params):
    config = variant(dtype="bfloat16")  # in float32 an MLP's gradient has a scan of its own

    def whiles(platform):
        parallel = dataclasses.replace(ALONE, scan_layers=scans_layers(platform))
        names = list(primitives(jax.make_jaxpr(loss_gradient(config, parallel))(params).jaxpr))
        return names.count("scan")

    assert whiles("tpu") == whiles("gpu") > whiles("cpu")


@pytest.mark.parametrize("layer_stack", ["scanned", "unrolled"])
@pytest.mark.parametrize("n_nontopk", [1, 3])
def test_an_edit_replaces_what_a_layer_hands_on(params, layer_stack, n_nontopk):
    config = variant(layer_stack=layer_stack, n_nontopk=n_nontopk)
    shape = (config.n_layers, 2, 12, config.d_model)
    given = jax.random.normal(jax.random.key(1), shape)
    chosen = jnp.asarray([False, True, False])  # the middle layer

    def edit(h, edits):
        replaces, content = edits
        return jnp.where(replaces, content, h)

    @jax.jit
    def run(tokens, chosen):
        def capture(h, u, h_next):
            return h, h_next

        model = transformer.bind(config, params)
        return model.hidden(
            tokens, capture=capture, hooks=LayerHooks(output=edit), hook_inputs=(chosen, given)
        )

    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, config.vocab_size)
    h, (before, after) = run(tokens, chosen)
    np.testing.assert_array_equal(after[1], given[1])
    np.testing.assert_array_equal(before[2], given[1])
    # Nothing goes past it.
    np.testing.assert_array_equal(run((tokens + 1) % config.vocab_size, chosen)[0], h)
    # And where it changes nothing, the model is the plain one.
    untouched, _ = run(tokens, jnp.zeros(3, bool))
    plain, _ = jax.jit(lambda tokens: transformer.bind(config, params).hidden(tokens))(tokens)
    np.testing.assert_allclose(untouched, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer_stack", ["scanned", "unrolled"])
def test_a_token_that_every_layer_reads_is_no_part_of_what_topk_layers_carry(layer_stack):
    config = variant(token_input="every", layer_stack=layer_stack, n_layers=4, n_nontopk=2)
    params = create(config, 0)
    entering, before_topk, leaving = layer_states(config, params)
    block = jax.jit(
        lambda params, layer, h, token: transformer.bind(config, params).block(layer)(
            h, rotation(config), jnp.ones_like(TOKENS), token=token
        )
    )
    token = params["embed"]["embedding"][TOKENS]
    reads = [TokenInput(token, 0), TokenInput(token, 0), TokenInput(0, token), TokenInput(0, 0)]
    for layer, (carried, read) in enumerate(zip([0 * token, *leaving[:3]], reads, strict=True)):
        expected = sum(block(params, layer, carried, read))
        np.testing.assert_allclose(before_topk[layer], expected, rtol=1e-5, atol=1e-5)
    assert not entering[0].any()
    assert ((leaving[:2] != 0).sum(axis=-1) <= config.topk_k).all()


def rotation(config):
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    return rotation_angles(positions, config, jnp.dtype(config.dtype))


def test_without_topk_layers_it_does_not_matter_which_layers_read_the_token():
    first, every = (variant(n_nontopk=3, token_input=which) for which in ("first", "every"))
    params = create(first, 0)
    np.testing.assert_array_equal(final_hidden(first, params), final_hidden(every, params))


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "head_dim": 8}, {"token_input": "every"}], ids=str)
def test_attention_weights_are_those_of_the_whole_model_in_float64(changes):
    config = variant(**changes)
    params = create(config, 0)
    segments = np.ones(TOKENS.shape, np.int32)
    segments[1, 7:] = 0
    weights = jax.jit(
        lambda params: transformer.bind(config, params).map_attention(lambda x: x, TOKENS, segments)
    )(params)
    expected = attention_in_float64(config, params, TOKENS, segments)
    assert weights.shape == (3, 2, 4, 12, 12)
    np.testing.assert_allclose(weights, expected, rtol=2e-4, atol=2e-6)
