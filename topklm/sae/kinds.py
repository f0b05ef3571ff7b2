"""The kinds of sparse autoencoders: their codes, losses and rules of adaptation, for one layer.

    pre = (x - centre) @ encoder.T + bias      codes z of pre, as the kind has it
    x is about z @ decoder + centre            rows of the decoder have unit length

Hidden states x are scaled so that what is left of a coordinate without the mean has a mean square of 1;
errors are means over tokens and coordinates, so they do not depend on the size of a minibatch.

- *topk*: the k largest of each token, clipped at 0; with AuxK. Gao et al. 2024, arXiv 2406.04093.
- *batchtopk*: the N k largest of N tokens; with AuxK. The smallest of them, averaged over steps, is the
  threshold at inference. Bussmann et al. 2024, arXiv 2412.06410.
- *matryoshka*: batchtopk with a loss of each of nested prefixes of the codes, Bussmann et al. 2025, arXiv
  2503.17547; each prefix, of a fourth of the codes of the next, counts 0.75 times as much (balanced, Chanin
  et al. 2025, arXiv 2505.11756).
- *jumprelu*: z = pre where pre > threshold, which is learned through a rectangle of some width at the jump,
  with a penalty on the number of codes: (L0 / k - 1)^2 of each token, Rajamanoharan et al. 2024, arXiv
  2407.14435; or the sum of tanh(4 z), Conerly et al. 2025 (Anthropic).
- *gba*: decoder and encoder are one; z = scale times (pre - bias) where pre > 0; biases follow target
  frequencies of groups of codes and no gradient (`adapt_biases`). Chen et al. 2025, arXiv 2506.14002; of the
  paper's algorithm we had notes only.

Dims: N tokens, D d_model, M codes.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.errors import UserError
from topklm.model.topk import topk
from topklm.neurons.dictionary import Dictionary
from topklm.sae import sparse
from topklm.sae.devices import Devices

Arrays = dict[str, jax.Array]

SPARSITIES = ("quadratic", "tanh")  # penalties of jumprelu

_FEWEST_OF_PREFIX = 16  # codes of the smallest prefix
_PREFIX_SHARE = 4
_TANH_SCALE = 4.0
_EMA = 0.01  # share of a new step in the averaged threshold
_UNSET = -1.0
_MOST_IDLE = 2**31 - 2**24  # tokens; int32 holds a minibatch more


@dataclasses.dataclass(frozen=True)
class SaeConfig:
    """How autoencoders are trained; UserError for values that fit no autoencoder."""

    kind: str  # one of `KINDS`
    width: int  # M
    k: int  # codes of a token: kept, kept on average, or aimed at
    learning_rate: float = 2e-3  # the highest
    minibatch: int = 1024  # tokens of a step
    aux_coefficient: float = 1 / 32  # of AuxK
    dead_tokens: int | None = None  # without a code active, after which it is dead; None: a tenth of all
    balance: float = 0.75  # of matryoshka: weight of a prefix, in terms of the next
    sparsity: str = "quadratic"  # of jumprelu, one of `SPARSITIES`
    coefficient: float = 0.3  # of that penalty, in shares of the variance
    warmup: float = 0.2  # share of the steps over which the coefficient rises from 0
    bandwidth: float = 0.2  # of the rectangle at the jump, in the root mean square of a coordinate
    groups: int = 10  # of gba
    lowest_frequency: float = 1e-3  # of the last group
    adapt_steps: int = 50  # between two adaptations of biases
    rate: float = 0.01  # of the adaptation, both ways

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(field="--kind", value=self.kind, allowed=f"one of {', '.join(KINDS)}")
        if self.width < 1:
            raise UserError(field="--width", value=self.width, allowed="1 or more")
        if not 1 <= self.k <= self.width:
            raise UserError(field="--k", value=self.k, allowed=f"from 1 to the width, {self.width}")
        if self.sparsity not in SPARSITIES:
            raise UserError(
                field="--sparsity", value=self.sparsity, allowed=f"one of {', '.join(SPARSITIES)}"
            )
        for flag, value in (("--learning-rate", self.learning_rate), ("--minibatch", self.minibatch)):
            if not value > 0:
                raise UserError(field=flag, value=value, allowed="above 0")
        if not self.coefficient >= 0:
            raise UserError(field="--coefficient", value=self.coefficient, allowed="0 or more")
        if self.kind == "gba":
            self.frequencies()

    @property
    def dictionary_kind(self) -> str:
        """Its name among `topklm.neurons.DICTIONARIES`."""
        return "sae" if self.kind == "topk" else f"sae-{self.kind}"

    @classmethod
    def of(cls, dictionary: Dictionary) -> "SaeConfig":
        """Makes the config of a dictionary that `topklm sae train` has trained; rates are the defaults."""
        kind = dictionary.kind.removeprefix("sae").removeprefix("-") or "topk"
        return cls(kind, dictionary.width, dictionary.keep)

    def prefixes(self) -> list[tuple[int, float]]:
        """Lists nested prefixes, the smallest first: how many codes, and the weight of its loss."""
        found, width, weight = [(self.width, 1.0)], self.width // _PREFIX_SHARE, self.balance
        while width >= _FEWEST_OF_PREFIX:
            found.append((width, weight))
            width, weight = width // _PREFIX_SHARE, weight * self.balance
        return found[::-1]

    def frequencies(self) -> np.ndarray:
        """Returns float64[M], target frequencies of gba's codes, geometric over groups, whose sum is k.

        UserError if no highest frequency up to 1 gives that sum.
        """
        groups = min(self.groups, self.width)
        of_code = np.arange(self.width) * groups // self.width

        def targets(highest: float) -> np.ndarray:
            return np.geomspace(highest, min(self.lowest_frequency, highest), groups)[of_code]

        low, high = 1e-9, 1.0
        if targets(high).sum() < self.k:
            text = f"gba's {groups} groups reach at most {targets(high).sum():.0f} of {self.width} codes"
            raise UserError(text, field="--k", value=self.k, advice="give a smaller k or a larger width")
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if targets(middle).sum() > self.k else (middle, high)
        return targets(low)


class Seen(NamedTuple):
    """Figures of the codes of a step."""

    error: jax.Array  # mean square over tokens and coordinates
    l0: jax.Array  # mean number of active codes of a token
    is_active: jax.Array  # bool[M], at any token
    least: jax.Array  # the smallest active code; infinite for none
    # Of gba, over the tokens: how many have pre > 0, float32[M], and the largest pre, float32[M].
    counts: jax.Array | None = None
    largest: jax.Array | None = None


# loss(config, params, memory, x_ND, coefficient, devices) gives the loss and what was seen.
Loss = Callable[[SaeConfig, Arrays, Arrays, jax.Array, jax.Array, Devices], tuple[jax.Array, Seen]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of autoencoders."""

    loss: Loss
    remembered: tuple[str, ...] = ()  # names in `memory`, beside `idle`
    trained: tuple[str, ...] = ("encoder", "decoder", "bias", "centre")


