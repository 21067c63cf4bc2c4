"""Units: recipes, and the values of the accordion and of API calls."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib_delta.errors import SettingError
from lib_delta.request import control_unit
from lib_delta.request.control_unit import Unit, format_units, parse_units, read_unit
from lib_delta.request.fields import SETTINGS, UNIT_FIELDS
from lib_delta.request.infotext import from_infotext
from lib_delta.request.request import Request
from lib_delta.request.schema import schema
from lib_delta.request.setting_choices import MODES, RESIZES, WEIGHT_TYPES

CANNY = Unit(enabled=True, model="control_v11p_sd15_canny", preprocessor="canny", weight=0.8, end=0.6)


def test_recipes_are_parsed_as_people_write_them() -> None:
    assert parse_units("canny@control_v11p_sd15_canny:0.8:end=0.6") == (CANNY,)
    assert parse_units("depth, off, \n ip-adapter_sd15 : 0.5 : type=ease in") == (
        Unit(enabled=True, model="depth"),
        Unit(),
        Unit(enabled=True, model="ip-adapter_sd15", weight=0.5, weight_type="ease in"),
    )
    assert parse_units("") == ()


def test_recipes_are_as_short_as_possible() -> None:
    assert format_units([Unit(enabled=True, model="depth"), Unit(), CANNY, Unit()]) == f"depth, off, {CANNY}"
    assert str(CANNY) == "canny@control_v11p_sd15_canny:0.8:end=0.6"
    assert format_units([Unit(model="depth"), Unit()]) == ""


NAMES = st.text(max_size=12).map(str.strip)
SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
THRESHOLDS = st.just(-1.0) | st.floats(0, 1e6)
UNITS = st.builds(
    lambda shares, **values: Unit(enabled=True, start=shares[0], end=shares[1], **values),
    SHARES,
    model=NAMES,
    preprocessor=NAMES,
    weight=st.floats(0, 2),
    mode=st.sampled_from(MODES),
    resize=st.sampled_from(RESIZES),
    pixel_perfect=st.booleans(),
    resolution=st.just(-1) | st.integers(64, 4096),
    threshold_a=THRESHOLDS,
    threshold_b=THRESHOLDS,
    weight_type=st.sampled_from(WEIGHT_TYPES),
)


@settings(deadline=None)
@given(st.lists(UNITS | st.just(Unit()), max_size=4))
@example([Unit(enabled=True, model="off"), Unit(), Unit(enabled=True, model="a@b, c:d", preprocessor='say "x"')])
@example([Unit(enabled=True, model="0.8"), Unit(enabled=True, preprocessor="canny"), Unit(enabled=True, model="\\")])
def test_recipes_round_trip_exactly(given_units: list[Unit]) -> None:
    parsed = list(parse_units(format_units(given_units)))
    while given_units and not given_units[-1].enabled:
        given_units.pop()
    assert parsed == given_units


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("canny@", "unit 'canny@' has no name of a model"),
        ("a@b@c", "has no name of a model"),
        ("canny@a:x", "unit 'canny@a:x' has weight 'x': a number is needed"),
        ("a:1:2", "cannot be read at '2'"),
        ("a:1:xx=2", "cannot be read at 'xx=2'"),
        ("a:1:mode=strong", "has mode 'strong': one of balanced, prompt, control is needed"),
        ("a:1:perfect=maybe", "has perfect=maybe: yes or no is needed"),
        ("canny@a:0,8", "unit '8' has a number for a model: write 0.8 with a point"),
    ],
)
def test_errors_quote_the_invalid_part(recipe: str, sentence: str) -> None:
    with pytest.raises(SettingError) as error:
        parse_units(recipe)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weight": 3}, "unit 2 has weight 3: a number from 0 to 2 is needed"),
        ({"weight": None}, "unit 2 has weight null"),
        ({"start": 0.8, "end": 0.2}, "unit 2 has start 0.8 and end 0.2"),
        ({"mode": "strong"}, 'unit 2 has mode "strong"'),
        ({"resolution": 8}, "unit 2 has resolution 8: a number from 64 to 4096, or -1 for the"),
        ({"weight_type": 7}, "unit 2 has weight_type 7"),
        ({"pixel_perfect": "yes"}, 'unit 2 has pixel_perfect "yes": true or false is needed'),
    ],
)
def test_errors_name_the_unit_unless_it_is_off(change: dict[str, Any], sentence: str) -> None:
    wrong = replace(CANNY, **change)
    with pytest.raises(SettingError) as error:
        Request(enabled=True, units=(CANNY, wrong))
    assert sentence in str(error.value)
    assert Request(enabled=True, units=(CANNY, replace(wrong, enabled=False))).has_units
    assert not Request(units=(wrong,)).wanted


def test_units_accept_the_keys_and_values_of_controlnets_api() -> None:
    controlnet = {
        "enabled": True,
        "image": {"image": "aGk=", "mask": None},
        "module": "canny",
        "model": "control_v11p_sd15_canny [d14c016b]",
        "weight": 1,
        "guidance_start": 0.1,
        "guidance_end": 0.9,
        "control_mode": "ControlNet is more important",
        "resize_mode": "Scale to Fit (Inner Fit)",
        "processor_res": 768,
        "threshold_a": 64,
        "low_vram": False,
    }
    unit = read_unit(controlnet, 1)
    expected = Unit(
        True, None, controlnet["model"], "canny", 1.0, 0.1, 0.9, "control", "crop and resize", False, 768, 64.0
    )
    assert unit == expected and unit.image == "aGk="
    assert read_unit({"model": "a", "control_mode": 1, "resize_mode": 0, "module": "none"}, 1) == Unit(
        True, model="a", mode="prompt", resize="just resize"
    )
    assert read_unit({"model": "None", "input_image": "x"}, 1).image == "x"


@pytest.mark.parametrize(
    ("given_units", "sentence"),
    [
        ([{"wieght": 1}], "unit 1 has no 'wieght': is 'weight' meant?"),
        ([CANNY.__dict__, {"mask": "aGk="}], "unit 2 has no 'mask'"),
        ([7], "unit 1 is a int: a dictionary or a recipe is needed"),
        (7, "'units' must be a list of dictionaries and recipes, not 7"),
        ("canny@", "has no name of a model"),
    ],
)
def test_wrong_units_of_an_api_call_raise_one_sentence(given_units: Any, sentence: str) -> None:
    with pytest.raises(SettingError) as error:
        Request.from_arguments([{"units": given_units}])
    assert sentence in str(error.value)
    assert not Request.from_arguments([{"enabled": False, "units": given_units}]).wanted


def test_units_of_an_api_call_are_recipes_or_dictionaries() -> None:
    request = Request.from_arguments([{"units": [str(CANNY), {"model": "depth", "image": "a.png"}]}])
    assert request.units == (CANNY, Unit(enabled=True, model="depth")) and request.units[1].image == "a.png"
    assert Request.from_arguments([{"units": str(CANNY)}]).units == (CANNY,)
    described = schema()["properties"]["units"]["items"]["anyOf"][0]["properties"]
    assert set(described) == {*UNIT_FIELDS, "recipe"}
    both = {"recipe": str(CANNY), "image": "a.png", "weight": 0.5}
    assert read_unit(both, 1) == replace(CANNY, weight=0.5) and read_unit(both, 1).image == "a.png"
    with pytest.raises(SettingError, match="has no name of a model"):
        read_unit({"recipe": "canny@"}, 1)


def test_the_units_widgets_follow_the_settings_unit_by_unit() -> None:
    values = [f.default for f in SETTINGS]
    values[0] = True
    row = [True, "picture", "depth", "None", 1, 0, 0.5, "prompt", "just resize", True, 512.0, -1, -1, "linear", ["b"]]
    request = Request.from_arguments([*values, False, *row[1:], *row, False, *row[1:]])
    second, first = request.units
    assert first == Unit(True, None, "depth", "", 1.0, 0.0, 0.5, "prompt", "just resize", True, 512)
    assert first.pictures == ["picture", "b"] and not second.enabled


def test_infotext_restores_the_units() -> None:
    request = Request(enabled=True, units=(Unit(), CANNY, Unit()))
    values = request.infotext()
    assert values["Delta units"] == "off, canny@control_v11p_sd15_canny:0.8:end=0.6"
    assert from_infotext(values, "units") == (Unit(), CANNY)
    assert from_infotext({"Delta lambda": "1"}, "units") == ()
    assert from_infotext({"Delta units": "a:b:c"}, "units") == ()
    assert "Delta units" not in Request(enabled=True, units=(replace(CANNY, weight=0.0),)).infotext()


def test_units_are_active_in_their_part_of_the_run() -> None:
    request = Request(enabled=True, units=(replace(CANNY, start=0.2),))
    assert [request.differs_at(progress) for progress in (0, 0.2, 0.6, 0.7)] == [False, True, True, False]
    assert request.has_units and not request.always_differs
    assert not Request(enabled=True, units=(replace(CANNY, weight=0.0),)).differs_at(0.4)


def test_importing_units_imports_no_torch() -> None:
    code = "import sys, lib_delta.request.control_unit; sys.exit(bool({'torch', 'numpy', 'PIL'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert control_unit.__name__ == "lib_delta.request.control_unit"
