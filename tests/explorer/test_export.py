"""The pages in one file."""

import base64
import hashlib
import html.parser
import re
import zlib

import explored_run
import pytest

from topklm.errors import UserError
from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.pages import export


def pages(text):
    """Returns HTML by id of the neurons in a file."""
    found = re.findall(
        r'<script type="text/plain" id="n-(\d+-\d+)" data-title="[^"]*">([^<]*)</script>', text
    )
    return {place: zlib.decompress(base64.b64decode(packed)).decode() for place, packed in found}


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "neurons.html"
    assert export(source, path) == 64
    return path.read_text()


def test_every_neuron_has_a_page_with_its_examples(source, exported):
    found = pages(exported)
    assert len(found) == 64
    for number in (3, 40):
        layer, neuron = source.place(number)
        text = found[f"{layer}-{neuron}"]
        assert text.count('<li class="example"') == len(source.row(number)["examples"])
        assert f"Neuron {layer}:{neuron}" in text
        assert "<form" not in text


def test_it_needs_nothing_but_itself(exported):
    everything = exported + "".join(pages(exported).values())
    assert not re.search(r'(src|srcset)="', everything)
    assert set(re.findall(r'href="([^"#]*)', everything)) == {""}
    assert "@import" not in everything
    assert "url(" not in everything
    assert "fetch(" not in everything


def test_its_own_policy_allows_its_own_script_and_no_other(exported):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', exported)[1]
    policy = html.parser.unescape(policy)
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", exported, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_links_lead_only_to_neurons_that_it_holds(source, tmp_path):
    path = tmp_path / "few.html"
    assert export(source, path, [(0, 3), (1, 17), (0, 3)]) == 2
    found = pages(path.read_text())
    assert set(found) == {"0-3", "1-17"}
    targets = set(re.findall(r'href="#(/neurons/[^"]*)"', path.read_text() + "".join(found.values())))
    assert targets == {"/neurons/0/3", "/neurons/1/17"}


def test_markup_in_labels_and_text_is_shown_and_not_made(explored_copy, tmp_path):
    source = NeuronData(explored_copy)
    source.labels.set(0, 3, "</script><script>alert(1)</script>\"'")
    path = tmp_path / "a.html"
    export(source, path)
    text = path.read_text()
    assert text.count("<script") == 64 + 1
    for page in pages(text).values():
        assert "<script" not in page
        assert "<img" not in page


def test_a_neuron_that_is_not_there_is_refused_and_nothing_written(source, tmp_path):
    with pytest.raises(UserError, match="neuron 32: must be from 0 to 31"):
        export(source, tmp_path / "a.html", [(0, 32)])
    with pytest.raises(UserError, match="there is no folder"):
        export(source, tmp_path / "none" / "a.html", [(0, 3)])
    assert list(tmp_path.iterdir()) == []


def test_the_dead_have_a_page_without_examples(exported):
    layer, neuron = explored_run.DEAD
    assert "Dead: not active" in pages(exported)[f"{layer}-{neuron}"]
