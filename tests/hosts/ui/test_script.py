"""The script and the accordion in a stand-in WebUI: the widgets' values, and the calls that reach the host."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from copy import copy
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib_delta import __version__
from lib_delta.errors import SettingError
from lib_delta.page.lambda_curve import draw_lambda
from lib_delta.request.control_unit import Unit
from lib_delta.request.fields import REQUEST_FIELDS, SETTINGS, UNIT_FIELDS
from lib_delta.request.request import Request
from lib_delta.request.schema import schema

ROOT = Path(__file__).resolve().parents[3]
STAND_IN = ROOT / "tests" / "browser"
SCRIPTS = [str(STAND_IN / "webui" / "scripts" / "xyz_grid.py"), str(ROOT / "scripts" / "delta_sampling.py")]
BASE, TUNED = "v1-5-pruned-emaonly.safetensors", "inks/moxin-tuned.safetensors [0123abcdef]"


class WebUI:
    """The stand-in WebUI with its scripts loaded."""

    def __init__(self):
        from modules import script_callbacks, scripts, shared

        from tests.support.recorded_gradio import made, said
        from tests.support.stand_in_host import use_stand_in_host

        self.host, self.blocks, self.said = use_stand_in_host(), made, said
        self.scripts, self.callbacks, self.shared = scripts, script_callbacks, shared
        self.load()

    def load(self):
        self.scripts.load_scripts(SCRIPTS)
        self.callbacks.call("before_ui")

    def module(self, name="delta_sampling.py"):
        return next(data.module for data in self.scripts.scripts_data if data.module.__name__ == name)

    def hosts(self, name):
        return importlib.import_module(f"lib_delta.hosts.ui.{name}")

    def runner(self, is_img2img=False):
        self.blocks.clear()
        made = self.scripts.ScriptRunner(is_img2img)
        made.setup_ui()
        return made

    def widget(self, elem_id):
        return next(block for block in self.blocks if block.given.get("elem_id", "").endswith(f"_{elem_id}"))

    def axis(self, label):
        return next(option for option in self.module("xyz_grid.py").axis_options if option.label == f"[Delta] {label}")

    def cells(self, p, label, text):
        grid = self.runner().selectable_scripts[0]
        return grid.cells(p, f"[Delta] {label}", text)


@pytest.fixture
def webui(monkeypatch):
    before = dict(sys.modules)
    monkeypatch.syspath_prepend(str(STAND_IN / "webui"))
    for name in [name for name in sys.modules if name.split(".")[0] in ("modules", "gradio")]:
        del sys.modules[name]
    from tests.support.recorded_gradio import use_recorded_gradio

    use_recorded_gradio()
    yield WebUI()
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update(before)


def read(runner, values):
    """Return the request of a tab after an update of its widgets; None leaves a widget unchanged."""
    pairs = [(values.get(widget), widget.value) for widget in runner.inputs]
    return Request.from_arguments([before if value is None else value for value, before in pairs])


def restored(runner, values):
    """Return the value that infotext sets each widget of a tab to."""
    return {component: target(values) for component, target in runner.infotext_fields}


def test_widgets_come_in_the_order_of_the_settings_and_hold_their_defaults(webui):
    values = [widget.value for widget in webui.runner().inputs]
    assert Request.from_arguments(values) == Request()
    assert len(values) == len(SETTINGS) + 3 * len(UNIT_FIELDS)


@pytest.mark.parametrize("is_img2img", [False, True])
def test_ids_name_the_tab_and_labels_are_unique_in_it(webui, is_img2img):
    runner = webui.runner(is_img2img)
    ids = [block.given["elem_id"] for block in webui.blocks if block.given.get("elem_id")]
    tab = "script_img2img_delta_sampling_" if is_img2img else "script_txt2img_delta_sampling_"
    assert all(elem_id.startswith(tab) for elem_id in ids) and len(ids) == len(set(ids))
    labels = [widget.label for widget in runner.inputs]
    assert len(labels) == len(set(labels)) and all(labels)


def test_the_page_gets_a_tooltip_for_each_setting_that_the_field_table_explains(webui):
    webui.runner()
    carrier = next(block.value for block in webui.blocks if "data-tooltips" in str(block.value))
    tooltips = json.loads(unescape(re.search('data-tooltips="([^"]*)"', carrier)[1]))
    ids = {block.given["elem_id"].split("delta_sampling_")[1] for block in webui.blocks if block.given.get("elem_id")}
    assert not set(tooltips) - ids, "a tooltip of no element"
    assert {name: tooltips.get(name, "") for name in REQUEST_FIELDS} == {
        n: f.tooltip for n, f in REQUEST_FIELDS.items()
    }
    for name, field in UNIT_FIELDS.items():
        assert [tooltips.get(f"unit{number}_{name}", "") for number in (1, 2, 3)] == [field.tooltip] * 3
    assert "unit4_model" not in tooltips


def test_numbers_labels_and_choices_come_from_the_field_table(webui):
    webui.runner()
    for name, field in REQUEST_FIELDS.items():
        given = webui.widget(f"delta_sampling_{name}-checkbox" if name == "enabled" else f"delta_sampling_{name}").given
        if field.step:
            assert (given["minimum"], given["maximum"], given["step"]) == (field.minimum, field.maximum, field.step)
        if field.choices:
            assert given["choices"][: len(field.choices)] == list(field.choices)
        if field.label:
            assert given["label"] == field.label


def test_all_widgets_are_inside_the_accordion(webui):
    runner = webui.runner()

    def containers(block):
        return [] if block.parent is None else [block.parent, *containers(block.parent)]

    for widget in runner.inputs[1:]:
        ids = [container.given.get("elem_id") for container in containers(widget)]
        assert ids[-3:-1] == [f"script_txt2img_delta_sampling_{name}" for name in ("settings", "enabled")], widget.label


def test_the_widgets_can_be_made_again_as_the_api_does(webui):
    first, second = webui.runner(), webui.runner()
    assert [w.given for w in first.inputs] == [w.given for w in second.inputs]


def test_the_hooks_reach_the_host_in_order(webui):
    runner = webui.runner()
    p = SimpleNamespace(script_args=[{"lambda": 2}, *[w.value for w in runner.inputs[1:]]], extra_generation_params={})
    webui.host.calls.clear()
    runner.call("process", p)
    runner.call("process_batch", p, batch_number=0, prompts=[""])
    runner.call("process_before_every_sampling", p, x=None)
    runner.call("postprocess", p, None)
    assert webui.host.calls == ["process", "process_batch", "before_sampling", "postprocess"]
    assert p.delta_request == Request(enabled=True, strength=2.0)


def test_the_host_is_started_once_for_each_load(webui):
    assert webui.host.calls == ["start"]
    webui.load()
    assert webui.host.calls == ["start", "start"]


def test_infotext_restores_every_setting(webui):
    numbers, texts = (2.5, 0.1, 0.9, "cosine", 0.2, 0.7), ("ink", "photo", "brush", "hires pass")
    units = Unit(True, model="edges", preprocessor="canny", weight=0.8, end=0.6, resolution=640), Unit(), Unit(True)
    details = {"quality": "fast", "every": 3.0, "between": "linear", "moved": 0.2, "units": units}
    request = Request(True, *numbers, BASE, TUNED, "moxin:0.8, lineart", *texts, **details)
    runner = webui.runner()
    values = restored(runner, request.infotext({BASE: "aabbccddee"}))
    # TUNED ends like a short hash, which is still part of its name.
    assert read(runner, values) == request


def test_what_the_text_does_not_name_is_set_to_its_default(webui):
    runner = webui.runner()
    values = restored(runner, {"Delta lambda": "0.5"})
    expected = Request(enabled=True, strength=0.5, bridge="same_snr")
    assert read(runner, values) == expected
    assert "None" in values.values(), "an empty dropdown is pasted by name"


def test_a_picture_without_a_delta_closes_the_accordion_and_leaves_the_rest(webui):
    runner = webui.runner()
    values = restored(runner, {"Steps": "20"})
    assert [values.get(w) for w in runner.inputs] == [False] + [None] * (len(runner.inputs) - 1)


def test_the_default_of_each_pasted_widget_has_the_type_of_its_setting(webui):
    for widget, setting in zip(webui.runner().inputs, SETTINGS):
        assert type(widget.value) is setting.value_type, setting.name


def test_send_to_finds_the_same_settings_in_both_tabs(webui):
    one, other = webui.runner(False), webui.runner(True)
    assert one.paste_field_names == other.paste_field_names
    assert [name for _, name in one.infotext_fields][: len(one.paste_field_names)] == one.paste_field_names


def test_a_lora_joins_the_list_once_and_with_the_weight_of_its_card(webui):
    add = webui.hosts("lora_box").with_lora
    chosen = SimpleNamespace(value="moxin")
    assert add("", chosen) == ("moxin:1", "None")
    assert add("", SimpleNamespace(value="lineart")) == ("lineart:0.6", "None")
    assert add("lineart:0.5, ", chosen) == ("lineart:0.5, moxin:1", "None")
    assert add("moxin:0.3", chosen) == ("moxin:0.3", "None")
    assert add("lineart:", chosen) == ("lineart:, moxin:1", "None")
    assert add("lineart", SimpleNamespace(value="None")) == ("lineart", "None")


def test_an_edit_changes_the_texts_and_unfolds_the_prompts_it_has_filled(webui):
    apply = webui.hosts("lora_box").apply_edit_json
    weight = '{"do": "weight", "index": 0, "name": "lineart", "weight": 0.25}'
    *texts, rows, prompts = apply(weight, "lineart:0.6", "", "")
    assert texts == ["lineart:0.25", "", ""] and 'value="0.25"' in rows and "open" not in prompts
    *texts, rows, prompts = apply('{"do": "words", "name": "lineart"}', "lineart:0.6", "", "")
    assert texts == ["lineart:0.6", "{prompt}, thin lines", ""] and prompts["open"] is True
    for nothing in ("", "[]", "{", '{"do": "dance"}'):
        assert apply(nothing, "lineart:0.6", "a", "b")[:3] == ("lineart:0.6", "a", "b")


def saved_values(row, request):
    """Return the widgets' values that a preset saves: the settings, and the units without their pictures."""
    units = [*request.units, Unit(), Unit(), Unit()]
    return [*(getattr(request, f.name) for f in SETTINGS[1:]), *(getattr(units[i], n) for i, n in row.unit_fields())]


