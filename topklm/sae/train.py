"""Trains sparse autoencoders on hidden states, those of several layers side by side.

The source gives batches of hidden states [S, N, D]; neighbouring batches are mixed, so that a minibatch is
not one document, and cut into minibatches. A batch's tokens that are no text are replaced by others of the
group. Layers do not see each other. Between two groups the whole state can be written to a file, from which
training goes on with the same bits. Several processes take the same steps on parts of each minibatch, by one
program; the first writes. Dims: S layers, N tokens of a batch, G of a group, D d_model, M codes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import functools
import hashlib
import io
import itertools
import json
from pathlib import Path
import signal
import time
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax

from topklm import distributed
from topklm.errors import UserError, disk_errors_are_user_errors
from topklm.layout import BATCH_AXES, ROWS, Layout, one_device
from topklm.neurons import check_begun_with, damage_is_a_user_error
from topklm.neurons.dictionary import Dictionary
from topklm.runtime.process import StopRequest
from topklm.sae import kinds
from topklm.sae.devices import Devices
from topklm.sae.kinds import Arrays, SaeConfig
from topklm.storage.files import parse_json, write_atomically

# Hidden states float[S, N, D], or those and which of the tokens are text, bool[N]; of several processes each
# gives arrays over the devices of all, or the same NumPy arrays.
Batch = Any
# Batches in order; or a function that gives them from the one of a number, for which none is read in vain.
Source = Iterable[Batch] | Callable[[int], Iterable[Batch]]

LAST = 0.2  # share of the tokens in which a code has to be active once not to count as dead
_MIXED = 8  # batches, at most
_MIXED_BYTES = 2**30  # of float32 hidden states, at most, unless one batch has more
_ADAM = optax.scale_by_adam(0.9, 0.999, 6.25e-10)  # Gao et al.'s
_WARMUP, _DECAY = 0.05, 0.2  # shares of the steps, at both ends
_DEAD_TOKENS = 10_000_000  # Gao et al.'s, of text that is ten times as long, or longer
_SPARSE_SHARE = 1 / 64  # of codes kept by topk, at most, for products with those alone (measured on AVX-512)

_LAYERS_OF_TOKENS = PartitionSpec(None, BATCH_AXES)


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """Trained autoencoders, and how training went."""

    dictionary: Dictionary
    # One entry for each group: `tokens` so far, and lists over layers of `mse` (in shares of the variance of
    # the first group), `explained_variance`, `l0` and `dead`, during training.
    history: list[dict[str, Any]]
    dead: np.ndarray  # bool[S, M], not active in the last fifth of the tokens


@dataclasses.dataclass(frozen=True)
class Saving:
    """A file that holds the state of training, and what it is of."""

    path: Path
    facts: Mapping[str, Any]  # by flag, of the hidden states; JSON-able; those of the file must be the same
    resume: bool = False
    every_s: float = 60.0
    stop: StopRequest | None = None  # to any of the processes, on which all save, and raise `Stopped`


class Stopped(Exception):  # noqa: N818 - named for what happened
    """Training was asked to stop, and its state is saved; the text says after how many tokens."""


def fit(
    config: SaeConfig,
    states: Source,
    n_batches: int,
    *,
    seed: int = 0,
    start: Dictionary | None = None,
    layout: Layout | None = None,
    saving: Saving | None = None,
    keep_state: bool = False,
    report: Callable[[int], None] = lambda tokens: None,
) -> Fitted:
    """Trains autoencoders of each layer on so many batches, all of one shape.

    Training begins at random by the seed; or at `start`, a dictionary of the same kind with as many codes or
    fewer. Minibatches are split over the devices of `layout`, by default one. The state is saved on the way
    as `saving` says, with `keep_state` also at the end. `report` is told of tokens that are done.

    Raises:
        UserError: For hidden states or errors that are not finite, a source that ends early, a state of
            other training, and a process of several that was asked for other training.
        Stopped: As `saving` says.
    """
    layout = layout or one_device()
    if config.minibatch % layout.size:
        allowed = f"a multiple of the {layout.size} devices"
        raise UserError(field="--minibatch", value=config.minibatch, allowed=allowed)
    training = _Training(config, n_batches, seed, layout, saving)
    if layout.is_shared and saving:
        distributed.check_same(training.settings)
    n_done = training.resume() if saving and saving.resume else 0
    report(n_done * training.n_tokens)
    found = states(n_done) if callable(states) else itertools.islice(states, n_done, None)
    waiting: tuple[int, int, Any] | None = None  # a group whose figures are not fetched yet
    for first, batches in _groups(found, n_done, n_batches):
        if training.state is None:
            training.begin(batches, start)
        figures = training.run(first, batches)
        if waiting:
            report(training.add(*waiting))
        waiting = first, len(batches), figures
        # Asked for before this group: all processes have heard of it by now, whichever has saved in between.
        is_asked = training.is_asked_to_stop
        if saving and (is_asked or time.monotonic() > training.next_save):
            report(training.add(*waiting))
            waiting = None
            training.save(first + len(batches))
        if is_asked:
            done, of = ((first + len(batches)) * training.n_tokens, n_batches * training.n_tokens)
            raise Stopped(f"stopped after {done:,} of {of:,} tokens")
    if waiting:
        report(training.add(*waiting))
        if keep_state:
            training.save(n_batches)
    return training.result()


def _groups(found: Iterable[Batch], n_done: int, n_batches: int) -> Iterator[tuple[int, list[Batch]]]:
    """Yields the number of a group's first batch, and its batches."""
    batches, number = iter(found), n_done
    while number < n_batches:
        group = list(itertools.islice(batches, 1))
        if group:
            states = group[0][0] if isinstance(group[0], tuple) else group[0]
            mixed = max(1, min(_MIXED, _MIXED_BYTES // (4 * states.size)))
            group += itertools.islice(batches, min(mixed, n_batches - number) - 1)
        if not group or len(group) < min(mixed, n_batches - number):
            there = number + len(group)
            raise UserError(f"the hidden states end after {there:,} of {n_batches:,} batches: give more text")
        yield number, group
        number += len(group)


class _Training:
    """The state of training, on the devices, and the compiled program of a group."""

    def __init__(self, config: SaeConfig, n_batches: int, seed: int, layout: Layout, saving: Saving | None):
        self.state: dict[str, Any] | None = None
        self.next_save = time.monotonic() + (saving.every_s if saving else 0)
        self.is_asked_to_stop = False
        self.history: list[dict[str, Any]] = []
        self._config, self._n_batches, self._seed = config, n_batches, seed
        self._layout, self._saving = layout, saving
        self.n_tokens = 0  # of a batch; 0 before there is one

    def begin(self, batches: list[Batch], start: Dictionary | None) -> None:
        """Makes the state from the first group."""
        x_SGD, texts_G = self._put(batches)
        n_layers, width = len(x_SGD), self._config.width
        n_tokens = self._n_batches * self.n_tokens
        dead_after = self._config.dead_tokens or min(_DEAD_TOKENS, n_tokens // 10)
        rows = jax.random.normal(jax.random.key(self._seed), (n_layers, width, x_SGD.shape[2]))
        self.state = _begin(self._config, np.asarray(rows), x_SGD, texts_G, max(dead_after, 1))
        self.state = jax.device_put(self.state, self._layout.replicated)
        if start is not None:
            self.state = _continued(self._config, start, self.state)
        steps = self._n_batches * max(1, self.n_tokens // self._config.minibatch)
        self.state["total"] = np.full(n_layers, steps, np.int32)
        self.state["optimizer"] = jax.vmap(_ADAM.init)(self.state["params"])
        self.state = jax.device_put(self.state, self._layout.replicated)

    def _put(self, batches: list[Batch]) -> tuple[jax.Array, jax.Array]:
        """Returns the group's hidden states [S, G, D], split by token, and which are text, bool[G]."""
        parts = [batch if isinstance(batch, tuple) else (batch, None) for batch in batches]
        self.n_tokens = parts[0][0].shape[1]
        is_split = self.n_tokens % self._layout.size == 0
        spec = _LAYERS_OF_TOKENS if is_split else PartitionSpec()
        to = NamedSharding(self._layout.mesh, spec)
        texts = [np.ones(x.shape[1], bool) if text is None else text for x, text in parts]
        states = jax.device_put([x for x, _ in parts], to)
        return _joined(states), _joined_texts(self._layout.replicated, texts)

    def run(self, first: int, batches: list[Batch]) -> Any:
        """Trains on a group; returns its figures, which may not be computed yet."""
        x_SGD, texts_G = self._put(batches)
        size = min(self._config.minibatch, self.n_tokens)
        n_steps = max(1, len(texts_G) // size)
        key = jax.random.fold_in(jax.random.key(self._seed), first)
        is_alone, config = self._layout.size == 1, self._config
        sparse = self._layout.platform == "cpu" and config.k <= config.width * _SPARSE_SHARE
        on = Devices(is_alone and sparse, None if is_alone or size % self._layout.size else self._layout.mesh)
        settings = config, n_steps, size, on, self._layout.replicated
        asked, stop = None, self._saving.stop if self._saving else None
        if stop is not None:
            number = signal.Signals[stop.signal_name].value if stop.signal_name else 0
            asked = self._layout.one_per_device(number)
        self.state, figures = _train_group(settings, self.state, x_SGD, texts_G, key, asked)
        if stop is not None:
            stop.begin_training()
        return figures

    def add(self, first: int, n: int, figures: Any) -> int:
        """Adds a group's figures to the history; returns the group's tokens. UserError if not finite."""
        found = {name: np.asarray(array) for name, array in figures.items()}
        if number := int(found.pop("asked", 0)):
            assert self._saving is not None and self._saving.stop is not None
            self._saving.stop.request(signal.Signals(number).name)
            self.is_asked_to_stop = True
        tokens = (first + n) * self.n_tokens
        if bad := np.flatnonzero(~np.isfinite(found["mse"])).tolist():
            why = "the hidden states are not finite"
            if np.isfinite(found["scatter"][bad]).all():
                why = f"training diverged; give a lower --learning-rate than {self._config.learning_rate:g}"
            where = ", ".join(map(str, bad))
            raise UserError(f"autoencoder {where} of {len(found['mse'])}, by {tokens:,} tokens: {why}")
        with np.errstate(divide="ignore", invalid="ignore"):
            explained = 1 - found["mse"] / found["scatter"]
        columns = {"mse": found["mse"], "explained_variance": explained, "l0": found["l0"]}
        entry = {name: [round(float(x), 6) for x in column] for name, column in columns.items()}
        self.history.append({"tokens": tokens, **entry, "dead": found["dead"].tolist()})
        return n * self.n_tokens

    def result(self) -> Fitted:
        """Fetches the autoencoders, for hidden states as they are, not scaled."""
        assert self.state is not None
        state = jax.tree.map(np.asarray, self.state)
        arrays = kinds.as_arrays(self._config, state["params"], state["memory"])
        scale_S1 = state["scale"][:, None]
        for name in ("centre", "bias", "threshold"):
            if (array := arrays[name]) is not None:
                arrays[name] = array * scale_S1
        made = {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items() if x is not None}
        dictionary = Dictionary(
            self._config.dictionary_kind,
            self._config.k,
            made["centre"],
            made["encoder"],
            made["decoder"],
            bias=made.get("bias"),
            threshold=made.get("threshold"),
        )
        n_last = max(1, int(LAST * self._n_batches * self.n_tokens))
        return Fitted(dictionary, self.history, state["memory"]["idle"] >= n_last)

    @property
    def settings(self) -> dict[str, Any]:
        """All that makes this training another one than others, by flag; JSON-able."""
        assert self._saving is not None
        flags = {f"--{name.replace('_', '-')}": x for name, x in dataclasses.asdict(self._config).items()}
        return {**flags, "--seed": self._seed, "batches": self._n_batches, **self._saving.facts}

    def save(self, n_done: int) -> None:
        """Writes the state after so many batches, in the first process."""
        assert self._saving is not None
        about = {"settings": self.settings, "done": n_done, "tokens": self.n_tokens}
        about["history"] = self.history
        if distributed.is_primary():
            leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.state))}
            to = io.BytesIO()
            np.savez(to, about=np.array(json.dumps(about)), **leaves)  # type: ignore[arg-type]
            with disk_errors_are_user_errors(f"writing {self._saving.path}"):
                write_atomically(self._saving.path, to.getvalue())
        self.next_save = time.monotonic() + self._saving.every_s

    def resume(self) -> int:
        """Reads the state; returns how many batches are done. UserError for no file, or one of others."""
        assert self._saving is not None
        path = self._saving.path
        if not path.exists():
            raise UserError(
                f"--resume: {path} is missing, so there is nothing to go on from: leave --resume out"
            )
        with damage_is_a_user_error(
            path, "delete it, and begin again", KeyError, EOFError, RuntimeError, zipfile.BadZipFile
        ):
            with np.load(path, allow_pickle=False) as found:
                about = parse_json(str(found["about"]))
                leaves = [found[str(i)] for i in range(len(found.files) - 1)]
            check_begun_with(path, about["settings"], self.settings)
            self.n_tokens, self.history = about["tokens"], about["history"]
            state = jax.tree.unflatten(jax.tree.structure(_shape_of_state(self._config)), leaves)
        if self._layout.is_shared:
            distributed.check_same({str(path): hashlib.sha256(json.dumps(about).encode()).hexdigest()})
        self.state = jax.device_put(state, self._layout.replicated)
        return about["done"]


def _shape_of_state(config: SaeConfig) -> dict[str, Any]:
    """Makes a state whose structure is that of any."""

    def make() -> dict[str, Any]:
        rows, x = jnp.ones((1, config.width, 2)), jnp.ones((1, 2, 2))
        state = _begin(config, rows, x, jnp.ones(2, bool), 1)
        optimizer = jax.vmap(_ADAM.init)(state["params"])
        return state | {"optimizer": optimizer, "total": jnp.ones(1, jnp.int32)}

    return jax.eval_shape(make)


@jax.jit
def _joined(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _joined_texts(replicated: NamedSharding, parts: list[jax.Array]) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.concatenate(parts), replicated)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _begin(
    config: SaeConfig, rows_SMD: jax.Array, x_SGD: jax.Array, texts_G: jax.Array, dead_after: int
) -> dict[str, Any]:
    """Makes the state of all layers but for the optimizer's; their scale is that of these hidden states."""
    n = jnp.maximum(jnp.sum(texts_G), 1)

    def mean(x_SGD: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(texts_G[:, None], x_SGD, 0), axis=1) / n

    centre_SD = mean(x_SGD)
    scale_S = jnp.sqrt(jnp.mean(mean(jnp.square(x_SGD - centre_SD[:, None])), axis=1))
    scale_S = jnp.where(scale_S > 0, scale_S, 1.0)
    some = _order(texts_G, jax.random.key(0), min(len(texts_G), 4096))
    x_SGD = x_SGD[:, some] / scale_S[:, None, None]
    make = functools.partial(kinds.begin, config, dead_after=dead_after)
    params, memory = jax.vmap(make)(_unit(rows_SMD), centre_SD / scale_S[:, None], x_SGD)
    steps = jnp.zeros(len(x_SGD), jnp.int32)
    return {"params": params, "memory": memory, "scale": scale_S, "step": steps}


def _continued(config: SaeConfig, start: Dictionary, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state with the parameters of a dictionary, scaled, in place of its own.

    Codes that the dictionary lacks stay random, with encoder rows of length 0.1 (as in 2505.11756).
    """
    params, memory = dict(state["params"]), dict(state["memory"])
    n_layers, width = start.decoder.shape[:2]
    is_one = start.members == 1 and start.kind == config.dictionary_kind and config.kind != "gba"
    if not is_one or width > config.width or params["decoder"].shape[::2] != start.decoder.shape[::2]:
        wanted = f"{config.kind} autoencoders of at most {config.width} codes, not gba, of the same states"
        raise UserError(f"training goes on from {wanted}, not from {start.description}")
    scale = np.asarray(state["scale"])[:, None]
    there = {"encoder": np.swapaxes(start.encoder, 1, 2), "decoder": start.decoder}
    there["bias"] = np.zeros((n_layers, width)) if start.bias is None else start.bias / scale
    params["encoder"] = 0.1 * params["encoder"]
    if "threshold" in params and start.threshold is not None:
        there["threshold"] = start.threshold / scale
    for name, array in there.items():
        params[name] = params[name].at[:, :width].set(jnp.asarray(array, jnp.float32))
    params["centre"] = jnp.asarray(start.centre / scale, jnp.float32)
    if "least" in memory and start.threshold is not None:
        memory["least"] = jnp.asarray(start.threshold[:, 0] / scale[:, 0], jnp.float32)
    return {**state, "params": params, "memory": memory}


def learning_rate(config: SaeConfig, step: jax.Array, total: jax.Array) -> jax.Array:
    """Returns that of a step: rises over a twentieth of the steps, and falls to 0 over the last fifth."""
    warmup, decay = (jnp.floor(share * total) for share in (_WARMUP, _DECAY))
    share = jnp.minimum((step + 1) / (warmup + 1), (total - step) / jnp.maximum(decay, 1))
    return config.learning_rate * jnp.clip(share, 0, 1)


def _order(texts_G: jax.Array, key: jax.Array, n: int) -> jax.Array:
    """Draws int[n], tokens in a random order, each once before one comes again; only text."""
    drawn = jnp.where(texts_G, jax.random.uniform(key, texts_G.shape), 2)
    return jnp.argsort(drawn)[jnp.arange(n) % jnp.maximum(jnp.sum(texts_G), 1)]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _train_group(
    settings: tuple,
    state: dict[str, Any],
    x_SGD: jax.Array,
    texts_G: jax.Array,
    key: jax.Array,
    asked: jax.Array | None,
) -> tuple[dict[str, Any], Arrays]:
    """Takes the steps of a group; returns the state, and figures over the group, float32[S] each.

    `asked` are signals to stop that came to the processes, or 0, an element on each device; one that did is
    among the figures.
    """
    config, n_steps, size, on, replicated = settings
    order = _order(texts_G, key, n_steps * size).reshape(n_steps, size)

    def of_layer(layer: tuple[dict[str, Any], jax.Array]) -> tuple[dict[str, Any], Arrays]:
        state, x_GD = layer

        def step(carry: dict[str, Any], tokens: jax.Array) -> tuple[dict[str, Any], tuple]:
            x_ND = x_GD[tokens] / carry["scale"]
            if on.mesh is not None:
                x_ND = jax.lax.with_sharding_constraint(x_ND, NamedSharding(on.mesh, ROWS))
            return _step(config, on, carry, x_ND)

        state, (errors, l0) = jax.lax.scan(step, state, order)
        used_GD = x_GD[order.reshape(-1)]
        apart = (used_GD - jnp.mean(used_GD, axis=0)) / state["scale"]
        memory = state["memory"]
        figures = {"mse": jnp.mean(errors), "l0": jnp.mean(l0), "scatter": jnp.mean(jnp.square(apart))}
        figures["dead"] = jnp.sum(memory["idle"] >= memory["dead_after"])
        return state, figures

    # One after another: each layer's products are large enough by themselves, and its state stays in cache.
    found = jax.lax.map(of_layer, (state, x_SGD))
    if asked is not None:
        found[1]["asked"] = jnp.max(asked)
    return jax.lax.with_sharding_constraint(found, replicated)  # each process reads all


def _step(
    config: SaeConfig, on: Devices, state: dict[str, Any], x_ND: jax.Array
) -> tuple[dict[str, Any], tuple[jax.Array, jax.Array]]:
    """Takes one step of one layer; returns the error and the codes of a token too."""
    params, memory = state["params"], state["memory"]
    share = jnp.minimum(1.0, state["step"] / jnp.maximum(1, config.warmup * state["total"]))
    loss = functools.partial(kinds.KINDS[config.kind].loss, config)

    def of(params: Arrays) -> tuple[jax.Array, kinds.Seen]:
        return loss(params, memory, x_ND, config.coefficient * share, on)

    gradients, seen = jax.grad(of, has_aux=True)(params)
    rows = "decoder" if "decoder" in params else "encoder"  # of unit length
    # Along a row a step would be undone by scaling: Adam is not to see that part.
    along = jnp.sum(gradients[rows] * params[rows], axis=1, keepdims=True)
    gradients[rows] = gradients[rows] - along * params[rows]
    updates, optimizer_state = _ADAM.update(gradients, state["optimizer"], params)
    rate = learning_rate(config, state["step"], state["total"])
    params = {name: array - rate * updates[name] for name, array in params.items()}
    params[rows] = _unit(params[rows])
    if "threshold" in params:
        # Below 0 it would let negative codes through; kept at 0 in the loss alone, it would not come back.
        params["threshold"] = jnp.maximum(params["threshold"], 0)
    memory = kinds.remember(config, memory, seen, len(x_ND), x_ND.shape[1])
    changed = {"params": params, "memory": memory, "optimizer": optimizer_state, "step": state["step"] + 1}
    return state | changed, (seen.error, seen.l0)


def _unit(rows: jax.Array) -> jax.Array:
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
