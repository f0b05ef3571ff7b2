"""`topklm bench decode`: tokens per second of generation, for one prompt and for many.

The floor is a program that reads every parameter once for all prompts' next tokens and does each matrix
product for those tokens alone, which takes a cache of keys and values. The peer is Hugging Face's `generate`,
with such a cache, the same weights and TopK in hooks. All subjects take the most likely token each time.

Beside the plain continuations stand steered ones, and for one prompt those of a program that reads all rows
of the weights after a TopK, not those of the active neurons alone.
"""

import argparse
from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
from pathlib import Path
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks import peers
from benchmarks.harness import roofline
from benchmarks.harness.report import Comparison, Report, Result
from benchmarks.harness.shapes import SHAPES
from benchmarks.harness.timing import Samples, alternate
from benchmarks.harness.worker import Prepared, Worker, call
from topklm import config as config_lib
from topklm.compile_check.check import with_vocabulary
from topklm.config import Config, ModelConfig
from topklm.errors import UserError
from topklm.inference import kv_cache
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.scheduler import Generation
from topklm.inference.sequence import Sampling
from topklm.model import transformer

DESCRIPTION = "Measures generation with a config's model, freshly initialised."
EXAMPLE = "topklm bench decode --config=configs/small.py --config.model.vocab_size=4096 --peer=torch"

BATCH_SIZES = (1, 32)
_PROMPT_TOKENS = 16
_NEW_TOKENS = 64
_SECONDS_PER_SAMPLE = 0.3
_NO_TOKEN = -1  # ends nothing early, so that all subjects do the same work
_STEERED_NEURONS = 4
_MOST_STEERING_COSTS = 1.02
_LEAST_OVER_PEER = 2.0
_WEIGHT_BYTES = 4  # parameters are float32 whatever the compute dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares flags of its own."""
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=_NEW_TOKENS,
        metavar="N",
        help=f"length of each continuation of {_PROMPT_TOKENS} tokens; default %(default)s",
    )


def run(arguments: argparse.Namespace, config: Config | None) -> Report:
    """Continues random prompts, 1 and 32 at a time.

    Args:
        arguments: `peer`, `repeats`, `new_tokens`.
        config: Its model; default shape s1. A vocabulary of 0 stands for `data.vocab_size`.

    Raises:
        UserError: If prompt and continuation do not fit the context, or the peer is not installed.
    """
    config = with_vocabulary(config or SHAPES["s1"])
    length = config.model.context_length
    if not 1 <= arguments.new_tokens <= length - _PROMPT_TOKENS:
        raise UserError(
            f"--new-tokens = {arguments.new_tokens}: must be from 1 to {length - _PROMPT_TOKENS}, "
            f"model.context_length ({length}) less the prompt's {_PROMPT_TOKENS}"
        )
    if arguments.peer:
        peers.require(arguments.peer)
    rates = roofline.measure_rates(config.model.dtype, arguments.repeats)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        spec = {"config": config.to_dict(), "new_tokens": arguments.new_tokens}
        ours = stack.enter_context(Worker(__name__, spec))
        all_rows = stack.enter_context(Worker(__name__, {**spec, "all_rows": True}))
        subjects = ours.subjects() | all_rows.subjects()
        if arguments.peer:
            weights = str(Path(folder) / "weights.npz")
            call("benchmarks.peers.llama:write_weights", config.to_dict(), weights)
            torch = Worker("benchmarks.peers.torch_decode", {**spec, "weights": weights})
            subjects |= stack.enter_context(torch).subjects()
        samples = alternate(
            subjects, arguments.repeats, warmup=1, at_least=_SECONDS_PER_SAMPLE, label="decode"
        )
        return _report(samples, config, arguments.new_tokens, rates, ours.facts)


