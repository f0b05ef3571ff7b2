"""The explorer's addresses: what they answer, and how they take what they cannot."""

import json
import re
import time

import pytest
from serve_site import serving

from topklm import web
from topklm.errors import UserError
from topklm.explorer.neuron_data import NeuronData

PAGES = [
    "/",
    "/?sort=density&order=falling&layer=1&columns=all&density.min=0.01&page=1",
    "/neurons/0/3",
    "/neurons/0/31",  # dead
    "/neurons/0/3?text=the+old+baker",
    "/neurons/0/3/preview",
    "/neurons/0/31/preview",
    "/prompt",
    "/prompt?text=the+old+baker",
    "/prompt?text=the+old+baker&token=2",
    "/search",
    "/search?q=lantern",
    "/search?q=nowhere_to_be_found",
    "/search?kind=regex&q=lantern&case=1&ends=1",
    "/search?kind=regex&q=zzzzzz",
    "/labels",
    "/api/overview?sort=density",
    "/api/neurons/0/3",
    "/api/neurons/0/3/context?at=5&size=300",
    "/api/search?q=lantern",
    "/api/search?kind=regex&q=lantern",
    "/api/labels.json",
    "/api/labels.csv",
]
NOT_THERE = [
    "/nowhere",
    "/neurons/2/0",
    "/neurons/0/32",
    "/neurons/0/99999999999999999999",
    "/neurons/0",
    "/neurons/-1/0",
    "/neurons/a/b",
    "/go?neuron=7:7",
    "/prompt?text=the&token=99",
    "/api/neurons/2/0",
    "/api/nowhere",
    "/api/neurons/0/3/context?at=999999999&size=10",
]
WITHOUT_SENSE = [
    "/?sort=nothing",
    "/?page=0",
    "/?page=99",
    "/?page=x",
    "/?layer=5",
    "/?density.min=x",
    "/go?neuron=",
    "/go?neuron=1",
    "/go?neuron=²:1",
    "/search?kind=other&q=x",
    "/search?kind=regex&q=(",
    "/prompt?text=%20",
    "/prompt?text=" + "a" * 500,
    "/prompt?text=the&token=x",
    "/api/overview?page=0",
    "/api/neurons/0/3/context?at=x&size=3",
    "/api/neurons/0/3/context?at=-1&size=3",
    "/api/neurons/0/3/context",
    "/api/search?kind=regex&q=(",
    "/api/search?q=",
]


@pytest.mark.parametrize("path", PAGES)
def test_pages_are_there(site, path):
    answer = site.ask(path)
    assert answer.status == 200
    assert answer.body


@pytest.mark.parametrize(
    ("path", "status"), [(path, 404) for path in NOT_THERE] + [(path, 400) for path in WITHOUT_SENSE]
)
def test_mistakes_are_answered_with_a_reason(site, path, status):
    answer = site.ask(path.replace("²", "%C2%B2"))
    assert answer.status == status
    if path.startswith("/api/"):
        assert answer.json["error"]
    else:
        assert 'role="alert"' in answer.text
        assert "</html>" in answer.text
    assert "Traceback" not in answer.text


def test_files_of_the_pages_are_kept_by_browsers_for_ever(site):
    for path in re.findall(r'(?:href|src)="(/static/[^"]*)"', site.ask("/").text):
        answer = site.ask(path)
        assert answer.status == 200
        assert "immutable" in answer.headers["cache-control"]
    assert answer.headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize(
    ("cookie", "theme"), [("dark", "dark"), ("light", "light"), ('"><script>', None), ("", None)]
)
def test_the_theme_that_was_chosen_stands_in_the_page(site, cookie, theme):
    text = site.ask("/labels", headers={"Cookie": f"topklm_theme={cookie}"}).text
    assert re.findall('data-theme="(.*?)"', text) == ([theme] if theme else [])


def test_a_neuron_typed_by_number_is_gone_to(site):
    for typed in ("1:17", "1/17", "%201:17%20"):
        answer = site.ask(f"/go?neuron={typed}")
        assert (answer.status, answer.headers["location"]) == (303, "/neurons/1/17")


def test_a_random_neuron_is_gone_to(site):
    assert site.ask(site.ask("/random").headers["location"]).status == 200


def test_forms_without_a_script_lead_to_pages_that_can_be_reloaded(site):
    answer = site.ask("/prompt", form={"text": "the old\r\nbaker"})
    assert (answer.status, answer.headers["location"]) == (303, "/prompt?text=the+old%0Abaker")
    answer = site.ask("/neurons/0/3/text", form={"text": "the"})
    assert (answer.status, answer.headers["location"]) == (303, "/neurons/0/3?text=the#own-text")
    assert site.ask("/neurons/5/3/text", form={"text": "the"}).status == 404


NOTE = {"comment": "", "by": "", "from_step": None, "to_step": None, "holds": True, "steps": ""}


def test_labels_are_set_shown_and_downloaded(site):
    assert (
        site.ask("/neurons/1/2/label", form={"label": "boats, and more"}).headers["location"]
        == "/neurons/1/2"
    )
    try:
        assert "boats, and more" in site.ask("/neurons/1/2").text
        assert "boats, and more" in site.ask("/labels").text
        assert site.ask("/?labelled=1").text.count("<tr>") == 2  # with the head
        assert [n["neuron"] for n in site.ask("/api/search?q=BOATS+more").json["labelled"]] == [2]
        assert site.ask("/api/labels.json").json["labels"] == [
            {"layer": 1, "neuron": 2, "label": "boats, and more"}
        ]
        assert site.ask("/api/labels.csv").text == (
            'layer,neuron,label,comment,by,from_step,to_step\r\n1,2,"boats, and more",,,,\r\n'
        )
        assert "attachment" in site.ask("/api/labels.csv").headers["content-disposition"]
        assert site.ask("/neurons/1/2/label", form={"label": "x" * 300}).status == 400
        assert site.ask("/api/neurons/1/2/label", form={"label": "a\nb"}).json["error"]
        assert site.ask("/neurons/7/2/label", form={"label": "x"}).status == 404
        assert site.ask("/api/neurons/1/2").json["label"] == "boats, and more"
    finally:
        site.ask("/neurons/1/2/label", form={"label": ""})
    assert site.ask("/api/labels.json").json["labels"] == []


