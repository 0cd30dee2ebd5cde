"""The page in a real browser, served by `foveate serve` with the shipped models."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page

PAGE = Path(__file__).parents[2] / "src/foveate/serving/page"
ARTEFACTS = Path(__file__).parents[2] / "out/ci-artefacts/page"
"""Screenshots of the last run."""
TOKEN = "the-token-of-the-browser-tests"
PATIENCE = 120_000
"""Milliseconds that anything may take before a test gives up; on a busy machine imports alone take minutes."""
QUEUE = 3


class Served(Protocol):
    """A running server, see conftest.py."""

    url: str

    def paused(self) -> Any: ...

    def metric(self, name: str) -> float: ...


@pytest.fixture(scope="module")
def served(start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With the shipped models, a token and narrow limits."""
    tokens = tmp_path_factory.mktemp("page") / "tokens.txt"
    tokens.write_text(TOKEN)
    options = {
        "--token-file": str(tokens),
        "--max-queue": str(QUEUE),
        "--max-megabytes": "1.5",
        "--max-megapixels": "0.5",
    }
    with start_server([part for option in options.items() for part in option], TOKEN) as served:
        yield served


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    from playwright.sync_api import expect, sync_playwright

    arguments = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


class Watched:
    """A tab, and what it should not do: errors in the console, requests to another host."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.statuses: list[int] = []
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda said: self._said(said.type, said.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self._requested(request.url))
        self.page.on("response", lambda response: self.statuses.append(response.status))
        self.url = url

    def _said(self, kind: str, text: str) -> None:
        # The browser itself says this of answers that are errors; the page must have shown them.
        if kind in ("error", "warning") and not text.startswith("Failed to load resource: the server responded with"):
            self.errors.append(f"{kind}: {text}")

    def _requested(self, url: str) -> None:
        if not url.startswith(("data:", "blob:")):
            self.hosts.add("/".join(url.split("/")[:3]))


@pytest.fixture
def open_page(served: Served, browser: Browser) -> Iterator[Any]:
    """Opens the page in a fresh session; afterwards nothing may have gone wrong in it."""
    opened: list[Watched] = []
    contexts: list[BrowserContext] = []

    def open_page(token: str | None = TOKEN, **options: Any) -> Page:
        settings: dict[str, Any] = {"viewport": {"width": 1280, "height": 860}, **options}
        context = browser.new_context(**settings)
        contexts.append(context)
        if token is not None:
            context.add_init_script(f"sessionStorage.setItem('foveate-token', '{token}')")
        watched = Watched(context, served.url)
        opened.append(watched)
        watched.page.goto(served.url)
        if token is not None:
            watched.page.locator(".sample").first.wait_for()
        return watched.page

    yield open_page
    for watched in opened:
        assert watched.errors == []
        assert watched.hosts == {served.url}
    for context in contexts:
        context.close()


def open_sample(page: Page, number: int) -> None:
    page.get_by_role("button", name=f"scene {number}", exact=True).click()
    page.get_by_role("heading", name=f"scene {number}").wait_for()


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drags from one point of the picture to another, in its pixels."""
    at = [on_screen(page, *point) for point in (start, end)]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move((at[0][0] + at[1][0]) / 2, at[1][1])
    page.mouse.move(*at[1])
    page.mouse.up()


def on_screen(page: Page, x: float, y: float) -> tuple[float, float]:
    place = page.locator("#picture").bounding_box()
    assert place is not None
    width = page.locator("#picture").evaluate("image => image.naturalWidth")
    scale = place["width"] / width
    return place["x"] + x * scale, place["y"] + y * scale


def described(page: Page) -> Locator:
    return page.locator(".region[data-state=done]")


def expecting(locator: Locator) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


# ---------------------------------------------------------------------------------------------------------------------
# Without a browser
# ---------------------------------------------------------------------------------------------------------------------


def test_files_of_the_page_parse_no_html_and_name_no_other_host() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
    assert {"index.html", "style.css", "app.js"} <= set(files)
    for name, text in files.items():
        if name.endswith(".js"):
            forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|\beval\(|new Function"
            assert not re.search(forbidden, text), name
        if name.endswith(".html"):
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text), name
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), name


