"""Two texts side by side, one with a neuron set from outside: what is written, and what is refused."""

import argparse
import contextlib
import dataclasses
import html
import http.client
import json
import re
import time
from urllib.parse import urlencode

import explored_run
import jax
import numpy as np
import pytest
from serve_site import serving
from test_security import assert_harmless

from topklm.commands import shared
from topklm.errors import UserError
from topklm.explorer.steering import COLUMNS, LiveModel, SteerSettings, Strengths, Writing, box, spelled
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.interventions import MODES, Intervention, Mode, load_interventions, save_interventions
from topklm.inference.scheduler import Generation
from topklm.inference.sequence import Sampling
from topklm.server import requests
from topklm.server.requests import ApiError, Limits

# Here all texts end at 25 to 32 tokens, and prompts at 16, so that few programs are compiled.
PROMPT, LENGTH, SEED = "The baker", 22, 4
PLACE = (1, 17)
ADDRESS = "/api/neurons/1/17/steer"
ASKED = {"prompt": PROMPT, "value": 3.5, "max_new_tokens": LENGTH, "seed": SEED}


@pytest.fixture(scope="module")
def reader(source):
    return LiveModel(str(source.folder.run), source.store.metadata)


def whole(writing):
    texts = dict.fromkeys(COLUMNS, "")
    while not writing.done:
        for piece in writing.more():
            texts[piece["column"]] += piece["text"]
    return texts


