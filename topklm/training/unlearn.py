"""Unlearns a text: fine-tunes a model so that it no longer serves one text, and serves another as before.

After SSPU (Wang et al. 2025, arXiv 2505.24428), whose loss is RMU's (Li et al. 2024, arXiv 2403.03218). With
h the state that layer l hands on, h0 that of the model as it was, and squares summed over coordinates and
averaged over tokens,

    |h(forget) - c u|^2 + alpha |h(retain) - h0(retain)|^2

u is a random vector, uniform in [0, 1) as RMU's, that is 0 at the chosen neurons of layer l and has length
1. SSPU keeps updates in the subspace of chosen SAE latents by a penalty; here decoder vectors are
coordinates, so the subspace is a mask of parameters (`only.neuron_mask`), and holds exactly. Beside it:
gradient ascent, the loss of retain less that of forget. Every fine-tuning has a budget, the rise of the
loss of retain documents that it does not train on: where a look finds it exceeded, the steps since the last
look are taken back, and the learning rate is halved. So all may cost the same, whatever rate suits them.
Dims: B rows, T tokens, D coordinates, L layers, G documents.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topklm.config import ModelConfig
from topklm.errors import disk_errors_are_user_errors
from topklm.eval import scoring
from topklm.eval import tasks as tasks_lib
from topklm.eval.tasks import Figure, TokenizedTask
from topklm.inference.interventions import Intervention
from topklm.model import transformer
from topklm.model.block import LayerHooks
from topklm.model.losses import token_losses
from topklm.neurons import check_begun_with, damage_is_a_user_error
from topklm.neurons.ablate_set import AblatedLosses, Estimate, Neuron, estimate
from topklm.neurons.documents import TextModel
from topklm.storage.files import parse_json, write_atomically
from topklm.training import only

_CHECK_EVERY = 4  # steps between two looks at the budget
_HALVINGS = 8  # of the learning rate, at most
_WATCHED = 4  # of the retain documents of the first half, each so many-th is watched and not trained on
_MOST_WATCHED = 8  # rows, at each look
SSPU, ASCENT, RELEARN = "sspu", "ascent", "relearn"  # losses

Rows = tuple[np.ndarray, ...]  # tokens, segment ids, positions int32[B, T], and bool[B, T]: read, not context
Report = Callable[[int], None]  # told of the steps that are done since the last time


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to unlearn."""

    name: str
    loss: str | None  # None: neurons are set to 0 and nothing is trained
    neurons: tuple[Neuron, ...] = ()
    is_masked: bool = False  # whether the parameters of the neurons alone move


AS_IT_WAS = Method("as it was", None)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How models are fine-tuned."""

    layer: int  # l
    steps: int  # of each method, at most
    relearn_steps: int
    learning_rate: float  # of Adam, until it is halved
    relearning_rate: float  # likewise, constant
    batch_size: int  # rows of each text in a step
    coefficient: float  # c, in mean lengths of h on the forget text
    alpha: float
    budget: float  # nats per token
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A method, and what became of the model."""

    method: Method
    params: transformer.Parameters
    n_parameters: int  # that may move
    steps: int  # that were not taken back
    figures: Mapping[str, Figure]  # by name of the column, in `COLUMNS`


