"""A trained model with its tokenizer: what `topklm.load` gives back, and what people call."""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import Config, ModelConfig
from topklm.data.tokenizer import Tokenizer
from topklm.inference.generate import generate_tokens
from topklm.model import transformer


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

    def __call__(self, tokens: str | jax.Array | np.ndarray | Sequence) -> jax.Array:
        """Next-token logits, float32[B, T, V].

        Args:
            tokens: A text, or token ids int32[B, T].
        """
        ids = self.to_tokens(tokens) if isinstance(tokens, str) else jnp.asarray(tokens, jnp.int32)
        if ids.ndim != 2:
            raise ValueError(f"tokens has shape {ids.shape}: must be [B, T]")
        if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < self.config.model.vocab_size):
            raise ValueError(f"tokens: ids must be from 0 to {self.config.model.vocab_size - 1}")
        return _logits(self.config.model, self.params, ids)

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


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: transformer.Parameters, tokens_BT: jax.Array) -> jax.Array:
    return transformer.bind(config, params)(tokens_BT)