def stream(site, asked, address=ADDRESS):
    headers = {"Content-Type": "application/json"}
    answer = site.ask(address, "POST", headers, json.dumps(asked).encode())
    if answer.status != 200:
        return answer, None
    return answer, [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize(
    ("mode", "positions", "seed", "temperature"),
    [("clamp", "all", 0, 0.7), ("ban", "all", 1, 1.0), ("add", "generated", -3, 0.7), ("force", "all", 5, 0)],
)
def test_the_columns_are_what_the_model_writes_with_the_same_seed_and_alone(
    source, reader, mode, positions, seed, temperature
):
    settings = SteerSettings(PROMPT, mode, 3.5, positions, temperature, LENGTH, seed)
    found = whole(Writing(source, reader, *PLACE, settings))
    options = {"max_new_tokens": LENGTH, "temperature": temperature, "seed": seed}
    steer = [Intervention(*PLACE, 3.5, mode, positions)]
    # Two rows, and interventions that may be none: another program would have to be compiled.
    unsteered, steered = (
        reader.model.generate([PROMPT, ""], **options, steer=some)[0] for some in ([], steer)
    )
    assert found == {
        "unsteered": spelled(unsteered.removeprefix(PROMPT)),
        "steered": spelled(steered.removeprefix(PROMPT)),
    }
    assert found["unsteered"]
    if mode != "ban":
        assert found["steered"] != found["unsteered"]


def test_the_unsteered_column_is_what_the_model_finds_most_likely_token_by_token(source, reader):
    found = whole(
        Writing(
            source, reader, *PLACE, SteerSettings(PROMPT, value=3.5, temperature=0, max_new_tokens=LENGTH)
        )
    )
    prompt, _, _ = generated(reader.model, {})
    ids = list(prompt)
    while len(ids) < len(prompt) + LENGTH and (len(ids) == len(prompt) or ids[-1] != prompt[0]):
        logits, _ = reader.model.run_with_cache(padded(ids))
        ids.append(int(np.argmax(logits[0, len(ids) - 1])))
    new = [token for token in ids[len(prompt) :] if token != prompt[0]]
    assert new
    assert found["unsteered"] == spelled(reader.model.tokenizer.decode(new))


def padded(ids):
    """Takes a program that is compiled already."""
    return np.array([ids + [0] * (32 - len(ids))])


def generated(model, steer):
    """Returns the tokens of the prompt, those of a text made from it, and why that ended."""
    separator = model.tokenizer.separator_id
    prompt = [separator, *model.tokenizer.encode(PROMPT).tolist()]
    generation = Generation(
        model.config.model,
        model.params,
        [prompt, prompt],
        [Sampling(temperature=0.7, seed=SEED)] * 2,
        max_new_tokens=[LENGTH] * 2,
        stop_token=separator,
        interventions=InterventionBatch.of(model.config.model, steer),
    )
    while not generation.done:
        generation.advance()
    return prompt, generation.texts[0][len(prompt) :], generation.finished[0]


def test_the_stream_has_the_prompt_both_texts_and_what_became_of_them(site, source, reader):
    answer, lines = stream(site, ASKED)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert lines[0] == {"prompt": PROMPT}
    pieces, ends = lines[1:-1], lines[-1]["ends"]
    # Both columns grow together: neither is whole before the other begins.
    order = [piece["column"] for piece in pieces]
    assert order.index("steered") < len(order) - 1 - order[::-1].index("unsteered")
    model = reader.model
    top = source.row(source.number(*PLACE))["top_tokens"][:10]
    some_marked = 0
    for column, steer in (("unsteered", {}), ("steered", {PLACE: 3.5})):
        prompt, new, why = generated(model, steer)
        mine = [piece for piece in pieces if piece["column"] == column]
        assert "".join(piece["text"] for piece in mine) == spelled(model.tokenizer.decode(new))
        end = ends[column]
        assert (end["why"], end["tokens"]) == (why, len(new))
        assert end["input_tokens"] == sum(token in top for token in new)
        # Tokens that are whole characters by themselves stand in the text as they are.
        letters = {token: text for token in top if (text := model.tokenizer.decode([token])).isalnum()}
        assert sum(
            piece["text"].count(letters[token]) for piece in mine for token in letters if piece["input_token"]
        ) == sum(new.count(token) for token in letters)
        some_marked += sum(piece["input_token"] for piece in mine)
        text = prompt + new
        _, cache = model.run_with_cache(padded(text))
        neuron = np.asarray(cache.neurons.dense())[PLACE[0], 0, :, PLACE[1]]
        active = neuron[len(prompt) : len(text)] != 0
        assert end["active"] == pytest.approx(active.mean())
        assert end["summary"].startswith(f"{len(new)} token")
    assert some_marked


def test_a_text_too_long_to_be_read_at_once_is_written_all_the_same(source, reader):
    short = dataclasses.replace(source.store.metadata, context_length=len(PROMPT) + 3)
    writing = Writing(source, LiveModel(str(source.folder.run), short), *PLACE, SteerSettings.of(ASKED))
    assert all(whole(writing).values())
    assert [end["active"] for end in writing.ends().values()] == [None, None]


WRONG = [
    ({"value": "NaN"}, "value = nan of layer 1, neuron 17: must be a finite number"),
    ({"value": float("nan")}, "value = nan"),
    ({"value": "1e999"}, "value = inf"),
    ({"value": "much"}, "value = much: must be a number"),
    ({"value": True}, "value = True: must be a number"),
    ({"value": [1]}, "value = \\[1\\]: must be a number"),
    ({"value": None}, "value = None: must be a number"),
    ({"mode": "shout"}, "mode = 'shout': must be one of"),
    ({"mode": 3}, "mode = 3: must be text"),
    ({"positions": "there"}, "positions = 'there': must be one of"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n"}, "prompt is empty"),
    ({"prompt": "a" * 128}, "prompt has 128 tokens: at most 127"),
    ({"prompt": 7}, "prompt = 7: must be text"),
    ({"temperature": -1}, "temperature = -1.0: must be 0 or more"),
    ({"max_new_tokens": 0}, "max_new_tokens = 0: must be from 1 to 200"),
    ({"max_new_tokens": 201}, "max_new_tokens = 201: must be from 1 to 200"),
    ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5: must be a whole number"),
    ({"seed": "x" * 500}, "seed = x{60}\\.\\.\\.: must be a whole number"),
    ({"seed": 2**70}, "seed = "),
    ({"strength": 4}, "strength is no field: there are prompt, mode, value"),
]


@pytest.mark.parametrize(("changed", "said"), WRONG)
def test_what_makes_no_sense_is_refused_in_one_line_before_anything_is_written(site, changed, said):
    answer, _ = stream(site, ASKED | changed)
    assert answer.status == 400
    assert re.match(said, answer.json["error"])
    assert "\n" not in answer.json["error"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "no JSON"),
        (b"[]", "is a JSON array"),
        (b"{}", "prompt is missing"),
        (b'{"prompt": "a"}', "value is missing"),
    ],
)
def test_a_request_that_is_not_whole_is_refused(site, body, said):
    answer = site.ask(ADDRESS, "POST", {"Content-Type": "application/json"}, body)
    assert answer.status == 400
    assert said in answer.json["error"]


