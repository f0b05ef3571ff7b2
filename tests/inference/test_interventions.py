"""Interventions against loops over single numbers, in whole passes and while text is made."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from plain_loop import CONFIG, compilations, params_of, plain_loop
import pytest

from topklm.errors import UserError
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.interventions import Intervention, entries_of, load_interventions, save_interventions
from topklm.inference.scheduler import Generation
from topklm.inference.sequence import Sampling
from topklm.model import transformer

PARAMS = params_of(CONFIG)
ONE = {"layer": 0, "neuron": 1, "value": 1}
BEHIND = ("clamp", "add", "scale", "ablate")
SETS = [
    Intervention(0, 3, 2.5),
    Intervention(0, 4, 0.75, "add", "prompt"),
    Intervention(0, 4, -1.5, "scale", "generated"),
    Intervention(0, 5, mode="ablate", positions=(1, 4)),
    Intervention(0, 5, 3.0, "add", positions=(4, 6)),
    Intervention(1, 0, -2.0, "scale"),
    Intervention(1, 23, 1.25, "clamp", (2, 3), row=1),
    Intervention(1, 23, -4.0, "add", "all", row=0),
    Intervention(1, 7, 9.0, "add", row=5),
    Intervention(0, 8, mode="ban"),
    Intervention(0, 9, mode="ban", positions="prompt"),
    Intervention(0, 10, 1.5, "force"),
    Intervention(0, 11, -2.0, "force", (2, 7), row=0),
]


def kept_by_hand(u, k, entries, prompt_lengths):
    """TopK with its competition, by sorting: the forced ones, then the best of those that are not banned."""
    h = np.zeros_like(u)
    for row, at in np.ndindex(u.shape[:2]):
        here = [one for one in entries if acts(one, row, at, prompt_lengths[row])]
        forced = {one.neuron: one.value for one in here if one.mode == "force"}
        banned = {one.neuron for one in here if one.mode == "ban"}
        free = sorted(set(range(u.shape[2])) - banned - set(forced), key=lambda j: -u[row, at, j])
        for j in free[: k - len(forced)]:
            h[row, at, j] = max(u[row, at, j], 0)
        for j, value in forced.items():
            h[row, at, j] = value
    return h


def acts(one, row, at, prompt_length):
    where = {"all": True, "prompt": at < prompt_length, "generated": at >= prompt_length}
    here = where[one.positions] if isinstance(one.positions, str) else at in range(*one.positions)
    return here and one.row in (None, row)


def by_hand(h, layer, entries, prompt_lengths):
    """What acts behind the TopK, one number after another."""
    h = np.array(h)
    for row, at in np.ndindex(h.shape[:2]):
        for one in entries:
            if one.layer == layer and acts(one, row, at, prompt_lengths[row]) and one.mode in BEHIND:
                old = h[row, at, one.neuron]
                new = {"clamp": one.value, "add": old + one.value, "scale": old * one.value, "ablate": 0.0}
                h[row, at, one.neuron] = new[one.mode]
    return h


def test_few_and_many_entries_are_one_formula():
    h = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32)
    many = [
        Intervention(0, n, n - 3.5, ("clamp", "add", "scale", "ablate")[n % 4], (n % 4, 5)) for n in range(12)
    ]
    edited = [
        jax.jit(lambda entries: entries.layer_hooks(CONFIG).output(h, 0))(InterventionBatch.of(CONFIG, part))
        for part in (many[:8], many[8:])
    ]
    together = InterventionBatch.of(CONFIG, many).layer_hooks(CONFIG).output(h, 0)
    assert len(InterventionBatch.of(CONFIG, many[:8]).layer) == 8
    np.testing.assert_array_equal(together, np.where(np.arange(24) < 8, *edited))
    np.testing.assert_allclose(together, by_hand(h, 0, many, [9, 9]), rtol=1e-6)


def summed_and_kept(_h, u, h_next):
    return u, h_next


@pytest.mark.parametrize("layer_stack", ["unrolled", "scanned"])
def test_every_mode_and_place_does_what_it_says_and_nothing_else(layer_stack):
    config = dataclasses.replace(CONFIG, layer_stack=layer_stack)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 8))
    interventions = InterventionBatch.of(config, SETS)
    assert interventions.layer.shape == (16,)

    @jax.jit
    def run(interventions):
        hooks = interventions.layer_hooks(config, prompt_lengths_B=jnp.asarray([3, 5]))
        model = transformer.bind(config, PARAMS)
        return model.hidden(tokens, capture=summed_and_kept, hooks=hooks, hook_inputs=jnp.arange(2))[1]

    summed, after = run(interventions)
    kept = kept_by_hand(np.asarray(summed[0]), config.topk_k, [one for one in SETS if not one.layer], [3, 5])
    assert (kept != 0).sum(axis=-1).max() == config.topk_k
    for layer, before in enumerate([kept, summed[1]]):
        by_loop = by_hand(before, layer, SETS, [3, 5])
        np.testing.assert_allclose(after[layer], by_loop, rtol=1e-5, atol=1e-6)
        assert np.abs(by_loop - before).max() > 1


def change(h, layer, positions, prompt_length):
    """What the interventions of the next test do, written out, of one row."""
    generated = positions >= prompt_length
    early = (positions >= 2) & (positions < 9)
    column = jnp.where((layer == 0) & generated, 2.0, h[0, :, 3])
    h = h.at[0, :, 3].set(column)
    column = jnp.where((layer == 1) & early, h[0, :, 8] * -3.0, h[0, :, 8])
    return h.at[0, :, 8].set(column)


@pytest.mark.parametrize("layer_stack", ["unrolled", pytest.param("scanned", marks=pytest.mark.slow)])
def test_text_is_steered_as_a_plain_loop_over_the_steered_model_says(layer_stack):
    config = dataclasses.replace(CONFIG, layer_stack=layer_stack)
    steer = [Intervention(0, 3, 2.0, positions="generated"), Intervention(1, 8, -3.0, "scale", (2, 9))]
    prompts, sampling, lengths = [[3, 14, 15], [9] * 20], [Sampling(0), Sampling(seed=4)], [33, 20]
    generation = Generation(
        config,
        PARAMS,
        prompts,
        sampling,
        max_new_tokens=lengths,
        stop_token=-1,
        interventions=InterventionBatch.of(config, steer),
    )
    while not generation.done:
        generation.advance()
    for text, prompt, one, n in zip(generation.texts, prompts, sampling, lengths, strict=True):
        steered = plain_loop(config, PARAMS, prompt, n, one, change=change)
        assert text[len(prompt) :] == steered
        if layer_stack == "unrolled":
            assert steered != plain_loop(config, PARAMS, prompt, n, one)


def logits_of(interventions, tokens):
    model = transformer.bind(CONFIG, PARAMS)
    hooks = interventions.layer_hooks(CONFIG)
    h, _ = model.hidden(tokens, hooks=hooks, hook_inputs=jnp.arange(CONFIG.n_layers))
    return model.logits(h)


def test_other_neurons_values_modes_and_places_compile_nothing():
    tokens = np.arange(8)[None]
    run = jax.jit(logits_of)

    def text(steer):
        generation = Generation(
            CONFIG,
            PARAMS,
            [[1, 2]],
            [Sampling()],
            max_new_tokens=[20],
            stop_token=-1,
            interventions=InterventionBatch.of(CONFIG, steer),
        )
        while not generation.done:
            generation.advance()

    def both(steer):
        run(InterventionBatch.of(CONFIG, steer), tokens)
        text(steer)

    both({(0, 1): 2.0})
    with compilations() as compiled:
        for steer in (SETS[:4], SETS[9:12], SETS[5:6], {}):
            both(steer)
    assert compiled == []


def test_the_gradient_of_a_value_is_a_difference_quotient():
    tokens = np.arange(8)[None]
    interventions = InterventionBatch.of(
        CONFIG, [Intervention(1, 3, 0.5), Intervention(1, 4, 0.25, "add"), Intervention(1, 5, mode="ablate")]
    )

    @jax.jit
    def loss(value):
        set_to = dataclasses.replace(interventions, value=value)
        return jax.nn.log_softmax(logits_of(set_to, tokens))[0, :, 7].sum()

    value = jnp.asarray(interventions.value)
    found = jax.jit(jax.grad(loss))(value)
    for entry in range(2):
        step = jnp.zeros_like(value).at[entry].set(0.02)
        quotient = (loss(value + step) - loss(value - step)) / 0.04
        np.testing.assert_allclose(found[entry], quotient, rtol=0.05, atol=1e-3)
        assert abs(found[entry]) > 1e-3
    assert (np.asarray(found[2:]) == 0).all()


def test_what_people_write_comes_back_entry_by_entry():
    assert InterventionBatch.of(CONFIG, SETS).entries() == [
        dataclasses.replace(one, value=float(np.float32(one.value))) for one in SETS
    ]
    assert InterventionBatch.of(CONFIG, {(1, 2): 3.0}, "add").entries() == [Intervention(1, 2, 3.0, "add")]
    assert InterventionBatch.of(CONFIG, {}).entries() == []
    same = InterventionBatch.of(CONFIG, SETS)
    assert InterventionBatch.of(CONFIG, same) is same


@pytest.mark.parametrize(
    ("steer", "mode", "message"),
    [
        ({(2, 0): 1.0}, "clamp", "layer = 2: must be an integer from 0 to 1, the model's layers"),
        ({(0, 24): 1.0}, "clamp", "neuron = 24: must be an integer from 0 to 23, the neurons of a layer"),
        ({(0, -1): 1.0}, "clamp", "neuron = -1: must be"),
        ({(0, 1.5): 1.0}, "clamp", "neuron = 1.5: must be"),
        ({(0, 1): float("nan")}, "clamp", "value = nan of layer 0, neuron 1: must be a finite number"),
        ({(0, 1): float("inf")}, "add", "value = inf of layer 0, neuron 1: must be a finite number"),
        ({(0, 1): 1e39}, "add", r"value = 1e\+39 of layer 0, neuron 1: must be at most"),
        ({(0, 1): "2"}, "add", "value = '2' of layer 0, neuron 1: must be a finite number"),
        ({(0, 1): 1.0}, "push", "mode = 'push': must be one of clamp, add, scale, ablate"),
        ({5: 1.0}, "clamp", r"steer: 5 names no neuron: must be \(layer, neuron\)"),
        ([(0, 1)], "clamp", r"steer: \(0, 1\) is no Intervention"),
        (
            [Intervention(0, 1, 1.0, positions="end")],
            "clamp",
            "positions = 'end': must be one of all, prompt",
        ),
        ([Intervention(0, 1, 1.0, positions=(3, 3))], "clamp", r"positions = \(3, 3\): must be"),
        ([Intervention(0, 1, 1.0, row=-1)], "clamp", "row = -1: must be"),
        ([Intervention(0, 1, 1.0), Intervention(0, 1, 1.0, row=1)], "clamp", "two interventions on neuron 1"),
        (
            {(1, 1): 1.0},
            "ban",
            "mode = 'ban' of layer 1, neuron 1: the layer has no TopK, layers with one: 0 ",
        ),
        (
            [Intervention(0, n, 1.0, "force", row=n % 2 or None) for n in range(11)],
            "clamp",
            "steer: 11 neurons forced in layer 0: must be at most 6, its places",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(steer, mode, message):
    with pytest.raises(ValueError, match=message) as refused:
        InterventionBatch.of(CONFIG, steer, mode)
    assert "\n" not in str(refused.value)


def test_no_more_neurons_of_a_group_are_forced_than_it_keeps():
    config = dataclasses.replace(CONFIG, topk_groups="4:1,20:5")
    forced = [Intervention(0, neuron, 1.0, "force") for neuron in (2, 4, 5)]
    InterventionBatch.of(config, forced)
    with pytest.raises(ValueError, match="2 neurons forced in neurons 0 to 3 of layer 0: must be at most 1"):
        InterventionBatch.of(config, [*forced, Intervention(0, 3, 1.0, "force")])


def test_interventions_survive_a_file(tmp_path):
    save_interventions(tmp_path / "a.json", SETS)
    assert load_interventions(tmp_path / "a.json", CONFIG) == SETS


ONE_ADDED = Intervention(1, 3, 2.5, "add")


@pytest.mark.parametrize(
    "steer",
    [
        {(1, 3): 2.5},
        {(np.int64(1), np.int32(3)): np.float32(2.5)},
        {(1, 3): jnp.float32(2.5)},
        ONE_ADDED,
        (ONE_ADDED,),
        iter([ONE_ADDED]),
        InterventionBatch.of(CONFIG, [ONE_ADDED]),
    ],
    ids=lambda steer: type(steer).__name__,
)
def test_all_that_a_model_takes_can_be_saved(tmp_path, steer):
    save_interventions(tmp_path / "a.json", steer, mode="add")
    assert load_interventions(tmp_path / "a.json", CONFIG) == [ONE_ADDED]


def test_neurons_are_named_by_a_pair_or_by_a_text():
    named = entries_of({"0:17": 4.0, " 1 : 3 ": 2.0, (1, 4): 1.0}, "add")
    assert named == [
        Intervention(0, 17, 4.0, "add"),
        Intervention(1, 3, 2.0, "add"),
        Intervention(1, 4, 1.0, "add"),
    ]


@pytest.mark.parametrize("steer", [5, "0:17=4", [(0, 17, 4.0)], [{(0, 17): 4.0}], {"0-17": 4.0}, None])
def test_what_is_no_intervention_is_neither_taken_nor_saved(tmp_path, steer):
    for takes in (
        lambda: InterventionBatch.of(CONFIG, steer),
        lambda: save_interventions(tmp_path / "a.json", steer),
    ):
        with pytest.raises(ValueError, match=r"^steer") as refused:
            takes()
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(("row", "n_rows"), [(1, 1), (5, 2), (2, 2)])
def test_a_row_that_the_batch_does_not_have_is_refused(row, n_rows):
    steer = [Intervention(0, 1, 1.0, row=0), Intervention(0, 2, 1.0, row=row)]
    for given in (steer, InterventionBatch.of(CONFIG, steer)):
        with pytest.raises(
            ValueError, match=f"row = {row}: must be from 0 to {n_rows - 1}, the texts of the"
        ):
            InterventionBatch.of(CONFIG, given, n_rows=n_rows)
        InterventionBatch.of(CONFIG, given, n_rows=row + 1)


@pytest.mark.parametrize(
    "value",
    [None, True, np.bool_(True), "1", 1j, np.complex64(1), np.array([1.0]), np.ones(99), 10**400, [1.0]],
    ids=repr,
)
def test_a_value_that_is_not_one_number_is_refused_in_one_short_line(value):
    with pytest.raises(
        ValueError, match=r"^value = .* of layer 0, neuron 1: must be a finite number"
    ) as refused:
        InterventionBatch.of(CONFIG, {(0, 1): value})
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 150


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it is no JSON"),
        ("[]", "it is no JSON object .*holds a list"),
        ("[" * 100_000, "it is no JSON object .*nested too deeply"),
        ({"version": 2}, "version = 2: this program reads 1"),
        ({"interventions": 3}, "interventions: must be a list"),
        ({"interventions": [3]}, r"interventions\[0\]: must be an object with layer and neuron"),
        ({"interventions": [{"layer": 0, "neuron": 1, "valu": 1}]}, r"interventions\[0\]: 'valu' is none of"),
        ({"interventions": [{"layer": 0, "neuron": 1}]}, r"interventions\[0\]: value is missing"),
        ({"interventions": [{**ONE, "layer": 9}]}, r"interventions\[0\]: layer = 9: must be"),
        ({"interventions": [ONE, {**ONE, "value": None}]}, r"interventions\[1\]: value = None"),
        ({"interventions": [{**ONE, "value": float("nan")}]}, r"interventions\[0\]: value = nan"),
        ({"interventions": [{**ONE, "mode": []}]}, r"mode = \[\]: must be one of"),
        ({"interventions": [{**ONE, "positions": [4, 2]}]}, r"positions = \(4, 2\): must be one of"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_in_one_line(tmp_path, content, message):
    whole = {"format": "topklm-interventions", "version": 1, "interventions": []}
    text = content if isinstance(content, str) else json.dumps({**whole, **content})
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        load_interventions(tmp_path / "a.json", CONFIG)
    assert str(refused.value).startswith(f"{tmp_path / 'a.json'}: ")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no such file of interventions"):
        load_interventions(tmp_path / "none.json")