def test_a_preset_brings_back_what_was_saved_and_does_not_switch_the_delta_on(webui):
    row, runner = webui.hosts("preset_row"), webui.runner()
    unit = Unit(True, None, "edges", "canny", 0.7, end=0.5)
    wanted = Request(True, 2.5, base=BASE, loras="moxin:0.8", adapted_prompt="ink", quality="fast", units=(unit,))
    said, listed, *_ = row.save("ink on SDXL", "", *saved_values(row, wanted))
    assert "Saved as &#x27;ink on SDXL&#x27;" in said and listed["choices"] == ["None", "ink on SDXL"]
    *values, prompts, units, said, listed, name = row.load_selected(SimpleNamespace(value="ink on SDXL"))
    assert Request.from_arguments([True, *values[: len(SETTINGS) - 1]]) == replace(wanted, units=())
    assert len(values) == len(runner.infotext_fields) - 3, "all but the switch of the delta, and two that unfold"
    assert values[len(SETTINGS) - 1 :][: len(row.RECIPE_FIELDS)] == [getattr(unit, name) for name in row.RECIPE_FIELDS]
    assert units["open"] is True
    assert values[[f.name for f in SETTINGS][1:].index("adapted")] == "None", "an empty dropdown shows it"
    assert prompts["open"] is True and said == ""
    assert listed["value"] == name["value"] == "ink on SDXL"
    said, listed, name = row.delete("ink on SDXL")
    assert "is deleted" in said and listed["choices"] == ["None"] and name["value"] == ""


