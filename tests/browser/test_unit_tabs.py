"""Units in a browser: dropped pictures, maps, lists, pasted infotext and presets."""

import base64
import io
import re

import pytest

from tests.browser.served import SCREENSHOTS, missing

if missing():
    pytest.skip(missing(), allow_module_level=True)

import gradio
from PIL import Image, ImageDraw
from playwright.sync_api import expect

pytest.register_assert_rewrite("tests.browser.tabs")
from tests.browser.tabs import Tab  # noqa: E402 - its asserts are rewritten

pytest_plugins = ("tests.browser.tabs",)

UNITS = "off, canny@control_v11p_sd15_canny:0.8:end=0.6:mode=control:perfect=yes:a=64"
DELTA = f'a castle\nSteps: 20, Sampler: Euler, Seed: 1, Delta lambda: 1, Delta bridge: learned, Delta units: "{UNITS}"'
DROP = """([element, name, type, data]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const dropped = new DataTransfer();
    dropped.items.add(new File([bytes], name, {type}));
    for (const kind of ["dragenter", "dragover", "drop"]) {
        element.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: dropped}));
    }
}"""


def picture(kind="RGB", size=(48, 64)):
    """Return a PNG file of a picture of a mode."""
    made = Image.new("RGB", size, "white")
    ImageDraw.Draw(made).ellipse((8, 8, 40, 40), outline="black", fill="orange")
    if kind == "RGBA":
        made.putalpha(made.convert("L"))
    if kind == "I;16":
        made = made.convert("L").convert("I").point(lambda value: value * 257).convert("I;16")
    stream = io.BytesIO()
    made.save(stream, "PNG")
    return stream.getvalue()


class UnitTab(Tab):
    """A unit of a tab of the page; ``whole`` is the tab with the rest of the accordion."""

    def __init__(self, page, name="txt2img", number=1):
        super().__init__(page, name)
        self.number, self.whole = number, Tab(page, name)

    def item(self, name):
        return super().item(f"unit{self.number}_{name}")

    def unfold(self):
        self.whole.open()
        self.whole.item("units").locator(".label-wrap").first.click()
        return self.turn_to()

    def turn_to(self):
        self.page.locator(f"#script_{self.name}_delta_sampling_unit_tabs .tab-nav button").nth(self.number - 1).click()
        expect(self.item("model")).to_be_visible()
        return self

    def put(self, *files, name="image"):
        """Choose files with the button of the widget."""
        given = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": file} for i, file in enumerate(files)]
        self.item(name).locator("input[type=file]").set_input_files(given)

    def drop(self, file):
        """Drop a file on the picture, as with a mouse."""
        place = self.item("image").locator("input[type=file]").locator("..").element_handle()
        code = base64.b64encode(file).decode()
        self.page.evaluate(DROP, [place, "dropped.png", "image/png", code])

    @property
    def on(self):
        return self.item("enabled").locator("input")

    def shown(self, name="image"):
        return self.item(name).locator("img")


@pytest.fixture
def unit(open_page):
    return UnitTab(open_page()).unfold()


def test_a_dropped_picture_is_shown_switches_its_unit_on_and_arrives(unit):
    expect(unit.on).not_to_be_checked()
    unit.drop(picture())
    expect(unit.shown()).to_be_visible()
    expect(unit.on).to_be_checked()
    unit.choose("model", "control_v11p_sd15_canny")
    text = unit.generate()
    assert "Delta units: control_v11p_sd15_canny," in text and 'Seen by units: "1: 48x64 RGB 255"' in text


@pytest.mark.parametrize(("kind", "seen"), [("RGBA", "RGBA 255"), ("I;16", "I(;16)? 65535")])
def test_nothing_of_a_transparent_or_a_16_bit_picture_is_lost(unit, kind, seen):
    unit.put(picture(kind))
    expect(unit.on).to_be_checked()
    unit.choose("model", "control_v11p_sd15_canny")
    assert re.search(f'Seen by units: "1: 48x64 {seen}"', unit.generate())


