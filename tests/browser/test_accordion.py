"""The accordion in a browser: a user's actions, and the settings that reach the host."""

import base64
import json
import re
import urllib.error
import urllib.request

import pytest

from tests.browser.served import SCREENSHOTS, missing

if missing():
    pytest.skip(missing(), allow_module_level=True)

import gradio
from playwright.sync_api import expect

from lib_delta import __version__
from lib_delta.request.fields import REQUEST_FIELDS

pytest.register_assert_rewrite("tests.browser.tabs")
from tests.browser.tabs import Tab  # noqa: E402 - its asserts are rewritten

pytest_plugins = ("tests.browser.tabs",)

DELTA = (
    "a castle, <lora:x:1>\nSteps: 20, Sampler: Euler, Seed: 1, Delta lambda: 6.5, Delta end: 0.6, Delta curve: cosine, "
    "Delta curve start: 0.2, Delta base: somebody-elses [0123abcdef], "
    'Delta LoRAs: "moxin:0.8, lineart:1:te=0.5", Delta prompt: "ink, brush", Delta hires: first pass'
)
PLAIN = "a castle\nSteps: 20, Sampler: Euler, Seed: 1"
PASTED = {
    "strength": "6.5",
    "end": "0.6",
    "curve": "cosine",
    "first": "0.2",
    "base": "somebody-elses",
    "loras": "moxin:0.8, lineart:1:te=0.5",
    "prompt": "ink, brush",
}


def test_lambda_is_drawn_anew_whenever_a_part_of_it_changes(tab):
    tab.drawn("lambda 1 from 0% to 100% of the steps")
    tab.type("strength", "2.5")
    tab.drawn("lambda 2.5 from 0% to 100% of the steps")
    tab.choose("curve", "sigmoid")
    tab.type("first", "0.2")
    tab.type("end", "0.8")
    tab.drawn("lambda 0.5 to 2.5, sigmoid, from 0% to 80% of the steps")
    tab.type("start", "0.9")
    expect(tab.item("drawing")).to_contain_text("start (0.9) must not come after end (0.8)")


def test_the_ends_of_the_curve_are_inactive_while_it_is_constant(tab):
    for item in ("first", "last"):
        expect(tab.item(item)).to_have_class(re.compile("delta-sampling-inactive"))
        expect(tab.box(item)).to_be_disabled()
    tab.choose("curve", "cosine")
    for item in ("first", "last"):
        expect(tab.item(item)).not_to_have_class(re.compile("delta-sampling-inactive"))
        expect(tab.box(item)).to_be_enabled()


def test_the_latest_values_are_drawn_even_if_an_older_answer_comes_last(tab):
    def late(route):
        if '"data":[2,' in route.request.post_data:
            tab.page.wait_for_timeout(1500)
        route.continue_()

    tab.page.route(re.compile("/run/predict"), late)
    tab.box("strength").fill("2")
    tab.box("strength").fill("3")
    tab.page.wait_for_timeout(2000)
    tab.drawn("lambda 3 from 0% to 100% of the steps")


def test_the_slider_ends_at_5_and_10_can_be_typed(tab):
    slider = tab.item("strength").locator("input[type=range]")
    assert slider.get_attribute("max") == "5"
    slider.focus()
    slider.press("End")
    expect(tab.box("strength")).to_have_value("5")
    tab.type("strength", "7")
    expect(tab.box("strength")).to_have_value("7")
    tab.drawn("lambda 7 from 0% to 100% of the steps")
    assert "Delta lambda: 7" in tab.generate()
    tab.type("strength", "12")
    expect(tab.box("strength")).to_have_value("10")
    tab.drawn("lambda 10 from 0% to 100% of the steps")


def test_loras_join_the_list_once_and_the_refresh_button_finds_new_ones(tab, open_page):
    tab.choose("add_lora", "moxin")
    expect(tab.box("loras")).to_have_value("moxin:1")
    tab.choose("add_lora", "lineart")
    expect(tab.box("loras")).to_have_value("moxin:1, lineart:0.6")
    tab.choose("add_lora", "moxin")
    expect(tab.box("add_lora")).to_have_value("None")
    expect(tab.box("loras")).to_have_value("moxin:1, lineart:0.6")
    tab.page.click("#script_txt2img_delta_sampling_refresh_add_lora")
    tab.choose("add_lora", "found-")
    expect(tab.box("loras")).to_have_value(re.compile("^moxin:1, lineart:0.6, found-"))
    # The button changes the widget on the server, which pages opened later share.
    later = Tab(open_page()).open()
    later.choose("add_lora", "moxin")
    expect(later.box("loras")).to_have_value("moxin:1")


def row(tab, name):
    return tab.item("picked").locator(f".delta-sampling-pick[data-name={name}]")