# ---------------------------------------------------------------------------------------------------------------------
# Describing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_a_drawn_box_is_described_and_shows_what_was_looked_at(open_page: Any, scenes: list[dict[str, Any]]) -> None:
    page = open_page()
    expecting(page.locator("#note-describe")).to_contain_text(
        "dynrefer-world answers. It knows the rendered world only"
    )
    open_sample(page, 4)
    pizza = next(item["box"] for item in scenes[3]["objects"] if item["category"] == "pizza")
    drag(page, (pizza[0], pizza[1]), (pizza[2], pizza[3]))
    expecting(described(page)).to_have_count(1)
    region = described(page)
    expecting(region.locator(".caption")).to_contain_text("pizza")
    expecting(page.locator("#boxes .label .full")).to_contain_text("pizza")
    expecting(page.get_by_role("status")).to_contain_text(re.compile(r"Box 1: .*pizza.*\d+\sms"))

    views = region.get_by_role("button", name=re.compile("^View "))
    assert views.count() >= 2
    assert views.first.locator("img").evaluate("image => image.naturalWidth > 0")
    views.last.hover()
    expecting(page.locator("#marks .outline.active")).to_have_count(1)
    tags = region.locator(".score", has_text="Tags")
    expecting(tags.locator("li").first).to_have_class("likely")
    few = tags.locator("li").count()
    tags.get_by_role("button", name=re.compile("^All ")).click()
    assert tags.locator("li").count() > few
    widths = tags.locator(".rail > span").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().width)")
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 50

    box = page.locator("#boxes .box.chosen")
    drag(page, ((pizza[0] + pizza[2]) / 2, (pizza[1] + pizza[3]) / 2), (227, 80 + (pizza[3] - pizza[1]) / 2))
    expecting(region.locator(".place")).not_to_have_text(", ".join(f"{value:.0f}" for value in pizza))
    corner = box.locator(".se").bounding_box()
    assert corner is not None
    page.mouse.move(corner["x"] + 13, corner["y"] + 13)
    page.mouse.down()
    page.mouse.move(*on_screen(page, 319, 96))
    page.mouse.up()
    corner = box.locator(".nw").bounding_box()
    assert corner is not None
    page.mouse.move(corner["x"] + 13, corner["y"] + 13)
    page.mouse.down()
    page.mouse.move(*on_screen(page, 228, 37))
    page.mouse.up()
    expecting(region.locator(".place")).to_have_text("228, 37, 319, 96")
    expecting(region.locator(".caption")).to_contain_text("table")


@pytest.mark.browser
def test_attention_is_laid_over_the_views_and_the_picture(open_page: Any, scenes: list[dict[str, Any]]) -> None:
    page = open_page(viewport={"width": 360, "height": 860}, color_scheme="dark")
    open_sample(page, 4)
    pizza, sofa = (
        next(item["box"] for item in scenes[3]["objects"] if item["category"] == name) for name in ("pizza", "sofa")
    )
    drag(page, (pizza[0], pizza[1]), (pizza[2], pizza[3]))
    expecting(described(page)).to_have_count(1)
    readers = page.get_by_role("group", name="Show where it read").get_by_role("button")
    expecting(readers).to_have_text(
        ["for caption, tags", re.compile("^tag: "), "for attributes, category", "category: pizza"]
    )
    expecting(page.locator(".heat")).to_have_count(0)
    # The map of the region's own view is in its place, and its pixels have colour.
    readers.last.focus()
    page.keyboard.press("Enter")
    expecting(readers.last).to_have_attribute("aria-pressed", "true")
    over = page.locator("#marks image.heat")
    expecting(over).to_have_count(1)
    place = [float(over.get_attribute(name) or 0) for name in ("x", "y", "width", "height")]
    assert place == [pizza[0], pizza[1], pizza[2] - pizza[0], pizza[3] - pizza[1]]
    expecting(page.locator(".region .hint")).to_have_text(
        re.compile(r"^Red where it read: \d+\s% in the region, \d+\s% in the views as wholes\.$")
    )
    page.locator("#frame").scroll_into_view_if_needed()
    x, y = on_screen(page, pizza[0], pizza[1])
    far = on_screen(page, pizza[2], pizza[3])
    shot = page.screenshot(clip={"x": x, "y": y, "width": far[0] - x, "height": far[1] - y})
    pixels = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)
    assert (pixels[..., 0] - pixels[..., 1:].max(axis=-1) > 80).sum() > 100
    # Three of the views served the category, and each has its map, as large as the view is drawn.
    assert page.locator(".seen img.heat").count() == 3
    assert page.locator(".seen img.heat").evaluate_all("images => images.every(image => image.naturalWidth === 6)")
    page.get_by_role("button", name=re.compile("^View .*t = 0.2: ")).hover()
    expecting(page.locator("#marks .outline.active")).to_have_count(1)
    expecting(over).not_to_have_attribute("width", f"{pizza[2] - pizza[0]:.0f}")
    assert float(over.get_attribute("width") or 0) > pizza[2] - pizza[0]
    assert overflow(page) == 0
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / "attention-360-dark.png")
    # It stays for the next region, and goes by the same button.
    page.locator("#stage").evaluate("stage => stage.scrollIntoView({ block: 'center' })")
    drag(page, (sofa[0], sofa[1]), (sofa[2], sofa[3]))
    expecting(described(page)).to_have_count(2)
    expecting(readers.last).to_have_text("category: sofa")
    expecting(over).to_have_attribute("x", f"{sofa[0]:.0f}")
    readers.last.click()
    expecting(page.locator("#marks .heat, .region.open .heat")).to_have_count(0)


