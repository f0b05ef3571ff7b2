"""What a steered text is searched for: a set of tokens, a regular expression, or a list of words."""

from collections.abc import Sequence
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.data.tokenizer import Tokenizer
from topklm.errors import UserError
from topklm.model import transformer

N_TOKENS = 10


@dataclasses.dataclass(frozen=True)
class Concept:
    """What counts as a hit; one of `token_ids` and `pattern` is given.

    Attributes:
        name: Short, for the head of a column.
        description: What it is and where it comes from, in words.
        token_ids: Each token of a text that is one of these is a hit.
        pattern: Each place of the text that matches is a hit; matches do not overlap.
    """

    name: str
    description: str
    token_ids: tuple[int, ...] = ()
    pattern: re.Pattern[str] | None = None

    def count(self, tokens: Sequence[int], text: str) -> int:
        """How many hits a text has.

        Args:
            tokens: Its token ids.
            text: What they decode to.
        """
        if self.pattern is not None:
            return sum(1 for found in self.pattern.finditer(text) if found.group())
        return int(np.isin(np.asarray(tokens, np.int64), self.token_ids).sum())


def of_tokens(name: str, source: str, token_ids: Sequence[int], tokenizer: Tokenizer) -> Concept:
    """A set of tokens, with where it comes from."""
    strings = ", ".join(f"'{token}'" for token in tokenizer.token_strings(token_ids))
    return Concept(name, f"{source}: {strings}", tuple(int(i) for i in token_ids))


def of_regex(regex: str) -> Concept:
    """Matches of a regular expression, whatever their case.

    Raises:
        UserError: If it is none.
    """
    try:
        pattern = re.compile(regex, re.IGNORECASE)
    except re.error as e:
        raise UserError(f"--concept-regex = {regex}: is no regular expression ({e}); mend it") from e
    return Concept("regex", f"matches of the regular expression {regex!r}, in any case", pattern=pattern)


def of_words(words: Sequence[str]) -> Concept:
    """Whole words, in any case.

    Raises:
        UserError: If there are none.
    """
    kept = sorted({word.strip() for word in words if word.strip()})
    if not kept:
        raise UserError("--concept-words: holds no word; give words with commas between, or a file of them")
    # \b would want a letter on one side, which a word such as "'s" does not begin with.
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, kept))})(?!\w)", re.IGNORECASE)
    return Concept("words", f"the words {', '.join(kept)}, in any case", pattern=pattern)


def raised_tokens(config: ModelConfig, params: transformer.Parameters, neuron: int) -> np.ndarray:
    """The tokens that a neuron raises most by the identity lens, int64[`N_TOKENS`], the most raised first.

    That lens is row `neuron` of diag(scale of the final norm) @ unembedding; see `statistics.lenses`, which
    needs no measuring. It is the same for all layers.
    """
    return np.asarray(_raised(config, params, np.int32(neuron), min(N_TOKENS, config.vocab_size)), np.int64)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _raised(config: ModelConfig, params: transformer.Parameters, neuron: jax.Array, n: int) -> jax.Array:
    model = transformer.bind(config, params)
    effects_V = model.final_norm.scale[...][neuron] * model.unembedding()[neuron, : config.vocab_size]
    return jax.lax.top_k(effects_V.astype(jnp.float32), n)[1]