def test_a_neuron_is_embedded_by_other_pages_without_anything_that_changes_something(site):
    answer = site.ask("/neurons/0/3?embed=1")
    assert answer.status == 200
    assert "frame-ancestors *" in answer.headers["content-security-policy"]
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    for not_there in ("<form", "<nav", "Steer"):
        assert not_there not in answer.text
    assert '<base target="_blank">' in answer.text
    assert "frame-ancestors 'none'" in site.ask("/neurons/0/3").headers["content-security-policy"]
    assert site.ask("/neurons/9/3?embed=1").status == 404


def test_labels_are_imported_suggested_and_walked(explored_copy):
    with serving(NeuronData(explored_copy)) as site:
        first = site.ask("/labels/next").headers["location"]
        _, _, layer, neuron = first.split("/")
        content = f"layer,neuron,label,comment,by\n{layer},{neuron},sea,often,Ann\n1,17,boats,,\n"
        answer = site.ask("/labels", form={"content": content})
        assert (answer.status, "2 labels added, 0 changed" in answer.text) == (200, True)
        assert answer.text.count("often") == 1
        assert "10 to label next" in answer.text
        second = site.ask("/labels/next").headers["location"]
        assert second not in (first, "/neurons/1/17")
        assert site.ask(f"/labels/next?after={layer}:{neuron}").headers["location"] == second
        notes = site.ask(f"/api/neurons/{layer}/{neuron}").json["notes"]
        assert notes == [NOTE | {"label": "sea", "comment": "often", "by": "Ann"}]
        form = {"label": "ocean", "comment": "seldom", "at": "1"}
        answer = site.ask(f"/api/neurons/{layer}/{neuron}/label", form=form)
        assert answer.json["label"] == "sea · ocean"
        for content, said in (("layer,neuron,label\n7,1,a", "layer 7: must be"), ("x", "cannot be read")):
            assert said in site.ask("/labels", form={"content": content}).text
            body = json.dumps({"content": content}).encode()
            headers = {"Content-Type": "application/json"}
            answer = site.ask("/api/labels", "POST", headers, body)
            assert (answer.status, said in answer.json["error"]) == (404 if "7" in content else 400, True)
        assert site.ask("/labels/next?after=7").status == 400
        assert site.ask("/labels/next?after=7:7").status == 404


def test_labels_of_another_models_neurons_do_no_harm(explored_copy):
    source = NeuronData(explored_copy)
    source.labels.set(9, 9, "of another model")
    source.labels.set(0, 500, "of another model")
    with serving(source) as site:
        for path in ("/", "/labels", "/?labelled=1", "/search?q=another", "/neurons/0/0", "/prompt?text=the"):
            assert site.ask(path).status == 200


def test_damaged_labels_are_said_to_be_damaged(explored_copy):
    explored_copy.labels.write_text("{")
    with serving(NeuronData(explored_copy)) as site:
        answer = site.ask("/neurons/0/0")
        assert answer.status == 400
        assert "labels.json is damaged" in answer.text


def test_a_run_without_its_checkpoint_has_pages_but_takes_no_prompt(explored_copy):
    (explored_copy.run / "checkpoints").rename(explored_copy.run / "gone")
    with serving(NeuronData(explored_copy)) as site:
        assert site.ask("/neurons/0/3").status == 200
        assert "checkpoints" in site.ask("/prompt?text=the").text
        assert "checkpoints" in site.ask("/api/prompt", form={"text": "the"}).json["error"]


def test_a_bug_is_a_page_too_and_no_trace(site, monkeypatch, caplog):
    monkeypatch.setattr("topklm.explorer.views.labelled", lambda source: 1 / 0)
    answer = site.ask("/labels")
    assert answer.status == 500
    assert "ZeroDivisionError" not in answer.text
    deadline = time.monotonic() + 60  # it is told after it is answered
    while "ZeroDivisionError" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_taken_port_is_said_to_be_taken():
    with web.listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(UserError, match=f"--port = {port}: cannot listen .* choose another"):
            web.listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "named"),
    [
        ("127.0.0.1", -1, "--port"),
        ("127.0.0.1", 65536, "--port"),
        ("no such host", 0, "--host"),
        ("192.0.2.1", 0, "cannot listen"),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_named(host, port, named):
    with pytest.raises(UserError, match=named):
        web.listen(host, port)


@pytest.mark.parametrize("what", ["store", "table", "tokenizer", "step", "other tokenizer"])
def test_parts_that_are_missing_or_of_another_run_are_named(explored_copy, what):
    tokenizer, metadata = explored_copy.run / "tokenizer.json", explored_copy.store / "metadata.json"
    if what == "store":
        metadata.unlink()
    elif what == "table":
        explored_copy.table.unlink()
    elif what == "tokenizer":
        tokenizer.unlink()
    elif what == "step":
        metadata.write_text(metadata.read_text().replace('"step": 5', '"step": 6'))
    else:
        tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"neurons measure|neurons harvest|prepare|harvest again"):
        NeuronData(explored_copy)