def pre_activations(params: Arrays, x_ND: jax.Array) -> jax.Array:
    """Returns float32[N, M], without a bias where the parameters have none."""
    still = jax.lax.stop_gradient(params["centre"])
    # Zeros, which have the centre's gradient: of all tokens at once, not of each with every code.
    of_centre = (still - params["centre"]) @ params["encoder"].T
    return (x_ND - still) @ params["encoder"].T + (params.get("bias", 0) + of_centre)


def _seen(x_ND: jax.Array, back_ND: jax.Array, codes_NM: jax.Array, **more: jax.Array) -> Seen:
    active = codes_NM > 0
    return Seen(
        jnp.mean(jnp.square(x_ND - back_ND)),
        jnp.sum(active) / len(codes_NM),
        jnp.any(active, axis=0),
        jnp.min(jnp.where(active, codes_NM, jnp.inf)),
        **more,
    )


def topk_loss(
    config: SaeConfig, params: Arrays, memory: Arrays, x_ND: jax.Array, _: jax.Array, on: Devices
) -> tuple[jax.Array, Seen]:
    """Computes the loss of topk."""
    pre = pre_activations(params, x_ND)
    if on.is_sparse:
        kept = sparse.largest(jax.lax.stop_gradient(pre), config.k)
        values = sparse.encode(x_ND - params["centre"], params["encoder"], params["bias"], kept)
        back = sparse.combine(values, kept, params["decoder"]) + params["centre"]
        active = values > 0
        seen = Seen(
            jnp.mean(jnp.square(x_ND - back)),
            jnp.sum(active) / len(x_ND),
            jnp.zeros(config.width, bool).at[kept].max(active),
            jnp.min(jnp.where(active, values, jnp.inf)),
        )
    else:
        codes = on.topk(pre, config.k)
        back = codes @ params["decoder"] + params["centre"]
        seen = _seen(x_ND, back, codes)
    return seen.error + aux_loss(config, params, memory, x_ND, back, on), seen


