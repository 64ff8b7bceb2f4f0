"""The built book in Chromium, opened as files with the network off, the way a reader on a train opens it."""

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]
HTML = ROOT / "_build" / "html"
PAGES = sorted(page.relative_to(HTML).as_posix() for page in HTML.glob("book/**/*.html"))
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        message = "The browser tests need Chromium: install it with 'sudo apt-get install chromium'."
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=FLAGS.split())
        yield running
        running.close()


@pytest.fixture(scope="module", params=PAGES)
def page(browser, request):
    """One page of the book, open on a light desktop; ``page.problems`` lists what went wrong on it so far."""
    context = browser.new_context(offline=True, color_scheme="light", viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.path, page.problems = request.param, []
    page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or page.problems.append(r.url))
    page.on("requestfailed", lambda r: page.problems.append(f"failed: {r.url[:200]}"))
    page.on("console", lambda m: m.type == "error" and page.problems.append(m.text))
    page.on("pageerror", lambda e: page.problems.append(str(e)))
    page.goto((HTML / request.param).as_uri())
    page.wait_for_function("!window.MathJax || window.MathJax.startup?.promise")
    page.evaluate("window.MathJax?.startup.promise.then(() => null)")
    yield page
    context.close()


def test_the_book_is_built():
    assert PAGES, "There is no book to test: run 'make book' first."


def test_the_front_page_leads_to_the_book(browser):
    page = browser.new_page()
    page.goto((HTML / "index.html").as_uri())
    page.wait_for_url("**/book/index.html")
    page.close()


def test_a_page_needs_no_network_and_makes_no_error(page):
    assert page.problems == []


def test_mathematics_is_typeset(page):
    assert page.locator("mjx-container").count() == page.locator(".math").count()
    assert page.locator("mjx-merror").count() == 0


def test_every_picture_has_alternative_text(page):
    texts = page.locator("img").evaluate_all("images => images.map(image => image.alt)")
    # Sphinx gives a picture without alternative text its file name.
    assert [text for text in texts if not text.strip() or text.endswith((".png", ".svg", ".jpg", ".webp"))] == []


def test_every_slider_has_a_name_and_moves_its_pictures_by_keyboard(page):
    for slider in page.locator("article input[type=range]").all():
        group = slider.locator("xpath=ancestor::*[@class='predoc-scrubber']")
        state = "group => [...group.querySelectorAll('img')].map(image => [image.src, image.alt])"
        assert slider.evaluate("slider => slider.labels[0]?.textContent.trim()")
        slider.focus()
        page.keyboard.press("Home")
        before, words = group.evaluate(state), group.locator("output").inner_text()
        page.keyboard.press("ArrowRight")
        after = group.evaluate(state)
        assert any(b[0] != a[0] for b, a in zip(before, after, strict=True)), "no picture changed"
        assert all(b[1] != a[1] for b, a in zip(before, after, strict=True)), "an alternative text stayed the same"
        assert group.locator("output").inner_text() == slider.get_attribute("aria-valuetext") != words
        page.keyboard.press("End")
        assert group.evaluate(state) != after
        wide = []
        for at in range(int(slider.get_attribute("max")) + 1):
            slider.fill(str(at))
            wide.append(slider.bounding_box()["width"])
        assert max(wide) == min(wide), "the words beside it change its length under the pointer"
        assert group.evaluate("group => [...group.querySelectorAll('img')].every(image => image.naturalWidth > 0)")
    assert page.problems == []


def test_the_source_can_be_downloaded(page):
    link = page.locator("a[href*='_sources']").first
    source = (HTML / page.path).parent / link.get_attribute("href")
    assert source.read_text() == (ROOT / page.path).with_suffix(".md").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_follows_the_colours_that_the_system_asks_for(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
    shots = ROOT / "_build" / "screenshots"
    shots.mkdir(exist_ok=True)
    page.screenshot(path=shots / f"{page.path.replace('/', '-').removesuffix('.html')}-{scheme}.png", full_page=True)


def test_a_narrow_screen_scrolls_down_only(page):
    page.set_viewport_size({"width": 390, "height": 800})
    width = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size({"width": 1200, "height": 900})
    assert width <= 390


def test_the_chapters_have_sliders():
    assert 'type="range"' in (HTML / "book/video/latent_ode.html").read_text()