def prepare(spec: Mapping[str, Any]) -> Prepared:
    """Prepares our subjects "batch N", in a process of their own; `spec` as `run` makes it."""
    config = config_lib.resolve(spec["config"])
    params = transformer.create(config.model, config.train.seed)
    prompts, new_tokens = random_prompts(config.model, max(BATCH_SIZES)), spec["new_tokens"]
    # As a loaded model keeps them from its first text on.
    texts = functools.partial(continuations, layers=kv_cache.by_layer(config.model, params))
    if spec.get("all_rows"):
        kv_cache.SPARSE_SHARE = 0.0
        one = functools.partial(texts, config.model, params, prompts[:1], new_tokens)
        return Prepared({_ALL_ROWS: one}, {})
    steer = InterventionBatch.of(
        config.model, {(0, neuron): 1.0 for neuron in range(_STEERED_NEURONS)}, "add"
    )
    subjects: dict[str, Callable[[], Any]] = {}
    for n in BATCH_SIZES:
        plain = functools.partial(texts, config.model, params, prompts[:n], new_tokens)
        subjects |= {f"batch {n}": plain, _steered(n): functools.partial(plain, steer=steer)}
    return Prepared(subjects, {"prompt_tokens": _PROMPT_TOKENS, "steered_neurons": _STEERED_NEURONS})


def continuations(
    config: ModelConfig,
    params: transformer.Parameters,
    prompts: np.ndarray,
    new_tokens: int,
    steer: InterventionBatch | None = None,
    layers: kv_cache.Layers = None,
) -> list[list[int]]:
    """Continues prompts as `topklm generate` does; [B, P] -> a list of new tokens for each."""
    greedy = [Sampling(temperature=0)] * len(prompts)
    limits = [new_tokens] * len(prompts)
    generation = Generation(
        config,
        params,
        prompts.tolist(),
        greedy,
        max_new_tokens=limits,
        stop_token=_NO_TOKEN,
        interventions=steer,
        layers=layers,
    )
    while not generation.done:
        generation.advance()
    return [text[prompts.shape[1] :] for text in generation.texts]


def random_prompts(config: ModelConfig, n: int) -> np.ndarray:
    """Returns int64[n, 16], the same for all subjects."""
    return np.random.default_rng(1).integers(0, config.vocab_size, (n, _PROMPT_TOKENS))


def step_floor(config: Config, batch_size: int, rates: roofline.Rates) -> float:
    """Computes the seconds for a token of each prompt: parameters read once, or the matrix products."""
    shapes = jax.eval_shape(lambda: transformer.create(config.model, 0))
    in_products = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    if not config.model.tie_embeddings:  # of the embedding, only the rows of the tokens are looked at
        in_products -= shapes["embed"]["embedding"].size
    flops = 2.0 * in_products * batch_size
    return max(_WEIGHT_BYTES * in_products / rates.bytes_per_second, flops / rates.flops_per_second)


_ALL_ROWS = "batch 1, all rows"


def _steered(n: int) -> str:
    return f"batch {n}, steered"


def _report(
    samples: Mapping[str, Samples],
    config: Config,
    new_tokens: int,
    rates: roofline.Rates,
    facts: Mapping[str, Any],
) -> Report:
    results, comparisons = [], []
    for n in BATCH_SIZES:
        plain, steered, peer = f"batch {n}", _steered(n), f"torch, batch {n}"
        floor = n / step_floor(config, n, rates)
        names = [name for name in (plain, _ALL_ROWS, steered, peer) if name in samples]
        names = [name for name in names if n == 1 or name != _ALL_ROWS]
        results += [Result(name, "tokens/s", samples[name].rates(n * new_tokens), floor) for name in names]
        if peer in samples:
            faster = samples[plain].speedup_over(samples[peer])
            comparisons.append(Comparison(f"{plain} / {peer}", faster, at_least=_LEAST_OVER_PEER))
        cost = samples[plain].speedup_over(samples[steered])
        comparisons.append(Comparison(f"time of {steered} / {plain}", cost, at_most=_MOST_STEERING_COSTS))
    saved = samples["batch 1"].speedup_over(samples[_ALL_ROWS])
    comparisons.append(Comparison(f"batch 1 / {_ALL_ROWS}", saved, note="of the weights after a TopK"))
    settings = {
        **facts,
        "new_tokens": new_tokens,
        "model": dataclasses.asdict(config.model),
        "rates": dataclasses.asdict(rates),
    }
    note = "The floor: parameters and products of the new tokens alone, as with a cache of keys and values."
    return Report("decode", settings, results, comparisons, [note])