def test_several_pictures_are_given_to_one_unit(unit):
    unit.put(picture(size=(48, 48)), picture(size=(64, 48)), name="images")
    expect(unit.item("images")).to_contain_text(re.compile(r"1\s*\.png"))
    expect(unit.on).to_be_checked()
    unit.choose("model", "ip-adapter_sd15")
    assert 'Seen by units: "1: 48x48 RGB 255 64x48 RGB 255"' in unit.generate()
    unit.on.uncheck()
    unit.put(picture())
    # Wait for the picture: the two before it may have switched the unit on.
    expect(unit.shown()).to_be_visible()
    expect(unit.on).to_be_checked()
    assert 'Seen by units: "1: 48x64 RGB 255 48x48 RGB 255 64x48 RGB 255"' in unit.generate()


def test_the_map_is_shown_and_what_is_wrong_with_it_is_said(unit):
    unit.item("preview").click()
    expect(unit.item("said")).to_contain_text("Put a picture in to see its map")
    unit.put(picture())
    expect(unit.shown()).to_be_visible()
    unit.choose("preprocessor", "canny")
    unit.item("preview").click()
    expect(unit.shown("map")).to_be_visible()
    expect(unit.item("said")).to_have_text("")
    unit.choose("preprocessor", "depth_midas")
    unit.item("preview").click()
    expect(unit.item("said")).to_contain_text("The preprocessor depth_midas of unit 1 failed")
    expect(unit.shown("map")).to_have_count(0)


def test_the_button_beside_the_list_finds_new_models(unit):
    unit.page.click("#script_txt2img_delta_sampling_unit1_refresh_model")
    unit.choose("model", "found-")
    unit.on.check()
    assert "Delta units: found-" in unit.generate()


def test_units_are_pasted_with_all_but_the_picture_and_generate_the_same(open_page):
    unit = UnitTab(open_page(), number=2)
    unit.paste(DELTA)
    expect(unit.box("model")).to_have_value("control_v11p_sd15_canny")
    expect(unit.box("preprocessor")).to_have_value("canny")
    expect(unit.box("weight")).to_have_value("0.8")
    expect(unit.on).to_be_checked()
    unit.turn_to()
    assert f'Delta units: "{UNITS}"' in unit.generate()


def test_units_are_sent_to_img2img_which_has_a_picture_of_its_own(unit):
    unit.choose("model", "control_v11p_sd15_canny")
    unit.on.check()
    unit.type("weight", "0.7")
    unit.page.click("#txt2img_send")
    other = UnitTab(unit.page, "img2img")
    expect(other.on).to_be_checked()
    expect(other.item("image")).to_contain_text("or img2img's")
    text = other.generate()
    assert 'Delta units: "control_v11p_sd15_canny:0.7"' in text and 'Seen by units: "1: nothing"' in text


def test_presets_have_the_units(unit):
    unit.choose("model", "ip-adapter_sd15")
    unit.on.check()
    unit.type("weight", "0.5")
    unit.whole.type("preset_name", "look")
    unit.page.click("#script_txt2img_delta_sampling_save_preset")
    expect(unit.whole.item("preset_said")).to_contain_text("Saved as 'look'")
    unit.on.uncheck()
    unit.type("weight", "1")
    unit.whole.choose("preset", "look")
    expect(unit.on).to_be_checked()
    expect(unit.box("weight")).to_have_value("0.5")
    assert 'Delta units: "ip-adapter_sd15:0.5"' in unit.generate()


@pytest.mark.parametrize("name", ["txt2img", "img2img", "narrow"])
def test_screenshots_of_units(open_page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page = open_page(420 if name == "narrow" else 1280)
    unit = UnitTab(page, "img2img" if name == "img2img" else "txt2img").unfold()
    if name != "narrow":
        unit.put(picture())
        unit.put(picture(), picture("RGBA"), name="images")
        expect(unit.item("images")).to_contain_text(re.compile(r"1\s*\.png"))
        unit.choose("preprocessor", "canny")
        unit.item("preview").click()
        expect(unit.shown("map")).to_be_visible()
        label, *buttons = (
            place.bounding_box() for place in unit.item("image").locator("[data-testid=block-label], button").all()
        )
        small = [button for button in buttons if button["y"] < label["y"] + 20 and 0 < button["width"] < 60]
        over = [label["x"] + label["width"] > button["x"] for button in small]
        assert over and not any(over), "the label lies over a button"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"
    page.mouse.move(0, 0)
    page.screenshot(path=SCREENSHOTS / f"gradio{gradio.__version__[0]}-units-{name}.png", full_page=True)