@pytest.mark.browser
def test_everything_streams_regions_that_can_be_copied(open_page: Any, scenes: list[dict[str, Any]]) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    open_sample(page, 4)
    page.evaluate(
        """() => {
          window.seen = [];
          const count = () => window.seen.push(document.querySelectorAll('.region').length);
          new MutationObserver(count).observe(document.getElementById('regions'), { childList: true });
        }"""
    )
    page.get_by_role("button", name="Everything").click()
    expecting(page.get_by_role("status")).to_contain_text("found and described")
    captions = " / ".join(described(page).locator(".caption").all_text_contents())
    for word in ("sofa", "pizza", "table", "bicycle"):
        assert word in captions
    assert page.evaluate("seen.at(-1)") == described(page).count()
    page.get_by_role("heading", name="regions").wait_for()
    described(page).first.get_by_role("button").first.click()
    expecting(page.locator(".seen img").first).to_be_visible()
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / "describe-1280-light.png")
    page.locator("#copy-regions").click()
    expecting(page.get_by_role("status")).to_contain_text("copied")
    copied = page.evaluate("navigator.clipboard.readText().then(JSON.parse)")
    assert copied["model"] == "dynrefer-world"
    assert [copied["width"], copied["height"]] == [384, 384]
    assert len(copied["regions"]) == described(page).count()
    best = max(
        scenes[3]["objects"], key=lambda item: (item["box"][2] - item["box"][0]) * (item["box"][3] - item["box"][1])
    )
    assert best["category"] in {region["category"] for region in copied["regions"]}
    assert all("png" not in view for region in copied["regions"] for view in region["views"])
    page.get_by_role("button", name="Clear").click()
    expecting(page.locator("#boxes .box")).to_have_count(0)


@pytest.mark.browser
def test_the_keyboard_alone_is_enough(open_page: Any) -> None:
    page = open_page()

    def tab_to(selector: str, key: str = "Tab") -> None:
        for _ in range(30):
            page.keyboard.press(key)
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} cannot be reached by {key}")

    tab_to(".skip")
    tab_to("[data-name='scene 3']")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="scene 3").wait_for()
    tab_to("#add-box", "Shift+Tab")
    page.keyboard.press("Enter")
    box = page.get_by_role("button", name=re.compile("^Box 1"))
    expecting(box).to_be_focused()
    # From the middle, 128 to 256 each way, in steps of 8 to the apple at 190, 73, 345, 258.
    for key, times in (("ArrowRight", 8), ("ArrowUp", 7), ("Shift+ArrowRight", 3), ("Shift+ArrowDown", 7)):
        for _ in range(times):
            page.keyboard.press(key)
    expecting(page.get_by_role("button", name=re.compile("^Box 1: .*apple"))).to_be_focused()
    page.keyboard.press("Enter")
    head = page.locator(".region .head")
    expecting(head).to_be_focused()
    expecting(head).to_have_attribute("aria-expanded", "true")
    expecting(page.locator(".region .place")).to_have_text("192, 72, 344, 256")
    tab_to("button.view")
    expecting(page.locator("#marks .outline.active")).to_have_count(1)
    tab_to("#tab-describe", "Shift+Tab")
    page.keyboard.press("ArrowRight")
    expecting(page.get_by_role("tab", name="Ask")).to_have_attribute("aria-selected", "true")
    tab_to(".idea")
    tab_to("#question")
    page.keyboard.type("what colour is the woman?")
    page.keyboard.press("Enter")
    expecting(page.locator(".answer")).to_have_text("blue")
    tab_to("#boxes .box", "Shift+Tab")
    page.keyboard.press("Delete")
    expecting(page.locator("#boxes .box")).to_have_count(0)
    expecting(page.get_by_role("button", name="Add a box")).to_be_focused()