@pytest.mark.parametrize("place", ["9/0", "0/32", "2/0"])
def test_a_neuron_that_is_not_there_is_not_steered(site, place):
    assert stream(site, ASKED, f"/api/neurons/{place}/steer")[0].status == 404
    assert site.ask(f"/neurons/{place}/steer", form={"prompt": "a"}).status == 404


def test_when_too_many_wait_one_more_is_sent_away(site, monkeypatch):
    monkeypatch.setattr("topklm.web._MOST_WAITING", 0)
    answer, _ = stream(site, ASKED)
    assert answer.status == 503
    assert "try again" in answer.json["error"]


def test_the_form_leads_to_a_page_with_both_texts_that_can_be_reloaded(site, source, reader):
    form = {name: str(value) for name, value in ASKED.items()} | {"prompt": "The\r\nold", "mode": "scale"}
    answer = site.ask("/neurons/1/17/steer", form=form)
    assert answer.status == 303
    expected = {
        "prompt": "The\nold",
        "mode": "scale",
        "value": "3.5",
        "max_new_tokens": str(LENGTH),
        "seed": str(SEED),
    }
    assert answer.headers["location"] == f"/neurons/1/17?{urlencode(expected)}#steer"
    page = site.ask(answer.headers["location"].partition("#")[0]).text
    texts = whole(Writing(source, reader, *PLACE, SteerSettings.of(expected)))
    for column in COLUMNS:
        found = re.search(f'data-column="{column}">(.*?)</p>', page, re.DOTALL)[1]
        shown = html.unescape(re.sub(r"</?(mark|span)[^>]*>", "", found))
        assert shown == "The\nold" + texts[column]
    assert '<option value="scale" selected data-value-is-factor>' in page
    # What is wrong stands in the page, with what was typed.
    page = site.ask("/neurons/1/17?prompt=The+baker&value=much").text
    assert "value = much: must be a number" in page
    assert ">The baker</textarea>" in page


def test_a_link_of_another_sites_page_fills_the_form_but_runs_nothing(site):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    page = site.ask("/neurons/1/17?prompt=The+baker&value=1", headers=headers).text
    assert ">The baker</textarea>" in page
    assert re.search(r'data-column="steered"></p>', page)


def test_markup_in_a_prompt_or_a_setting_is_shown_and_not_made(site):
    hostile = "</p><script>"
    page = site.ask("/neurons/1/17?" + urlencode({"prompt": hostile, "value": 1, "max_new_tokens": 15})).text
    assert_harmless(page)
    assert page.count("&lt;/p&gt;&lt;script&gt;</span>") == 2  # in both texts
    page = site.ask(
        "/neurons/1/17?" + urlencode({"prompt": "old\u202e", "value": 1, "max_new_tokens": 20})
    ).text
    assert page.count("old\\u202e</span>") == 2
    for name in ("prompt", "value", "mode", "positions", "temperature", "max_new_tokens", "seed"):
        asked = {"prompt": "The", "value": 1, name: "</textarea>\"'><script>alert(1)</script>" * 9}
        page = site.ask("/neurons/1/17?" + urlencode(asked)).text
        assert_harmless(page)
        assert 'role="alert"' in page


class Endless(Generation):
    """Goes on without new tokens until nobody wants any."""

    done = False

    def advance(self, steps):
        if len(self.texts[0]) > len(PROMPT) + 1:
            time.sleep(0.02)
            self.went_on = getattr(self, "went_on", 0) + 1
            return [[], []]
        made.append(self)
        return super().advance(1)


made: list[Endless] = []


def test_others_have_the_model_meanwhile_and_a_client_that_goes_ends_it(site, monkeypatch):
    monkeypatch.setattr("topklm.explorer.steering.Generation", Endless)
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", ADDRESS, json.dumps(ASKED).encode(), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert json.loads(answer.readline()) == {"prompt": PROMPT}
        assert json.loads(answer.readline())["column"] in COLUMNS
        assert site.ask("/api/neurons/1/17/text", form={"text": "the old baker"}).status == 200
        answer.close()
    monkeypatch.setattr("topklm.explorer.steering.Generation", Generation)
    # The next one has its turn when the first has ended, and not before.
    assert stream(site, ASKED)[0].status == 200
    went_on = made[0].went_on
    assert went_on > 0
    time.sleep(0.1)
    assert made[0].went_on == went_on


