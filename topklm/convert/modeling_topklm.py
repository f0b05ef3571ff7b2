"""TopK language models for Hugging Face Transformers: Llama whose residual stream passes through TopK.

Part of every exported folder; needs torch and transformers, not topklm. The output of `model.layers[l].topk`
are the neurons of layer l.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm


class TopKLMConfig(LlamaConfig):
    """Llama's fields, and those of TopK."""

    model_type = "topklm"

    topk_k: int = 32
    n_nontopk: int = 1  # final layers without TopK
    topk_activation: str = "relu"  # or "identity", "abs"
    topk_groups: str = ""  # "WIDTH:K,...": neighbouring neurons that compete among themselves; "": all
    topk_centred: bool = False  # u less its mean over those that compete
    token_input: str = "first"  # "every": layers read the token's embedding, the stream does not carry it
    qk_norm: bool = False


class TopK(nn.Module):
    """Keeps the k largest entries of each group of neurons, and sets the others to 0."""

    def __init__(self, config: TopKLMConfig):
        super().__init__()
        groups = config.topk_groups or f"{config.hidden_size}:{config.topk_k}"
        pairs = [group.split(":") for group in groups.split(",")]
        self.widths, self.counts = [int(w) for w, _ in pairs], [int(k) for _, k in pairs]
        self.activation, self.centred = config.topk_activation, config.topk_centred

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Maps [..., D] -> [..., D]."""
        parts = zip(u.split(self.widths, dim=-1), self.counts, strict=True)
        return torch.cat([self.kept(x, k) for x, k in parts], dim=-1)

    def kept(self, u: torch.Tensor, k: int) -> torch.Tensor:
        """Computes TopK of one group."""
        if self.centred:
            u = u - u.float().mean(-1, keepdim=True).to(u.dtype)
        judged = u.abs() if self.activation == "abs" else u
        index = judged.topk(k, dim=-1, sorted=False).indices
        h = torch.zeros_like(u).scatter(-1, index, u.gather(-1, index))
        return h.relu() if self.activation == "relu" else h


class Token:
    """The embedding of the tokens of this pass, for layers that read it beside the stream."""

    value: torch.Tensor | None = None


class TopKLMLayer(LlamaDecoderLayer):
    """Llama's layer, whose output passes through TopK."""

    def __init__(self, config: TopKLMConfig, layer_idx: int, token: Token):
        super().__init__(config, layer_idx)
        n_topk = config.num_hidden_layers - config.n_nontopk
        self.topk = TopK(config) if layer_idx < n_topk else nn.Identity()
        if config.qk_norm:
            for name in "qk":
                norm = LlamaRMSNorm(config.head_dim, config.rms_norm_eps)
                setattr(self.self_attn, f"{name}_norm", norm)
                getattr(self.self_attn, f"{name}_proj").register_forward_hook(
                    lambda _, inputs, out, norm=norm: norm(out.unflatten(-1, (-1, config.head_dim))).flatten(
                        -2
                    )
                )
        if config.token_input == "every" and layer_idx < n_topk:
            for norm in (self.input_layernorm, self.post_attention_layernorm):
                norm.register_forward_pre_hook(lambda _, arguments: (arguments[0] + token.value,))
        if config.token_input == "every" and layer_idx == n_topk:
            self.self_attn.register_forward_hook(lambda _, inputs, out: (out[0] + token.value, *out[1:]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Does as Llama's."""
        out = super().forward(*args, **kwargs)
        return (self.topk(out[0]), *out[1:]) if isinstance(out, tuple) else self.topk(out)


class TopKLMModel(LlamaModel):
    """Llama's stack of such layers."""

    config_class = TopKLMConfig
    _no_split_modules = ["TopKLMLayer"]  # noqa: RUF012 - as transformers has it

    def __init__(self, config: TopKLMConfig):
        super().__init__(config)
        self.token = Token()
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(TopKLMLayer(config, i, self.token) for i in layers)
        self.post_init()

    def forward(self, input_ids: Any = None, *args: Any, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        """Does as Llama's."""
        if self.config.token_input == "every":
            self.token.value = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            input_ids, inputs_embeds = None, torch.zeros_like(self.token.value)
        return super().forward(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)


class TopKLMForCausalLM(LlamaForCausalLM):
    """The model with its unembedding."""

    config_class = TopKLMConfig
    _no_split_modules = ["TopKLMLayer"]  # noqa: RUF012 - as transformers has it

    def __init__(self, config: TopKLMConfig):
        super().__init__(config)
        self.model = TopKLMModel(config)
        self.post_init()