def test_what_cannot_be_saved_loaded_or_deleted_is_said_and_changes_nothing(webui):
    row = webui.hosts("preset_row")
    assert "needs a name" in row.save("None", "", *saved_values(row, Request()))[0]
    assert "has no name" in row.save("x", "", *saved_values(row, Request(loras=":1")))[0]
    assert "There is no preset &#x27;x&#x27;" in row.delete("x")[0]
    assert "Choose the preset to delete" in row.delete("None")[0]
    *updates, said, _, _ = row.load_selected(SimpleNamespace(value="gone"))
    assert "There is no preset &#x27;gone&#x27;" in said and all(set(update) == {"__type__"} for update in updates)


def test_a_preset_is_replaced_only_by_a_second_click(webui):
    row = webui.hosts("preset_row")
    assert row.save("mine", "", *saved_values(row, Request(strength=3.0)))[-1] == ""
    said, _, _, confirming = row.save(" mine", "", *saved_values(row, Request(strength=2.0)))
    assert "save again to replace it" in said and confirming == "mine"
    assert row.load("mine")[0] == 3.0
    other = row.save("other", confirming, *saved_values(row, Request()))
    assert "Saved as" in other[0] and other[-1] == ""
    assert "Saved as" in row.save("mine", confirming, *saved_values(row, Request(strength=2.0)))[0]
    assert row.load("mine")[0] == 2.0


