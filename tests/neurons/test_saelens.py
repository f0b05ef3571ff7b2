"""Folders of SAELens and delphi: as those libraries read them, or by their formulas in NumPy."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import saved_runs

from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel
from topklm.model import transformer
from topklm.neurons import saelens, segment
from topklm.neurons.dictionary import Dictionary
from topklm.neurons.store import Metadata, Store, StoreWriter

LAYERS = (0, 1)
D, K = 12, 3


@pytest.fixture
def model():
    def of(**changes):
        shape = dataclasses.replace(saved_runs.MODEL, **changes)
        config = dataclasses.replace(saved_runs.CONFIG, model=shape)
        params = transformer.create(config.model, 0)
        return LanguageModel("runs/made", 3, config, saved_runs.tokenizer(), params)

    return of


def facts(lm):
    return saelens.ModelFacts(lm.run, lm.cfg, lm.tokenizer.separator_id)


def dictionary(bias, width=D, threshold=False, **options):
    rng = np.random.default_rng(3)
    shapes = [(2, D), (2, D, width), (2, width, D)]
    arrays = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    offsets = rng.normal(size=(2, width)).astype(np.float32) if bias else None
    bounds = rng.uniform(0, 4, size=(2, width)).astype(np.float32) if threshold else None
    return Dictionary("sae", K, *arrays, {"tokens": 5}, offsets, bounds, **options)


def their_codes(folder, h):
    """SAELens' SAEs in float64, by `topk_sae.py` and `jumprelu_sae.py` of `sae_lens/saes`, 6.54."""
    about = json.loads((folder / "cfg.json").read_text())
    found = load_file(folder / "sae_weights.safetensors")
    w = {name: value.astype(np.float64) for name, value in found.items()}
    x = h - w["b_dec"] if about["apply_b_dec_to_input"] else h
    pre = x @ w["W_enc"] + w["b_enc"]
    lengths = np.linalg.norm(w["W_dec"], axis=1) if about.get("rescale_acts_by_decoder_norm") else 1.0
    pre = pre * lengths
    if about["architecture"] == "topk":
        pre[pre < np.sort(pre, axis=-1)[:, [-about["k"]]]] = 0
    else:
        pre[pre <= w.get("threshold", w.get("topk_threshold"))] = 0
    codes = np.maximum(pre, 0)
    return codes, (codes / lengths) @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("apply_b_dec", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_dictionary_computes_what_its_folder_says(tmp_path, model, bias, apply_b_dec, rescale):
    made = dictionary(bias)
    saelens.write_dictionary(facts(model()), made, LAYERS, tmp_path)
    for layer in LAYERS:
        path = tmp_path / f"blocks.{layer}.hook_resid_post/cfg.json"
        about = json.loads(path.read_text())
        about |= {"apply_b_dec_to_input": apply_b_dec, "rescale_acts_by_decoder_norm": rescale}
        path.write_text(json.dumps(about))
    read = saelens.read_dictionary(tmp_path, LAYERS, D)
    if apply_b_dec and not rescale:
        for name in ("centre", "encoder", "decoder", "bias"):
            np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    h = np.random.default_rng(4).normal(size=(2, 40, D)).astype(np.float32)
    codes = np.asarray(read.encode(h))
    decoded = np.asarray(read.decode(codes))
    for number, layer in enumerate(LAYERS):
        want, back = their_codes(tmp_path / f"blocks.{layer}.hook_resid_post", h[number].astype(np.float64))
        np.testing.assert_allclose(codes[number], want, atol=1e-4)
        np.testing.assert_allclose(decoded[number], back, atol=1e-4)


@pytest.mark.parametrize(("width", "threshold"), [(D, True), (3 * D, True), (3 * D, False), (5, True)])
def test_thresholds_and_other_widths_go_there_and_back(tmp_path, model, width, threshold):
    made = dictionary(True, width, threshold)
    saelens.write_dictionary(facts(model()), made, LAYERS, tmp_path)
    read = saelens.read_dictionary(tmp_path, LAYERS, D)
    assert (read.keep, read.width) == (K, width)
    for name in ("centre", "encoder", "decoder", "bias", "threshold"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    h = np.random.default_rng(4).normal(size=(2, 40, D)).astype(np.float32)
    codes = np.asarray(read.encode(h))
    decoded = np.asarray(read.decode(codes))
    assert 0 < (codes > 0).mean() < 0.6
    for number, layer in enumerate(LAYERS):
        folder = tmp_path / f"blocks.{layer}.hook_resid_post"
        want, back = their_codes(folder, h[number].astype(np.float64))
        np.testing.assert_allclose(codes[number], want, atol=1e-4)
        np.testing.assert_allclose(decoded[number], back, atol=1e-4)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_what_saelens_saves_while_it_trains_is_read_with_its_one_threshold(tmp_path, model, architecture):
    saelens.write_dictionary(facts(model()), dictionary(True, 20), LAYERS, tmp_path)
    for layer in LAYERS:
        folder = tmp_path / f"blocks.{layer}.hook_resid_post"
        about = json.loads((folder / "cfg.json").read_text())
        about |= {"architecture": architecture, "k": 3.0, "rescale_acts_by_decoder_norm": True}
        (folder / "cfg.json").write_text(json.dumps(about))
        weights = load_file(folder / "sae_weights.safetensors")
        save_file({**weights, "topk_threshold": np.array(1.5)}, folder / "sae_weights.safetensors")
    read = saelens.read_dictionary(tmp_path, LAYERS, D)
    h = np.random.default_rng(4).normal(size=(2, 40, D)).astype(np.float32)
    for number, layer in enumerate(LAYERS):
        want, _ = their_codes(tmp_path / f"blocks.{layer}.hook_resid_post", h[number].astype(np.float64))
        np.testing.assert_allclose(read.encode(h)[number], want, atol=2e-4)


@pytest.mark.parametrize("threshold", [False, True])
def test_saelens_itself_computes_the_same_codes(tmp_path, model, threshold):
    made = dictionary(True, 30, threshold)
    saelens.write_dictionary(facts(model()), made, LAYERS, tmp_path)
    sae_lens = pytest.importorskip("sae_lens")
    torch = pytest.importorskip("torch")
    h = np.random.default_rng(4).normal(size=(2, 40, D)).astype(np.float32)
    codes = made.encode(h)
    for number, layer in enumerate(LAYERS):
        sae = sae_lens.SAE.load_from_disk(tmp_path / f"blocks.{layer}.hook_resid_post", device="cpu")
        theirs = sae.encode(torch.tensor(h[number]))
        np.testing.assert_allclose(codes[number], theirs.detach().numpy(), atol=1e-4)
        np.testing.assert_allclose(made.decode(codes)[number], sae.decode(theirs).detach(), atol=1e-4)


@pytest.mark.parametrize("options", [{"members": 3}, {"threshold": True, "members": 3, "sequential": True}])
def test_ensembles_that_saelens_lacks_are_refused(tmp_path, model, options):
    with pytest.raises(UserError, match="ensemble of 3"):
        saelens.write_dictionary(facts(model()), dictionary(True, **options), LAYERS, tmp_path)


def test_a_dictionary_with_a_bias_is_kept_in_a_file(tmp_path):
    for bias in (False, True):
        made = dictionary(bias)
        made.save(tmp_path / "dictionary.npz")
        read = Dictionary.load(tmp_path / "dictionary.npz")
        assert read.sha256 == made.sha256
        assert (read.bias is not None) == bias


@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_the_codes_of_a_topk_lm_are_its_neurons_to_the_last_bit(tmp_path, model, activation):
    lm = model(topk_activation=activation)
    saelens.write_neurons(facts(lm), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"blocks.{layer}.hook_resid_post" for layer in range(lm.cfg.n_topk_layers)
    ]
    _, cache = lm.run_with_cache("river in the rain")
    h = np.asarray(cache["blocks.0.hook_topk"])[0]
    weights = load_file(tmp_path / "blocks.0.hook_resid_post/sae_weights.safetensors")
    np.testing.assert_array_equal(h @ weights["W_enc"] + weights["b_enc"], h)
    about = json.loads((tmp_path / "blocks.0.hook_resid_post/cfg.json").read_text())
    assert about["k"] >= np.count_nonzero(h, axis=-1).max()
    assert about["architecture"] == {"relu": "topk", "abs": "abstopk"}[activation]
    sae_lens = pytest.importorskip("sae_lens")  # in an environment of its own: it holds transformer-lens back
    torch = pytest.importorskip("torch")
    sae = sae_lens.SAE.load_from_disk(tmp_path / "blocks.0.hook_resid_post", device="cpu")
    np.testing.assert_array_equal(sae.encode(torch.tensor(h)).detach().numpy(), h)
    assert sae.cfg.metadata.hook_name == "blocks.0.hook_resid_post"


def test_what_saelens_has_not_is_refused(tmp_path, model):
    with pytest.raises(UserError, match="topk_activation is identity"):
        saelens.write_neurons(facts(model(topk_activation="identity")), tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "gated"}, "architecture 'gated'"),
        ({"architecture": "jumprelu"}, "must be of these widths"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm'"),
        ({"k": 4}, "its layers keep 3, 4 codes"),
        ({"k": 0}, "k = 0"),
        ({"k": "many"}, "k = many"),
    ],
    ids=str,
)
def test_another_folder_of_saelens_is_refused_in_one_line(tmp_path, model, change, said):
    saelens.write_dictionary(facts(model()), dictionary(False), LAYERS, tmp_path)
    path = tmp_path / "blocks.1.hook_resid_post/cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=said) as refused:
        saelens.read_dictionary(tmp_path, LAYERS, D)
    assert "\n" not in str(refused.value)