def test_a_server_that_is_told_to_stop_ends_what_is_written_without_a_trace(source, monkeypatch, caplog):
    monkeypatch.setattr("topklm.explorer.steering.Generation", Endless)
    with serving(source) as site:
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
        connection.request("POST", ADDRESS, json.dumps(ASKED).encode(), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert json.loads(answer.readline()) == {"prompt": PROMPT}
        assert json.loads(answer.readline())["column"] in COLUMNS
    with contextlib.closing(connection):
        assert not any("ends" in json.loads(line) for line in answer.read().splitlines())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("highest", [1e-6, 0.37, 1.0, 2.5, 41.0, 9876.0])
def test_the_slider_ends_at_four_times_the_highest_activation_on_a_step(highest):
    strengths = Strengths.of(highest, highest / 3)
    steps = strengths.end / strengths.step
    assert steps == pytest.approx(round(steps))
    assert 100 <= steps <= 1001
    assert 4 * highest * (1 - 1e-6) <= strengths.end < 4 * highest + strengths.step
    assert [value for value, _, _ in strengths.marks()] == pytest.approx([n * highest for n in range(5)])
    assert all(0 <= place <= 100 for _, place, _ in strengths.marks())


def test_the_box_begins_with_words_before_the_strongest_example(source):
    shown = box(source, *PLACE)
    prompt = shown["chosen"]["prompt"]
    text = source.plain_text(0, source.store.n_tokens)
    assert prompt
    assert prompt in " ".join(text.split())
    highest = source.row(source.number(*PLACE))["max_activation"]
    assert float(shown["chosen"]["value"]) == pytest.approx(0.7 * highest, rel=0.02)


def test_a_dead_neuron_is_steered_on_the_scale_of_its_layer(site, source):
    layer, neuron = explored_run.DEAD
    highest = [source.row(n)["max_activation"] for n in range(explored_run.D) if n != neuron]
    assert box(source, layer, neuron)["strengths"].highest == pytest.approx(np.median(highest))
    assert stream(site, ASKED, f"/api/neurons/{layer}/{neuron}/steer")[0].status == 200


def test_prose_keeps_its_lines_and_spells_what_would_hide():
    assert spelled("a\r\nb\xa0\u4e2d\u202e\x1b[\t\x00") == "a\nb\xa0\u4e2d\\u202e\\x1b[\\t\\x00"


def test_only_layers_with_topk_can_ban_and_force(source):
    assert list(box(source, *PLACE)["modes"]) == list(MODES)


@pytest.fixture
def added_modes(monkeypatch):
    """Two more modes in the table: one with a value after TopK, one without inside of it."""
    for mode in (
        Mode("subtract", True, None, "take {value} off", lambda value: 1.0, lambda value: -value),
        Mode("saturate", False, "wins", "set it to 9", lambda value: 0.0, lambda value: 9.0),
    ):
        monkeypatch.setitem(MODES, mode.name, mode)
    jax.clear_caches()  # programs know the modes that there were when they were compiled
    yield
    jax.clear_caches()


@pytest.mark.slow
def test_a_mode_needs_one_entry_in_the_table_to_be_known_everywhere(
    source, reader, site, added_modes, tmp_path
):
    model, tokens = reader.model, padded([3, 1, 4, 1, 5])
    # The library: a value, a file, and a request to the server are the same intervention.
    for mode, value, like in (("subtract", 2.5, ("add", -2.5)), ("saturate", 0.0, ("force", 9.0))):
        one = Intervention(*PLACE, value, mode)
        expected = np.asarray(model(tokens, steer=[Intervention(*PLACE, like[1], like[0])]))
        np.testing.assert_array_equal(model(tokens, steer=[one]), expected)
        assert np.abs(expected - np.asarray(model(tokens))).max() > 0
        save_interventions(tmp_path / "file.json", [one])
        assert load_interventions(tmp_path / "file.json") == [one]
        entry = {"layer": 1, "neuron": 17, "mode": mode} | ({"value": value} if value else {})
        asked = {"prompt": [3], "steer": [entry]}
        assert requests.completion(model, "m", Limits(), asked).sequences[0].steer.entries() == [one]
    without_topk = dataclasses.replace(model.config.model, n_nontopk=model.config.model.n_layers)
    with pytest.raises(ValueError, match="the layer has no TopK"):
        Intervention(*PLACE, mode="saturate").check(without_topk)
    # The explorer: the page offers them, its script gets its facts there, and the box writes with them.
    page = site.ask("/neurons/1/17").text
    assert '<option value="subtract">subtract: take the strength off</option>' in page
    assert '<option value="saturate" data-without-value>saturate: set it to 9</option>' in page
    without_value = {name: value for name, value in ASKED.items() if name != "value"}
    assert stream(site, {**without_value, "mode": "saturate"})[0].status == 200
    assert stream(site, {**without_value, "mode": "subtract"})[0].status == 400
    # Command lines.
    parser = argparse.ArgumentParser()
    shared.add_steering(parser)
    given = parser.parse_args(["--steer", "1:17", "--steer-mode", "saturate"])
    assert shared.interventions(given, model) == [Intervention(*PLACE, mode="saturate")]
    assert "take the value off" in " ".join(parser.format_help().split())


def test_a_value_may_be_in_units_of_the_neurons_largest_activation(source, reader, site):
    """Python, the command line, the server and the explorer mean the same by 0.5x."""
    model, largest = reader.model, float(np.abs(source.store.neuron(*PLACE).values).max())
    assert model.largest_activation(*PLACE) == largest == source.row(source.number(*PLACE))["max_activation"]
    tokens = np.arange(30)[None] % 50
    expected = model(tokens, steer={PLACE: 0.5 * largest})
    assert not np.array_equal(expected, model(tokens))
    for steer in ({PLACE: "0.5x"}, {"1:17": " .5x"}, Intervention(*PLACE, "5e-1x")):
        np.testing.assert_array_equal(model(tokens, steer=steer), expected)
    parser = argparse.ArgumentParser()
    shared.add_steering(parser)
    one = Intervention(*PLACE, 0.5 * largest)
    arguments = parser.parse_args(["--steer", "1:17=0.5x", "--steer", "0:3=2"])
    assert shared.interventions(arguments, model) == [one, Intervention(0, 3, 2.0)]
    limits = Limits()
    for steer in ({"1:17": "0.5x"}, [{"layer": 1, "neuron": 17, "value": "0.5x"}]):
        (sequence,) = requests.completion(model, "m", limits, {"prompt": [3], "steer": steer}).sequences
        assert sequence.steer.entries() == [one]
    as_number, as_times = (stream(site, {**ASKED, "value": value})[1] for value in (0.5 * largest, "0.5x"))
    assert as_times == as_number

    dead = Intervention(*explored_run.DEAD, "1x")
    with pytest.raises(
        ValueError, match=r"^0:31 is active at none of the 7,517 tokens harvested.*without x$"
    ):
        model(tokens, steer=dead)
    with pytest.raises(ValueError, match=r"^value = 2x of 1:17: mode scale multiplies already"):
        model(tokens, steer={PLACE: "2x"}, steer_mode="scale")
    with pytest.raises(ValueError, match="value = '2 x' of layer 1, neuron 17: must be a finite number"):
        model(tokens, steer={PLACE: "2 x"})
    elsewhere = dataclasses.replace(model, run="nowhere")
    said = r"step = 5: nowhere has no activations of step 5: run topklm neurons harvest nowhere"
    with pytest.raises(UserError, match=said):
        elsewhere.generate("a", steer={PLACE: "1x"})
    with pytest.raises(UserError, match=f"^{said}"):
        shared.interventions(parser.parse_args(["--steer", "1:17=1x"]), elsewhere)
    with pytest.raises(ApiError, match=f"^steer: {said}"):
        requests.completion(elsewhere, "m", limits, {"prompt": [3], "steer": {"1:17": "1x"}})
    with pytest.raises(ApiError, match="must be a finite number"):
        requests.completion(model, "m", limits, {"prompt": [3], "steer": {"1:17": "x"}})