def test_the_preset_none_is_the_defaults(webui):
    row = webui.hosts("preset_row")
    *values, _, _, said, _, _ = row.load_selected(SimpleNamespace(value="None"))
    assert Request.from_arguments([True, *values[: len(SETTINGS) - 1]]) == Request(enabled=True)
    assert "The settings are the defaults" in said


def test_the_default_preset_is_loaded_when_the_page_is_there(webui):
    row = webui.hosts("preset_row")
    assert all("value" not in update for update in row.load_default() if update), "there is none"
    row.save("mine", "", *saved_values(row, Request(strength=3.0)))
    webui.shared.opts.data["delta_sampling_preset"] = "mine"
    assert row.load_default()[0] == 3.0


def test_prompts_unfold_when_a_picture_has_filled_them(webui):
    unfold = webui.hosts("accordion").unfold_prompts
    assert unfold({"Delta lambda": "1", "Delta prompt": "ink"})["open"] is True
    assert "open" not in unfold({"Delta lambda": "1"})


def test_the_status_is_text_and_not_markup(webui):
    webui.host.loaded = ["<b>"]
    accordion = webui.hosts("accordion")
    version = f"<div>Delta Sampling {__version__}</div>"
    assert accordion.status_html() == f"<div>loaded: &lt;b&gt; on cpu, 1.6 GB</div>{version}"
    assert accordion.unload_html() == f"<div>1.6 GB were given back</div><div>nothing is loaded</div>{version}"


def test_the_settings_page_has_the_documented_defaults(webui):
    webui.callbacks.call("ui_settings")
    assert webui.shared.opts.data == {
        "delta_sampling_base": "None",
        "delta_sampling_units": 3,
        "delta_sampling_cache": 1,
        "delta_sampling_cache_size": 8,
        "delta_sampling_device": "Automatic",
        "delta_sampling_precision": "Automatic",
        "delta_sampling_placement": "whole",
        "delta_sampling_form": "automatic",
        "delta_sampling_compile": False,
        "delta_sampling_on_error": "stop",
        "delta_sampling_preset": "None",
        "delta_sampling_show": False,
        "delta_sampling_adetailer": True,
    }
    base = webui.shared.opts.data_labels["delta_sampling_base"]
    assert base.component_args()["choices"] == ["None", BASE, TUNED]
    base.refresh()
    assert "found-2.safetensors" in base.component_args()["choices"]


