"""A run as a Hugging Face folder, and such a folder as a model; neither needs torch.

model.safetensors         parameters by Llama's names, QK-norm by Qwen 3's; several files of 5 GB where more
config.json               Llama's or Qwen 3's fields, those of TopK, and under "topklm" the run's own config
modeling_topklm.py        the model for transformers, where layers have a TopK
tokenizer.json            the run's, which now puts the separator in front of a text, as topklm does
README.md                 the model card

A parameter of a block is one line of `_BLOCK_NAMES`. Kernels are [in, out] here and [out, in] there; rows of
padding have no counterpart.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np

from topklm.config import Config, ModelConfig, from_saved, resolve
from topklm.data.tokenizer import Tokenizer, open_tokenizer
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.imports import VERSION, optional_module
from topklm.model.transformer import Parameters
from topklm.storage.files import local_path, read_json

MODEL_TYPE = "topklm"  # of config.json, where layers have a TopK
_BASE_TYPES = {False: "llama", True: "qwen3"}  # by `qk_norm`

# Of a block: our path -> their name inside a layer.
_BLOCK_NAMES = {
    ("attention", "query", "kernel"): "self_attn.q_proj",
    ("attention", "key", "kernel"): "self_attn.k_proj",
    ("attention", "value", "kernel"): "self_attn.v_proj",
    ("attention", "out", "kernel"): "self_attn.o_proj",
    ("mlp", "gate", "kernel"): "mlp.gate_proj",
    ("mlp", "up", "kernel"): "mlp.up_proj",
    ("mlp", "down", "kernel"): "mlp.down_proj",
    ("attention_norm", "scale"): "input_layernorm",
    ("mlp_norm", "scale"): "post_attention_layernorm",
}
_QK_NORM_NAMES = {
    ("attention", "query_norm", "scale"): "self_attn.q_norm",
    ("attention", "key_norm", "scale"): "self_attn.k_norm",
}

# Fields of config.json that have one of ours as their value.
_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_width",
    "intermediate_size": "d_mlp",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_TOPK_FIELDS = (
    "n_nontopk",
    "topk_k",
    "topk_activation",
    "topk_groups",
    "topk_centred",
    "token_input",
    "qk_norm",
)
# By the number that each is in `ModelConfig.rope_scaling`.
_ROPE_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _block_names(config: ModelConfig) -> dict[tuple[str, ...], str]:
    return _BLOCK_NAMES | (_QK_NORM_NAMES if config.qk_norm else {})


def tensors(config: ModelConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields parameters, or gradients of them, by Hugging Face's names, each contiguous."""
    size = config.vocab_size
    yield "model.embed_tokens.weight", _own(np.asarray(params["embed"]["embedding"])[:size])
    for path, name in _block_names(config).items():
        stacked = params["blocks"]
        for key in path:
            stacked = stacked[key]
        for layer in range(config.n_layers):
            value = np.asarray(stacked[layer])
            yield f"model.layers.{layer}.{name}.weight", _own(value.T if path[-1] == "kernel" else value)
    yield "model.norm.weight", _own(np.asarray(params["final_norm"]["scale"]))
    if not config.tie_embeddings:
        yield "lm_head.weight", _own(np.asarray(params["unembed"]["kernel"]).T[:size])


def parameters(config: ModelConfig, take: Callable[[str], np.ndarray]) -> Parameters:
    """Returns parameters, float32, of tensors that are asked for by Hugging Face's names.

    `take` returns a tensor and counts it as used; of more rows than `vocab_size`, the first are taken.
    UserError names a tensor of another shape.
    """
    d, size = config.d_model, config.vocab_size

    def taken(name: str, *shape: int | None) -> np.ndarray:
        """Returns a tensor of a shape; None: of `vocab_size` rows or more."""
        value = np.asarray(take(name)).astype(np.float32)
        fits = [
            (want is None and have >= size) or want == have
            for want, have in zip(shape, value.shape, strict=False)
        ]
        if len(shape) != value.ndim or not all(fits):
            wanted = [size if want is None else want for want in shape]
            raise UserError(f"tensor {name} is {list(value.shape)}: config.json says {wanted}")
        return value

    def padded(name: str) -> np.ndarray:
        return np.pad(taken(name, None, d)[:size], ((0, config.padded_vocab_size - size), (0, 0)))

    heads, kv_heads = config.n_heads * config.head_width, config.n_kv_heads * config.head_width
    shapes = {
        "query": (heads, d),
        "key": (kv_heads, d),
        "value": (kv_heads, d),
        "out": (d, heads),
        "gate": (config.d_mlp, d),
        "up": (config.d_mlp, d),
        "down": (d, config.d_mlp),
        "query_norm": (config.head_width,),
        "key_norm": (config.head_width,),
    }
    blocks: dict[str, Any] = {}
    for path, name in _block_names(config).items():
        found = [
            taken(f"model.layers.{layer}.{name}.weight", *shapes.get(path[-2], (d,)))
            for layer in range(config.n_layers)
        ]
        inner = blocks
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = np.stack([x.T for x in found])
    norm = taken("model.norm.weight", d)
    params = {"blocks": blocks, "embed": {"embedding": padded("model.embed_tokens.weight")}}
    params["final_norm"] = {"scale": norm}
    if not config.tie_embeddings:
        params["unembed"] = {"kernel": _own(padded("lm_head.weight").T)}
    return params