def test_each_lora_has_a_slider_and_the_text_stays_the_truth(tab):
    tab.type("loras", "moxin:0.8:te=0.5, lineart")
    slider = row(tab, "moxin").locator("[type=range]")
    expect(slider).to_have_value("0.8")
    slider.focus()
    slider.press("ArrowRight")
    expect(tab.box("loras")).to_have_value("moxin:0.85:te=0.5, lineart")
    expect(row(tab, "moxin").locator("[type=range]")).to_be_focused()
    row(tab, "lineart").locator("[type=number]").fill("-0.5")
    row(tab, "lineart").locator("[type=number]").blur()
    expect(tab.box("loras")).to_have_value("moxin:0.85:te=0.5, lineart:-0.5")
    expect(row(tab, "lineart").locator("[type=range]")).to_have_attribute("min", "-1")
    row(tab, "moxin").get_by_text("\N{MULTIPLICATION SIGN}").click()
    expect(tab.box("loras")).to_have_value("lineart:-0.5")
    tab.type("loras", "lineart:much")
    expect(tab.item("picked")).to_contain_text("has weight 'much': a number is needed")
    tab.type("loras", "lineart:1, gone")
    expect(row(tab, "gone")).to_contain_text("there is no LoRA 'gone'")


def test_trigger_words_join_the_side_models_prompt(tab):
    expect(tab.box("prompt")).to_be_hidden()
    tab.choose("add_lora", "lineart")
    row(tab, "lineart").get_by_text("+ thin lines").click()
    expect(tab.box("prompt")).to_be_visible()
    expect(tab.box("prompt")).to_have_value("{prompt}, thin lines")
    row(tab, "lineart").get_by_text("photo").click()
    expect(tab.box("negative_prompt")).to_have_value("{prompt}, photo")
    expect(row(tab, "lineart")).to_contain_text("\N{CHECK MARK} thin lines")
    assert 'Delta prompt: "{prompt}, thin lines"' in tab.generate()


def test_a_click_on_a_card_adds_its_lora_while_the_accordion_is_open_and_its_switch_says_so(open_page):
    tab = Tab(open_page())
    card, main = tab.page.locator("#txt2img_card_moxin"), tab.page.locator("#txt2img_prompt textarea")
    card.click()
    expect(main).to_have_value("a harbour at night <lora:moxin:0.7> moxin style")
    card.click()
    tab.open()
    card.click()
    expect(main).to_have_value(re.compile("<lora:moxin:0.7> moxin style$"))
    before = main.input_value()
    tab.item("cards").locator("input").check()
    card.click()
    expect(tab.box("loras")).to_have_value("moxin:0.7")
    expect(tab.page.locator(".delta-sampling-note")).to_have_text("Delta Sampling: moxin:0.7")
    card.click()
    expect(tab.box("loras")).to_have_value("")
    assert main.input_value() == before
    tab.page.locator("#txt2img_card_ball").click()
    expect(main).to_have_value(f"{before} ball")
    tab.enabled.uncheck()
    card.click()  # the WebUI handles it again, and removes the text from the prompt
    expect(main).to_have_value("a harbour at night ball")


def test_presets_are_saved_loaded_and_deleted(tab):
    tab.type("strength", "3")
    tab.type("loras", "lineart:0.5")
    tab.type("preset_name", "lines")
    tab.page.click("#script_txt2img_delta_sampling_save_preset")
    expect(tab.item("preset_said")).to_contain_text("Saved as 'lines'")
    tab.type("strength", "1")
    tab.type("loras", "")
    tab.choose("preset", "lines")
    expect(tab.box("strength")).to_have_value("3")
    expect(tab.box("loras")).to_have_value("lineart:0.5")
    tab.drawn("lambda 3 from 0% to 100% of the steps")
    expect(row(tab, "lineart").locator("[type=range]")).to_have_value("0.5")
    tab.page.click("#script_txt2img_delta_sampling_delete_preset")
    expect(tab.item("preset_said")).to_contain_text("'lines' is deleted")
    expect(tab.box("preset")).to_have_value("None")
    tab.page.click("#script_txt2img_delta_sampling_delete_preset")
    expect(tab.item("preset_said")).to_contain_text("Choose the preset to delete")


def test_the_webuis_tooltip_of_none_is_not_shown_over_ours(tab):
    shown = tab.box("adapted")
    shown.evaluate("element => { element.title = 'Do not do anything special'; }")
    expect(shown).to_have_attribute("title", "")