class Parts:
    """A folder of results, each a file that is written whole: begun again, nothing is done that is there.

    `settings` are by flag, and JSON-able: UserError for results of others.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], params: transformer.Parameters):
        self._folder, self._settings = folder, json.loads(json.dumps(settings))
        self._structure = jax.tree.structure(params)

    def get(self, method: Method, make: Callable[[], Result]) -> Result:
        """Reads the result of a method, or makes and keeps it."""
        path = self._folder / f"{method.name.replace(' ', '-')}.npz"
        if path.exists():
            return self._read(path, method)
        result = make()
        self._write(path, result)
        return result

    def _write(self, path: Path, result: Result) -> None:
        about: dict[str, Any] = {"settings": self._settings, "figures": {}}
        about |= {"n_parameters": result.n_parameters, "steps": result.steps}
        arrays = {f"params.{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(result.params))}
        for name, figure in result.figures.items():
            fields = {field.name: getattr(figure, field.name) for field in dataclasses.fields(figure)}
            arrays |= {f"{name}.{field}": fields.pop(field) for field in ("sums", "weights")}
            about["figures"][name] = fields
        to = io.BytesIO()
        np.savez(to, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
        with disk_errors_are_user_errors(f"writing {path}"):
            self._folder.mkdir(exist_ok=True)
            write_atomically(path, to.getvalue())

    def _read(self, path: Path, method: Method) -> Result:
        again = "delete it, and give the same command"
        with damage_is_a_user_error(path, again, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
            with np.load(path, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            about = parse_json(str(arrays["about"]))
            check_begun_with(self._folder, about["settings"], self._settings)
            leaves = [
                arrays[f"params.{i}"] for i in range(sum(name.startswith("params.") for name in arrays))
            ]
            params = jax.tree.unflatten(self._structure, leaves) if leaves else {}
            figures = {
                name: Figure(**fields, sums=arrays[f"{name}.sums"], weights=arrays[f"{name}.weights"])
                for name, fields in about["figures"].items()
            }
            return Result(method, params, about["n_parameters"], about["steps"], figures)


COLUMNS = ("forget", "retain", "blimp", "bits_per_byte", "relearned")


def objective(
    config: ModelConfig,
    loss: str,
    layer: int,
    params: transformer.Parameters,
    original: transformer.Parameters,
    keep_LD: jax.Array,
    target_D: jax.Array,
    alpha: jax.Array | float,
    forget: Any,
    retain: Any,
) -> jax.Array:
    """Computes the loss of a step, a scalar, by name: `SSPU`, `ASCENT` or `RELEARN` (forget text alone)."""
    if loss == SSPU:
        states = functools.partial(_states, config, layer)
        away = jnp.square(states(params, keep_LD, forget) - target_D).sum(axis=-1)
        before = states(original, keep_LD, retain)
        drift = jnp.square(states(params, keep_LD, retain) - before).sum(axis=-1)
        return _mean(away, forget[3]) + alpha * _mean(drift, retain[3])
    of_forget = _cross_entropy(config, params, keep_LD, forget)
    if loss == RELEARN:
        return of_forget
    return _cross_entropy(config, params, keep_LD, retain) - of_forget


def _mean(values_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
    return jnp.where(counted_BT, values_BT, 0).sum() / jnp.maximum(counted_BT.sum(), 1)


def _hidden(config: ModelConfig, params: Any, keep_LD: jax.Array, rows: Any, capture: Any = None) -> Any:
    hooks = LayerHooks(output=lambda h, keep_D: h * keep_D.astype(h.dtype))
    model = transformer.bind(config, params)
    return model, *model.hidden(*rows[:3], capture=capture, hooks=hooks, hook_inputs=keep_LD)


def _states(config: ModelConfig, layer: int, params: Any, keep_LD: jax.Array, rows: Any) -> jax.Array:
    """Returns what a layer hands on, float32[B, T, D]."""
    *_, seen = _hidden(config, params, keep_LD, rows, lambda h, u, h_next: h_next)
    return seen[layer].astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _cross_entropy(config: ModelConfig, params: Any, keep_LD: jax.Array, rows: Any) -> jax.Array:
    """Returns the mean loss of the tokens that are read, nats."""
    model, h_BTD, _ = _hidden(config, params, keep_LD, rows)
    nll = token_losses(h_BTD, model.unembedding(), jnp.roll(rows[0], -1, axis=1), config.vocab_size)
    return _mean(nll, jnp.roll(rows[3], -1, axis=1))  # a token's loss stands at the one before it


def _adam(rate: jax.Array | float) -> optax.GradientTransformation:
    """Returns Adam, whose state is the same for every rate."""
    return optax.chain(optax.scale_by_adam(), optax.scale(-rate))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(
    config: ModelConfig,
    loss: str,
    layer: int,
    rate: jax.Array | float,
    params: Any,
    opt_state: Any,
    mask: Any,
    *given: Any,
) -> tuple[Any, Any]:
    """Takes one step; `given` are the further arguments of `objective`."""
    grads = jax.grad(functools.partial(objective, config, loss, layer))(params, *given)
    updates, opt_state = only.masked_update(_adam(rate), mask, grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


class Unlearning:
    """Halves of two texts, ready for methods: each trains on the first of both and is measured on the second.

    Documents are token ids int[n], as `AblatedLosses` takes them; tasks are "blimp" and "heldout" text.
    """

    def __init__(
        self,
        model: TextModel,
        settings: Settings,
        train: Mapping[str, Sequence[np.ndarray]],
        test: Mapping[str, Sequence[np.ndarray]],
        tasks: Mapping[str, TokenizedTask],
    ):
        self._model, self._settings, self._test, self._tasks = model, settings, test, tasks
        retain = train["retain"]
        # Of a single document both parts are the whole.
        trained = [ids for number, ids in enumerate(retain) if number % _WATCHED] or retain
        parts = {"forget": train["forget"], "retain": trained, "watched": retain[::_WATCHED]}
        self._rows = {name: _packed(model, documents) for name, documents in parts.items()}
        length = jax.jit(self._mean_length)(model.params, self._model.put(self._first_rows("forget")))
        self._c = settings.coefficient * float(length)

    def n_steps(self, methods: Iterable[Method]) -> int:
        """Counts the steps of methods at most, relearning and that of the model as it was included."""
        s, methods = self._settings, list(methods)
        return (1 + len(methods)) * s.relearn_steps + s.steps * sum(m.loss is not None for m in methods)

    def run(self, method: Method, report: Report = lambda steps: None) -> Result:
        """Carries a method out, and measures what is left."""
        config, params, steps, n = self._model.config, self._model.params, 0, 0
        keep = np.ones((config.n_layers, config.d_model), np.float32)
        if method.loss is not None:
            mask = only.neuron_mask(config, method.neurons)
            if not method.is_masked:
                mask = jax.tree.map(np.ones_like, mask)
            n = only.n_marked(mask, params)
            params, steps = self._tuned(method, mask, keep, report)
        elif method.neurons:
            keep[tuple(np.array(method.neurons).T)] = 0
        figures = self._measured(method, params, keep, report)
        return Result(method, params, n, steps, figures)

    def target(self, neurons: Sequence[Neuron]) -> np.ndarray:
        """Returns c u, float32[D]."""
        s = self._settings
        u = np.random.default_rng(s.seed).random(self._model.config.d_model).astype(np.float32)
        u[[number for layer, number in neurons if layer == s.layer]] = 0
        return self._c * u / np.linalg.norm(u)

    def _tuned(self, method: Method, mask: Any, keep: np.ndarray, report: Report) -> tuple[Any, int]:
        """Fine-tunes within the budget; returns the parameters, and the steps that led to them."""
        s, config = self._settings, self._model.config
        check = self._model.put(self._first_rows("watched"))
        before = float(_cross_entropy(config, self._model.params, keep, check))
        step, rate, n_kept = self._stepper(method.loss, mask, keep, method.neurons), s.learning_rate, 0
        state = self._model.params, _adam(rate).init(self._model.params)
        kept = state, n_kept
        for number in range(1, s.steps + 1):
            state, n_kept = step(number, rate, *state), n_kept + 1
            report(1)
            if number % _CHECK_EVERY and number < s.steps:
                continue
            # Of a loss that is no number this is False too.
            if float(_cross_entropy(config, state[0], keep, check)) - before <= s.budget:
                kept = state, n_kept
            else:
                (state, n_kept), rate = kept, rate / 2
            if rate < s.learning_rate / 2**_HALVINGS:
                report(s.steps - number)
                break
        return state[0], n_kept

    def _stepper(
        self, loss: str | None, mask: Any, keep: np.ndarray, neurons: Sequence[Neuron]
    ) -> Callable[..., tuple[Any, Any]]:
        """Makes `(number, rate, params, opt_state) -> (params, opt_state)`, a step on rows of its number."""
        s, target = self._settings, self.target(neurons)

        def step(number: int, rate: float, params: Any, opt_state: Any) -> tuple[Any, Any]:
            forget, retain = (self._model.put(self._drawn(name, number)) for name in ("forget", "retain"))
            given = self._model.params, keep, target, s.alpha, forget, retain
            return _step(self._model.config, loss, s.layer, rate, params, opt_state, mask, *given)

        return step

    def _measured(self, method: Method, params: Any, keep: np.ndarray, report: Report) -> dict[str, Figure]:
        config, model = self._model.config, dataclasses.replace(self._model, params=params)
        off = [] if method.loss else method.neurons
        found = {name: self._losses(model, name, off) for name in ("forget", "retain")}
        steer = [Intervention(layer, neuron, mode="ablate") for layer, neuron in off]
        interventions = scoring.interventions_for(config, steer or None)
        for name, measure in (("blimp", "acc"), ("heldout", "bits_per_byte")):
            outcome = self._tasks[name].evaluate(model, interventions)
            assert outcome is not None  # nothing stops it
            figures = {f.measure: f for f in tasks_lib.figures_of(outcome) if not f.part}
            found[name if name in COLUMNS else measure] = figures[measure]
        everything = jax.tree.map(np.ones_like, only.neuron_mask(config, ()))
        step, rate = self._stepper(RELEARN, everything, keep, ()), self._settings.relearning_rate
        state = params, _adam(rate).init(params)
        for number in range(1, self._settings.relearn_steps + 1):
            state = step(number, rate, *state)
            report(1)
        again = dataclasses.replace(self._model, params=state[0])
        return found | {"relearned": self._losses(again, "forget", off)}

    def _losses(self, model: TextModel, name: str, off: Iterable[Neuron]) -> Figure:
        documents = self._test[name]
        group = {name: np.ones(sum(map(len, documents)), bool)}
        losses = AblatedLosses(model, documents, group)
        sums = losses.sums(off)[name]
        return Figure(name, "", "nats", "document", sums, losses.n_tokens[name].astype(np.float64))

    def _drawn(self, name: str, number: int) -> Rows:
        """Draws the rows of a step, each once where there are enough."""
        n_rows = self._model.layout.round_up(self._settings.batch_size)
        rng = np.random.default_rng([self._settings.seed, number])
        there = len(self._rows[name][0])
        rows = rng.choice(there, n_rows, replace=there < n_rows)
        return tuple(array[rows] for array in self._rows[name])

    def _first_rows(self, name: str) -> Rows:
        n_rows = self._model.layout.round_up(_MOST_WATCHED)
        return tuple(np.resize(array, (n_rows, *array.shape[1:])) for array in self._rows[name])

    def _mean_length(self, params: Any, rows: Any) -> jax.Array:
        config = self._model.config
        keep = jnp.ones((config.n_layers, config.d_model))
        states = _states(config, self._settings.layer, params, keep, rows)
        return _mean(jnp.linalg.norm(states, axis=-1), rows[3])


def _packed(model: TextModel, documents: Sequence[np.ndarray]) -> Rows:
    packed = model.pack(list(model.windows(documents)))
    is_read = packed.places >= 0
    some = is_read.any(axis=1)
    return tuple(a[some] for a in (packed.inputs, packed.segment_ids, packed.positions, is_read))


def change(result: Result, before: Result, column: str, seed: int) -> Estimate:
    """Computes how a figure has changed, with its 95 % interval by bootstrap over its units, paired."""
    after, other = result.figures[column], before.figures[column]
    return estimate(after.sums - other.sums, after.weights, np.random.default_rng(seed))
