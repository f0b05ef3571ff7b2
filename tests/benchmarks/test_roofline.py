"""The work of a train step, counted another way."""

import dataclasses

import jax
import pytest

from benchmarks.harness import roofline
from benchmarks.harness.roofline import Part, Rates
from benchmarks.harness.shapes import SHAPES, with_model
from topklm.model import transformer
from topklm.training import throughput

S1 = SHAPES["s1"]
GROUPED = with_model(S1, n_kv_heads=2, dtype="bfloat16", tie_embeddings=True)


@pytest.mark.parametrize("config", [S1, SHAPES["s2"], GROUPED], ids=["s1", "s2", "grouped"])
def test_products_are_those_of_the_usual_formula_with_half_of_the_scores(config):
    model = config.model
    tokens = config.train.batch_size * model.context_length
    square = 12 * model.n_layers * model.n_heads * model.head_width * model.context_length
    triangle = square * (model.context_length + 1) / (2 * model.context_length)
    want = tokens * (throughput.flops_per_token(model) - square + triangle)
    assert sum(part.flops for part in roofline.parts_of_step(config)) == pytest.approx(want, rel=1e-12)


def test_scores_are_counted_pair_by_pair():
    config = with_model(S1, context_length=5, n_layers=1, n_nontopk=1, d_model=8, n_heads=2, n_kv_heads=2)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=3))
    head = 4
    pairs = sum(1 for query in range(5) for key in range(5) if key <= query)
    products = 3 * 2 * pairs * 2 * (2 * head)  # sequences, heads, pairs, two products of 2 x head FLOPs
    projections = 3 * 5 * 4 * 2 * 8 * 8
    attention = {part.name: part for part in roofline.parts_of_step(config)}["attention"]
    assert attention.flops == 3 * (products + projections)


@pytest.mark.parametrize("config", [S1, GROUPED], ids=["untied", "tied"])
def test_the_optimizer_moves_every_parameter(config):
    model = dataclasses.replace(config.model, vocab_multiple=1)
    shapes = jax.eval_shape(lambda: transformer.create(model, 0))
    # Read: parameter, two moments, and the gradient twice; written: all but the gradient.
    want = throughput.parameter_count(shapes) * 4 * (5 + 3)
    assert {part.name: part for part in roofline.parts_of_step(config)}["optimizer"].bytes == want


def test_topk_reads_and_writes_the_stream_of_the_layers_that_have_it():
    part = {part.name: part for part in roofline.parts_of_step(GROUPED)}["TopK"]
    entries = 5 * 16 * 256 * 256  # layers, sequences, tokens, width
    assert part.bytes == entries * (2 + 2 + 1 + 1 + 2 + 2)  # x, y, mask, mask, g, dx
    assert part.flops == 0


def test_the_floor_is_what_takes_longer():
    rates = Rates("float32", flops_per_second=100.0, bytes_per_second=10.0)
    assert Part("products", flops=1000, bytes=20).seconds(rates) == 10
    assert Part("traffic", flops=100, bytes=50).seconds(rates) == 5
    parts = [Part("a", flops=100), Part("b", bytes=20)]
    assert roofline.step_seconds(parts, rates) == 3


@pytest.mark.slow
def test_rates_of_this_machine_are_measured():
    rates = roofline.measure_rates("float32", repeats=1)
    assert rates.flops_per_second > 1e8 and rates.bytes_per_second > 1e8
