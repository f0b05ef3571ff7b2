"""A trained model with its tokenizer: what `topklm.load` gives back, and what people call."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import html
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import Config, ModelConfig
from topklm.data.tokenizer import Tokenizer
from topklm.inference import hooks
from topklm.inference.adaptive import AdaptiveK, with_topk_k
from topklm.inference.cache import Layers, by_layer
from topklm.inference.generate import Generation
from topklm.inference.interventions import Interventions, Steer
from topklm.inference.programs import STEPS
from topklm.inference.sampling import Sampling
from topklm.inference.streaming import TextStream, check_stop
from topklm.model import transformer
from topklm.neurons import names
from topklm.neurons.activations import SparseActivations, capture_named
from topklm.neurons.cache import ActivationCache
from topklm.neurons.show import ActiveNeurons

_STEPS_OF_A_STREAM = 4  # tokens between pieces of text that is shown while it is made
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

    def __call__(
        self,
        tokens: Tokens,
        steer: Steer | None = None,
        steer_mode: str = "clamp",
        topk_k: int | None = None,
    ) -> jax.Array:
        """Next-token logits, float32[B, T, V].

        Args:
            tokens: A text, or token ids int32[B, T]; for interventions, all of it is the prompt.
            steer: Interventions on neurons, see `generate`.
            steer_mode: See `generate`.
            topk_k: Entries that each TopK keeps; default as in training. Another k is another program.

        Raises:
            ValueError: For token ids that are not [B, T], or not in the vocabulary; as `generate` for steer
                and topk_k.
        """
        config = with_topk_k(self.config.model, topk_k)
        interventions = None if steer is None else Interventions.of(config, steer, steer_mode)
        return _logits(config, self.params, self._ids(tokens), interventions)

    def run_with_cache(
        self,
        tokens: Tokens,
        names_filter: names.NamesFilter = None,
        steer: Steer | None = None,
        steer_mode: str = "clamp",
        topk_k: int | None = None,
    ) -> tuple[jax.Array, ActivationCache]:
        """Next-token logits, float32[B, T, V], and what the layers computed on the way.

        `cache.neurons` holds the TopK layers in sparse form, `cache["blocks.0.hook_topk"]` is one made dense.

        Args:
            tokens: A text, or token ids int32[B, T].
            names_filter: What to keep: a name such as "blocks.2.hook_resid_post" (see `neurons.names`),
                several, or a function that says of each name whether it is wanted. By default what the TopK
                layers keep, in sparse form; everything else takes B x T x D numbers for each name.
            steer: As in calling the model; what is kept is what layers hand on then.
            steer_mode: See `generate`.
            topk_k: As in calling the model.

        Raises:
            ValueError: As calling the model, and for a name that the model does not have.
        """
        config = with_topk_k(self.config.model, topk_k)
        wanted = names.chosen(config, names_filter)
        interventions = None if steer is None else Interventions.of(config, steer, steer_mode)
        ids = self._ids(tokens)
        logits, neurons, others = _logits_and_activations(config, wanted, self.params, ids, interventions)
        places = map(names.parse, wanted)
        layers = tuple(layer for layer, hook in places if hook == names.TOPK)
        return logits, ActivationCache(neurons, layers, others)

    def active_neurons(self, text: str) -> ActiveNeurons:
        """The active neurons of each token of a text; a notebook or a terminal shows them as a table."""
        _, cache = self.run_with_cache(text)
        return ActiveNeurons.of(self.to_str_tokens(text), cache.neurons)

    def run_with_hooks(self, tokens: Tokens, fwd_hooks: Sequence[tuple[str, Callable]] = ()) -> jax.Array:
        """Next-token logits, float32[B, T, V], with functions called on the way: for free-form research.

        Nothing is compiled as a whole: the functions see arrays, not tracers, and may do anything. That is
        slow; what `steer` can say is better said there.

        Args:
            tokens: A text, or token ids int32[B, T].
            fwd_hooks: (name, fn) each, the name "blocks.{l}.hook_topk" (TopK layers only) or
                "blocks.{l}.hook_resid_post"; fn(array [B, T, D], name) returns what takes the array's place,
                or None. Of one layer, those of hook_topk come first; of one name, in this order.

        Raises:
            ValueError: As calling the model; for another name; for a result of another shape.
        """
        return hooks.run_with_hooks(self.config.model, self.params, self._ids(tokens), fwd_hooks)

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        seed: int = 0,
        *,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        steer: Steer | None = None,
        steer_mode: str = "clamp",
        topk_k: int | None = None,
        adaptive: AdaptiveK | None = None,
        when_full: str = "slide",
    ) -> str | list[str] | Iterator[str]:
        """Prompt and continuation as one string; a list of them for a list of prompts.

        A text of a list is what it would be alone, with the same seed.

        Args:
            prompt: Text that begins a document; may be empty.
            max_new_tokens: Upper bound on the continuation's length, tokens.
            temperature: Divides the logits; 0 takes the most likely token each time.
            seed: The same seed gives the same text.
            top_k: Only the k most likely tokens are drawn from; None or 0: all.
            top_p: Only the fewest most likely tokens whose probabilities sum to this or more.
            min_p: Only tokens at least this fraction as probable as the most likely one.
            repetition_penalty: See `Sampling`.
            stop: The continuation is cut before the first of these texts to appear in it.
            stream: Give an iterator over pieces of the continuation, as they come, which together are the
                text without the prompt. No piece ends inside a character. For one prompt only.
            steer: Interventions on neurons: {(layer, neuron): value}, or `Intervention` objects, or
                `Interventions`.
            steer_mode: What is done with the values of a mapping, one of the modes of `Intervention`.
            topk_k: Entries that each TopK keeps; default as in training.
            adaptive: More of them at tokens where the model is uncertain, see `AdaptiveK`.
            when_full: Beyond the model's context, "slide": it sees the last `context_length` tokens, run anew
                for each further token; "halve": when the context is full, its older half is forgotten, which
                is faster; "stop": the text ends, and a prompt that does not fit is refused.

        Raises:
            ValueError: For a value that is not allowed, in one line: name, value, what is.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        sampling = Sampling(temperature, top_k or 0, top_p, min_p, repetition_penalty, seed)
        ids = [np.asarray(self.to_tokens(text))[0].tolist() for text in prompts]
        config = with_topk_k(self.config.model, topk_k)
        generation = Generation(
            config,
            self.params,
            ids,
            [sampling.check()] * len(prompts),
            max_new_tokens=[max_new_tokens] * len(prompts),
            stop_token=self.tokenizer.separator_id,
            interventions=None if steer is None else Interventions.of(config, steer, steer_mode),
            adaptive=adaptive,
            when_full=when_full,
            layers=self._layers,
        )
        stop = check_stop(stop)
        streams = [TextStream(self.tokenizer, one, stop) for one in ids]
        if stream and not isinstance(prompt, str):
            raise ValueError("stream = True: must be False for a list of prompts; stream one at a time")
        if stream:
            # Alone, the first token need not wait for others.
            steps = itertools.chain([1], itertools.repeat(_STEPS_OF_A_STREAM))
            return (piece for (piece,) in _pieces(generation, streams, steps) if piece)
        parts = list(_pieces(generation, streams, itertools.repeat(STEPS)))
        texts = [text + "".join(pieces[row] for pieces in parts) for row, text in enumerate(prompts)]
        return texts[0] if isinstance(prompt, str) else texts

    def to_tokens(self, text: str, prepend_separator: bool = True) -> jax.Array:
        """Token ids int32[1, T]; the separator stands first, as it does in training."""
        ids = self.tokenizer.encode(text)
        if prepend_separator:
            ids = np.concatenate([[self.tokenizer.separator_id], ids])
        return jnp.asarray(ids, jnp.int32)[None]

    def to_str_tokens(self, text: str, prepend_separator: bool = True) -> list[str]:
        """The pieces that `to_tokens` cuts a text into."""
        return self.tokenizer.token_strings(np.asarray(self.to_tokens(text, prepend_separator))[0])

    @functools.cached_property
    def _layers(self) -> Layers:
        """Of the parameters of the blocks, the copy that tokens are made with."""
        return by_layer(self.config.model, self.params)

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


