"""The recipes of configs/paper.py are what their names say."""

import jax
import pytest

from configs import paper
from topklm.compile_check.check import with_vocabulary
from topklm.config import resolve
from topklm.errors import UserError
from topklm.model import transformer

SIZES = {"130m": 130e6, "400m": 400e6, "1.4b": 1.4e9, "7b": 7e9}


def recipe(variant):
    return with_vocabulary(resolve(paper.get_config(variant)))


def parameters(config):
    shapes = jax.eval_shape(lambda: transformer.create(config.model, 0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_has_the_parameters_of_its_name_and_twenty_tokens_for_each(size):
    config = recipe(size)
    n = parameters(config)
    assert n == pytest.approx(SIZES[size], rel=0.1)
    assert n == paper.parameter_count(paper.get_config(size).model)
    tokens = config.train.steps * config.train.batch_size * config.model.context_length
    assert tokens == pytest.approx(20 * n, rel=0.001)


@pytest.mark.parametrize("variant", [v for v in paper.VARIANTS if not v.endswith("-base")])
def test_a_twin_differs_only_in_having_no_topk(variant):
    ours, twin = paper.get_config(variant), paper.get_config(f"{variant}-base")
    assert resolve(ours).model.n_topk_layers > 0
    assert resolve(twin).model.n_topk_layers == 0
    ours.model.n_nontopk = twin.model.n_nontopk
    assert ours == twin


def test_the_recipe_for_a_gpu_sees_the_same_batches():
    assert recipe("130m-gpu").train.batch_size == recipe("130m").train.batch_size


def test_an_unknown_variant_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"paper:13b: the variants are 130m, 130m-base"):
        paper.get_config("13b")