def test_widths_that_are_not_the_models_and_damage_are_refused(tmp_path, model):
    saelens.write_dictionary(facts(model()), dictionary(False), LAYERS, tmp_path)
    with pytest.raises(UserError, match=r"d_in = 12.* d_in the model's 16"):
        saelens.read_dictionary(tmp_path, LAYERS, 16)
    with pytest.raises(UserError, match=r"has no blocks\.2\.hook_resid_post/cfg\.json"):
        saelens.read_dictionary(tmp_path, (0, 1, 2), D)
    path = tmp_path / "blocks.0.hook_resid_post/sae_weights.safetensors"
    content = path.read_bytes()
    for end in (0, 9, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match="damaged or cut short"):
            saelens.read_dictionary(tmp_path, LAYERS, D)
    save_file({"W_enc": np.zeros((D, D), np.float32)}, path)
    with pytest.raises(UserError, match="must be of these widths"):
        saelens.read_dictionary(tmp_path, LAYERS, D)


@pytest.fixture
def store(tmp_path):
    """Three rows and a part of one, two layers, of which a neuron in five is active."""
    rng = np.random.default_rng(0)
    n = 3 * saelens.DELPHI_ROW + 10
    values = rng.normal(size=(2, n, D)) * (rng.random((2, n, D)) < 0.2)
    metadata = Metadata("made", 3, "0", "text", "topk", LAYERS, D, D, "identity", 32)
    with StoreWriter(tmp_path / "store", metadata, 0) as writer:
        text = rng.integers(0, 256, n).astype(np.int32), np.arange(n) // 40, np.ones(n, np.float32)
        writer.append(segment.from_dense(*text, values.astype(ml_dtypes.bfloat16)))
    return Store(tmp_path / "store")


