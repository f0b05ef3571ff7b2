"""Log-likelihoods of continuations given their contexts, many to a row of tokens.

A request is the token ids of a context and of a continuation. Its tokens but the last are read, so a row of T
tokens holds as much as T + 1 ids. Requests are put into rows, the longest first, and told apart by segment
ids: one program serves all. Only positions that are scored reach the unembedding, in a second program, which
is compiled for a few numbers of them. The score of a request does not depend on its neighbours in the row.
Dims: B rows, T tokens of a row, P scored positions of a row, D d_model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topklm.config import ModelConfig
from topklm.errors import ArgumentError
from topklm.inference import forward
from topklm.inference.forward import Input
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.interventions import Intervention
from topklm.layout import Layout
from topklm.model import transformer
from topklm.model.losses import token_scores
from topklm.neurons.documents import TextModel, first_fit

_STRETCH_TOKENS = 2**20  # that are put into rows together
_SHORTEST_ROW = 256  # tokens, where the context is longer: attention in a row takes the square of it
_FEWEST_PLACES = 16  # P; more are filled up to the next power of four

# Of (parameters, input, columns int32[B, P], targets int32[B, P]): "nats" float32[B, P], negative log
# probabilities of the targets after these columns; "likeliest" bool[B, P], whether no token is more likely.
Program = Callable[[Any, Input, Any, Any], Mapping[str, Any]]


class Request(NamedTuple):
    """A continuation to be scored, and the text before it; token ids, int32[n] each.

    Both have a token at least. A context that begins a document begins with the separator.
    """

    context: np.ndarray
    continuation: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Scores of R requests."""

    nats: np.ndarray  # float64[R], negative log-likelihoods of continuations
    is_greedy: np.ndarray  # bool[R], whether each token of the continuation is a likeliest one
    n_cut: np.ndarray  # int64[R], first tokens of contexts that were left out, for they did not fit


def make_program(config: ModelConfig, layout: Layout, *, in_float32: bool) -> Program:
    """Makes a model's two programs, split over the devices of a layout; in float32 if asked."""
    if in_float32:
        config = dataclasses.replace(config, dtype="float32")

    def program(params: transformer.Parameters, given: Input, columns_BP: Any, targets_BP: Any) -> Any:
        with jax.default_matmul_precision("float32") if in_float32 else contextlib.nullcontext():
            h_BTD = forward.hidden(config, params, given)
            return _head(config, layout, params, h_BTD, columns_BP, targets_BP)

    return program


@functools.partial(jax.jit, static_argnums=(0, 1))
def _head(
    config: ModelConfig,
    layout: Layout,
    params: transformer.Parameters,
    h_BTD: jax.Array,
    columns_BP: jax.Array,
    targets_BP: jax.Array,
) -> dict[str, jax.Array]:
    h_BPD = jnp.take_along_axis(h_BTD, columns_BP[..., None], axis=1)
    w_DV = transformer.bind(config, params).unembedding()
    nats_BP, likeliest_BP = token_scores(h_BPD, w_DV, targets_BP, config.vocab_size)
    # Every process reads all of them.
    found = {"nats": nats_BP, "likeliest": likeliest_BP}
    return jax.lax.with_sharding_constraint(found, layout.replicated)


