"""A trained model with its tokenizer: what `topklm.load` gives back, and what people call."""

from collections.abc import Sequence
import dataclasses
import functools
import html

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import Config, ModelConfig
from topklm.data.tokenizer import Tokenizer
from topklm.inference.generate import generate_tokens
from topklm.model import transformer
from topklm.neurons import names
from topklm.neurons.activations import SparseActivations, capture_named
from topklm.neurons.cache import ActivationCache
from topklm.neurons.show import ActiveNeurons

Tokens = str | jax.Array | np.ndarray | Sequence  # a text, or token ids [B, T]


@dataclasses.dataclass(frozen=True, repr=False)
class LanguageModel:
    """A trained model with its tokenizer, ready to be called."""

    run: str
    step: int
    config: Config
    tokenizer: Tokenizer
    params: transformer.Parameters

    def __repr__(self) -> str:
        m = self.config.model
        shape = f"{m.n_layers} layers of width {m.d_model}, vocabulary {m.vocab_size:,}"
        topk = f"TopK keeps {m.topk_k} in {m.n_topk_layers} layers" if m.n_topk_layers else "no TopK"
        return f"LanguageModel({self.run}, step {self.step:,}: {shape}, {topk})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><th scope="row" style="text-align:left">{name}</th>'
            f'<td style="text-align:left">{html.escape(fact)}</td></tr>'
            for name, fact in self._facts().items()
        )
        return f"<table>{rows}</table>"

    def __call__(self, tokens: Tokens) -> jax.Array:
        """Next-token logits, float32[B, T, V].

        Args:
            tokens: A text, or token ids int32[B, T].

        Raises:
            ValueError: For token ids that are not [B, T], or not in the vocabulary.
        """
        return _logits(self.config.model, self.params, self._ids(tokens))

    def run_with_cache(
        self, tokens: Tokens, names_filter: names.NamesFilter = None
    ) -> tuple[jax.Array, ActivationCache]:
        """Next-token logits, float32[B, T, V], and what the layers computed on the way.

        `cache.neurons` holds the TopK layers in sparse form, `cache["blocks.0.hook_topk"]` is one made dense.

        Args:
            tokens: A text, or token ids int32[B, T].
            names_filter: What to keep: a name such as "blocks.2.hook_resid_post" (see `neurons.names`),
                several, or a function that says of each name whether it is wanted. By default what the TopK
                layers keep, in sparse form; everything else takes B x T x D numbers for each name.

        Raises:
            ValueError: As calling the model, and for a name that the model does not have.
        """
        wanted = names.chosen(self.config.model, names_filter)
        ids = self._ids(tokens)
        logits, neurons, others = _logits_and_activations(self.config.model, wanted, self.params, ids)
        places = map(names.parse, wanted)
        layers = tuple(layer for layer, hook in places if hook == names.TOPK)
        return logits, ActivationCache(neurons, layers, others)

    def active_neurons(self, text: str) -> ActiveNeurons:
        """The active neurons of each token of a text; a notebook or a terminal shows them as a table."""
        _, cache = self.run_with_cache(text)
        return ActiveNeurons.of(self.to_str_tokens(text), cache.neurons)

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> str | list[str]:
        """Prompt and continuation as one string; a list of them for a list of prompts.

        Args:
            prompt: Text that begins a document; may be empty.
            max_new_tokens: Upper bound on the continuation's length, tokens.
            temperature: Divides the logits; 0 takes the most likely token each time.
            seed: The same seed gives the same text.
        """
        if not isinstance(prompt, str):
            return [str(self.generate(p, max_new_tokens, temperature, seed)) for p in prompt]
        continuation = generate_tokens(
            self.config.model,
            self.params,
            np.asarray(self.to_tokens(prompt))[0].tolist(),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_token=self.tokenizer.separator_id,
        )
        return prompt + self.tokenizer.decode(continuation)

    def to_tokens(self, text: str, prepend_separator: bool = True) -> jax.Array:
        """Token ids int32[1, T]; the separator stands first, as it does in training."""
        ids = self.tokenizer.encode(text)
        if prepend_separator:
            ids = np.concatenate([[self.tokenizer.separator_id], ids])
        return jnp.asarray(ids, jnp.int32)[None]

    def to_str_tokens(self, text: str, prepend_separator: bool = True) -> list[str]:
        """The pieces that `to_tokens` cuts a text into."""
        return self.tokenizer.token_strings(np.asarray(self.to_tokens(text, prepend_separator))[0])

    def _facts(self) -> dict[str, str]:
        """What a reader wants to know first, for a notebook."""
        m = self.config.model
        leaves = jax.tree.leaves(self.params)
        devices = set().union(*(leaf.devices() for leaf in leaves))
        place = f"{len(devices)} devices" if len(devices) > 1 else str(devices.pop())
        kept = f"keeps {m.topk_k} of {m.d_model:,} neurons in the first {m.n_topk_layers} layers"
        return {
            "run": f"{self.run}, step {self.step:,}",
            "parameters": f"{sum(leaf.size for leaf in leaves):,} on {place}",
            "layers": f"{m.n_layers} of width {m.d_model:,}; {m.n_heads} heads, MLP {m.d_mlp:,} wide",
            "TopK": f"{kept} ({m.topk_activation})" if m.n_topk_layers else "none: a Base LM",
            "tokens": f"vocabulary of {m.vocab_size:,}; trained on windows of {m.context_length:,}",
        }

    def _ids(self, tokens: Tokens) -> jax.Array:
        ids = self.to_tokens(tokens) if isinstance(tokens, str) else jnp.asarray(tokens, jnp.int32)
        if ids.ndim != 2:
            raise ValueError(f"tokens has shape {ids.shape}: must be [B, T]")
        if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < self.config.model.vocab_size):
            raise ValueError(f"tokens: ids must be from 0 to {self.config.model.vocab_size - 1}")
        return ids


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: transformer.Parameters, tokens_BT: jax.Array) -> jax.Array:
    return transformer.bind(config, params)(tokens_BT)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits_and_activations(
    config: ModelConfig, wanted: tuple[str, ...], params: transformer.Parameters, tokens_BT: jax.Array
) -> tuple[jax.Array, SparseActivations, dict[str, jax.Array]]:
    model = transformer.bind(config, params)
    h_BTD, neurons, others = capture_named(model, tokens_BT, wanted)
    return model.logits(h_BTD), neurons, others
