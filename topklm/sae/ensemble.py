"""Ensembles of autoencoders as one dictionary with the codes of all members, after arXiv 2505.16077.

- *bag*: members begin with other weights and see the same batches; the mean of what they reconstruct is
  the ensemble's. Its codes are the members', divided by their number, so one pass encodes all of them.
- *boost*: each member is trained on what the ones before have left, and the sum is the ensemble's. A member
  has to know what was left: encoding goes through members one after another (`Dictionary.sequential`).

Dims: S layers, M codes of a member, J members; the dictionary has J M codes of which J k are kept.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topklm import distributed
from topklm.errors import UserError
from topklm.layout import Layout
from topklm.neurons.dictionary import Dictionary
from topklm.sae import train
from topklm.sae.kinds import SaeConfig
from topklm.sae.train import Batch, Fitted, Saving, Source

KINDS = ("bag", "boost")


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """How members make an ensemble; one member is an autoencoder by itself."""

    kind: str = "bag"  # one of `KINDS`
    members: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(field="--ensemble", value=self.kind, allowed=f"one of {', '.join(KINDS)}")
        if self.members < 1:
            raise UserError(field="--members", value=self.members, allowed="1 or more")

    @property
    def passes(self) -> int:
        """How often the hidden states are read."""
        return self.members if self.kind == "boost" else 1


ALONE = Ensemble()


def fit(
    config: SaeConfig,
    states: Source,
    n_batches: int,
    *,
    how: Ensemble = ALONE,
    seed: int = 0,
    start: Dictionary | None = None,
    layout: Layout | None = None,
    saving: Saving | None = None,
    report: Callable[[int], None] = lambda tokens: None,
) -> Fitted:
    """Trains an ensemble; arguments and errors as of `train.fit`.

    Boosting reads `states` once for each member, so they are a function or can be iterated again; the
    history has the members' entries one after another.
    """
    options: dict[str, Any] = {"layout": layout, "report": report}
    if how.members == 1:
        return train.fit(config, states, n_batches, seed=seed, start=start, saving=saving, **options)
    if start is not None:
        raise UserError(text="an ensemble begins at random, not from a dictionary", field="--members")
    if saving is not None:
        facts = {**saving.facts, "--ensemble": how.kind, "--members": how.members}
        saving = dataclasses.replace(saving, facts=facts)
    if how.kind == "bag":
        tiled = _changed(states, lambda x: jnp.concatenate([x] * how.members))
        return _bagged(train.fit(config, tiled, n_batches, seed=seed, saving=saving, **options), how.members)
    if not callable(states) and iter(states) is states:
        raise UserError("boosting reads the hidden states once for each member: give a list or a function")
    found = list[Fitted]()
    for number in range(how.members):
        left = _changed(states, _left_by([fitted.dictionary for fitted in found]))
        found.append(_member(config, left, n_batches, seed + number, saving, number, options))
    return _boosted(found)


def _member(
    config: SaeConfig,
    left: Source,
    n_batches: int,
    seed: int,
    saving: Saving | None,
    number: int,
    options: dict[str, Any],
) -> Fitted:
    """Trains a member of boosting, or reads its state after its last batch, where that was saved."""
    if saving is None:
        return train.fit(config, left, n_batches, seed=seed, **options)
    path = saving.path.with_name(f"{saving.path.stem}-{number}{saving.path.suffix}")
    resume = saving.resume and (distributed.of_first("member", path.exists) or number == 0)
    of_member = dataclasses.replace(saving, path=path, resume=resume)
    return train.fit(config, left, n_batches, seed=seed, saving=of_member, keep_state=True, **options)


def _changed(states: Source, change: Callable[[jax.Array], jax.Array]) -> Source:
    """Returns the source with other hidden states."""

    def of(batch: Batch) -> Batch:
        return (
            (change(jnp.asarray(batch[0])), batch[1])
            if isinstance(batch, tuple)
            else change(jnp.asarray(batch))
        )

    def begin(first: int) -> Iterator[Batch]:
        found: Iterable[Batch] = states(first) if callable(states) else itertools.islice(states, first, None)
        return map(of, found)

    return begin


def _left_by(members: list[Dictionary]) -> Callable[[jax.Array], jax.Array]:
    """Returns a function from hidden states to what these members leave of them."""

    @jax.jit
    def left(x_SND: jax.Array) -> jax.Array:
        for member in members:
            x_SND = x_SND - member.decode(member.encode(x_SND))
        return x_SND

    return left


def _split(array: np.ndarray, members: int) -> np.ndarray:
    """Returns [J, S, ...] of [J S, ...]."""
    return array.reshape(members, -1, *array.shape[1:])


def _bagged(fitted: Fitted, members: int) -> Fitted:
    one = fitted.dictionary
    centre, encoder, decoder = (_split(x, members) for x in (one.centre, one.encoder, one.decoder))
    shared = centre.mean(axis=0)
    bias = np.zeros(one.decoder.shape[:2], np.float32) if one.bias is None else one.bias
    # (x - own centre) @ encoder = (x - shared centre) @ encoder + (shared - own) @ encoder
    moved = _split(bias, members) + np.einsum("jsd,jsdm->jsm", shared - centre, encoder)
    threshold = None if one.threshold is None else _split(one.threshold, members) / members
    made = dataclasses.replace(
        one,
        keep=one.keep * members,
        centre=shared,
        encoder=np.concatenate(encoder / members, axis=2),
        decoder=np.concatenate(decoder, axis=1),
        bias=np.concatenate(moved / members, axis=1).astype(np.float32),
        threshold=None if threshold is None else np.concatenate(threshold, axis=1),
        members=members,
    )
    return Fitted(made, fitted.history, np.concatenate(_split(fitted.dead, members), axis=1))


def _boosted(found: list[Fitted]) -> Fitted:
    members = [fitted.dictionary for fitted in found]
    centres = np.stack([member.centre for member in members])
    later = centres.sum(axis=0) - np.cumsum(centres, axis=0)  # of the members after each
    biases = list[np.ndarray]()
    for member, after in zip(members, later, strict=True):
        bias = np.zeros(member.decoder.shape[:2], np.float32) if member.bias is None else member.bias
        # All centres are taken off before the first member: those of later ones are put back.
        biases.append(bias + np.einsum("sd,sdm->sm", after, member.encoder))
    thresholds = [member.threshold for member in members if member.threshold is not None]
    made = dataclasses.replace(
        members[0],
        keep=members[0].keep * len(members),
        centre=centres.sum(axis=0),
        encoder=np.concatenate([member.encoder for member in members], axis=2),
        decoder=np.concatenate([member.decoder for member in members], axis=1),
        bias=np.concatenate(biases, axis=1).astype(np.float32),
        threshold=np.concatenate(thresholds, axis=1) if thresholds else None,
        members=len(members),
        sequential=True,
    )
    history = [entry for fitted in found for entry in fitted.history]
    return Fitted(made, history, np.concatenate([fitted.dead for fitted in found], axis=1))
