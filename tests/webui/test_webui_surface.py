"""What API callers, pasted pictures and the XYZ plot get: schema, arguments, infotext, axes, status."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest

from lib_delta import __version__
from tests.support.webui.client import SCRIPT, RefusedError, WebUI, decode, skip_without_infotexts
from tests.support.webui.files import Files
from tests.support.webui.results import delta_keys, plot, plot_arguments, status, texts_of, without_hash

TYPES = {"boolean": bool, "number": (int, float), "string": str, "array": list}


# Arguments.


def test_the_schema_describes_the_defaults(webui: WebUI) -> None:
    schema = webui.get("/delta-sampling/schema")
    assert schema["type"] == "object" and schema["additionalProperties"] is False
    for key, about in schema["properties"].items():
        value = about["default"]
        kinds = about["type"] if isinstance(about["type"], list) else [about["type"]]
        assert any(isinstance(value, TYPES[kind]) for kind in kinds), key
        assert about.get("minimum", value) <= value <= about.get("maximum", value), key
        assert value in about.get("enum", [value]), key
        assert about["description"], key


def answer_without_password(webui: WebUI, path: str) -> int:
    try:
        with urllib.request.urlopen(webui.url + path, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_without_a_password_schema_and_status_are_served_if_the_webuis_own_routes_are(webui: WebUI) -> None:
    own = answer_without_password(webui, "/sdapi/v1/options")
    assert own in (200, 401)
    for path in ("schema", "status"):
        assert answer_without_password(webui, f"/delta-sampling/{path}") == own


def test_the_defaults_are_what_missing_keys_mean(webui: WebUI, files: Files) -> None:
    properties = webui.get("/delta-sampling/schema")["properties"]
    defaults = {key: about["default"] for key, about in properties.items()}
    chosen = {"base": files.sd1, "loras": files.lora}
    some, every = webui.generate(chosen), webui.generate({**defaults, **chosen})
    assert np.array_equal(some.pictures, every.pictures)
    assert delta_keys(some.infotexts[0]) == delta_keys(every.infotexts[0])


SETTINGS = {
    "enabled": True,
    "lambda": 0.75,
    "start": 0.1,
    "end": 0.9,
    "curve": "linear",
    "curve_start": 1.0,
    "curve_end": 0.25,
    "prompt": 'a boat, "red": 1',
    "negative_prompt": "green",
    "adapted_prompt": "a ship",
    "hires": "first pass",
    "cfg": 3.5,
    "size": "512",
    "bridge": "published",
}
TEXTS = {
    "Delta lambda": "0.75",
    "Delta start": "0.1",
    "Delta end": "0.9",
    "Delta curve": "linear",
    "Delta curve end": "0.25",
    "Delta prompt": 'a boat, "red": 1',
    "Delta negative prompt": "green",
    "Delta adapted prompt": "a ship",
    "Delta hires": "first pass",
    "Delta CFG": "3.5",
    "Delta size": "512",
    "Delta bridge": "published",
}


def all_settings(files: Files) -> dict[str, Any]:
    return {**SETTINGS, "base": files.sd1, "adapted": files.tuned, "loras": f"{files.lora}:0.5:te=0.25"}


def all_texts(files: Files) -> dict[str, str]:
    names = {"Delta base": files.sd1, "Delta adapted": files.tuned, "Delta LoRAs": f"{files.lora}:0.5:te=0.25"}
    return {**TEXTS, **names}


def test_positional_arguments_are_the_named_ones(webui: WebUI, files: Files) -> None:
    settings, order = all_settings(files), webui.get("/delta-sampling/schema")["properties"]
    order.pop("units")  # of which each has a place for every field
    arguments = {SCRIPT: {"args": [settings.get(key, about["default"]) for key, about in order.items()]}}
    named, by_position = webui.generate(settings), webui.generate(alwayson_scripts=arguments)
    assert np.array_equal(named.pictures, by_position.pictures)
    assert delta_keys(named.infotexts[0]) == delta_keys(by_position.infotexts[0]) != {}


def test_the_first_positional_arguments_are_enough(webui: WebUI, files: Files) -> None:
    first = {SCRIPT: {"args": [True, 0]}}
    assert np.array_equal(webui.generate(alwayson_scripts=first).pictures, webui.generate().pictures)


def test_the_infotext_has_what_is_not_the_default(webui: WebUI, files: Files) -> None:
    simple = texts_of(webui.generate(files.delta()).infotexts[0])
    told = {"Delta base": files.sd1, "Delta LoRAs": files.lora, "Delta bridge": "stitched"}
    assert simple == {"Delta lambda": "1", **told}
    assert texts_of(webui.generate(all_settings(files)).infotexts[0]) == all_texts(files)


def test_a_saved_picture_gives_the_settings_back(webui: WebUI, files: Files) -> None:
    body = {**webui.defaults, "alwayson_scripts": {SCRIPT: {"args": [all_settings(files)]}}}
    picture = webui.post("/sdapi/v1/txt2img", body)["images"][0]
    answer = webui.post("/sdapi/v1/png-info", {"image": picture})
    read = {key: value for key, value in answer["parameters"].items() if key.startswith("Delta ")}
    read.pop("Delta LoRA hashes", None)
    assert read.pop("Delta version") == __version__
    assert {key: without_hash(str(value)) for key, value in read.items()} == all_texts(files)


def test_an_infotext_makes_the_same_picture_again(webui: WebUI, files: Files) -> None:
    """The API fills what is not given from ``infotext``, as pasting does in the browser."""
    first = webui.generate(all_settings(files))
    body = {"infotext": first.infotexts[0], "override_settings_restore_afterwards": True}
    skip_without_infotexts(webui)
    answer = webui.post("/sdapi/v1/txt2img", body)
    again = np.asarray(decode(answer["images"][0]).convert("RGB"), int)
    assert texts_of(json.loads(answer["info"])["infotexts"][0]) == all_texts(files)
    assert np.array_equal(again, first.pictures[0])


def test_a_plot_over_lambda_and_lora_weight(webui: WebUI, files: Files) -> None:
    cells = plot(webui, files.delta(), {"[Delta] Lambda": "0-1 [3]", "[Delta] LoRA weight": "0.5, 1"})
    loras = (f"{files.lora}:0.5", files.lora)
    wanted = [(strength, lora) for lora in loras for strength in ("0", "0.5", "1")]
    plain = webui.generate().pictures[0]
    assert len(cells) == len(wanted)
    for cell, (strength, lora) in zip(cells, wanted):
        if strength == "0":
            assert delta_keys(cell.infotext) == {}
            assert np.array_equal(cell.picture, plain)
        else:
            told = {"Delta lambda": strength, "Delta base": files.sd1, "Delta LoRAs": lora, "Delta bridge": "stitched"}
            assert texts_of(cell.infotext) == told
            alone = webui.generate(files.delta(**{"lambda": float(strength), "loras": lora})).pictures[0]
            assert np.array_equal(cell.picture, alone)
    loaded = [line for line in status(webui) if line.startswith(files.sd1)]
    assert len(loaded) == 1


def test_a_plot_over_files_switches_the_delta_on(webui: WebUI, files: Files) -> None:
    axes = {"[Delta] Adapted": f"None, {files.tuned}", "[Delta] LoRAs": f"{files.lora}, {files.unmatched_lora}"}
    cells = plot(webui, {"enabled": False, "base": files.sd1}, axes)
    told = [(t.get("Delta adapted"), t["Delta LoRAs"]) for t in (texts_of(cell.infotext) for cell in cells)]
    loras = (files.lora, files.unmatched_lora)
    assert told == [(adapted, lora) for lora in loras for adapted in (None, files.tuned)]
    assert len({cell.picture.tobytes() for cell in cells}) == 4


def test_an_axis_wins_over_a_tag(webui: WebUI, files: Files) -> None:
    webui.defaults["prompt"] += f"<delta:{files.lora}:1.2>"
    try:
        cells = plot(webui, files.delta(), {"[Delta] Lambda": "0, 0.5, 1"})
    finally:
        webui.defaults["prompt"] = webui.defaults["prompt"].partition("<")[0]
    for cell, strength in zip(cells, (0, 0.5, 1)):
        alone = webui.generate(files.delta(**{"lambda": strength})).pictures[0]
        assert np.array_equal(cell.picture, alone)


def test_impossible_and_empty_cells(webui: WebUI, files: Files) -> None:
    plain = webui.generate().pictures[0]
    cells = plot(webui, files.delta(), {"[Delta] LoRAs": f"None, {files.lora}"})
    assert np.array_equal(cells[0].picture, plain) and delta_keys(cells[1].infotext)["Delta LoRAs"] == files.lora
    cells = plot(webui, files.delta(end=0.5), {"[Delta] Start": "0.9, 0.1"})
    assert "Delta not applied: start (0.9) must not come after end (0.5)" in cells[0].infotext
    assert cells[0].picture.max() == 255 and cells[0].picture.min() < 50, "the sentence stands on the picture"


def test_the_grids_own_text_has_the_recipe(webui: WebUI, files: Files) -> None:
    script = {"script_name": "X/Y/Z plot", "script_args": plot_arguments(webui, {"[Delta] Lambda": "0, 1"})}
    body = {**webui.defaults, **script, "alwayson_scripts": {SCRIPT: {"args": [files.delta()]}}}
    grid, first, *_ = json.loads(webui.post("/sdapi/v1/txt2img", body)["info"])["infotexts"]
    told = {"Delta base": files.sd1, "Delta LoRAs": files.lora, "Delta bridge": "stitched"}
    assert texts_of(grid) == {"Delta lambda": "0", **told}
    assert delta_keys(first) == {}


WRONG_AXES = {
    "lambda": ("[Delta] Lambda", "1, 70", r"\[Delta\] Lambda \"70\" is not allowed: a number from 0 to 10 is"),
    "curve": ("[Delta] Curve", "zigzag", r"\[Delta\] Curve \"zigzag\" is not allowed: one of constant"),
    "base": ("[Delta] Base", "nothing", r"\[Delta\] Base \"nothing\" is no checkpoint"),
    "LoRAs": ("[Delta] LoRAs", "nothing", r"\[Delta\] LoRAs \"nothing\" is no LoRA"),
}


@pytest.mark.parametrize(("axis", "values", "words"), WRONG_AXES.values(), ids=WRONG_AXES)
def test_a_wrong_axis_value_is_refused(webui: WebUI, files: Files, axis: str, values: str, words: str) -> None:
    with pytest.raises(RefusedError) as caught:
        plot(webui, files.delta(), {axis: values})
    assert re.search(words, caught.value.sentence), caught.value.sentence


def test_after_a_plot_nothing_of_it_is_left(webui: WebUI, files: Files) -> None:
    before = webui.generate(files.delta())
    plot(webui, files.delta(), {"[Delta] Lambda": "0.5", "[Delta] End": "0.5"})
    after = webui.generate(files.delta())
    assert np.array_equal(before.pictures, after.pictures)
    assert delta_keys(before.infotexts[0]) == delta_keys(after.infotexts[0])


def test_the_status_names_what_is_loaded_and_what_the_last_run_cost(webui: WebUI, files: Files) -> None:
    webui.generate(files.delta(loras=f"{files.lora}, {files.unmatched_lora}"))
    base, first, second, last = status(webui)
    assert re.match(rf"{files.sd1}\S*: on \S+, \d+ MB \(\w+\)$", base)
    layers = r"\d\d+ layers of the UNet and \d\d+ of the text encoder"
    assert re.match(rf"{files.lora}\S* \(LoRA of rank \d+\) adapts {layers}\.$", first)
    assert re.match(rf"{files.unmatched_lora}\S* .*adapts .*; \d+ of its \d+ keys match no layer\.$", second)
    bridged = r"\(SD 1\.x/2\.x latents: same as the side model's, 8 x 8\)"
    cost = rf"Last run: delta in 4 steps, \d+ passes of the side model, [\d.]+ s {bridged}"
    assert re.match(rf"{cost}; it was (\S+%,? ){{4}}of the picture's estimate$", last), last


def test_without_steps_the_status_says_so(webui: WebUI, files: Files) -> None:
    webui.generate(files.delta(hires="hires pass"))
    why = "the delta is enabled only for the hires pass, and there was none"
    assert status(webui)[-1] == f"Last run: no step had the delta: {why}"


def test_a_plain_run_is_the_last_run(webui: WebUI, files: Files) -> None:
    webui.generate(files.delta())
    webui.generate()
    assert status(webui)[-1] == "Last run: no delta was requested"


@pytest.mark.parametrize(
    "changes", [{"loras": "{}:0"}, {"loras": "{}:1:te=0:lbw=NONE"}, {"loras": "", "adapted": "copy"}]
)
def test_a_delta_of_zero_is_not_claimed(webui: WebUI, files: Files, changes: dict[str, str]) -> None:
    delta = {"base": files.sd1, **changes, "loras": changes["loras"].format(files.lora)}
    if "adapted" in changes:
        delta["adapted"] = files.copy
    got = webui.generate(delta)
    assert np.array_equal(got.pictures, webui.generate().pictures) and delta_keys(got.infotexts[0]) == {}
    webui.generate(delta)
    why = (
        "every LoRA has a weight of 0"
        if changes["loras"].endswith(":0")
        else "the base and the adapted model did not differ"
    )
    assert status(webui)[-1].endswith(why)


TEXTS_THAT_PARSERS_EAT = ('"a cat"', "512x512", "None", " a cat ", '"', "a # b", 'say "x", twice')


@pytest.mark.parametrize("text", TEXTS_THAT_PARSERS_EAT)
def test_side_prompts_come_back_from_pictures_as_they_were(webui: WebUI, files: Files, text: str) -> None:
    first = webui.generate(files.delta(prompt=text))
    skip_without_infotexts(webui)
    body = {"infotext": first.infotexts[0], "override_settings_restore_afterwards": True}
    answer = webui.post("/sdapi/v1/txt2img", body)
    assert json.loads(answer["info"])["infotexts"][0] == first.infotexts[0]
    assert np.array_equal(np.asarray(decode(answer["images"][0]).convert("RGB"), int), first.pictures[0])


def test_models_are_given_back_where_none_are_kept(webui: WebUI, files: Files) -> None:
    kept = webui.generate(files.delta())
    webui.options(delta_sampling_cache=0)
    given_back = webui.generate(files.delta())
    assert status(webui)[0] == "No side model is loaded"
    assert np.array_equal(kept.pictures, given_back.pictures)


def test_unloading_the_main_checkpoint_does_no_harm(webui: WebUI, files: Files) -> None:
    before = webui.generate(files.delta())
    webui.post("/sdapi/v1/unload-checkpoint", {})
    with contextlib.suppress(RefusedError):  # Forge Neo has no such route, and loads when it is needed
        webui.post("/sdapi/v1/reload-checkpoint", {})
    assert np.array_equal(webui.generate(files.delta()).pictures, before.pictures)


def test_only_one_base_is_kept(webui: WebUI, files: Files) -> None:
    for base in (files.sd1, files.tuned):
        webui.generate(files.delta(base=base))
    lines = status(webui)
    assert lines[0].startswith(files.tuned)
    assert sum(" MB " in line for line in lines) == 1


def test_the_delta_is_shown_beside_each_picture_if_the_settings_say_so(webui: WebUI, files: Files) -> None:
    without = webui.generate(files.delta(), batch_size=2)
    webui.options(delta_sampling_show=True)
    try:
        shown, plain = webui.generate(files.delta(), batch_size=2), webui.generate(batch_size=2)
    finally:
        webui.options(delta_sampling_show=False)
    assert len(without.pictures) == len(plain.pictures) == 2 and len(shown.pictures) == 4
    assert np.abs(shown.pictures[:2] - without.pictures).max() <= 2
    assert all(picture.std() > 10 for picture in shown.pictures[2:]), "a map, and not one colour"
    assert all("Delta lambda" in text for text in shown.infotexts)


def test_the_main_prompt_can_stand_in_the_side_models(webui: WebUI, files: Files) -> None:
    whole = webui.generate(files.delta(prompt=f"{webui.defaults['prompt']}, ink"))
    standing = webui.generate(files.delta(prompt="{prompt}, ink"))
    assert np.abs(standing.pictures - whole.pictures).max() <= 2
    assert np.abs(standing.pictures - webui.generate(files.delta()).pictures).max() > 2