def test_a_run_tells_what_was_added_and_the_status_follows(tab):
    tab.choose("base", "v1-5-pruned-emaonly.safetensors")
    tab.choose("add_lora", "moxin")
    expect(tab.box("loras")).to_have_value("moxin:1")
    text = tab.generate()
    assert "Delta lambda: 1, Delta base: v1-5-pruned-emaonly.safetensors" in text and 'Delta LoRAs: "moxin:1"' in text
    expect(tab.page.locator("#txt2img_gallery img").first).to_be_visible()
    expect(tab.item("status")).to_contain_text("loaded: v1-5-pruned-emaonly.safetensors + moxin")
    tab.page.click("#script_txt2img_delta_sampling_unload")
    expect(tab.item("status")).to_contain_text("1.6 GB were given back")
    expect(tab.item("status")).to_contain_text("nothing is loaded")


def test_a_closed_accordion_adds_nothing(open_page):
    assert "Delta" not in Tab(open_page()).generate()


def test_a_wrong_setting_is_told_in_one_sentence(tab):
    tab.type("loras", "moxin:much")
    assert tab.generate() == "Error: LoRA pick 'moxin:much' has weight 'much': a number is needed"


def test_pasting_a_picture_restores_everything_and_generates_the_same(open_page):
    tab = Tab(open_page())
    expect(tab.enabled).not_to_be_checked()
    tab.paste(DELTA)
    expect(tab.enabled).to_be_checked()
    for name, value in PASTED.items():
        expect(tab.box(name)).to_have_value(value)
    expect(tab.box("prompt")).to_be_visible()
    tab.drawn("lambda 1.3 to 6.5, cosine, from 0% to 60% of the steps")
    given = DELTA.replace(" [0123abcdef]", "").partition("Delta")[2].split(", Delta")
    written = tab.generate().partition("Delta")[2].split(", Delta")
    # Infotext of older pictures names no bridge: their latents were scaled.
    assert sorted(written) == sorted([*given, " bridge: same_snr", f" version: {__version__}"])


def test_pasting_a_picture_without_a_delta_closes_the_accordion_and_keeps_what_is_in_it(tab):
    tab.type("strength", "2")
    tab.paste(PLAIN)
    expect(tab.enabled).not_to_be_checked()
    expect(tab.box("strength")).to_have_value("2")
    assert "Delta" not in tab.generate()


def test_settings_can_be_sent_to_the_other_tab(tab):
    tab.type("strength", "3")
    tab.type("loras", "lineart:0.5")
    tab.page.click("#txt2img_send")
    other = Tab(tab.page, "img2img")
    expect(other.enabled).to_be_checked()
    expect(other.box("strength")).to_have_value("3")
    expect(other.box("loras")).to_have_value("lineart:0.5")


def test_every_cell_of_an_xyz_plot_tells_its_own_lambda(tab):
    tab.page.get_by_text("X/Y/Z plot").first.click()
    tab.page.locator("#txt2img_axis input").click()
    tab.page.locator("#txt2img_axis ul.options li").get_by_text("[Delta] Lambda").click()
    tab.page.fill("#txt2img_axis_values textarea", "0-2 [3]")
    assert re.findall(r"Delta lambda: ([\d.]+)", tab.generate()) == ["0", "1", "2"]


def test_widgets_have_tooltips_in_both_tabs(open_page):
    page = open_page()
    for name in ("txt2img", "img2img"):
        tab = Tab(page, name)
        for item in ("strength", "curve", "loras", "adapted", "hires", "unload", "unit1_images", "unit3_mode"):
            assert tab.item(item).get_attribute("title"), item
        assert tab.item("strength").get_attribute("title") == REQUEST_FIELDS["strength"].tooltip


def test_the_schema_and_the_status_are_served_with_the_webuis_own_password(webui):
    def get(path, password):
        header = base64.b64encode(f"user:{password}".encode()).decode()
        request = urllib.request.Request(f"{webui}/delta-sampling/{path}", headers={"Authorization": f"Basic {header}"})
        return json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request))

    assert get("schema", "password")["properties"]["lambda"]["maximum"] == 10
    assert get("status", "password")["host"] == "stand-in"
    for path in ("schema", "status"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(path, "guess")


@pytest.mark.parametrize("name", ["txt2img", "img2img", "dark", "narrow"])
def test_screenshots(open_page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page = open_page(420 if name == "narrow" else 1280, theme="dark" if name == "dark" else "light")
    tab = Tab(page, "img2img" if name == "img2img" else "txt2img").open()
    tab.choose("base", "v1-5-pruned-emaonly.safetensors")
    tab.choose("add_lora", "moxin")
    expect(tab.box("loras")).to_have_value("moxin:1")
    tab.choose("curve", "cosine")
    tab.type("first", "0.2")
    tab.type("end", "0.75")
    tab.drawn("lambda 0.2 to 1, cosine, from 0% to 75% of the steps")
    tab.generate()
    expect(tab.item("status")).to_contain_text("loaded: v1-5-pruned-emaonly.safetensors + moxin")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"
    page.mouse.move(0, 0)
    page.screenshot(path=SCREENSHOTS / f"gradio{gradio.__version__[0]}-{name}.png", full_page=True)