def nested_loss(
    config: SaeConfig, params: Arrays, memory: Arrays, x_ND: jax.Array, _: jax.Array, on: Devices
) -> tuple[jax.Array, Seen]:
    """Computes the loss of matryoshka, and of batchtopk, which has one prefix: all codes.

    AuxK is of the error of all codes.
    """
    prefixes = config.prefixes() if config.kind == "matryoshka" else [(config.width, 1.0)]
    codes = on.batch_topk(pre_activations(params, x_ND), config.k)
    back, begin, losses = params["centre"], 0, []
    for end, weight in prefixes:
        back = back + codes[:, begin:end] @ params["decoder"][begin:end]
        losses.append(weight * jnp.mean(jnp.square(x_ND - back)))
        begin = end
    return sum(losses) + aux_loss(config, params, memory, x_ND, back, on), _seen(x_ND, back, codes)


def aux_loss(
    config: SaeConfig, params: Arrays, memory: Arrays, x_ND: jax.Array, back_ND: jax.Array, on: Devices
) -> jax.Array:
    """Computes AuxK: how well the D / 2 dead codes with the largest pre-activations give the error.

    The error holds no centre, so none is added to what they decode. Dead is a code that no token has had
    active for as many tokens as `memory["dead_after"]`.
    """
    n_aux = min(max(x_ND.shape[1] // 2, 1), config.width)
    is_dead = memory["idle"] >= memory["dead_after"]
    error_ND = jax.lax.stop_gradient(x_ND - back_ND)

    def none() -> jax.Array:
        return jnp.zeros(())

    def few() -> jax.Array:  # all of them are used: no others are multiplied
        (at,) = jnp.nonzero(is_dead, size=n_aux, fill_value=0)
        part = {name: params[name][at] for name in ("encoder", "bias")} | {"centre": params["centre"]}
        codes = jnp.where(jnp.arange(n_aux) < jnp.sum(is_dead), pre_activations(part, x_ND), 0)
        return jnp.mean(jnp.square(codes @ params["decoder"][at] - error_ND))

    def many() -> jax.Array:
        pre = jnp.where(is_dead, pre_activations(params, x_ND), -jnp.inf)
        return jnp.mean(jnp.square(on.topk(pre, n_aux, "identity") @ params["decoder"] - error_ND))

    n_dead = jnp.sum(is_dead)
    which = jnp.where(n_dead == 0, 0, jnp.where(n_dead <= n_aux, 1, 2))
    return config.aux_coefficient * jax.lax.switch(which, (none, few, many))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """Returns pre where it is above the threshold, else 0; the threshold's gradient is an estimate."""
    del bandwidth
    return jnp.where(pre > threshold, pre, 0)


def _jump_forward(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> tuple[jax.Array, tuple]:
    return jump(pre, threshold, bandwidth), (pre, threshold)


def _jump_backward(bandwidth: float, kept: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    pre, threshold = kept
    slope = gradient * _rectangle(pre, threshold, bandwidth) * threshold
    return jnp.where(pre > threshold, gradient, 0), -jnp.sum(slope, axis=0)


jump.defvjp(_jump_forward, _jump_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """Returns 1 where pre is above the threshold, else 0; only the threshold has a gradient, an estimate."""
    del bandwidth
    return (pre > threshold).astype(pre.dtype)


def _step_forward(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> tuple[jax.Array, tuple]:
    return step(pre, threshold, bandwidth), (pre, threshold)


def _step_backward(bandwidth: float, kept: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    pre, threshold = kept
    return jnp.zeros_like(pre), -jnp.sum(gradient * _rectangle(pre, threshold, bandwidth), axis=0)


step.defvjp(_step_forward, _step_backward)


def _rectangle(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    return (jnp.abs(pre - threshold) < bandwidth / 2) / bandwidth


def jumprelu_loss(
    config: SaeConfig, params: Arrays, memory: Arrays, x_ND: jax.Array, coefficient: jax.Array, _: Devices
) -> tuple[jax.Array, Seen]:
    """Computes the loss of jumprelu; `coefficient` is that of the penalty at this step."""
    del memory
    pre, threshold = pre_activations(params, x_ND), params["threshold"]
    codes = jump(pre, threshold, config.bandwidth)
    back = codes @ params["decoder"] + params["centre"]
    if config.sparsity == "tanh":
        penalty = jnp.mean(jnp.sum(jnp.tanh(_TANH_SCALE * codes), axis=1)) / config.k
    else:
        l0 = jnp.sum(step(pre, threshold, config.bandwidth), axis=1)
        penalty = jnp.mean(jnp.square(l0 / config.k - 1))
    seen = _seen(x_ND, back, codes)
    return seen.error + coefficient * penalty, seen


def gba_loss(
    config: SaeConfig, params: Arrays, memory: Arrays, x_ND: jax.Array, _: jax.Array, __: Devices
) -> tuple[jax.Array, Seen]:
    """Computes the loss of gba, half the squared error; its biases are in `memory`."""
    del config
    alone_NM = pre_activations(params, x_ND)
    pre_NM = alone_NM + memory["bias"]
    codes = jnp.where(pre_NM > 0, alone_NM, 0)
    back = (params["scale"] * codes) @ params["encoder"] + params["centre"]
    is_above = pre_NM > 0
    counts, largest = jnp.sum(is_above, axis=0, dtype=jnp.float32), jnp.max(pre_NM, axis=0)
    seen = _seen(x_ND, back, is_above.astype(jnp.float32), counts=counts, largest=largest)
    return seen.error / 2, seen


def adapt_biases(
    config: SaeConfig, bias_M: jax.Array, counts_M: jax.Array, largest_M: jax.Array, n: jax.Array, d: int
) -> jax.Array:
    """Returns gba's biases after one adaptation.

    Let p be a code's frequency among n tokens, r its largest pre-activation, or 0. Above its target p, a
    bias falls by rate times r, to no less than -sqrt(D); below a frequency of 1e-6 it rises by rate times
    the mean of the positive r of its group, to no more than 0. The bounds are those of the paper, whose
    hidden states have length 1, in our units.
    """
    groups = min(config.groups, config.width)
    group_M = jnp.asarray(np.arange(config.width) * groups // config.width)
    frequency, r = counts_M / n, jnp.maximum(largest_M, 0)
    positive = (r > 0).astype(jnp.float32)
    sums = jnp.zeros(groups).at[group_M].add(r)
    mean_r = (sums / jnp.maximum(jnp.zeros(groups).at[group_M].add(positive), 1))[group_M]
    lower = jnp.maximum(bias_M - config.rate * r, -jnp.sqrt(jnp.float32(d)))
    higher = jnp.minimum(bias_M + config.rate * mean_r, 0)
    target = jnp.asarray(config.frequencies(), jnp.float32)
    return jnp.where(frequency > target, lower, jnp.where(frequency < 1e-6, higher, bias_M))


def remember(config: SaeConfig, memory: Arrays, seen: Seen, n: int, d: int) -> Arrays:
    """Returns the memory after a step of n tokens."""
    idle = jnp.minimum(memory["idle"], _MOST_IDLE) + n
    found = memory | {"idle": jnp.where(seen.is_active, 0, idle)}
    if "least" in memory:
        least = jnp.where(jnp.isfinite(seen.least), seen.least, memory["least"])
        averaged = (1 - _EMA) * memory["least"] + _EMA * least
        found["least"] = jnp.where(memory["least"] == _UNSET, least, averaged)
    if "counts" in memory:
        assert seen.counts is not None and seen.largest is not None
        counts, largest = memory["counts"] + seen.counts, jnp.maximum(memory["largest"], seen.largest)
        n_read = memory["read"] + n
        is_due = n_read >= config.adapt_steps * n
        adapted = adapt_biases(config, memory["bias"], counts, largest, n_read, d)
        found["bias"] = jnp.where(is_due, adapted, memory["bias"])
        found["counts"] = jnp.where(is_due, 0, counts)
        found["largest"] = jnp.where(is_due, -jnp.inf, largest)
        found["read"] = jnp.where(is_due, 0, n_read)
    return found


KINDS: Mapping[str, Kind] = {
    "topk": Kind(topk_loss),
    "batchtopk": Kind(nested_loss, ("least",)),
    "matryoshka": Kind(nested_loss, ("least",)),
    "jumprelu": Kind(jumprelu_loss, trained=("encoder", "decoder", "bias", "centre", "threshold")),
    "gba": Kind(
        gba_loss,
        ("bias", "counts", "largest", "read"),
        ("encoder", "centre", "scale"),
    ),
}


def begin(
    config: SaeConfig, rows_MD: jax.Array, centre_D: jax.Array, x_ND: jax.Array, dead_after: int
) -> tuple[Arrays, Arrays]:
    """Makes parameters and memory of a layer from random rows of unit length and some hidden states.

    The encoder starts as the decoder's transpose. Thresholds of jumprelu and biases of gba start where codes
    have their frequencies on these hidden states; the papers start all codes far more active.
    """
    width = config.width
    params = {"encoder": rows_MD, "decoder": rows_MD, "bias": jnp.zeros(width), "centre": centre_D}
    memory = {"idle": jnp.zeros(width, jnp.int32), "dead_after": jnp.full((), dead_after, jnp.int32)}
    if config.kind in ("jumprelu", "gba"):
        pre_MN = rows_MD @ (x_ND - centre_D).T
        shares = config.frequencies() if config.kind == "gba" else np.full(width, config.k / width)
        ranks = np.clip(np.round(shares * len(x_ND)).astype(int), 0, len(x_ND) - 1)
        bounds = jnp.zeros(width)  # the positive pre-activations of those ranks
        for rank in np.unique(ranks):
            codes = np.flatnonzero(ranks == rank)
            largest = topk(pre_MN[codes], int(rank) + 1, backend="threshold")  # XLA may split it
            has_all = jnp.sum(largest > 0, axis=1) > rank
            least = jnp.min(jnp.where(largest > 0, largest, jnp.inf), axis=1)
            bounds = bounds.at[codes].set(jnp.where(has_all, least, 0))
        params["threshold"], params["scale"] = bounds, jnp.ones(width)
        counts = {"counts": jnp.zeros(width), "largest": jnp.full(width, -jnp.inf), "read": jnp.zeros(())}
        memory |= {"bias": -bounds, **counts}
    memory["least"] = jnp.full((), _UNSET)
    kind = KINDS[config.kind]
    kept = ("idle", "dead_after", *kind.remembered)
    return {name: params[name] for name in kind.trained}, {name: memory[name] for name in kept}


def as_arrays(
    config: SaeConfig, params: Mapping[str, np.ndarray], memory: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray | None]:
    """Returns arrays of a `Dictionary`, [S, ...] each, for scaled hidden states.

    A threshold stands for the batch in batchtopk and matryoshka, and for the biases in gba.
    """
    encoder, decoder, threshold = params["encoder"], params.get("decoder"), None
    if config.kind == "jumprelu":
        threshold = params["threshold"]
    elif config.kind == "gba":
        size, sign = np.abs(params["scale"]), np.sign(params["scale"])
        threshold = -memory["bias"] * size
        encoder, decoder = encoder * size[..., None], encoder * sign[..., None]
    elif config.kind != "topk":
        threshold = np.broadcast_to(np.maximum(memory["least"], 0)[..., None], encoder.shape[:-1])
    return {
        "centre": params["centre"],
        "encoder": np.swapaxes(encoder, -1, -2),
        "decoder": decoder,
        "bias": params.get("bias"),
        "threshold": threshold,
    }