# ---------------------------------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_answers_stream_and_budgets_are_measured(open_page: Any) -> None:
    page = open_page()
    open_sample(page, 6)
    page.get_by_role("tab", name="Ask").click()
    expecting(page.locator("#note-ask")).to_contain_text("mg-llava-world answers. It knows the rendered world only")
    page.evaluate(
        """() => {
          window.said = [];
          new MutationObserver((records) => {
            for (const record of records)
              for (const node of record.addedNodes)
                if (node.nodeType === 3 && record.target.className === 'answer') window.said.push(node.data);
          }).observe(document.getElementById('talk'), { childList: true, subtree: true });
        }"""
    )
    page.get_by_label("Question", exact=True).fill("where is the blue sofa?")
    page.get_by_role("button", name="Ask", exact=True).click()
    answer = page.locator(".turn .answer[data-state=done]")
    expecting(answer).to_have_text("to the right of a grey truck")
    said = page.evaluate("said")
    assert len(said) >= 4, "the answer came in one piece"
    assert all(later.startswith(earlier) for earlier, later in pairwise(said))
    expecting(page.locator(".object-name", has_text="truck")).to_be_visible()
    assert page.locator("#marks .veil").count() == 0

    page.get_by_label("Token budget").fill("20")
    expecting(page.locator("#runs-rows tr")).to_have_count(2)
    first, second = page.locator("#runs-rows tr").all()
    expecting(first).to_contain_text("all")
    expecting(second).to_contain_text("7 of 36")
    for row in (first, second):
        expecting(row.locator(".value")).to_have_text(re.compile(r"^\d+\sms$"))
    expecting(page.locator("#marks .veil.strong")).to_have_count(1)
    page.screenshot(path=ARTEFACTS / "ask-1280-light.png")
    first.get_by_role("button").click()
    expecting(page.locator("#marks .veil.strong")).to_have_count(0)

    page.get_by_label("Question", exact=True).fill("what colour is the horse?")
    page.keyboard.press("Enter")
    expecting(answer).to_have_count(2)
    expecting(answer.last).to_have_text("white")

    drag(page, (28, 314), (125, 378))
    page.get_by_label("Objects to look at one by one").select_option("my 1 box")
    page.get_by_label("Question", exact=True).fill("what colour is the truck?")
    page.keyboard.press("Enter")
    expecting(answer).to_have_count(3)
    expecting(page.locator(".turn .made").last).to_contain_text("1 object")
    expecting(page.locator("#marks .object")).to_have_count(1)
    page.get_by_role("button", name="Start anew").click()
    expecting(page.locator(".turn")).to_have_count(0)


@pytest.mark.browser
def test_pictures_can_be_dropped_and_pasted(open_page: Any, scenes: list[dict[str, Any]]) -> None:
    page = open_page()
    # As the browser gives them: a DataTransfer with a file.
    send = """([kind, name, url]) => {
      const bytes = Uint8Array.from(atob(url.split(',')[1]), (letter) => letter.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], name, { type: 'image/png' }));
      const options = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
      const event = kind === 'paste' ? new ClipboardEvent(kind, options) : new DragEvent(kind, options);
      document.getElementById('frame').dispatchEvent(event);
      return event.defaultPrevented;
    }"""
    for kind, number in (("drop", 2), ("paste", 5)):
        assert page.evaluate(send, [kind, f"by {kind}.png", scenes[number]["image"]])
        page.get_by_role("heading", name=f"by {kind}.png").wait_for()
        shown = page.locator("#picture").evaluate("image => image.src")
        assert shown == scenes[number]["image"]