def test_a_settings_file_of_an_older_version_keeps_what_it_means(webui):
    webui.shared.opts.data["delta_sampling_form"] = "low-rank factors (less memory)"
    webui.callbacks.call("ui_settings")
    assert webui.shared.opts.data["delta_sampling_form"] == "low-rank factors"
    offered = webui.shared.opts.data_labels["delta_sampling_form"].component_args["choices"]
    assert offered == ["automatic", "merged", "low-rank factors"]


def test_checkpoints_that_cannot_be_a_base_are_behind_all(webui):
    lists = webui.hosts("checkpoint_choices")
    assert lists.base_choices() == ["None", BASE, TUNED]
    webui.host.catalog.known_checkpoints.append("juggernaut-xl.safetensors")
    assert lists.base_choices() == ["None", BASE, TUNED, lists.ALL]
    update = lists.whole_list(lists.ALL, SimpleNamespace(value=lists.ALL))
    assert update["choices"] == ["None", BASE, TUNED, "juggernaut-xl.safetensors"] and update["value"] == "None"
    assert lists.whole_list(BASE, SimpleNamespace(value=BASE)) == BASE


def test_adetailers_passes_run_the_script_unless_the_user_does_not_want_it(webui):
    opts, app = webui.shared.opts, SimpleNamespace(routes=[])
    webui.callbacks.call("app_started", None, app)
    assert "ad_script_names" not in opts.data, "without ADetailer there is no list"
    opts.data_labels["ad_script_names"] = SimpleNamespace(default="dynamic_prompting,wildcards")
    opts.data["delta_sampling_adetailer"] = False
    webui.callbacks.call("app_started", None, app)
    assert "ad_script_names" not in opts.data
    opts.data["delta_sampling_adetailer"] = True
    for _ in range(2):
        webui.callbacks.call("app_started", None, app)
    assert opts.data["ad_script_names"] == "dynamic_prompting,wildcards,delta_sampling"


def test_names_with_commas_are_offered_as_they_are_read(webui):
    webui.host.catalog.known_loras.append("my, ink")
    axis = webui.axis("LoRAs")
    assert axis.choices() == ["None", "moxin", "lineart", '"my, ink"']
    for value in ('"my, ink"', "my, ink"):
        p = SimpleNamespace()
        axis.confirm(p, [value])
        axis.apply(p, value, [])
        assert p.delta_sampling_axes["loras"] == '"my, ink"'


def test_axes_are_there_once_after_any_number_of_reloads(webui):
    webui.callbacks.call("before_ui")
    names = ["Lambda", "Start", "End", "Curve", "Base", "Adapted", "LoRAs", "LoRA weight", "CFG", "Size", "Bridge"]
    names += ["Quality", "Quality steps", "Quality moved", "Unit weight", "Unit start", "Unit end", "Unit model"]
    expected = ["Nothing", *(f"[Delta] {name}" for name in names)]
    assert [option.label for option in webui.module("xyz_grid.py").axis_options] == expected
    webui.load()
    assert [option.label for option in webui.module("xyz_grid.py").axis_options] == expected


def test_a_webui_without_the_plot_gets_no_axes(webui):
    webui.scripts.load_scripts(SCRIPTS[1:])
    webui.callbacks.call("before_ui")


def test_numbers_have_the_type_that_ranges_need_and_models_cost_more(webui):
    assert {webui.axis(name).type for name in ("Lambda", "Start", "End", "LoRA weight")} == {float}
    costs = [webui.axis(name).cost for name in ("Base", "Adapted", "LoRAs", "LoRA weight", "Lambda")]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs) and costs[0] < 1


def test_each_cell_has_its_own_values(webui):
    p = SimpleNamespace()
    cells = webui.cells(p, "Lambda", "0-2 [3]")
    for cell in cells:
        webui.axis("Base").apply(cell, "V1-5-pruned-emaonly", [])
    axes = [cell.delta_sampling_axes for cell in cells]
    assert axes == [{"enabled": True, "strength": value, "base": BASE} for value in (0.0, 1.0, 2.0)]
    assert not hasattr(p, "delta_sampling_axes")


