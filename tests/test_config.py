import dataclasses
import json
from pathlib import Path

import pytest

from topklm import config as config_lib
from topklm.config import Config, differences_that_matter, flatten, from_saved, nearest_field, resolve
from topklm.errors import UserError
from topklm.training.metrics import describe_model

_TOPICS = {"model": {"topk_groups": "56:8,200:24"}, "optim": {"topic_weight": 1.0}}


def with_fields(**fields):
    """The default config with fields such as model__topk_k."""
    values = Config().to_dict()
    for name, value in fields.items():
        section, field = name.split("__")
        values[section][field] = value
    return resolve(values)


def test_the_defaults_resolve_to_themselves():
    assert resolve(config_lib.default()) == Config()
    assert resolve({}) == Config()


def test_what_is_missing_takes_its_default():
    config = resolve({"model": {"d_model": 64}, "train": {"steps": 3}})
    assert (config.model.d_model, config.train.steps) == (64, 3)
    assert config.model.n_layers == Config().model.n_layers


def test_a_config_survives_json():
    config = with_fields(model__topk_k=7, optim__learning_rate=0.1, data__source="a.txt,b.txt")
    assert from_saved(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_is_frozen_and_hashable():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.d_model = 3
    assert hash(config) == hash(Config())


def test_every_field_has_a_name_of_two_parts_but_those_of_no_section():
    names = list(flatten(Config()))
    assert "model.d_model" in names
    assert [name for name in names if name.count(".") != 1] == ["profile"]
    assert len(set(names)) == len(names)


def test_a_field_of_no_section_is_set_and_survives_like_others():
    config = resolve({"profile": "10:13"})
    assert config.profile == flatten(config)["profile"] == "10:13"
    assert from_saved(json.loads(json.dumps(config.to_dict()))) == config
    assert not differences_that_matter(Config(), config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modl": {}}, r"config\.modl is not a section; did you mean model\?"),
        ({"xyz": {}}, r"config\.xyz is not a section; there are: model, data, train"),
        ({"model": 3}, r"config\.model = 3: must be a section"),
        ({"profile": {"steps": 3}}, r"profile = \{'steps': 3\}: must be of type str"),
        ({"profil": "3:4"}, r"config\.profil is not a section; did you mean profile\?"),
        ({"model": {"topk": 3}}, r"config\.model\.topk is not a field; did you mean topk_k\?"),
        ({"log": {"xyz": 3}}, r"config\.log\.xyz is not a field; there are: every_steps"),
        ({"model": {"topk_k": "8"}}, r"model\.topk_k = '8': must be of type int"),
        ({"optim": {"topic_weight": -1.0}}, r"optim\.topic_weight = -1\.0: must be 0 or more"),
        (
            {"optim": {"topic_weight": 1.0}},
            r"optim\.topic_weight = 1\.0: must be 0 without model\.topk_groups",
        ),
        ({**_TOPICS, "model": {**_TOPICS["model"], "n_nontopk": 4}}, r"optim\.topic_weight.*in a Base LM"),
        (
            {**_TOPICS, "optim": {"topic_weight": 1.0, "topic_tokens": 256}},
            r"optim\.topic_tokens = 256: must be less than model\.context_length \(256\)",
        ),
        ({"model": {"topk_k": 8.0}}, r"model\.topk_k = 8\.0: must be of type int"),
        ({"model": {"topk_k": True}}, r"model\.topk_k = True: must be of type int"),
        (
            {"model": {"layer_stack": "scan"}},
            r"model\.layer_stack = 'scan': must be one of auto, scanned,",
        ),
        ({"model": {"tie_embeddings": 1}}, r"model\.tie_embeddings = 1: must be of type bool"),
        ({"data": {"source": None}}, r"data\.source = None: must be of type str"),
        ({"optim": {"beta1": 1.0}}, r"optim\.beta1 = 1\.0: must be at least 0 and below 1"),
        ({"optim": {"learning_rate": float("inf")}}, r"optim\.learning_rate = inf: must be a finite number"),
        ({"optim": {"schedule": "linear"}}, r"optim\.schedule = 'linear': must be one of cosine, wsd"),
        ({"data": {"heldout_fraction": 1.0}}, r"data\.heldout_fraction = 1\.0: must be above 0 and below 1"),
        (
            {"mesh": {"data": -1, "fsdp": -1}},
            r"only one of mesh\.data, mesh\.fsdp, mesh\.context, mesh\.tensor may be -1",
        ),
    ],
)
def test_a_mistake_is_named(values, message):
    with pytest.raises(UserError, match=message):
        resolve(values)


