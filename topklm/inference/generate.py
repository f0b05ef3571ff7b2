"""Text from a model: sampling one token at a time over the whole window.

Every step runs the full forward pass on one fixed shape, so it compiles once; there is no KV cache here.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.model import transformer


def generate_tokens(
    config: ModelConfig,
    params: transformer.Parameters,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_token: int,
) -> list[int]:
    """Continues a prompt.

    Args:
        config: The model's shape.
        params: Its parameters.
        prompt: Token ids, at least one; the model sees the last `context_length` of them.
        max_new_tokens: Upper bound on the length of the continuation, tokens.
        temperature: Divides the logits; 0 takes the most likely token.
        seed: Of the samples; the same seed gives the same tokens.
        stop_token: Generation ends when this token is drawn; it is not returned.

    Returns:
        The new token ids.

    Raises:
        ValueError: For an empty prompt, or a temperature below 0.
    """
    if not prompt:
        raise ValueError("prompt is empty: it must hold at least one token")
    if not temperature >= 0:
        raise ValueError(f"temperature = {temperature}: must be 0 or more")
    key = jax.random.key(seed)
    tokens = list(prompt)
    for position in range(max_new_tokens):
        seen = tokens[-config.context_length :]
        # Padding stands to the right, where causal attention never looks.
        window = np.full((1, config.context_length), stop_token, np.int32)
        window[0, : len(seen)] = seen
        step_key = jax.random.fold_in(key, position)
        token = int(_next_token(config, params, window, len(seen) - 1, step_key, float(temperature)))
        if token == stop_token:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@functools.partial(jax.jit, static_argnums=0)
def _next_token(
    config: ModelConfig,
    params: transformer.Parameters,
    window_1T: jax.Array,
    last: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    model = transformer.bind(config, params)
    h_1TD, _ = model.hidden(window_1T)
    h_D = jax.lax.dynamic_index_in_dim(h_1TD[0], last, keepdims=False)
    logits_V = model.logits(h_D)
    # The quotient of temperature 0 is never used, but must not be NaN.
    sampled = jax.random.categorical(key, logits_V / jnp.where(temperature > 0, temperature, 1.0))
    return jnp.where(temperature > 0, sampled, jnp.argmax(logits_V))