def test_axis_values_are_applied_on_top_of_the_accordion(webui):
    runner = webui.runner()
    p = SimpleNamespace(script_args=[{"loras": "moxin:0.2, lineart"}], extra_generation_params={})
    (cell,) = webui.cells(p, "LoRA weight", "0.5")
    webui.axis("Adapted").apply(cell, "None", [])
    cell = copy(cell)
    runner.call("process", cell)
    assert cell.delta_request == Request(enabled=True, loras="moxin:0.5, lineart:0.5")


@pytest.mark.parametrize(
    ("axis", "value", "sentence"),
    [
        ("Lambda", "11", '[Delta] Lambda "11" is not allowed: a number from 0 to 10 is'),
        ("Start", "-1", '[Delta] Start "-1" is not allowed: a number from 0 to 1 is'),
        ("Curve", "wave", '[Delta] Curve "wave" is not allowed: one of constant, linear, cosine, sigmoid is'),
        ("Base", "sd3", f'[Delta] Base "sd3" is no checkpoint: one of None, {BASE}, {TUNED} is'),
        ("LoRAs", "ink", '[Delta] LoRAs "ink" is no LoRA: one of None, moxin, lineart is'),
        ("LoRAs", "moxin:x", "LoRA pick 'moxin:x' has weight 'x': a number is needed"),
    ],
)
def test_a_wrong_axis_value_is_refused_with_those_that_are_allowed(webui, axis, value, sentence):
    with pytest.raises(SettingError) as error:
        webui.cells(SimpleNamespace(), axis, value)
    assert str(error.value) == sentence


@pytest.mark.parametrize(("axis", "text"), [("Adapted", "moxin-tuned, None"), ("LoRAs", '"moxin:0.8, lineart", None')])
def test_values_with_short_names_and_recipes_are_allowed(webui, axis, text):
    assert len(webui.cells(SimpleNamespace(), axis, text)) == 2


def test_long_lists_are_cut_in_errors(webui):
    assert webui.hosts("xyz_axes").listed([str(i) for i in range(14)]).endswith("10, 11 and 2 more is")


def test_schema_and_status_are_served_and_axes_are_there_without_a_user_interface(webui):
    webui.scripts.load_scripts(SCRIPTS)
    guard, answers, guards = [object()], {}, []

    def add_api_route(path, answer, methods, dependencies):
        answers[path] = answer
        guards.append(dependencies)

    options = SimpleNamespace(path="/sdapi/v1/options", dependencies=guard)
    webui.callbacks.call("app_started", None, SimpleNamespace(routes=[options], add_api_route=add_api_route))
    assert answers["/delta-sampling/schema"]() == schema()
    assert answers["/delta-sampling/status"]() == {
        "version": __version__,
        "host": "stand-in",
        "status": ["nothing is loaded"],
    }
    assert guards == [guard, guard]
    assert webui.axis("Lambda")


def test_without_the_webuis_api_nothing_is_served(webui):
    webui.scripts.load_scripts(SCRIPTS)
    webui.callbacks.call("app_started", None, SimpleNamespace(routes=[]))
    assert webui.axis("Lambda")


