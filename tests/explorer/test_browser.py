"""Every page in a real browser: what a person does there, by mouse and by keyboard, wide and narrow."""

import json
import re
import shutil
import time
from unittest import mock

import pytest

from topklm.explorer.pages import export
from topklm.inference.interventions import Intervention
from topklm.inference.scheduler import Generation

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

EVERY_PAGE = [
    "/",
    "/?columns=all&density.min=0.001",
    "/neurons/0/3",
    "/neurons/0/31",
    "/neurons/1/17?text=The+old+baker",
    "/neurons/1/17?embed=1",
    "/prompt",
    "/prompt?text=The+old+baker",
    "/prompt?text=The+old+baker&token=4",
    "/search?q=lantern",
    "/search?kind=regex&q=lantern",
    "/labels",
    "/neurons/9/9",
]
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 800}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, site):
    """Opens pages that fail the test when they complain, or ask another machine for anything."""
    complaints, contexts = [], []

    def heard(message):
        # That the page of a mistake has its status is no complaint of ours.
        if message.type in ("error", "warning") and "the server responded with a status" not in message.text:
            complaints.append(message.text)

    def opened(path="/", address=None, **options):
        context = browser.new_context(**{"viewport": WIDE, "base_url": site.address, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", heard)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        allowed = (site.address, "file://", "blob:", "data:")
        page.on(
            "request",
            lambda request: None if request.url.startswith(allowed) else complaints.append(request.url),
        )
        page.goto(address or path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def serious_faults(page):
    found = axe.Axe().run(page).response["violations"]
    return [
        (fault["id"], [node["html"][:200] for node in fault["nodes"][:3]])
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_no_page_has_a_serious_fault_for_people_who_see_or_move_otherwise(open_page, scheme):
    page = open_page("/labels", color_scheme=scheme)
    for path in EVERY_PAGE:
        page.goto(path)
        assert (path, serious_faults(page)) == (path, [])
    page.goto("/neurons/0/3")
    page.keyboard.press("v")
    page.keyboard.press("w")
    page.locator(".definitions summary").click()
    page.keyboard.press("?")
    assert serious_faults(page) == []


def test_no_page_is_wider_than_a_phone(open_page):
    page = open_page("/labels", viewport=PHONE, has_touch=True, is_mobile=True)
    for path in EVERY_PAGE:
        page.goto(path)
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert (path, widths) == (path, [375, 375])
    page.goto("/neurons/0/3")
    page.get_by_role("button", name="Values").click()
    page.get_by_role("button", name="Whole windows").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 375


def column(page, title):
    heads = page.locator("table.neurons thead th").all_inner_texts()
    place = next(n for n, head in enumerate(heads) if title in head)
    return page.locator(f"table.neurons tbody tr > :nth-child({place + 1})").all_inner_texts()


def test_the_table_sorts_filters_and_pages_and_the_address_says_how(open_page):
    page = open_page("/")
    assert page.locator("table.neurons tbody tr").count() == 50
    page.get_by_role("link", name="Density").click()
    page.wait_for_url("**/?sort=density")
    page.get_by_role("link", name="Density").click()
    page.wait_for_url("**/?sort=density&order=falling")
    densities = [float(text.split()[0]) for text in column(page, "Density")]
    assert densities == sorted(densities, reverse=True)
    assert page.evaluate("document.activeElement.textContent").strip().endswith("Density")
    page.reload()
    assert [float(text.split()[0]) for text in column(page, "Density")] == densities
    page.get_by_role("checkbox", name="1", exact=True).check()
    page.wait_for_url("**layer=1**")  # at once
    page.get_by_text("Filter by value").click()
    page.get_by_label("Density, at least").fill("0.2")
    page.get_by_label("Density, at least").press("Enter")
    page.wait_for_url("**density.min=0.2**")
    assert all(float(text.split()[0]) >= 20 for text in column(page, "Density"))
    assert all(text.startswith("1:") for text in column(page, "Neuron"))
    page.get_by_role("link", name="Reset").click()
    page.wait_for_url(re.compile(r"/$"))
    page.get_by_role("link", name="next →").click()
    page.wait_for_url("**/?page=2")
    assert page.locator("table.neurons tbody tr").count() == 14
    page.go_back()
    page.wait_for_url(re.compile(r"/$"))
    page.locator("table.neurons tbody tr").nth(49).wait_for()


def test_a_value_that_makes_no_sense_is_said_to_be_wrong_where_it_was_typed(open_page):
    page = open_page("/")
    page.get_by_text("Filter by value").click()
    page.get_by_label("Density, at least").fill("much")
    page.get_by_label("Density, at least").press("Tab")
    page.get_by_role("alert").get_by_text("density.min = much: must be a number").wait_for()


def test_neurons_are_walked_by_keyboard(open_page):
    page = open_page("/neurons/0/3")
    for key, place in (("j", "0/4"), ("ArrowRight", "0/5"), ("k", "0/4"), ("ArrowLeft", "0/3")):
        page.keyboard.press(key)
        page.wait_for_url(f"**/neurons/{place}")
    page.keyboard.press("?")
    page.get_by_role("heading", name="Keys").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("heading", name="Keys").wait_for(state="hidden")
    page.keyboard.press("g")
    page.keyboard.type("1:7")
    page.keyboard.press("Enter")
    page.wait_for_url("**/neurons/1/7")
    page.keyboard.press("/")
    page.wait_for_url("**/search")
    playwright.expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("jk?")  # typed, not obeyed
    assert page.get_by_role("searchbox").input_value() == "jk?"
    page.goto("/neurons/1/7")
    page.keyboard.press("r")
    page.wait_for_url(re.compile(r"/neurons/\d+/\d+$"))


def test_next_and_previous_follow_the_table_that_one_came_from(open_page):
    page = open_page("/?sort=density&order=falling")
    names = page.locator("table.neurons a.neuron-name")
    places = [name.replace(":", "/") for name in names.all_inner_texts()]
    page.goto("/?sort=density&order=falling&page=2")
    places += [name.replace(":", "/") for name in names.all_inner_texts()]
    page.goto("/?sort=density&order=falling")
    names.nth(2).click()
    for key, at in (("j", 3), ("k", 2), ("k", 1)):
        page.get_by_text("of 50+ in the table").wait_for()
        page.keyboard.press(key)
        page.wait_for_url(f"**/neurons/{places[at]}")
    page.get_by_role("link", name="of 50+ in the table").click()
    page.wait_for_url("**/?sort=density&order=falling")
    names.nth(49).click()
    page.get_by_role("link", name=f"{places[50].replace('/', ':')} →").wait_for()  # of the next page
    page.keyboard.press("j")
    page.wait_for_url(f"**/neurons/{places[50]}")
    page.get_by_text("51 of 64 in the table").wait_for()


def test_dragging_over_the_map_filters_the_table_and_a_click_ends_that(open_page):
    page = open_page("/")
    page.locator(".map summary").click()
    drawing = page.locator(".map .plot")
    drawing.scroll_into_view_if_needed()
    assert page.locator(".legend svg").count() == 2
    box = drawing.bounding_box()
    left, top, width, height = (box[name] for name in ("x", "y", "width", "height"))
    page.mouse.move(left + 0.3 * width, top + 0.2 * height)
    page.mouse.down()
    page.mouse.move(left + 0.6 * width, top + 0.8 * height, steps=4)
    page.mouse.up()
    page.wait_for_url("**token_entropy_corrected.max=*")
    name = "token_entropy_corrected"
    low, high = (float(page.locator(f"[name='{name}.{end}']").input_value()) for end in ("min", "max"))
    assert 0 < low < high
    page.get_by_text(re.compile(r"^\d+ neurons?$")).wait_for()
    entropies = [float(text) for text in column(page, "Token entropy")]
    assert entropies and all(low <= value <= high for value in entropies)
    inside = page.locator(".map .point:not(.out)").count()
    assert inside == len(entropies) < 64
    page.mouse.click(left + 0.97 * width, top + 0.06 * height)
    page.wait_for_url(re.compile(r"/$"))
    assert page.locator(".map .point.out").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_card_tells_of_a_neuron_where_its_link_is_pointed_at_or_has_the_focus(open_page, scheme):
    page = open_page("/search?q=lantern", color_scheme=scheme)
    card = page.locator(".preview")
    link = page.locator("a.neuron-name").first
    link.hover()
    card.wait_for()
    assert card.inner_text().startswith(link.inner_text())
    assert card.locator("mark.here").count() == 1
    assert serious_faults(page) == []
    page.keyboard.press("Escape")
    card.wait_for(state="detached")
    page.goto("/neurons/0/3")
    page.get_by_role("tab", name="By co-activation").focus()
    page.keyboard.press("Tab")
    card.wait_for()
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "preview"
    page.mouse.move(5, 5)
    card.hover()  # stays while it is pointed at
    page.keyboard.press("Tab")
    playwright.expect(card).to_have_text(re.compile(r"^\d:\d+"))
    page.goto("/prompt?text=The+old+baker")
    page.locator("a.cell").first.hover()
    card.wait_for()


@pytest.mark.parametrize(("viewport", "most"), [({"width": 1440, "height": 900}, 500), (PHONE, 800)])
def test_the_evidence_comes_first(open_page, viewport, most):
    """Tokens and the first example stand above the figures, the strongest in the first screen."""
    page = open_page("/neurons/0/3", viewport=viewport)

    def top(selector):
        return page.locator(selector).first.bounding_box()["y"]

    assert top(".evidence") < top("#steer") < top(".example") < top(".tiles")
    assert top(".example") < most
    assert page.locator(".example:visible").count() <= 5 + 5 * 2
    page.get_by_text(re.compile(r"^\d+ more$")).first.click()
    assert page.locator(".example:visible").count() > 10


def test_what_has_the_focus_can_be_seen(open_page):
    page = open_page("/neurons/0/3")
    for _ in range(12):
        page.keyboard.press("Tab")
        width = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert float(width.removesuffix("px")) >= 2


def test_tabs_are_worked_by_keyboard(open_page):
    page = open_page("/neurons/0/3")
    page.get_by_role("tab", name="Jacobian lens").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", selected=True).first.inner_text() == "Identity lens"
    assert page.url.endswith("/neurons/0/3")


def test_an_examples_token_is_seen_and_more_of_its_text_on_demand(open_page):
    page = open_page("/neurons/0/3")
    page.evaluate("document.querySelectorAll('.rest').forEach(rest => { rest.open = true })")
    # In a document longer than a window.
    example = page.locator(".example").filter(has_text=re.compile(r"\bThe .{100,}")).first
    assert example.locator("mark.here").is_visible()
    before = len(example.locator(".text").inner_text())
    more = example.get_by_role("button")
    more.click()
    whole = len(example.locator(".text").inner_text())
    assert whole > before
    more.click()
    longer = re.compile(rf"^.{{{whole + 1},}}$", re.DOTALL)
    playwright.expect(example.locator(".text")).to_have_text(longer)
    assert example.locator("mark.here").count() == 1


def test_the_activation_of_a_token_is_told(open_page):
    page = open_page("/neurons/0/3")
    mark = page.locator("mark.here").first
    mark.hover()
    told = mark.evaluate("m => getComputedStyle(m, '::after').content")
    assert told == f'"{mark.get_attribute("data-v")}"'
    page.keyboard.press("v")
    mark = page.locator("mark[data-v]").nth(1)
    assert mark.evaluate("m => getComputedStyle(m, '::after').position") == "static"


def test_a_neuron_is_labelled_and_the_label_stays(open_page):
    page = open_page("/neurons/1/11")
    page.keyboard.press("l")
    page.keyboard.type("<b>bold</b> & 'quoted'")
    page.keyboard.press("Enter")
    page.get_by_text("saved").wait_for()
    page.reload()
    assert page.locator("#label-field").input_value() == "<b>bold</b> & 'quoted'"
    page.goto("/labels")
    page.get_by_role("link", name="<b>bold</b> & 'quoted'").click()
    page.wait_for_url("**/neurons/1/11")
    page.locator("#label-field").fill("")
    page.get_by_role("button", name="Save").first.click()
    page.get_by_text("saved").wait_for()
    page.goto("/labels")
    page.get_by_text("There are none yet").wait_for()


def test_labels_are_imported_from_a_file_and_commented(open_page, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("layer,neuron,label\n1,12,sea\n")
    page = open_page("/labels")
    page.get_by_text("Import labels").click()
    page.get_by_label("A file").set_input_files(path)
    playwright.expect(page.locator("#import-content")).to_have_value(path.read_text())
    assert serious_faults(page) == []
    page.get_by_role("button", name="Add these labels").click()
    page.get_by_text("1 labels added").wait_for()
    page.goto("/neurons/1/12")
    page.get_by_text("Comment, more labels").click()
    page.get_by_label("Comment").first.fill("in stories")
    page.get_by_label("By", exact=True).first.fill("Ann")
    page.locator(".note-form").first.get_by_role("button", name="Save").click()
    page.get_by_text("saved").wait_for()
    page.get_by_label("Another label").fill("waves")
    page.get_by_role("button", name="Add").click()
    page.get_by_text("2 labels, 1 comment").wait_for()
    assert serious_faults(page) == []
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press("u")
    page.wait_for_url(lambda url: not url.endswith("/1/12"))
    for _ in range(2):
        page.goto("/neurons/1/12")
        page.locator("#label-field").fill("")
        page.locator(".label-form").get_by_role("button", name="Save").click()
        page.get_by_text("saved").wait_for()
    page.goto("/labels")
    page.get_by_text("There are none yet").wait_for()


def test_a_prompt_shows_neurons_that_lead_to_their_pages(open_page):
    page = open_page("/prompt")
    page.get_by_label("Text", exact=True).fill("The old <i>baker</i>")
    page.get_by_role("button", name="Show neurons").click()
    page.wait_for_url("**/prompt?text=*")
    assert page.locator("table.prompt tbody tr").count() == 20  # one for each byte
    page.reload()
    assert page.locator("table.prompt tbody tr").count() == 20
    page.locator("table.prompt tbody tr").nth(4).get_by_role("link", name="All 8 neurons").first.click()
    page.get_by_role("heading", name="Token 4").wait_for()
    name = page.locator("#chosen a.neuron-name").first
    layer, neuron = name.inner_text().split(":")
    name.click()
    page.wait_for_url(f"**/neurons/{layer}/{neuron}")


def test_a_prompt_that_is_too_long_is_said_to_be(open_page):
    page = open_page("/prompt")
    page.get_by_label("Text", exact=True).fill("a" * 300)
    page.get_by_role("button", name="Show neurons").click()
    page.get_by_role("alert").get_by_text("at most 127").wait_for()
    assert page.get_by_label("Text", exact=True).input_value() == "a" * 300


def test_a_neuron_is_tried_on_a_text_of_ones_own(open_page):
    page = open_page("/neurons/1/17")
    page.get_by_label("Text to run the model on").fill("The old baker found a lantern")
    page.get_by_role("button", name="Show activations").click()
    page.locator(".own").wait_for()
    assert page.locator(".own").inner_text() == "The old baker found a lantern"
    assert "text=The+old" in page.url


@pytest.fixture(scope="module")
def compiled(site):
    """Compiles for texts of up to 32 tokens, so that no page has to wait for it."""
    form = {"prompt": "The baker", "value": "1", "max_new_tokens": "22"}
    assert site.ask("/api/neurons/1/17/steer", form=form).status == 200


def test_a_neuron_is_steered_by_keyboard_and_the_page_can_be_sent_on(open_page, compiled):
    page = open_page("/neurons/1/17", permissions=["clipboard-read", "clipboard-write"])
    assert not page.get_by_label("Prompt").is_visible()
    page.locator("#steer summary").press("Enter")
    value = page.get_by_label("Strength", exact=True)
    page.get_by_label("Prompt").fill('The "old" <i>')
    page.get_by_role("spinbutton", name="Tokens").fill("18")
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("End")
    highest = float(value.input_value())
    page.keyboard.press("ArrowLeft")
    assert 0 < float(value.input_value()) < highest == float(slider.get_attribute("max"))
    page.keyboard.press("Home")
    assert (value.input_value(), slider.get_attribute("aria-valuetext")) == ("0", "0, 0 times the highest")
    value.fill("3.5")
    assert abs(float(slider.input_value()) - 3.5) < float(slider.get_attribute("step"))
    mode = page.get_by_label("Mode", exact=True)
    mode.select_option("ablate")
    playwright.expect(value).to_be_disabled()
    mode.select_option("scale")
    assert (value.input_value(), slider.get_attribute("max")) == ("2", "4")
    mode.select_option("clamp")
    assert value.input_value() == "3.5"
    page.get_by_role("spinbutton", name="Tokens").press("Enter")
    page.get_by_text("Done").wait_for()
    texts = {name: page.locator(f"[data-column={name}]").inner_text() for name in ("unsteered", "steered")}
    assert all(text.startswith('The "old" <i>') for text in texts.values())
    assert texts["steered"] != texts["unsteered"]
    assert page.get_by_text("18 tokens").count() >= 1
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert serious_faults(page) == []
    page.reload()
    assert {name: page.locator(f"[data-column={name}]").inner_text() for name in texts} == texts
    page.get_by_role("button", name="Copy as Python").click()
    page.get_by_text("Copied").wait_for()
    call = mock.Mock()
    exec(page.evaluate("navigator.clipboard.readText()"), {"model": call})
    options = {"max_new_tokens": 18, "temperature": 0.7, "seed": 0, "steer": {(1, 17): 3.5}}
    call.generate.assert_called_once_with('The "old" <i>', **options)
    page.get_by_label("Where").select_option("generated")
    mode.select_option("add")
    page.get_by_role("button", name="Copy as Python").click()
    page.wait_for_function("async () => (await navigator.clipboard.readText()).includes('Intervention')")
    exec(page.evaluate("navigator.clipboard.readText()"), {"model": call})
    one = Intervention(1, 17, 3.5, "add", "generated")
    assert call.generate.call_args.kwargs["steer"] == [one]
    value.fill("0.5x")
    highest = float(slider.get_attribute("data-highest"))
    assert abs(float(slider.input_value()) - highest / 2) <= float(slider.get_attribute("step"))
    page.get_by_role("button", name="Copy as Python").click()
    page.wait_for_function("async () => (await navigator.clipboard.readText()).includes('0.5x')")
    exec(page.evaluate("navigator.clipboard.readText()"), {"model": call})
    assert call.generate.call_args.kwargs["steer"] == [Intervention(1, 17, "0.5x", "add", "generated")]
    page.get_by_role("button", name="Write").click()
    page.wait_for_url("**value=0.5x**")
    page.get_by_text("Done").wait_for()
    value.fill("3.5")
    page.get_by_role("button", name="Copy as interventions").click()
    page.wait_for_function("async () => (await navigator.clipboard.readText()).startsWith('{')")
    (copied,) = json.loads(page.evaluate("navigator.clipboard.readText()"))["interventions"]
    assert Intervention(**copied) == one


def test_what_is_written_comes_bit_by_bit_and_can_be_stopped(open_page, compiled, monkeypatch):
    class Endless(Generation):
        done = False

        def advance(self, steps):
            time.sleep(0.02)
            for text in self.texts:
                text.append(text[-1])  # rrrr
            return [text[-1:] for text in self.texts]

    monkeypatch.setattr("topklm.explorer.steering.Generation", Endless)
    page = open_page("/neurons/1/17", viewport=PHONE)
    page.locator("#steer summary").click()
    page.get_by_label("Prompt").fill("The baker")
    page.get_by_role("button", name="Write").click()
    for name in ("unsteered", "steered"):
        playwright.expect(page.locator(f"[data-column={name}]")).to_have_text(re.compile("^The bakerrrr"))
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped").wait_for()
    monkeypatch.undo()
    written = page.locator("[data-column=steered]").inner_text()
    # The server has stopped too: the next has its turn.
    page.get_by_role("spinbutton", name="Tokens").fill("22")
    page.get_by_role("button", name="Write").click()
    page.get_by_text("Done").wait_for()
    assert page.locator("[data-column=steered]").inner_text() != written
    page.get_by_label("Prompt").fill("a" * 200)
    page.get_by_role("button", name="Write").click()
    page.get_by_role("alert").get_by_text("prompt has 200 tokens: at most 127").wait_for()


def test_search_finds_passages_and_ranks_neurons(open_page):
    page = open_page("/search")
    page.get_by_role("searchbox").fill("lantern")
    page.keyboard.press("Enter")
    page.locator(".passages mark.found").first.wait_for()
    page.get_by_label("regular expression").check()
    page.get_by_role("searchbox").fill("lant(ern|h")
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    page.get_by_role("searchbox").fill("lantern|boat")
    page.keyboard.press("Enter")
    page.get_by_text("matches:").wait_for()
    page.locator("table.neurons a.neuron-name").first.click()
    page.wait_for_url("**/neurons/**")


def test_an_embedded_neuron_is_shown_in_a_frame_of_another_site(open_page, site, tmp_path):
    path = tmp_path / "page.html"
    source = f"{site.address}/neurons/0/3?embed=1"
    path.write_text(f'<iframe src="{source}" width="900" height="700"></iframe>')
    page = open_page(address=path.as_uri())
    frame = page.frame_locator("iframe")
    frame.get_by_role("heading", name="Neuron 0:3").wait_for()
    frame.get_by_role("tab", name="Identity lens").click()
    assert frame.get_by_role("tab", name="Identity lens").get_attribute("aria-selected") == "true"


def test_similar_neurons_are_links(open_page):
    page = open_page("/neurons/0/3")
    page.get_by_role("tab", name="By effect").click()
    link = page.locator(".similar a.neuron-name:visible").first
    place = link.inner_text().split()[0].replace(":", "/")
    link.click()
    page.wait_for_url(f"**/neurons/{place}")


def test_a_neuron_is_copied_as_json(open_page, site):
    page = open_page("/neurons/0/3", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("link", name="Copy as JSON").click()
    page.get_by_text("Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == site.ask("/api/neurons/0/3").text


def test_the_theme_is_chosen_and_remembered(open_page):
    page = open_page("/", color_scheme="light")
    background = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(background)
    page.get_by_role("button", name="Light or dark").click()
    dark = page.evaluate(background)
    assert dark != light
    page.goto("/labels")
    assert page.evaluate(background) == dark
    page.keyboard.press("t")
    assert page.evaluate(background) == light


def test_markup_in_the_text_is_never_run(open_page, site):
    page = open_page("/search?q=script")
    assert page.locator(".passages li").count() >= 1
    assert page.locator("main script, main img").count() == 0
    page.goto("/prompt?text=%3Cimg+src%3Dx+onerror%3Dalert(1)%3E")
    assert page.locator("main script, main img").count() == 0


def test_without_scripts_everything_can_still_be_read_and_asked(open_page, compiled):
    page = open_page("/neurons/0/3", java_script_enabled=False)
    assert page.get_by_role("heading", name="Identity lens").is_visible()
    page.goto("/prompt")
    page.get_by_label("Text", exact=True).fill("The old baker")
    page.get_by_role("button", name="Show neurons").click()
    assert page.locator("table.prompt tbody tr").count() == 13
    page.goto("/neurons/1/17")
    page.locator("#steer summary").click()
    page.get_by_label("Prompt").fill("The baker")
    page.get_by_role("spinbutton", name="Tokens").fill("22")
    page.get_by_role("button", name="Write").click()
    page.wait_for_url("**/neurons/1/17?prompt=The+baker&*#steer")
    assert page.locator("[data-column=steered]").inner_text().startswith("The baker")


def test_what_the_server_refuses_is_said_and_the_page_stays(open_page):
    page = open_page("/")
    page.route("**/?sort=*", lambda route: route.fulfill(status=503, body="too many"))
    page.get_by_role("link", name="Density").click()
    page.get_by_role("alert").get_by_text("too many").wait_for()
    assert page.locator("table.neurons tbody tr").count() == 50


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_the_file_opens_from_disk_and_is_walked_and_sorted(open_page, source, tmp_path, scheme):
    path = tmp_path / "neurons.html"
    export(source, path)
    page = open_page(address=path.as_uri(), color_scheme=scheme)
    assert serious_faults(page) == []
    page.get_by_role("button", name="Density").click()
    densities = [float(text.split()[0]) for text in column(page, "Density")]
    assert densities == sorted(densities)
    link = page.locator("table.neurons a.neuron-name").nth(20)
    place = link.inner_text().split()[0]
    link.click()
    page.get_by_role("heading", name=f"Neuron {place}").wait_for()
    assert serious_faults(page) == []
    assert page.locator("mark.here").first.is_visible()
    page.keyboard.press("j")
    playwright.expect(page).not_to_have_title(re.compile(rf"^{place}\b"))
    page.reload()
    page.locator("#neuron h1").wait_for()
    page.go_back()
    page.get_by_role("heading", name=f"Neuron {place}").wait_for()
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
