"""Steps of odd shapes on every family of TPUs: a report in which everything is counted, or one line."""

import importlib.util

import pytest

from configs import books, paper, small
from topklm.compile_check import check
from topklm.config import resolve
from topklm.errors import UserError

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")

SHAPE = {"d_model": 128, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_mlp": 256, "context_length": 128}
ODD = {"d_model": 6, "n_heads": 3, "n_kv_heads": 1, "topk_k": 3}


def compiled(name, model, batch_size, mesh):
    values = {"model": {**SHAPE, "topk_k": 8, **model}, "mesh": mesh, "data": {"vocab_size": 512}}
    slices = values["mesh"].pop("slices", 1)
    config = resolve({**values, "train": {"batch_size": batch_size}})
    return check.compile_check(config, check.find(name, slices), "made")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "model", "batch_size", "mesh"),
    [
        ("v5e:2x4", {}, 8, {}),
        slow("v5e:1x1", {}, 1, {}),
        slow("v6e:1x1", ODD, 1, {}),
        slow("v5p:1x1x1", {"context_length": 1}, 1, {}),
        slow("v5p:2x2x1", {}, 8, {}),
        slow("v5p:2x2x2", {"context_length": 100}, 8, {"fsdp": 4}),
        slow("v6e:2x2", {}, 4, {"tensor": 2}),
        slow("v5e:2x2", {"n_heads": 1, "n_kv_heads": 1}, 4, {}),
        slow("v5e:2x2", {"d_model": 130, "n_heads": 5, "n_kv_heads": 5}, 4, {}),
        slow("v5e:2x2", {"context_length": 129}, 4, {}),
        slow("v5e:2x2", {"context_length": 640}, 4, {"context": 2}),
        slow("v5e:2x4", {"n_heads": 4, "n_kv_heads": 1}, 8, {"context": 4}),
        slow("v5e:2x2", {"topk_backend": "approx", "dtype": "bfloat16"}, 8, {"fsdp": 2}),
        slow("v5e:2x2", {"attention": "blocked", "context_length": 7}, 8, {}),
        slow("v5e:2x2", {"layer_stack": "unrolled", "remat": "minimal"}, 4, {}),
        slow("v5e:2x2", {"tie_embeddings": True, "dtype": "bfloat16"}, 8, {"tensor": 2, "fsdp": 2}),
        slow("v5e:2x2", {"qk_norm": True, "dtype": "bfloat16"}, 8, {"tensor": 2, "fsdp": 2}),
        slow("v5e:2x2", {}, 8, {"slices": 2}),
    ],
)
def test_a_step_of_any_shape_is_counted_whole(name, model, batch_size, mesh):
    found = compiled(name, model, batch_size, dict(mesh))
    assert found.unread == {}
    assert found.compiled_flops >= found.model_flops
    assert "not counted" not in check.as_text(found)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "experiment",
    [module.get_config(v) for module in (small, books) for v in module.VARIANTS] + [paper.get_config("130m")],
    ids=[f"{m.__name__}:{v}" for m in (small, books) for v in m.VARIANTS] + ["configs.paper:130m"],
)
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x1", "v6e:2x2"])
def test_every_recipe_has_a_report_or_a_line_on_every_family(experiment, name):
    try:
        found = check.compile_check(resolve(experiment), check.find(name), "made")
    except UserError as e:
        assert "GiB per device" in str(e)
    else:
        assert found.unread == {}


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:3x3", "v6e:1x3", "v5p:3x1x1"])
def test_a_slice_that_is_not_made_is_one_line(name):
    with pytest.raises(UserError, match=f"--topology = {name}: libtpu does not know this slice"):
        check.find(name)