def _pieces(
    generation: Generation, streams: Sequence[TextStream], steps: Iterator[int]
) -> Iterator[list[str]]:
    """The text of every row, piece by piece, each of as many tokens as `steps` says."""
    while not generation.done:
        new = generation.advance(next(steps))
        yield [text.add(tokens) for text, tokens in zip(streams, new, strict=True)]
        for row, text in enumerate(streams):
            if text.stopped:
                generation.end(row)
    yield [text.end() for text in streams]


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    config: ModelConfig,
    params: transformer.Parameters,
    tokens_BT: jax.Array,
    interventions: Interventions | None,
) -> jax.Array:
    model = transformer.bind(config, params)
    if interventions is None:
        return model(tokens_BT)
    changes = interventions.changes(config)
    h_BTD, _ = model.hidden(tokens_BT, **changes._asdict(), edits=jnp.arange(config.n_layers))
    return model.logits(h_BTD)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits_and_activations(
    config: ModelConfig,
    wanted: tuple[str, ...],
    params: transformer.Parameters,
    tokens_BT: jax.Array,
    interventions: Interventions | None,
) -> tuple[jax.Array, SparseActivations, dict[str, jax.Array]]:
    model = transformer.bind(config, params)
    how = () if interventions is None else (interventions.changes(config), len(interventions.layer))
    h_BTD, neurons, others = capture_named(model, tokens_BT, wanted, *how)
    return model.logits(h_BTD), neurons, others