def to_json(config: ModelConfig, separator_id: int, dtype: str) -> dict[str, Any]:
    """Returns config.json: Llama's or Qwen3's of a Base LM, else that of `modeling_topklm.py`."""
    is_base = config.n_topk_layers == 0
    kind = {"llama": "Llama", "qwen3": "Qwen3", MODEL_TYPE: "TopKLM"}
    model_type = _BASE_TYPES[config.qk_norm] if is_base else MODEL_TYPE
    rule, numbers = config.rope_rule
    rope: dict[str, Any] = {"rope_type": rule or "default", "rope_theta": config.rope_theta}
    rope |= dict(zip(_ROPE_NUMBERS.get(rule, ()), numbers, strict=True))
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    values = {
        "architectures": [f"{kind[model_type]}ForCausalLM"],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # The first two are for transformers before 5.
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if rule else None,
        "rope_parameters": rope,
        "bos_token_id": separator_id,
        "eos_token_id": separator_id,
        "dtype": dtype,
    }
    if is_base:
        return values
    code = {
        "AutoConfig": "TopKLMConfig",
        "AutoModel": "TopKLMModel",
        "AutoModelForCausalLM": "TopKLMForCausalLM",
    }
    return values | {
        **{name: getattr(config, name) for name in _TOPK_FIELDS},
        "original_architecture": "LlamaForCausalLM",  # by which TransformerLens chooses its adapter
        "auto_map": {auto: f"modeling_topklm.{name}" for auto, name in code.items()},
    }


def from_json(values: Mapping[str, Any]) -> ModelConfig:
    """Returns the model of a config.json: Llama, Qwen3, `to_json`'s; UserError names all that is unknown."""
    kind = values.get("model_type")
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    rule = rope.get("rope_type", rope.get("type", "default"))
    layer_types = set(values.get("layer_types") or ["full_attention"])
    unknown = {
        f"model_type {kind!r}": kind not in (*_BASE_TYPES.values(), MODEL_TYPE),
        f"rope_type {rule!r}": rule not in ("default", *_ROPE_NUMBERS),
        "attention_bias": values.get("attention_bias"),
        "mlp_bias": values.get("mlp_bias"),
        "sliding windows": values.get("use_sliding_window") or layer_types != {"full_attention"},
        f"hidden_act {values.get('hidden_act')!r}": values.get("hidden_act", "silu") != "silu",
        "quantization_config": values.get("quantization_config"),
    }
    if found := [name for name, is_there in unknown.items() if is_there]:
        raise UserError(
            f"config.json has {', '.join(found)}, which topklm has not: it takes Llama (1 to 3) and Qwen 3, "
            "without biases, sliding windows and quantized weights"
        )
    try:
        fields = {ours: values[theirs] for theirs, ours in _FIELDS.items() if theirs in values}
        fields.setdefault("n_kv_heads", values["num_attention_heads"])
        fields["head_dim"] = fields.pop("head_width", None) or 0
        if rule in _ROPE_NUMBERS:
            numbers = (f"{float(rope[name]):g}" for name in _ROPE_NUMBERS[rule])
            fields["rope_scaling"] = ":".join([rule, *numbers])
        fields["rope_theta"] = float(rope.get("rope_theta", values.get("rope_theta", 10_000.0)))
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"config.json: {e!r} while it was read: is it of a Llama or Qwen 3 model?") from e
    optional = ("head_width", "tie_embeddings")
    if missing := [theirs for theirs, ours in _FIELDS.items() if ours not in (*fields, *optional)]:
        raise UserError(f"config.json has no {', '.join(missing)}: is it of a Llama or Qwen 3 model?")
    if kind == MODEL_TYPE:
        fields |= {name: values[name] for name in _TOPK_FIELDS if name in values}
    else:
        fields |= {"qk_norm": kind == "qwen3", "n_nontopk": fields["n_layers"], "topk_k": 1}
        if isinstance(fields["d_model"], int):
            fields["topk_k"] = min(ModelConfig.topk_k, max(fields["d_model"], 1))
    return resolve({"model": fields}).model