def score(
    model: TextModel,
    requests: Sequence[Request],
    interventions: InterventionBatch | None = None,
    *,
    program: Program | None = None,
    report: Callable[[int], None] = lambda tokens: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Scores requests; every process of a run gives all of them, and gets all scores; None if given up.

    Rows are split over the devices of the model's layout. Interventions come from `interventions_for`, the
    program from `make_program`; by default it is one in float32. `report` is told of the tokens that are
    read; `stopped` is asked after every batch whether to give up. ArgumentError for an empty context or
    continuation, or a continuation of more than T tokens.
    """
    program = program or make_program(model.config, model.layout, in_float32=True)
    length = model.config.context_length
    n_cut = np.array([_n_cut(request, length, number) for number, request in enumerate(requests)], np.int64)
    nats, is_greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    sizes = [len(r.context) + len(r.continuation) - 1 - cut for r, cut in zip(requests, n_cut, strict=True)]
    for numbers in _stretches(sizes):
        for batch in _batches(model, requests, n_cut, sizes, numbers):
            tokens, segment_ids = _put(model, batch.tokens, batch.segment_ids)
            given = Input(tokens, segment_ids, interventions)
            found = jax.device_get(program(model.params, given, *_put(model, batch.columns, batch.targets)))
            is_scored = batch.owners >= 0
            owners = batch.owners[is_scored]
            np.add.at(nats, owners, np.asarray(found["nats"], np.float64)[is_scored])
            np.logical_and.at(is_greedy, owners, np.asarray(found["likeliest"])[is_scored])
            report(int(np.count_nonzero(batch.segment_ids)))
            if stopped():
                return None
    return Scores(nats, is_greedy, n_cut)


def interventions_for(config: ModelConfig, steer: Sequence[Intervention] | None) -> InterventionBatch | None:
    """Makes interventions on all of every request; ArgumentError for one on a row, or generated tokens."""
    if not steer:
        return None
    for one in steer:
        if one.row is not None or one.positions == "generated":
            text = "acts on a row, or on generated tokens; scored texts have neither: use another"
            raise ArgumentError(text, field="steer", value=f"{one.layer}:{one.neuron}")
    return InterventionBatch.of(config, list(steer))


def window_requests(model: TextModel, documents: Iterable[np.ndarray]) -> tuple[list[Request], np.ndarray]:
    """Makes requests that together score every token of documents, int32[n] of each, none empty.

    A document longer than a row becomes several, each given the last tokens of the one before, as windows of
    `topklm.neurons.documents`. Returns requests, and the number of each one's document, int64[R].
    """
    windows = list(model.windows(documents))
    requests = [Request(w.inputs[: w.n_known], w.inputs[w.n_known :]) for w in windows]
    return requests, np.array([w.document for w in windows], np.int64)


class _Batch(NamedTuple):
    tokens: np.ndarray  # int32[B, T]
    segment_ids: np.ndarray  # int32[B, T]: 1, 2, ... for the requests of a row, 0 for padding
    columns: np.ndarray  # int32[B, P], after which positions tokens are scored
    targets: np.ndarray  # int32[B, P], those tokens
    owners: np.ndarray  # int64[B, P], whose they are; -1: nobody's


def _n_cut(request: Request, length: int, number: int) -> int:
    context, continuation = map(len, request)
    if not context or not continuation:
        raise ArgumentError(f"request {number} has an empty context or continuation", field="requests")
    if continuation > length:
        text = f"request {number} has a continuation of {continuation:,} tokens: must be at most {length:,}"
        raise ArgumentError(f"{text}, the model's context", field="requests")
    return max(0, context + continuation - 1 - length)


def _stretches(sizes: Sequence[int]) -> Iterable[np.ndarray]:
    """Yields the numbers of requests, of so many tokens, in stretches, the longest first."""
    order = np.argsort(-np.asarray(sizes, np.int64), kind="stable")
    stretches = np.cumsum(np.asarray(sizes, np.int64)[order]) // _STRETCH_TOKENS
    yield from np.split(order, np.flatnonzero(np.diff(stretches)) + 1)


def _batches(
    model: TextModel,
    requests: Sequence[Request],
    n_cut: np.ndarray,
    sizes: Sequence[int],
    numbers: np.ndarray,
) -> Iterable[_Batch]:
    """Yields these requests in batches of B rows, which are no longer than they must be."""
    longest, context_length = int(max(sizes[number] for number in numbers)), model.config.context_length
    length = min(context_length, max(_SHORTEST_ROW, 1 << (longest - 1).bit_length()))
    n_rows = model.rows * (context_length // length)
    rows, n = first_fit([sizes[number] for number in numbers], length)
    members: list[list[int]] = [[] for _ in range(n)]
    for number, row in zip(numbers.tolist(), rows, strict=True):
        members[row].append(number)
    for begin in range(0, n, n_rows):
        part = members[begin : begin + n_rows]
        most = max(sum(len(requests[number].continuation) for number in row) for row in part)
        places = min(length, _FEWEST_PLACES * 4 ** max(0, math.ceil(math.log(most / _FEWEST_PLACES, 4))))
        tokens = np.full((n_rows, length), model.separator_id, np.int32)
        segment_ids = np.zeros((n_rows, length), np.int32)
        columns, targets = (np.zeros((n_rows, places), np.int32) for _ in range(2))
        owners = np.full((n_rows, places), -1, np.int64)
        for row, of_row in enumerate(part):
            at = place = 0
            for segment, number in enumerate(of_row, 1):
                context, continuation = requests[number]
                ids, n_scored = np.concatenate([context[n_cut[number] :], continuation]), len(continuation)
                end, last = at + len(ids) - 1, place + n_scored
                tokens[row, at:end], segment_ids[row, at:end] = ids[:-1], segment
                columns[row, place:last] = np.arange(end - n_scored, end)
                targets[row, place:last], owners[row, place:last] = continuation, number
                at, place = end, last
        yield _Batch(tokens, segment_ids, columns, targets, owners)


def _put(model: TextModel, *arrays: np.ndarray) -> list[jax.Array]:
    """Puts arrays of a batch on the devices, of which each process has its rows."""
    own = model.layout.process_rows(len(arrays[0]))
    return [model.layout.put_batch({"": array}, len(array), own)[""] for array in arrays]
