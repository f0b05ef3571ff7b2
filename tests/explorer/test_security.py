"""Everything that a stranger's page, or a stranger, can make the explorer do: nothing."""

import contextlib
import html.parser
import re
import socket
import threading
import time

import explored_run
import pytest
from serve_site import serving

from topklm import web
from topklm.explorer.neuron_data import NeuronData
from topklm.web import MAX_BODY, is_loopback

HOSTILE_LABEL = "<script>alert('label')</script>\"'><img src=x onerror=alert(3)>"
POSTS = ("/prompt", "/neurons/0/3/text", "/neurons/0/3/label", "/api/prompt", "/api/neurons/0/3/label")


class Parser(html.parser.HTMLParser):
    """Collects what a browser would run."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.handlers, self.tags, self.styles = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "script":
            self.scripts.append(dict(attributes).get("src"))
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.styles += [value for name, value in attributes if name == "style"]


def assert_harmless(text):
    page = Parser(text)
    assert len(page.scripts) == 1
    assert re.fullmatch("/static/[0-9a-f]{12}/app.js", page.scripts[0])
    assert page.handlers == []
    assert page.styles == []
    assert "style" not in page.tags
    assert "img" not in page.tags
    return page


def hostile_example(source):
    """Returns a neuron with an example in a document of markup."""
    first = len(explored_run.DOCUMENTS) - len(explored_run.HOSTILE)
    starts = source.documents[0]
    for number in range(source.n_neurons):
        for at in source.row(number, ["examples"])["examples"]:
            if starts[first] <= at < starts[first + 2]:
                return source.place(number)
    raise AssertionError("no example is hostile")


def test_markup_in_the_corpus_is_shown_and_not_made(site):
    layer, neuron = hostile_example(site.source)
    page = assert_harmless(site.ask(f"/neurons/{layer}/{neuron}").text)
    assert "svg" in page.tags
    for words in ("script", "onerror", "raw"):
        answer = site.ask(f"/search?q={words}")
        assert answer.status == 200
        assert_harmless(answer.text)
        assert f'<mark class="found">{words}</mark>' in answer.text


def test_characters_that_turn_or_hide_text_are_spelled(site):
    answer = site.ask("/search?q=reversed")
    assert "\\u202e" in answer.text
    assert "\u202e" not in answer.text
    assert "\x1b" not in answer.text


def test_markup_in_a_prompt_is_shown_and_not_made(site):
    for path in ("/prompt?text=", "/neurons/0/3?text=", "/search?q=", "/search?kind=regex&q="):
        answer = site.ask(
            path + "%3Cscript%3Ealert(1)%3C/script%3E%3Cimg%20src=x%20onerror=alert(2)%3E%22%27"
        )
        assert_harmless(answer.text)
        assert "&lt;script&gt;" in answer.text


def test_markup_in_a_label_is_shown_and_not_made(site):
    assert site.ask("/neurons/1/9/label", form={"label": HOSTILE_LABEL}).status == 303
    try:
        for path in (
            "/neurons/1/9",
            "/labels",
            "/?labelled=1",
            "/search?q=alert",
            "/prompt?text=the+old+baker",
        ):
            assert_harmless(site.ask(path).text)
        assert site.ask("/api/neurons/1/9").json["label"] == HOSTILE_LABEL
    finally:
        site.ask("/neurons/1/9/label", form={"label": ""})


def test_markup_in_an_address_is_shown_and_not_made(site):
    for path in ("/%3Cscript%3Ealert(1)%3C/script%3E", "/go?neuron=%3Cscript%3E", "/?sort=%3Cscript%3E"):
        answer = site.ask(path)
        assert 400 <= answer.status < 500
        assert_harmless(answer.text)


def test_every_answer_forbids_scripts_that_are_not_ours(site):
    for path in ("/", "/neurons/0/3", "/nowhere", "/api/overview", "/neurons/9/9"):
        headers = site.ask(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/x/app.js",
        "/static/VERSION/../app.py",
        "/static/VERSION/..%2fapp.py",
        "/static/VERSION/../../app.py",
        "/static/VERSION/%2fetc%2fpasswd",
        "/static/VERSION/",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static/....//app.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/../../../../etc/passwd",
        "/static/..\\app.py",
        "/static/%00",
        "/neurons/..%2f..%2fconfig.json",
        "/static/",
    ],
)
def test_no_other_file_can_be_read(site, path):
    version = re.search(r"/static/(\w+)/style.css", site.ask("/").text)[1]
    answer = site.ask(path.replace("VERSION", version))
    assert answer.status in (400, 404)
    assert b"root:" not in answer.body
    assert b"import" not in answer.body


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1", "127.0.0.1:1", "[::1]"])
def test_only_its_own_name_is_answered(site, host):
    assert site.ask("/", headers={"Host": host}).status == 421
    assert site.ask("/", headers={"Host": f"localhost:{site.port}"}).status == 200


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_another_sites_page_changes_nothing(site, path, headers):
    assert site.ask(path, headers=headers, form={"label": "mine", "text": "the"}).status == 403
    assert site.ask("/api/neurons/0/3").json["label"] == ""


def test_our_own_page_may_change_labels(site):
    own = {"Origin": site.address, "Sec-Fetch-Site": "same-origin"}
    assert site.ask("/neurons/0/3/label", headers=own, form={"label": "mine"}).status == 303
    assert site.ask("/api/neurons/0/3").json["label"] == "mine"
    assert site.ask("/api/neurons/0/3/label", headers=own, form={"label": ""}).json["label"] == ""


def test_another_sites_page_cannot_make_the_model_run_or_a_pattern_be_searched(site):
    elsewhere = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    answer = site.ask("/prompt?text=the+old+baker", headers=elsewhere)
    assert "the old baker" in answer.text
    assert "<table" not in answer.text
    assert "<table" in site.ask("/prompt?text=the+old+baker").text
    assert "Precision" not in site.ask("/search?kind=regex&q=lantern", headers=elsewhere).text
    assert "Precision" in site.ask("/search?kind=regex&q=lantern").text
    for path in ("/", "/api/search?kind=regex&q=lantern", "/prompt?text=the"):
        embedded = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        assert site.ask(path, headers=embedded).status == 403


def test_bodies_have_a_limit_also_where_their_length_is_not_said(site):
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    large = b"text=" + b"a" * MAX_BODY
    assert site.ask("/prompt", "POST", form, large).status == 413
    assert site.ask("/prompt", "POST", form, large[: MAX_BODY - 1]).status in (303, 400)
    with socket.create_connection(("127.0.0.1", site.port), timeout=30) as client:
        head = f"POST /prompt HTTP/1.1\r\nHost: {site.host}\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(head.encode())
        with contextlib.suppress(OSError):
            for _ in range(20):
                client.sendall(b"2000\r\n" + b"a" * 0x2000 + b"\r\n")
        assert b" 413 " in client.recv(100)


def test_a_link_has_a_limit(site):
    # Little more than the limit of a head: what is unread when the server hangs up takes its answer away.
    assert site.ask("/prompt?text=" + "a" * web._MAX_HEAD).status == 400


def test_methods_that_a_page_does_not_have_are_refused(site):
    for method in ("PUT", "DELETE", "PATCH", "POST"):
        assert site.ask("/", method).status == 405


def test_slow_clients_are_hung_up_on_and_stop_nobody(site, monkeypatch):
    monkeypatch.setattr(web, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(web, "BODY_SECONDS", 0.5)
    head = f"POST /prompt HTTP/1.1\r\nHost: {site.host}\r\nContent-Length: 100\r\n\r\ntext="
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", site.port), timeout=60))
            for _ in range(60)
        ]
        for number, client in enumerate(clients):
            # One third says nothing, one third half a head, one third half a body.
            client.sendall([b"", b"GET / HTTP/1.1\r\nHost: ", head.encode()][number % 3])
        assert site.ask("/labels").status == 200
        for number, client in enumerate(clients):
            answer = client.recv(1000)
            assert (b" 408 " in answer) if number % 3 == 2 else answer == b""


def test_who_sends_a_byte_at_a_time_is_hung_up_on_too(site, monkeypatch):
    monkeypatch.setattr(web, "REQUEST_SECONDS", 0.5)
    with (
        socket.create_connection(("127.0.0.1", site.port), timeout=60) as client,
        contextlib.suppress(OSError),
    ):
        for _ in range(400):
            client.sendall(b"G")
            time.sleep(0.05)
        raise AssertionError("it was listened to for 20 seconds")


def test_a_pattern_that_takes_for_ever_stops_nobody(site, monkeypatch):
    monkeypatch.setattr("topklm.explorer.finding.REGEX_SECONDS", 2.0)
    answers = []

    def ask():
        answers.append(site.ask("/api/search?kind=regex&q=(%5Cw%2B%5Cs%3F)%2B%5C%24%5C%24"))

    thread = threading.Thread(target=ask)
    thread.start()
    asked = 0
    while thread.is_alive():
        assert site.ask("/labels").status == 200
        asked += 1
    thread.join()
    assert asked > 1
    assert answers[0].status in (200, 400)


def test_too_many_who_wait_for_the_same_are_sent_away(site, monkeypatch):
    monkeypatch.setattr("topklm.web._MOST_WAITING", 0)
    monkeypatch.setattr("topklm.explorer.views.prompt", lambda *_: 1 / 0)
    answer = site.ask(
        "/api/prompt", headers={"Content-Type": "application/json"}, method="POST", body=b'{"text":"a"}'
    )
    assert answer.status == 503
    assert "again" in answer.json["error"]


@pytest.mark.parametrize("kind", ["search", "prompt"])
def test_who_has_waited_too_long_for_a_turn_is_told_so(site, monkeypatch, kind):
    begun, goes_on = threading.Event(), threading.Event()

    def view(*_):
        begun.set()
        goes_on.wait(60)
        return {"done": True}

    monkeypatch.setattr("topklm.web._WAITING_SECONDS", 0.05)
    monkeypatch.setattr("topklm.explorer.finding.regex", view)
    monkeypatch.setattr("topklm.explorer.views.prompt", view)
    headers, answers = {"Content-Type": "application/json"}, []

    def ask():
        if kind == "search":
            return site.ask("/api/search?kind=regex&q=a")
        return site.ask("/api/prompt", "POST", headers, b'{"text": "a"}')

    thread = threading.Thread(target=lambda: answers.append(ask()))
    thread.start()
    try:
        assert begun.wait(60)
        late = ask()
        assert late.status == 503
        assert "try again" in late.json["error"]
    finally:
        goes_on.set()
        thread.join()
    assert answers[0].json == {"done": True}
    assert ask().status == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"text": 5}', b'{"text": null}', b"{", b"\xff\xfe", b"[" * 60_000, b'"text"'],
    ids=lambda body: repr(body[:12]),
)
def test_a_body_that_makes_no_sense_is_refused_with_a_reason(site, body):
    answer = site.ask("/api/prompt", "POST", {"Content-Type": "application/json"}, body)
    assert answer.status == 400
    assert answer.json["error"]


def test_many_fields_are_refused(site):
    body = "&".join(f"a{n}=1" for n in range(5000)).encode()
    assert (
        site.ask("/prompt", "POST", {"Content-Type": "application/x-www-form-urlencoded"}, body).status == 400
    )


@pytest.fixture(scope="module")
def guarded(explored):
    with serving(NeuronData(explored), token="right-token") as served:
        yield served


def test_without_the_token_nothing_is_told(guarded):
    for path in ("/", "/static/x/app.js", "/api/overview", "/?token=wrong", "/?token="):
        answer = guarded.ask(path)
        assert answer.status == 401
        assert b"neuron" not in answer.body
    for headers in (
        {"Cookie": "topklm_token=wrong"},
        {"Cookie": "topklm_token="},
        {"Authorization": "Bearer x"},
    ):
        assert guarded.ask("/", headers=headers).status == 401
    assert guarded.ask("/neurons/0/3/label", form={"label": "x"}).status == 401


def test_the_token_in_a_link_becomes_a_cookie(guarded):
    answer = guarded.ask("/neurons/0/3?a=b&token=right-token")
    assert (answer.status, answer.headers["location"]) == (303, "/neurons/0/3?a=b")
    cookie = answer.headers["set-cookie"]
    assert "httponly" in cookie.lower()
    assert "samesite=lax" in cookie.lower()
    assert guarded.ask("/neurons/0/3", headers={"Cookie": cookie.split(";")[0]}).status == 200
    assert guarded.ask("/api/overview", headers={"Authorization": "Bearer right-token"}).status == 200


def test_the_token_leads_to_no_other_site(guarded):
    answer = guarded.ask("//evil.example/?token=right-token")
    assert answer.headers["location"] == "/evil.example/"


def test_with_a_token_another_sites_page_still_changes_nothing(guarded):
    headers = {"Cookie": "topklm_token=right-token", "Origin": "http://evil.example"}
    assert guarded.ask("/neurons/0/3/label", headers=headers, form={"label": "x"}).status == 403


@pytest.mark.parametrize(
    ("host", "only_here"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "")],
)
def test_what_only_this_machine_can_reach_is_known(host, only_here):
    assert is_loopback(host) == only_here
