"""A page of the stand-in in a browser, and a user's actions in one of its tabs.  The fixtures form a plugin."""

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.browser.served import browser, serve

expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    """The address of the stand-in."""
    with serve(tmp_path_factory.mktemp("webui") / "log.txt") as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    """A running browser."""
    with sync_playwright() as playwright:
        # Containers run tests as root, and Chromium does not start its sandbox as root.
        started = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(chromium, webui):
    """A function that opens the stand-in in a page of a given size and theme; errors of the page fail the test."""
    pages, errors = [], []

    def opened(width=1280, height=1250, theme="light"):
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(error))
        page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(webui) else route.abort())
        page.goto(f"{webui}/?__theme={theme}")
        page.wait_for_selector("#script_img2img_delta_sampling_enabled-visible-checkbox", state="attached")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert not errors, errors


class Tab:
    """One tab of the page; names are those of the accordion's elements."""

    def __init__(self, page, name="txt2img"):
        self.page, self.name = page, name
        self.select(name)

    def select(self, name):
        self.page.locator("#tabs .tab-nav button").get_by_text(name, exact=True).first.click()

    def item(self, name):
        # gradio 3 gives the id of a gr.HTML to the element inside it as well
        return self.page.locator(f"#script_{self.name}_delta_sampling_{name}").first

    def box(self, name):
        """The input of a widget."""
        return self.item(name).locator("input, textarea").first

    @property
    def enabled(self):
        return self.page.locator(f"#script_{self.name}_delta_sampling_enabled-visible-checkbox")

    def open(self):
        self.item("enabled").locator(".label-wrap").first.click()
        expect(self.enabled).to_be_checked()
        return self

    def type(self, name, value):
        self.box(name).fill(value)
        self.box(name).blur()

    def choose(self, name, value):
        option = self.item(name).locator("ul.options li").filter(has_text=value)
        self.box(name).click()
        for _ in range(20):  # an open list does not change when the refresh button's answer arrives
            if option.count():
                break
            self.page.wait_for_timeout(500)
            self.box(name).blur()
            self.box(name).click()
        option.click()

    def drawn(self, words):
        expect(self.item("drawing").locator("svg")).to_have_attribute("aria-label", words)

    def generate(self):
        """Generate, and return the picture's infotext."""
        log = self.page.locator(f"#html_log_{self.name}").first
        text = self.page.locator(f"#{self.name}_infotext textarea")
        last = log.locator("p").get_attribute("data-run") if log.locator("p").count() else None
        self.page.click(f"#{self.name}_generate")
        done = log.locator(f'p[data-run]:not([data-run="{last}"])')
        expect(done).to_contain_text("Time taken")
        expect(text).to_have_value(str(done.get_attribute("title")))
        return text.input_value()

    def paste(self, text):
        self.select("PNG info")
        self.page.fill("#pnginfo_text textarea", text)
        self.page.click(f"#pnginfo_to_{self.name}")
        self.select(self.name)


@pytest.fixture
def tab(open_page):
    return Tab(open_page()).open()
