"""Pages about a trace in a real browser: slider, keys, cards, and the exported file."""

import shutil

import pytest
from serve_site import serving
from test_browser import PHONE, browser, open_page, playwright, pytestmark, serious_faults  # noqa: F401
from test_trace_pages import STEPS, traced  # noqa: F401

from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.pages import export

PAGES = ["/formation", "/formation?trace=trace-coordinates", "/layers", "/?step=2", "/neurons/0/3?step=2"]


@pytest.fixture(scope="module")
def site(traced):  # noqa: F811
    with serving(NeuronData(traced)) as served:
        yield served


def test_no_page_is_wider_than_a_phone(open_page):  # noqa: F811
    page = open_page("/labels", viewport=PHONE, has_touch=True, is_mobile=True)
    for path in [*PAGES, "/neurons/0/3"]:
        page.goto(path)
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert (path, widths) == (path, [375, 375])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_has_a_serious_fault_for_people_who_see_or_move_otherwise(open_page, scheme):  # noqa: F811
    page = open_page("/labels", color_scheme=scheme)
    for path in [*PAGES, "/neurons/0/3"]:
        page.goto(path)
        assert (path, serious_faults(page)) == (path, [])


def test_steps_are_walked_by_keys_slider_and_links(open_page):  # noqa: F811
    page = open_page("/neurons/0/3")
    page.keyboard.press("]")  # there is none after the last
    for key, step in (("[", 4), ("[", 2), ("]", 4), ("[", 2), ("[", 0)):
        page.keyboard.press(key)
        page.wait_for_url(f"**/neurons/0/3?step={step}")
    page.keyboard.press("j")  # the next neuron at the same step
    page.wait_for_url("**/neurons/0/4?step=0")
    slider = page.get_by_role("slider", name="Step")
    slider.press("ArrowRight")
    page.wait_for_url("**/neurons/0/4?step=2")
    page.locator("a.of-step").nth(2).click()
    page.wait_for_url("**/neurons/0/4?step=4")
    page.get_by_role("link", name="Back to step 5").click()
    page.wait_for_url("**/neurons/0/4")
    page.goto("/?sort=density")
    page.keyboard.press("[")
    page.wait_for_url("**/?step=4&sort=density")
    page.get_by_role("checkbox", name="1", exact=True).check()
    page.wait_for_url("**step=4**layer=1**")  # a filter stays at the step


def test_steps_are_links_without_scripts(open_page):  # noqa: F811
    page = open_page("/", java_script_enabled=False)
    page.locator(".step-links").get_by_role("link", name="2", exact=True).click()
    page.wait_for_url("**/?step=2")
    page.get_by_role("link", name="Earlier step").click()
    page.wait_for_url("**/?step=0")
    assert page.get_by_role("slider").count() == 0


def test_a_cell_shows_the_card_of_its_step_and_a_row_opens_its_neuron(open_page):  # noqa: F811
    page = open_page("/neurons/0/3")
    cell = page.locator("a.of-step").nth(1)
    assert "step 2: density" in cell.get_attribute("title")
    cell.hover()
    card = page.get_by_role("tooltip")
    playwright.expect(card).to_contain_text("0:3 at step 2")
    for said in ("density", "token entropy", "explained by the token", "jaccard"):
        assert said in card.inner_text().lower()
    page.goto("/formation")
    page.locator("rect.row[data-address='/neurons/1/20']").click()
    page.wait_for_url("**/neurons/1/20")


def test_the_exported_file_has_strips_steps_formation_and_layers(open_page, traced, tmp_path):  # noqa: F811
    path = tmp_path / "neurons.html"
    source = NeuronData(traced)
    export(source, path)
    page = open_page(address=path.as_uri() + "#/neurons/0/3")
    playwright.expect(page.locator("a.of-step")).to_have_count(len(STEPS))
    page.locator("a.of-step").nth(1).click()
    playwright.expect(page.get_by_text("Step 2 of the trace")).to_be_visible()
    playwright.expect(page.locator(".examples")).to_be_hidden()
    page.keyboard.press("[")
    page.wait_for_url("**#/neurons/0/3/0")
    page.keyboard.press("]")
    page.wait_for_url("**#/neurons/0/3/2")
    page.get_by_role("link", name="Back to step 5").click()
    playwright.expect(page.locator(".examples")).to_be_visible()
    page.get_by_role("link", name="Formation").click()
    playwright.expect(page.get_by_role("heading", name="Neurons by onset")).to_be_visible()
    page.get_by_role("link", name="Layers").click()
    playwright.expect(
        page.get_by_role("heading", name="The same index in two layers", exact=True)
    ).to_be_visible()
    page.get_by_role("link", name="village").click()
    page.get_by_role("button", name="Onset .5").click()
    onsets = page.locator("#neurons tbody tr td:nth-child(9)").all_inner_texts()
    known = [int(text) for text in onsets if text.isdigit()]
    assert known
    assert known == sorted(known)


def test_the_exported_file_without_a_trace_has_none(open_page, traced, tmp_path):  # noqa: F811
    run = shutil.copytree(traced.run, tmp_path / "village", ignore=shutil.ignore_patterns("trace*"))
    path = tmp_path / "neurons.html"
    export(NeuronData(type(traced)(run, traced.step)), path)
    page = open_page(address=path.as_uri() + "#/neurons/0/3")
    page.get_by_role("heading", name="Neuron 0:3").wait_for()
    assert page.locator("a.of-step").count() == 0
    assert page.get_by_role("link", name="Formation").count() == 0
