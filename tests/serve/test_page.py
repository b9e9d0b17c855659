"""The page in a real browser: a conversation, its pictures in the making, stop, draw again, uploads, and a phone."""

import signal

import pytest
from PIL import Image

from test_serve import start

SLOW = 120_000  # ms that an answer may take on a busy machine

# Written down by the page itself: a preview may be gone before a test that looks now and then has seen it.
COUNT_PREVIEWS = """
window.previews = new Set();
new MutationObserver(() => {
    for (const picture of document.querySelectorAll("figure.growing img")) previews.add(picture.src);
}).observe(document.body, {subtree: true, childList: true, attributes: true});
"""

NOTICE_STOP = """
window.stop_was_shown = false;
new MutationObserver(() => { window.stop_was_shown ||= !document.querySelector("#stop").hidden; })
    .observe(document.querySelector("#stop"), {attributes: true});
"""


@pytest.fixture(scope="module")
def address():
    process, address = start("--steps", "8", "--max-images", "2")
    yield address
    process.terminate()
    assert process.wait(20) in (0, -signal.SIGTERM)


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desk", "phone"])
def page(request, visit, address):
    width, height = request.param
    page = visit(width, height)
    page.goto(address)
    page.wait_for_selector("#settings input", state="attached")
    yield page
    assert page.errors == []
    # Nothing comes from elsewhere, and nothing is wider than the screen.
    assert all(url.startswith((address, "data:", "blob:")) for url in page.requests)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def finished(page) -> None:
    page.wait_for_selector("#send:visible", timeout=SLOW)


def ask(page, text: str) -> None:
    # A short answer shows "Stop" for an instant only: the page itself notices it.
    page.evaluate(NOTICE_STOP)
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.wait_for_function("stop_was_shown")


def told(page) -> list[str]:
    """What is shown, in order."""
    turns = "main > .user, main > .assistant"
    shown = f":is({turns}) :is(p, figure:not(.growing))"
    return page.eval_on_selector_all(shown, "nodes => nodes.map(n => n.innerText.trim())")


def test_a_newcomer_is_told_what_the_miniature_knows(page):
    page.wait_for_selector("#world")
    assert "26 things (house, tree," in page.locator("#world").inner_text()


def test_a_conversation(page, tmp_path):
    # A first question, whose pictures appear while they are painted.
    page.evaluate(COUNT_PREVIEWS)
    ask(page, "How do I draw a red house with a blue door?")
    finished(page)
    assert page.evaluate("previews.size") > 2
    assert page.locator("figure img").count() == 2 and page.locator("figure.growing").count() == 0
    first = told(page)
    assert first[0] == "How do I draw a red house with a blue door?" and first[1].startswith("Step 1")
    assert first[-1] == "It ends here: a limit is reached."

    # The second picture once more: what stood before it stays, and is the same picture still.
    before = [page.locator("figure img").nth(k).get_attribute("src") for k in range(2)]
    page.locator("figcaption button").nth(1).click()
    finished(page)
    after = [page.locator("figure img").nth(k).get_attribute("src") for k in range(2)]
    assert after[0] == before[0] and after[1] != before[1]

    # A second question goes on from there.
    ask(page, "Make the roof green.")
    finished(page)
    assert "green" in told(page)[-2] and page.locator("figure img").count() == 3

    # All of it as one file.
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "page.html")
    saved = (tmp_path / "page.html").read_text()
    assert saved.count("<img") == 3 and "Make the roof green." in saved and "<script" not in saved
    page.click("#anew")
    assert told(page) == [] and page.locator("#hints button").count() == 3


def test_stop_and_ask_again(page):
    page.evaluate("document.querySelector('details').open = true")
    page.fill('input[name="steps"]', "200")
    ask(page, "Draw a red star.")
    page.wait_for_selector(".assistant p", timeout=SLOW)
    page.click("#stop")
    finished(page)
    assert told(page)[-1] == "Stopped."
    page.fill('input[name="steps"]', "2")
    ask(page, "Draw a blue circle.")
    finished(page)
    assert page.locator("figure img").count() == 1


def test_pictures_are_added_and_taken_away_and_what_is_typed_stays_text(page, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "b.txt").write_text("no picture")
    page.set_input_files("#file", [tmp_path / "a.png"])
    page.wait_for_selector("#pictures img")
    page.set_input_files("#file", [tmp_path / "a.png", tmp_path / "b.txt"])
    page.locator("#pictures img").nth(1).wait_for()
    page.locator("#pictures img").first.click()
    assert page.locator("#pictures img").count() == 1
    ask(page, "<img src=x onerror=alert(1)> What is this?")
    finished(page)
    assert page.locator(".user img").count() == 1
    assert page.locator(".user p").inner_text() == "<img src=x onerror=alert(1)> What is this?"
    assert page.locator("#pictures img").count() == 0


def test_a_mistake_is_told_and_the_conversation_goes_on(page):
    page.evaluate("document.querySelector('details').open = true")
    page.fill('input[name="steps"]', "0")
    page.fill("#text", "Draw a red star.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".problem")
    assert "steps 0: must be from 1 to 1000" in page.locator(".problem").inner_text()
    page.errors.clear()  # the browser writes a line about the 400
    page.fill('input[name="steps"]', "2")
    ask(page, "Draw a red star.")
    finished(page)
    assert page.evaluate("messages.map(m => m.role).join()") == "user,assistant"