@pytest.mark.browser
def test_html_stays_text(open_page: Any) -> None:
    page = open_page()
    nasty = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    file = io.BytesIO()
    Image.new("RGB", (96, 64), "teal").save(file, "PNG")
    page.set_input_files("#file", {"name": f"{nasty}.png", "mimeType": "image/png", "buffer": file.getvalue()})
    page.get_by_role("heading", name=f"{nasty}.png").wait_for()
    # The picture was not rendered here, so that the note is a warning now.
    expecting(page.locator("#note-describe")).to_have_class("note warns")
    page.get_by_role("tab", name="Ask").click()
    page.get_by_label("Question", exact=True).fill(nasty)
    page.keyboard.press("Enter")
    expecting(page.locator(".turn .question")).to_have_text(nasty)
    expecting(page.locator(".turn .made")).to_contain_text("ms")
    expecting(page.locator("#runs-title")).to_have_text(nasty)
    assert page.locator(".panel img, .panel script, .bar img").count() == 0


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_a_question_stays_with_its_picture_and_is_not_sent_where_it_is_too_large(
    served: Served, open_page: Any
) -> None:
    page = open_page()
    open_sample(page, 1)
    page.get_by_role("tab", name="Ask").click()
    question = page.get_by_label("Question", exact=True)
    with served.paused():
        question.fill("what is it?")
        page.keyboard.press("Enter")
        expecting(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
        open_sample(page, 2)
        expecting(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
        expecting(page.locator(".turn")).to_have_count(0)
        expecting(question).to_have_value("")
    # The file is within the limit, the question with it in base64 is not.
    file = io.BytesIO()
    Image.new("RGB", (680, 680), "teal").save(file, "BMP")  # 1.3 MiB, of the 1.5 that are taken
    page.set_input_files("#file", {"name": "noise.bmp", "mimeType": "image/bmp", "buffer": file.getvalue()})
    page.get_by_role("heading", name="noise.bmp").wait_for()
    question.fill("what is it?")
    page.keyboard.press("Enter")
    expecting(page.get_by_role("alert")).to_contain_text("noise.bmp in a question has")
    expecting(question).to_have_value("what is it?")


@pytest.mark.browser
def test_a_token_needs_no_storage(open_page: Any) -> None:
    page = open_page(token=None)
    page.add_init_script(
        "Object.defineProperty(window, 'sessionStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    page.reload()
    page.get_by_label("Bearer token").fill(TOKEN)
    page.get_by_role("button", name="Use it").click()
    page.locator(".sample").first.wait_for()


@pytest.mark.browser
def test_files_that_cannot_be_read_are_refused_in_a_sentence(open_page: Any) -> None:
    page = open_page()
    open_sample(page, 1)
    alert = page.get_by_role("alert")
    page.set_input_files(
        "#file", {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\nno more"}
    )
    expecting(alert).to_contain_text("is not an image in a known format")
    expecting(page.get_by_role("heading", name="scene 1")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expecting(alert).to_be_hidden()

    page.set_input_files("#file", {"name": "large.png", "mimeType": "image/png", "buffer": b"x" * (2 * 2**20)})
    expecting(alert).to_contain_text("large.png has 2.0 MiB, more than the 1.5 MiB that this server takes")

    file = io.BytesIO()
    Image.new("RGB", (1000, 600)).save(file, "PNG")
    page.set_input_files("#file", {"name": "wide.png", "mimeType": "image/png", "buffer": file.getvalue()})
    page.get_by_role("heading", name="wide.png").wait_for()
    page.get_by_role("button", name="Everything").click()
    expecting(alert).to_contain_text("1000x600 = 600000 pixels, more than the limit of 500000")
    expecting(alert.get_by_role("button", name=re.compile("Try again"))).to_be_hidden()


@pytest.mark.browser
def test_a_busy_server_is_asked_again(open_page: Any, served: Served) -> None:
    page = open_page()
    open_sample(page, 4)
    with served.paused():
        for row in range(QUEUE):
            drag(page, (15 + row, 156), (117, 258))
            page.keyboard.press("Escape")
        expecting(page.locator(".region[data-state=waiting]")).to_have_count(QUEUE)
        drag(page, (191, 161), (362, 256))
        failed = page.locator(".region[data-state=failed]")
        expecting(failed).to_have_count(1)
        alert = page.get_by_role("alert")
        expecting(alert).to_be_visible()
        said = alert.locator("p").inner_text()
        assert said in failed.locator(".sub").inner_text()
        again = alert.get_by_role("button", name=re.compile(r"^Try again in \d+ s$"))
        expecting(again).to_be_disabled()
    expecting(described(page)).to_have_count(QUEUE)
    alert.get_by_role("button", name="Try again", exact=True).click()
    expecting(described(page)).to_have_count(QUEUE + 1)
    expecting(alert).to_be_hidden()
    expecting(page.locator(".caption", has_text="sofa")).to_be_visible()
    with served.paused():
        page.get_by_role("button", name="Everything").click()
        page.get_by_role("button", name="Stop").click()
        expecting(page.get_by_role("status")).to_have_text("Stopped after 0 regions.")


@pytest.mark.browser
def test_a_token_is_asked_for_and_kept_in_the_session(open_page: Any) -> None:
    page = open_page(token=None)
    dialog = page.get_by_role("dialog", name="This server wants a token")
    expecting(dialog).to_be_visible()
    page.get_by_label("Bearer token").fill("a-token-that-is-not-known")
    page.keyboard.press("Enter")
    expecting(page.locator("#token-why")).to_contain_text("token")
    page.get_by_label("Bearer token").fill(TOKEN)
    page.get_by_role("button", name="Use it").click()
    expecting(dialog).to_be_hidden()
    page.locator(".sample").first.wait_for()
    assert page.evaluate("[...Object.values(sessionStorage), ...Object.values(localStorage)]") == [TOKEN]
    page.reload()
    page.locator(".sample").first.wait_for()
    assert page.get_by_role("dialog").count() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Small screens, both schemes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_draws_by_touch_and_never_scrolls_sideways(open_page: Any, scheme: str) -> None:
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, color_scheme=scheme)
    assert overflow(page) == 0
    open_sample(page, 4)
    page.locator("#stage").scroll_into_view_if_needed()
    scrolled = page.evaluate("scrollY")
    touch = page.context.new_cdp_session(page)
    for kind, point in (
        ("touchStart", (191, 161)),
        ("touchMove", (300, 200)),
        ("touchMove", (362, 256)),
        ("touchEnd", None),
    ):
        x, y = on_screen(page, *point) if point else (0, 0)
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}] if point else []})
    expecting(described(page)).to_have_count(1)
    expecting(described(page).locator(".caption")).to_contain_text("sofa")
    assert page.evaluate("scrollY") == scrolled
    assert overflow(page) == 0
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"describe-360-{scheme}.png", full_page=True)
    page.get_by_role("tab", name="Ask").click()
    page.get_by_role("button", name="what colour is the bicycle?").click()
    expecting(page.locator(".answer")).to_have_text("orange")
    page.get_by_label("Token budget").fill("20")
    expecting(page.locator("#runs-rows tr")).to_have_count(2)
    assert overflow(page) == 0
    page.screenshot(path=ARTEFACTS / f"ask-360-{scheme}.png", full_page=True)


@pytest.mark.browser
def test_the_scheme_can_be_chosen_and_is_kept(open_page: Any) -> None:
    page = open_page(color_scheme="light", reduced_motion="reduce")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(paper)
    toggle = page.get_by_role("button", name=re.compile("^Colour scheme"))
    toggle.click()
    assert page.evaluate(paper) == light
    toggle.click()
    dark = page.evaluate(paper)
    assert dark != light
    open_sample(page, 2)
    page.screenshot(path=ARTEFACTS / "page-1280-dark.png")
    page.reload()
    assert page.evaluate(paper) == dark
    toggle.click()
    expecting(toggle).to_have_accessible_name("Colour scheme: auto")
    assert page.evaluate(paper) == light