def test_a_whole_number_is_a_number():
    rate = with_fields(optim__learning_rate=1).optim.learning_rate
    assert (rate, type(rate)) == (1.0, float)


@pytest.mark.parametrize(
    ("k", "n_nontopk"), [(1, 1), (Config().model.d_model, 1), (32, Config().model.n_layers)]
)
def test_the_ends_of_a_range_are_allowed(k, n_nontopk):
    model = with_fields(model__topk_k=k, model__n_nontopk=n_nontopk).model
    assert model.n_topk_layers == model.n_layers - n_nontopk


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("d_modl", "config.model.d_model"), ("modl", "config.model"), ("step", "config.train.steps")],
)
def test_the_nearest_name_is_suggested(misspelt, meant):
    assert nearest_field(misspelt) == f"did you mean {meant}?"


def test_a_name_like_no_other_is_sent_to_the_help():
    assert "--help" in nearest_field("zzzzzz")


def test_equal_configs_do_not_differ():
    assert differences_that_matter(Config(), Config()) == {}


def test_a_change_of_the_run_itself_is_listed_with_both_values():
    saved, asked = with_fields(), with_fields(model__topk_k=4, optim__schedule="wsd", train__steps=5)
    assert differences_that_matter(saved, asked) == {
        "model.topk_k": (Config().model.topk_k, 4),
        "optim.schedule": ("cosine", "wsd"),
    }


@pytest.mark.parametrize("schedule", config_lib.settings()["optim.schedule"].choices)
def test_length_place_and_reporting_may_change(schedule):
    saved = with_fields(optim__schedule=schedule)
    asked = with_fields(
        optim__schedule=schedule,
        train__steps=9,
        data__dir="elsewhere",
        mesh__fsdp=2,
        checkpoint__every_steps=3,
        checkpoint__keep=9,
        eval__every_steps=4,
        log__every_steps=1,
    )
    assert differences_that_matter(saved, asked) == {}


def test_a_run_may_change_between_exact_topk_backends_and_not_to_the_approximate_one():
    def with_backend(backend):
        return dataclasses.replace(Config(), model=dataclasses.replace(Config().model, topk_backend=backend))

    assert differences_that_matter(Config(), with_backend("lax")) == {}
    assert differences_that_matter(with_backend("threshold"), with_backend("approx")) == {
        "model.topk_backend": ("threshold", "approx")
    }
    assert differences_that_matter(with_backend("approx"), Config())


@pytest.mark.parametrize("scanned", [True, False])
def test_a_config_saved_with_scan_layers_is_still_read(scanned):
    saved = config_lib.Config().to_dict()
    del saved["model"]["layer_stack"]
    saved["model"]["scan_layers"] = scanned
    assert config_lib.from_saved(saved) == config_lib.Config()


def test_the_page_of_settings_is_what_the_fields_say():
    page = (Path(__file__).parents[1] / "docs/config.md").read_text(encoding="utf-8")
    assert page == config_lib.page(), "python -m topklm.config > docs/config.md"
    assert all(f"| `{name}` |" in page for name in flatten(Config()))


def test_a_range_says_what_it_holds():
    share = config_lib.settings()["optim.decay_fraction"].range
    assert (share.holds(0), share.holds(1.0), share.holds(1.01), share.allowed) == (
        True,
        True,
        False,
        "from 0 to 1",
    )


def test_a_model_is_described_with_all_that_its_topk_does():
    assert describe_model(Config()) == "4 layers, TopK keeps 32 of 256 (relu) in 3 of them"
    fields = {"model__topk_groups": "56:8,200:24", "model__topk_centred": True, "model__token_input": "every"}
    how = "relu, groups 56:8,200:24, centred, token input every"
    assert describe_model(with_fields(**fields)) == f"4 layers, TopK keeps 32 of 256 ({how}) in 3 of them"
    assert describe_model(with_fields(model__n_nontopk=4)) == "4 layers, TopK in none of them"