def _own(x: np.ndarray) -> np.ndarray:
    """Returns a contiguous array: of a transposed view, safetensors would write the untransposed buffer."""
    return np.ascontiguousarray(x)


CODE = Path(__file__).with_name("modeling_topklm.py")
DTYPES = ("float32", "bfloat16")
HUB = "hf:"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FILE_BYTES = 5_000_000_000
_OWN = "topklm"  # the key of config.json that others do not read
# Buffers that older versions of transformers saved among the parameters.
_COMPUTED = ".rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is written to a folder, or was read from one."""

    config: Config
    tokenizer: Tokenizer
    params: Parameters  # float32; on the host where it was read
    run: str = ""  # name of the run that it comes from
    step: int = 0  # of that run
    notes: tuple[str, ...] = ()  # facts that a user should know of one that was read


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Tells whether this names a model of Hugging Face's: `hf:ORG/NAME`, or a folder with its config.json."""
    if str(path).startswith(HUB):
        return True
    config = Path(path) / "config.json"
    try:
        return "model_type" in json.loads(config.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def write(model: Model, out: Path, dtype: str, card: str) -> None:
    """Writes a model's files into an empty folder, tensors of a dtype of `DTYPES`, and a card as README.md.

    UserError if its tokenizer is none that the folder can hold.
    """
    config, tokenizer = model.config.model, model.tokenizer
    if tokenizer.kind != "huggingface":
        raise UserError(
            f"RUN = {model.run}: its tokenizer is of the kind {tokenizer.kind}, and a Hugging Face folder "
            "holds a tokenizer.json: export is for runs with such a tokenizer, trained by topklm or not"
        )
    separator = tokenizer.separator_id
    about = {
        "version": VERSION,
        "run": model.run,
        "step": model.step,
        "tokenizer_sha256": tokenizer.sha256,
        "config": model.config.to_dict(),
    }
    _write_json(out / "config.json", {**to_json(config, separator, dtype), _OWN: about})
    _write_tensors(out, tensors(config, model.params), dtype)
    # Without a length: transformers warns of it at each call that gives another.
    ids = {f"{name}_token_id": separator for name in ("bos", "eos", "pad")}
    _write_json(out / "generation_config.json", ids)
    (out / "tokenizer.json").write_bytes(_with_separator_in_front(tokenizer))
    _write_json(out / "tokenizer_config.json", tokenizer.config(config.context_length))
    if config.n_topk_layers:
        shutil.copyfile(CODE, out / CODE.name)
    (out / "README.md").write_text(card, encoding="utf-8")


def read(path: str, flag: str = "FOLDER", tokenizer: Tokenizer | None = None) -> Model:
    """Reads a folder of a Llama, of Qwen 3, or one that `write` wrote; or `hf:ORG/NAME`.

    Errors name the folder by `flag`; a `tokenizer` is in place of the folder's own. UserError if a file is
    missing or damaged, a tensor is missing, left over or of another shape, or the model has what topklm has
    not, which is named.
    """
    folder = _from_hub(path.removeprefix(HUB)) if path.startswith(HUB) else local_path(path, flag)
    with disk_errors_are_user_errors(f"reading {path}"):
        if not (folder / "config.json").exists():
            raise UserError(f"{flag} = {path}: has no config.json: give a folder of a Hugging Face model")
        values = read_json(folder / "config.json", "give a whole folder")
        if "model_type" not in values:
            advice = "it is a run of topklm already" if "model" in values else "give a Hugging Face model's"
            raise UserError(f"{flag} = {path}: its config.json has no model_type: {advice}")
        own = values.get(_OWN)
        own = own if isinstance(own, Mapping) else {}
        tokenizer = tokenizer or _read_tokenizer(folder, str(own.get("tokenizer_sha256", "")))
        config = from_json(values)
        notes = []
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"{flag} = {path}: tokenizer.json has {tokenizer.vocab_size:,} tokens, config.json "
                f"{config.vocab_size:,}: the tokenizer is of another model"
            )
        if unused := config.vocab_size - tokenizer.vocab_size:
            notes.append(f"the last {unused:,} rows of its vocabulary stand for no token, and are left out")
        first = values.get("bos_token_id")
        if isinstance(first, int) and first != tokenizer.separator_id:
            names = tokenizer.token_strings([tokenizer.separator_id, first])
            notes.append(f"topklm begins texts with {names[0]}; this model was trained with {names[1]}")
        saved = from_saved(own["config"]) if "config" in own else Config()
        if "config" in own and from_json(to_json(saved.model, 0, "")) == config:
            config = saved.model  # which has more to say: rows of padding, how a step is computed
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        params = _read_parameters(folder, config, path)
    saved = dataclasses.replace(saved, model=config)
    run, step = str(own.get("run", "")), own.get("step", 0)
    return Model(saved, tokenizer, params, run, step if isinstance(step, int) else 0, tuple(notes))


