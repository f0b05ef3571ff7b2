"""Shape and parameters by the names of Hugging Face's Llama, with QK-norm Qwen3.

A parameter of a block is one line of `_BLOCK_NAMES`. Kernels are [in, out] here and [out, in] there; rows of
padding have no counterpart.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from topklm.config import ModelConfig, resolve
from topklm.errors import UserError
from topklm.model.transformer import Parameters

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