def test_the_script_imports_no_torch():
    """Runs in a new process, since pytest's has imported torch."""
    code = f"""
import sys
sys.path[:0] = [{str(STAND_IN / "webui")!r}, {str(ROOT)!r}]
from tests.support.recorded_gradio import use_recorded_gradio
use_recorded_gradio()
from tests.support.stand_in_host import use_stand_in_host
use_stand_in_host()
from modules import scripts
scripts.load_scripts({SCRIPTS!r})
print([name for name in ("torch", "numpy", "safetensors", "transformers") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_installing_says_nothing_where_all_is_there_and_one_sentence_elsewhere():
    command = [sys.executable, str(ROOT / "install.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
    bare = [sys.executable, "-S", "-I", str(ROOT / "install.py")]
    said = subprocess.run(bare, capture_output=True, text=True, check=True).stdout
    assert said.startswith("Delta Sampling needs torch and safetensors and transformers") and said.count("\n") == 1


def test_the_drawing_says_in_words_what_it_shows():
    assert 'aria-label="lambda 2 from 0% to 100% of the steps"' in draw_lambda(2, 0, 1, "constant", 1, 1)
    curve = draw_lambda(2, 0.1, 0.5, "sigmoid", 0.2, 1)
    assert 'aria-label="lambda 0.4 to 2, sigmoid, from 10% to 50% of the steps"' in curve


def test_the_drawing_ends_its_axis_above_lambda():
    for value, top in ((0, "1"), (1, "1"), (1.5, "2"), (4, "5"), (7, "10")):
        assert f'text-anchor="end">{top}</text>' in draw_lambda(value, 0, 1, "constant", 1, 1)


def test_the_drawing_takes_what_widgets_give_while_somebody_types():
    assert "lambda 10 from" in draw_lambda(12, 0, 1, "constant", 1, 1)
    assert "a number is missing" in draw_lambda(None, 0, 1, "constant", 1, 1)
    assert "start (0.5) must not come after end (0.2)" in draw_lambda(1, 0.5, 0.2, "constant", 1, 1)
    wrong = draw_lambda(1, 0, 1, "<wave>", 1, 1)
    assert "curve must be one of" in wrong and "<wave>" not in wrong


def test_as_many_units_are_shown_as_the_settings_say(webui):
    webui.shared.opts.data["delta_sampling_units"] = 1
    runner = webui.runner()
    assert len(runner.inputs) == len(SETTINGS) + len(UNIT_FIELDS)
    request = Request(True, units=(Unit(True, model="edges"), Unit(True, model="depth")))
    assert read(runner, restored(runner, request.infotext())).units == request.units[:1]
    assert webui.said == ["The picture has 2 units of Delta Sampling, and 1 are shown: see Settings"]
    webui.shared.opts.data["delta_sampling_units"] = "many"
    assert len(webui.runner().inputs) == len(SETTINGS) + 3 * len(UNIT_FIELDS)


def test_a_picture_switches_units_off_that_it_did_not_have_and_keeps_what_is_in_them(webui):
    runner = webui.runner()
    values = restored(runner, Request(True, units=(Unit(), Unit(True, model="depth"))).infotext())
    enabled = [
        values[widget] for widget in runner.inputs if widget.elem_id.endswith("_enabled") and "unit" in widget.elem_id
    ]
    assert enabled == [False, True, False]
    model = [values[widget] for widget in runner.inputs if widget.elem_id.endswith("_model")]
    assert model == [None, "depth", None]


def test_a_map_is_shown_or_what_is_wrong_with_it(webui):
    from PIL import Image

    shown = webui.hosts("unit_box").preview_map
    values = [widget.value for widget in webui.runner().inputs[len(SETTINGS) :][: len(UNIT_FIELDS)]]
    assert shown(2, *values) == (None, "<div>Put a picture in to see its map</div>")
    values[1], values[3] = Image.new("L", (2, 2), 55), "canny"
    made, said = shown(2, *values)
    assert made.getpixel((0, 0)) == 200 and said == ""
    values[3] = "depth_midas"
    assert shown(2, *values) == (None, "<div>The preprocessor depth_midas of unit 2 failed</div>")


def test_axes_of_units_have_their_limits_and_lists(webui):
    assert webui.axis("Unit model").choices() == ["None", "control_v11p_sd15_canny", "ip-adapter_sd15"]
    with pytest.raises(SettingError, match='Unit weight "3" is not allowed: a number from 0 to 2 is'):
        webui.cells(SimpleNamespace(), "Unit weight", "3")
    with pytest.raises(SettingError, match='Unit model "depth" is not allowed: one of None'):
        webui.cells(SimpleNamespace(), "Unit model", "depth")
    (cell,) = webui.cells(SimpleNamespace(), "Unit model", "None")
    assert cell.delta_sampling_axes == {"enabled": True, "unit_model": ""}
