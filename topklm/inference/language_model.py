"""A trained model with its tokenizer: `topklm.load` returns it, and people call it."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import html
import itertools
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import DTYPES, Config, ModelConfig
from topklm.data.tokenizer import Tokenizer
from topklm.errors import ArgumentError, UserError
from topklm.inference import forward
from topklm.inference.adaptive import AdaptiveK, with_topk_k
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.interventions import DEFAULT_MODE, Steer, entries_of, in_activations
from topklm.inference.kv_cache import Layers, by_layer
from topklm.inference.scheduler import Generation
from topklm.inference.sequence import Sampling, bucket, check_integer
from topklm.inference.steps import STEPS
from topklm.inference.tokens import (
    Row,
    Rows,
    TextStream,
    check_stop,
    documents,
    joined,
    read,
    rows_of,
    split_at_character,
)
from topklm.model import topk, transformer
from topklm.neurons import NeuronsFolder
from topklm.neurons.capture import (
    TOPK,
    ActivationCache,
    NamesFilter,
    all_hook_names,
    matching_hook_names,
    parse_hook_name,
)
from topklm.neurons.dictionary import check_coordinates
from topklm.neurons.display import ActiveNeurons
from topklm.neurons.store import Store
from topklm.storage.files import is_bucket

_STEPS_OF_A_STREAM = 4  # tokens between pieces of text that is shown while it is made
# A text, or token ids [T]: one row. Several texts, ids [B, T], or rows of ids: a batch.
Tokens = str | jax.Array | np.ndarray | Sequence


class Generated(NamedTuple):
    """A text that was made, as `generate` gives it, and its tokens; read again, it may be cut into others.

    Attributes:
        text: The text.
        tokens: int32[n], prompt and new ones, those of a stop string included; the separator that stands
            before a text is the first, one that was drawn at its end is left out.
    """

    text: str
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class LanguageModel:
    """A trained model with its tokenizer, ready to be called.

    Wherever it takes tokens, these are a text, with a separator before it as in training; token ids [T]; or a
    batch: ids [B, T], or a list of texts or of rows of ids. Rows that are shorter than others are padded on
    their right, where nothing can change the tokens before; `lengths` says how long they are. All but
    `generate` works inside `jax.jit`, `jax.vmap` and `jax.grad`, with ids and the values of interventions
    traced or not.

    Of the arguments that several methods take, `steer` and `steer_mode` are interventions on neurons, see
    `generate`, for which all tokens are the prompt. `topk_k` is the entries that each TopK keeps, as in
    training by default; another k is another program. `segment_ids`, integers of the tokens' shape, say which
    document each token belongs to: attention stays inside documents, and positions begin at 0 in each, as in
    training; by default a row is one document. A value that is not allowed raises ValueError, in one line.
    """

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
        m, leaves = self.config.model, jax.tree.leaves(self.params)
        devices = set().union(*(leaf.devices() for leaf in leaves))
        where = f"{len(devices)} devices" if len(devices) > 1 else str(devices.pop())
        kept = f"keeps {m.topk_k} of {m.d_model:,} neurons in the first {m.n_topk_layers} layers"
        facts = {
            "run": f"{self.run}, step {self.step:,}",
            "parameters": f"{sum(leaf.size for leaf in leaves):,} on {where}",
            "layers": f"{m.n_layers} of width {m.d_model:,}; {m.n_heads} heads, MLP {m.d_mlp:,} wide",
            "TopK": f"{kept} ({m.topk_activation})" if m.n_topk_layers else "none: a Base LM",
            "tokens": f"vocabulary of {m.vocab_size:,}; trained on windows of {m.context_length:,}",
        }
        rows = "".join(
            f'<tr><th scope="row" style="text-align:left">{name}</th>'
            f'<td style="text-align:left">{html.escape(fact)}</td></tr>'
            for name, fact in facts.items()
        )
        return f"<table>{rows}</table>"

    def __call__(
        self,
        tokens: Tokens,
        steer: Steer | None = None,
        steer_mode: str = DEFAULT_MODE,
        topk_k: int | None = None,
        segment_ids: Any = None,
    ) -> jax.Array:
        """Gives next-token logits, float32[B, T, V], of at most `context_length` tokens a row.

        Programs are compiled for a few lengths, to which rows are padded.
        """
        config, given, rows = self._input(tokens, segment_ids, steer, steer_mode, topk_k)
        return forward.cut(forward.logits(config, self.params, given), rows.ids.shape[1], axis=1)

    def loss(
        self,
        tokens: Tokens,
        *,
        per_token: bool = False,
        steer: Steer | None = None,
        steer_mode: str = DEFAULT_MODE,
        topk_k: int | None = None,
        segment_ids: Any = None,
    ) -> jax.Array:
        """Gives the mean next-token loss in nats, float32: of every token but the first of a document.

        With `per_token` it gives float32[B, T - 1], the loss of tokens 1 to T - 1 given those before; NaN
        where there is none: after the end of a row, and at the first token of a document. Raises ValueError
        where no row has two tokens.
        """
        config, given, rows = self._input(tokens, segment_ids, steer, steer_mode, topk_k)
        if rows.lengths.max() < 2:
            raise ArgumentError("no row has two tokens, so there is no loss", field="tokens")
        mean, losses = forward.losses(config, self.params, given, rows.lengths)
        return forward.cut(losses, rows.ids.shape[1] - 1, axis=1) if per_token else mean

    def run_with_cache(
        self,
        tokens: Tokens,
        names_filter: NamesFilter = None,
        steer: Steer | None = None,
        steer_mode: str = DEFAULT_MODE,
        topk_k: int | None = None,
        segment_ids: Any = None,
    ) -> tuple[jax.Array, ActivationCache]:
        """Gives next-token logits, float32[B, T, V], and what the layers computed on the way.

        `cache.neurons` holds the TopK layers in sparse form, `cache["blocks.0.hook_topk"]` is one made dense.
        `names_filter` says what is kept: a name such as "blocks.2.hook_resid_post" (all: `hook_names`),
        several, or a function that says of each name whether it is wanted. By default what the TopK layers
        keep, in sparse form; everything else takes B x T x D numbers for each name. Outputs of layers are
        kept as `steer` leaves them.
        """
        config, given, rows = self._input(tokens, segment_ids, steer, steer_mode, topk_k)
        wanted = matching_hook_names(config, names_filter)
        logits, neurons, others = forward.logits_and_activations(config, wanted, self.params, given)
        length = rows.ids.shape[1]
        neurons = jax.tree.map(lambda x: forward.cut(x, length, axis=2), neurons)
        others = {name: forward.cut(x, length, axis=1) for name, x in others.items()}
        layers = tuple(layer for layer, hook in map(parse_hook_name, wanted) if hook == TOPK)
        cache = ActivationCache(neurons, layers, others, self.hook_names)
        return forward.cut(logits, length, axis=1), cache

    def active_neurons(self, tokens: Tokens) -> ActiveNeurons:
        """Finds the active neurons of each token of one text; notebook and terminal show a table."""
        rows, _ = self._rows(tokens)
        if len(rows) > 1:
            raise ArgumentError(f"{len(rows)} texts; must be one, or its token ids", field="tokens")
        _, cache = self.run_with_cache(rows[0].ids)
        return ActiveNeurons.of(self.tokenizer.token_strings(rows[0].ids), cache.neurons)

    def run_with_hooks(
        self,
        tokens: Tokens,
        fwd_hooks: forward.ForwardHooks = (),
        steer: Steer | None = None,
        steer_mode: str = DEFAULT_MODE,
        topk_k: int | None = None,
        segment_ids: Any = None,
    ) -> jax.Array:
        """Gives next-token logits, float32[B, T, V], with functions called on the way: for free research.

        Nothing is compiled as a whole, unless it is called inside `jax.jit`: the functions see arrays, not
        tracers, and may do anything. That is slow; use `steer` for everything that it can do.

        `fwd_hooks` are (name, fn) each, the name one of `hook_names`, or a function that says of each whether
        it is meant; fn(array [B, T, D], name) returns what takes the array's place, or None. The name also
        has `.name` and `.layer()`. Of a layer they come in the order of `hook_names`; of one name, in this
        order, and after `steer`. Raises ValueError for another name, and for a result of another shape.
        """
        config, given, _ = self._input(tokens, segment_ids, steer, steer_mode, topk_k, fill=False)
        return forward.run_with_hooks(config, self.params, given, fwd_hooks)

    def generate(
        self,
        prompt: Tokens,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        seed: int = 0,
        *,
        n: int = 1,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        steer: Steer | None = None,
        steer_mode: str = DEFAULT_MODE,
        topk_k: int | None = None,
        adaptive: AdaptiveK | None = None,
        when_full: str = "slide",
        return_tokens: bool = False,
    ) -> str | Generated | list[str] | list[Generated] | Iterator[str]:
        """Continues prompts: gives prompt and continuation as one string, a list of them for several.

        A text of a list is what it would be alone, with the same seed.

        Args:
            prompt: Text that begins a document, and may be empty; token ids; or a batch of either.
            max_new_tokens: Upper bound on the continuation's length, tokens.
            temperature: Divides the logits; 0 takes the most likely token each time.
            seed: The same seed gives the same text.
            n: Samples of each prompt, with different random numbers, the first one that of n = 1. They stand
                together in the list.
            top_k: Only the k most likely tokens are drawn from; None or 0: all.
            top_p: Only the fewest most likely tokens whose probabilities sum to this or more.
            min_p: Only tokens at least this fraction as probable as the most likely one.
            repetition_penalty: See `Sampling`.
            stop: The continuation is cut before the first of these texts to appear in it.
            stream: Give an iterator over pieces of the continuation, as they come, which together are the
                text without the prompt. No piece ends inside a character. For one prompt only.
            steer: Interventions on neurons: {(layer, neuron): value} or {"LAYER:NEURON": value}, or one or
                several `Intervention`, or `InterventionBatch`. Their `row` counts the texts that are made. A
                value "0.7x" is 0.7 times the neuron's largest activation, see `largest_activation`.
            steer_mode: Of the values of a mapping, one of the modes of `Intervention`.
            topk_k: Entries that each TopK keeps; default as in training.
            adaptive: More of them at tokens where the model is uncertain, see `AdaptiveK`.
            when_full: Beyond the model's context, "slide": it sees the last `context_length` tokens, run
                again for each further token; "halve": when the context is full, its older half is forgotten,
                which is faster; "stop": the text ends, and a prompt that does not fit is refused.
            return_tokens: Give `Generated`, the text with its tokens.

        Raises:
            ValueError: For a value that is not allowed, in one line: name, value, what is.
        """
        check_integer("n", n, "an integer, 1 or more", 1)
        if isinstance(prompt, list | tuple) and not prompt:
            return []
        given, is_batch = self._rows(prompt, name="prompt")
        is_list = is_batch or n > 1
        if stream and (is_list or return_tokens):
            allowed = "False for a list of prompts, several samples, or their tokens"
            advice = "stream one text at a time"
            raise ArgumentError(field="stream", value=True, allowed=allowed, advice=advice)
        prompts = [row for row in given for _ in range(n)]
        sampling = Sampling(temperature, top_k or 0, top_p, min_p, repetition_penalty, seed)
        config, interventions = self._asked(len(prompts), steer, steer_mode, topk_k)
        generation = Generation(
            config,
            self.params,
            [row.ids for row in prompts],
            [dataclasses.replace(sampling, index=index) for _ in given for index in range(n)],
            max_new_tokens=[max_new_tokens] * len(prompts),
            stop_token=self.tokenizer.separator_id,
            interventions=interventions,
            adaptive=adaptive,
            when_full=when_full,
            layers=self.decode_layers,
        )
        stop = check_stop(stop)
        begun = [self._begun(row, stop) for row in prompts]
        streams = [text for _, text in begun]
        if stream:
            # Alone, the first token need not wait for others.
            steps = itertools.chain([1], itertools.repeat(_STEPS_OF_A_STREAM))
            return (piece for (piece,) in _pieces(generation, streams, steps) if piece)
        parts = list(_pieces(generation, streams, itertools.repeat(STEPS)))
        texts = [shown + "".join(pieces[row] for pieces in parts) for row, (shown, _) in enumerate(begun)]
        if not return_tokens:
            return texts if is_list else texts[0]
        made = [
            Generated(text, np.array(tokens[: stream.n_tokens], np.int32))
            for text, stream, tokens in zip(texts, streams, generation.texts, strict=True)
        ]
        return made if is_list else made[0]

    def to_tokens(
        self, tokens: Tokens, prepend_separator: bool = True, *, prepend_bos: bool | None = None
    ) -> jax.Array:
        """Makes token ids int32[B, T], shorter rows padded with separators, see `lengths`.

        A separator stands before texts, as it does in training, unless `prepend_separator`, or the same as
        TransformerLens calls it, is False.
        """
        rows, _ = self._rows(tokens, prepend_separator if prepend_bos is None else prepend_bos)
        return jnp.asarray(joined([row.ids for row in rows], self.tokenizer.separator_id).ids)

    def lengths(
        self, tokens: Tokens, prepend_separator: bool = True, *, prepend_bos: bool | None = None
    ) -> np.ndarray:
        """Counts the tokens of each row, int32[B]; `to_tokens` fills rows up after them."""
        rows, _ = self._rows(tokens, prepend_separator if prepend_bos is None else prepend_bos)
        return np.array([len(row.ids) for row in rows], np.int32)

    def to_str_tokens(
        self, tokens: Tokens, prepend_separator: bool = True, *, prepend_bos: bool | None = None
    ) -> Any:
        """Cuts a text, or ids [T] or [1, T], into pieces, a list of str; a batch, into a list of lists."""
        rows, _ = self._rows(tokens, prepend_separator if prepend_bos is None else prepend_bos)
        pieces = [self.tokenizer.token_strings(row.ids) for row in rows]
        is_list = len(rows) > 1 or (not isinstance(tokens, str) and rows[0].text is not None)
        return pieces if is_list else pieces[0]

    def to_string(self, tokens: Tokens) -> Any:
        """Gives the text of ids [T], or of one id; of [B, T], a list. Separators are shown as nothing."""
        one = np.ndim(tokens) == 0 if hasattr(tokens, "__array__") else isinstance(tokens, int)
        rows, is_batch = rows_of([tokens] if one else tokens, self.cfg.vocab_size, None)
        texts = [self.tokenizer.decode(row.ids) for row in rows]
        return texts if is_batch else texts[0]

    def to_single_token(self, text: str) -> int:
        """Gives the id of a text that is one token; raises ValueError for another text."""
        (row, *more), is_batch = self._rows(text, separator=False)
        if is_batch or more or len(row.ids) != 1:
            pieces = self.tokenizer.token_strings(row.ids)
            raise ArgumentError(
                field="text", value=short(text), allowed=f"one token, not {len(pieces)}: {short(pieces)}"
            )
        return int(row.ids[0])

    def to_single_str_token(self, token: int) -> str:
        """Gives the piece of text that an id stands for."""
        return self.tokenizer.token_strings(rows_of([token], self.cfg.vocab_size, None)[0][0].ids)[0]

    @property
    def cfg(self) -> ModelConfig:
        """Gives the model's shape, `config.model`."""
        return self.config.model

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Names what can be captured and hooked, in the order of computation; see `neurons.capture`."""
        return all_hook_names(self.cfg)

    @property
    def W_E(self) -> jax.Array:  # noqa: N802 - as in TransformerLens
        """Gives the embedding, [V, D]."""
        return self.params["embed"]["embedding"][: self.cfg.vocab_size]

    @property
    def W_U(self) -> jax.Array:  # noqa: N802 - as in TransformerLens
        """Gives the unembedding, [D, V], after the final norm; a column is a token's direction."""
        return transformer.bind(self.cfg, self.params).unembedding()[:, : self.cfg.vocab_size]

    def astype(self, dtype: Any) -> "LanguageModel":
        """Makes the same model in float32 or bfloat16, computation and matrices; norms stay float32."""
        name = dtype_name(dtype)

        def cast(path: tuple, leaf: jax.Array) -> jax.Array:
            return leaf if path[-1].key == "scale" else leaf.astype(name)

        config = dataclasses.replace(self.config, model=dataclasses.replace(self.cfg, dtype=name))
        return dataclasses.replace(self, config=config, params=jax.tree.map_with_path(cast, self.params))

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is made of the parameters."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def decode_layers(self) -> Layers:
        """Gives the copy of the blocks' parameters that decoding reads, see `by_layer`."""
        return by_layer(self.config.model, self.params)

    def _encode(self, text: str, separator: bool = True) -> np.ndarray:
        """Gives the ids of a text, int[n]."""
        ids = self.tokenizer.encode(text)
        return np.concatenate([[self.tokenizer.separator_id], ids]) if separator else ids

    def _rows(self, tokens: Tokens, separator: bool = True, name: str = "tokens") -> tuple[list[Row], bool]:
        """Reads rows that are known, and whether they are a batch."""
        encode = functools.partial(self._encode, separator=separator)
        return rows_of(tokens, self.cfg.vocab_size, encode, name)

    def _input(
        self,
        tokens: Tokens,
        segment_ids: Any,
        steer: Steer | None,
        steer_mode: str,
        topk_k: int | None,
        fill: bool = True,
    ) -> tuple[ModelConfig, forward.Input, Rows]:
        """Makes what a program runs of what was given, filled up to one of a few lengths, and tells both."""
        separator, context = self.tokenizer.separator_id, self.cfg.context_length
        rows = read(tokens, self.cfg.vocab_size, self._encode, separator)
        batch, length = rows.ids.shape
        if length > context:
            text = f"a row has {length} tokens: must be at most {context}, the model's context; cut it"
            raise ArgumentError(text, field="tokens")
        segments = None if segment_ids is None else documents(segment_ids, (batch, length))
        added = bucket(length, context) - length if fill else 0
        ids, segments = jax.tree.map(lambda x: forward.padded(x, added, separator), (rows.ids, segments))
        config, interventions = self._asked(batch, steer, steer_mode, topk_k)
        return config, forward.Input(ids, segments, interventions), rows

    def _asked(
        self, n_rows: int, steer: Steer | None, steer_mode: str, topk_k: int | None
    ) -> tuple[ModelConfig, InterventionBatch | None]:
        """Gives the model's shape with the k that is asked for, and interventions on so many texts."""
        config = topk.for_parameters(with_topk_k(self.cfg, topk_k), self.params)
        if steer is None:
            return config, None
        if not isinstance(steer, InterventionBatch):
            entries = entries_of(steer, steer_mode)
            steer = [in_activations(one, self.largest_activation) for one in entries]
        return config, InterventionBatch.of(config, steer, steer_mode, n_rows)

    def largest_activation(self, layer: int, neuron: int) -> float:
        """Gives a neuron's largest harvested activation, "1x" of `steer`; UserError if there is none."""
        return self._harvested.largest_activation(layer, neuron)

    @functools.cached_property
    def _harvested(self) -> Store:
        if is_bucket(self.run):
            text = "activations are kept on a disk, and values such as 0.7x need them; copy the run to one"
            raise ArgumentError(text, field="run", value=self.run)
        store = Store.of_step(NeuronsFolder(Path(self.run), self.step))
        check_coordinates(store.metadata.dictionary, "steering")
        if store.metadata.tokenizer_sha256 != self.tokenizer.sha256:
            raise UserError(f"{store.folder} is of another model: delete it, and harvest again")
        return store

    def _begun(self, prompt: Row, stop: Sequence[str]) -> tuple[str, TextStream]:
        """Gives the text of a prompt, and the stream of its continuation."""
        ids = prompt.ids.tolist()
        shown, rest = split_at_character(self.tokenizer, ids) if prompt.text is None else (prompt.text, [])
        stream = TextStream(self.tokenizer, ids[: len(ids) - len(rest)], stop)
        return shown + stream.add(rest), stream


def dtype_name(dtype: Any) -> str:
    """Gives the name of a dtype that models compute in, also of JAX's and NumPy's; UserError for another."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    return name


def _pieces(
    generation: Generation, streams: Sequence[TextStream], steps: Iterator[int]
) -> Iterator[list[str]]:
    """Yields the text of every row piece by piece, each of as many tokens as `steps` says."""
    while not generation.done:
        new = generation.advance(next(steps))
        yield [text.add(tokens) for text, tokens in zip(streams, new, strict=True)]
        for row, text in enumerate(streams):
            if text.stopped:
                generation.end(row)
    yield [text.end() for text in streams]