def _from_hub(name: str) -> Path:
    """Downloads a model's files, or finds them in the library's cache; returns their folder."""
    hub = optional_module("huggingface_hub", "hf", f"{HUB}{name}")
    kinds = ["*.json", "*.safetensors", "tokenizer.model", "*.tiktoken"]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=kinds))
    except Exception as e:  # of requests, of the hub, of names: all say why
        why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"{HUB}{name}: {why}") from e


def _write_tensors(out: Path, tensors: Iterator[tuple[str, np.ndarray]], dtype: str) -> None:
    """Writes files of at most `_FILE_BYTES`, or one tensor, and their index if there are several."""
    numpy = optional_module("safetensors.numpy", "export", "topklm export")
    kind = np.dtype(jnp.bfloat16 if dtype == "bfloat16" else dtype)
    files: list[list[str]] = []
    total, pending = 0, dict[str, np.ndarray]()

    def flush() -> None:
        # Without "format" older versions of transformers refuse the file.
        numpy.save_file(pending, out / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(x.nbytes for x in pending.values()) + tensor.nbytes > _FILE_BYTES:
            flush()
        pending[name] = tensor.astype(kind)
        total += pending[name].nbytes
    flush()
    width = f"of-{len(files):05d}"
    names = [f"model-{i + 1:05d}-{width}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else [_WEIGHTS]
    for i, name in enumerate(names):
        (out / f"part-{i}").rename(out / name)
        shutil.copymode(out / "config.json", out / name)  # the library makes files for their owner alone
    if len(files) > 1:
        where = {tensor: name for name, held in zip(names, files, strict=True) for tensor in held}
        _write_json(out / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _read_parameters(folder: Path, config: Any, path: str) -> Parameters:
    """Reads the parameters; all tensors must be used, but for a tied unembedding and computed buffers."""
    safetensors = optional_module("safetensors", "export", "reading safetensors")
    files = _weight_files(folder, path)
    open_files: dict[str, Any] = {}
    for file in files:
        try:
            opened = safetensors.safe_open(file, framework="numpy")
            open_files |= dict.fromkeys(opened.keys(), opened)
        except Exception as e:  # the library raises a class of its own for each kind of damage
            raise UserError(f"{file} is damaged or cut short ({e}): get the whole folder again") from e
    used = set()

    def take(name: str) -> np.ndarray:
        if name not in open_files:
            raise UserError(f"{path} has no tensor {name}: get the whole folder again")
        used.add(name)
        return open_files[name].get_tensor(name)

    params = parameters(config, take)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    if left := sorted(name for name in open_files.keys() - used - tied if not name.endswith(_COMPUTED)):
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        raise UserError(
            f"{path} holds tensors that topklm has no use for: {shown}: it is another kind of model"
        )
    return params


def _weight_files(folder: Path, path: str) -> Sequence[Path]:
    index = folder / _INDEX
    if index.exists():
        where = read_json(index, "get the whole folder again").get("weight_map")
        if not isinstance(where, Mapping) or not where:
            raise UserError(f"{index} is damaged (no weight_map): get the whole folder again")
        files = [folder / name for name in sorted(set(map(str, where.values())))]
    else:
        files = [folder / _WEIGHTS]
    for file in files:
        if not file.exists():
            raise UserError(f"{path}: {file.name} is missing: topklm reads safetensors; get the whole folder")
    return files


def _read_tokenizer(folder: Path, sha256: str) -> Tokenizer:
    """Reads the folder's tokenizer: a run's own bytes where `write` changed them and they can be told."""
    file = folder / "tokenizer.json"
    if not file.exists():
        file = folder / "tokenizer.model"
        if not file.exists():
            raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model: get the whole folder")
    tokenizer = open_tokenizer(file)
    if sha256 and tokenizer.sha256 != sha256:
        parts = json.loads(tokenizer.to_bytes())
        for was in (None, "absent"):
            parts["post_processor"] = was
            if was:
                del parts["post_processor"]
            content = json.dumps(parts, indent=2, ensure_ascii=False).encode()
            if hashlib.sha256(content).hexdigest() == sha256:
                return Tokenizer(content)
    return tokenizer


def _with_separator_in_front(tokenizer: Tokenizer) -> bytes:
    """Returns tokenizer.json with a step that puts the separator before a text, as topklm does itself."""
    parts = json.loads(tokenizer.to_bytes())
    [name], number = tokenizer.token_strings([tokenizer.separator_id]), tokenizer.separator_id
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    texts = [{"Sequence": {"id": which, "type_id": 0}} for which in "AB"]
    parts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, *texts],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }
    return json.dumps(parts, indent=2, ensure_ascii=False).encode()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