def test_delphis_cache_holds_every_activation_of_whole_rows(tmp_path, store):
    saelens.write_delphi(store, tmp_path, "made")
    rows = store.n_tokens // saelens.DELPHI_ROW
    width = store.metadata.d_model
    for layer in store.metadata.layers:
        held = load_file(tmp_path / f"layers.{layer}/0_{width - 1}.safetensors")
        np.testing.assert_array_equal(held["tokens"].reshape(-1), store.tokens(0, rows * saelens.DELPHI_ROW))
        dense = np.zeros((rows * saelens.DELPHI_ROW, width))
        row, position, neuron = held["locations"].astype(int).T
        dense[row * saelens.DELPHI_ROW + position, neuron] = held["activations"]
        for number in range(width):
            events = store.neuron(layer, number)
            want = np.zeros(store.n_tokens)
            want[events.tokens] = events.values
            np.testing.assert_allclose(dense[:, number], want[: len(dense)], rtol=1e-3)


def test_a_store_without_a_whole_row_is_refused(tmp_path, monkeypatch, store):
    monkeypatch.setattr(saelens, "DELPHI_ROW", 10**9)
    with pytest.raises(UserError, match="harvest more"):
        saelens.write_delphi(store, tmp_path, "made")


def test_bits_do_not_depend_on_a_bias_of_zero():
    made = dictionary(False)
    zero = dataclasses.replace(made, bias=np.zeros((2, D), np.float32))
    h = np.random.default_rng(4).normal(size=(2, 40, D)).astype(np.float32)
    assert jax.tree.all(jax.tree.map(np.array_equal, made.encode(h), zero.encode(h)))
