"""Our model in Hugging Face's Llama (with QK-norm Qwen3), TopK a forward hook on the layers that have it.

The same function of the same weights: no biases, RMSNorm, rotary positions, SwiGLU, and `torch.topk` with
`scatter` on a layer's output. Tests hold its logits, gradients and loss to ours.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers

from topklm import config as config_lib
from topklm.config import ModelConfig
from topklm.convert import huggingface
from topklm.model import transformer


def build(
    config: ModelConfig, attention: str = "sdpa", masks: np.ndarray | None = None
) -> transformers.PreTrainedModel:
    """Builds the model with weights of its own, float32, on the CPU, TopK in place.

    Args:
        config: The shape, with its vocabulary.
        attention: Hugging Face's name of the implementation.
        masks: bool[S, B, T, D], which entries the TopK layers keep; None for the k largest.
    """
    kind = "Qwen3" if config.qk_norm else "Llama"
    more: dict[str, Any] = {} if config.qk_norm else {"mlp_bias": False}
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_mlp,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_width,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=config.context_length,
            attention_bias=False,
            use_cache=False,
            attn_implementation=attention,
            **more,
        )
    )
    for number, layer in enumerate(model.model.layers[: config.n_topk_layers]):
        layer.register_forward_hook(_hook(config, None if masks is None else torch.tensor(masks[number])))
    return model


def load(model: torch.nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Gives the model the weights of `state_dict`, one array at a time.

    Raises:
        KeyError: If one is missing.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(weights[name])))


def state_dict(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns parameters, or gradients of them, by Hugging Face's names."""
    return dict(huggingface.tensors(config, params))


def write_weights(config: Mapping[str, Any], path: str) -> None:
    """Writes the parameters that a config starts from, for `load`, so that both start alike.

    Args:
        config: As JSON, with its vocabulary.
        path: An .npz to be written.
    """
    resolved = config_lib.resolve(config)
    params = transformer.create(resolved.model, resolved.train.seed)
    weights: dict[str, Any] = state_dict(resolved.model, params)
    np.savez(path, **weights)


def topk(u: torch.Tensor, k: int, activation: str) -> torch.Tensor:
    """Computes TopK as one writes it in PyTorch, [..., D] -> [..., D]; ties are kept in any order."""
    if activation == "abs":
        index = torch.topk(u.abs(), k, dim=-1).indices
        values = u.gather(-1, index)
    else:
        values, index = torch.topk(u, k, dim=-1)
    kept = values.relu() if activation == "relu" else values
    return torch.zeros_like(u).scatter(-1, index, kept)


def _hook(config: ModelConfig, mask: torch.Tensor | None) -> Callable:
    def replace(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        del module, arguments
        u = output[0] if isinstance(output, tuple) else output
        h = topk(u, config.topk_k, config.topk_activation) if mask is None else u * mask
        return (h, *output[1:]) if isinstance(output, tuple) else h

    return replace
