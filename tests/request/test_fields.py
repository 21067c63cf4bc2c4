"""The field table, and everything that is read from it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from lib_delta.core.strength import covers
from lib_delta.page.tooltips import accordion_tooltips, unit_tooltips
from lib_delta.request import request as request_module
from lib_delta.request.control_unit import Unit
from lib_delta.request.fields import REQUEST_FIELDS, UNIT_FIELDS, Field
from lib_delta.request.passes import Passes
from lib_delta.request.request import Request

ENTRIES = [*REQUEST_FIELDS.values(), *UNIT_FIELDS.values()]


def test_the_tables_have_the_fields_in_the_order_of_positional_arguments() -> None:
    assert [*REQUEST_FIELDS, "units"] == [f.name for f in fields(Request)]
    assert list(UNIT_FIELDS) == [f.name for f in fields(Unit)]


@pytest.mark.parametrize("table", [REQUEST_FIELDS, UNIT_FIELDS])
def test_keys_infotext_labels_and_recipe_options_are_unique(table: dict[str, Field]) -> None:
    for attribute in ("key", "infotext", "recipe"):
        values = [value for field in table.values() if (value := getattr(field, attribute))]
        assert len(values) == len({*values}), attribute


@pytest.mark.parametrize("field", [f for f in ENTRIES if f.name not in ("image", "images")], ids=lambda f: f.name)
def test_defaults_are_allowed_and_plain(field: Field) -> None:
    assert field.allows(field.default) and field.plain(field.default) == field.default


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        (REQUEST_FIELDS["strength"], [0, 10, 0.5], [-0.1, 10.1, float("nan"), True, "1", None]),
        (REQUEST_FIELDS["size"], ["picture", "64", "4096"], ["63", "4097", "64.0", "", 64]),
        (REQUEST_FIELDS["curve"], ["cosine"], ["zigzag", 0]),
        (REQUEST_FIELDS["enabled"], [True], [1, "yes"]),
        (UNIT_FIELDS["resolution"], [64, -1], [63, 0, float("inf")]),
        (UNIT_FIELDS["threshold_a"], [0, 1e9, -1], [-2]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_values_are_checked_by_type_limits_and_choices(field: Field, good: list[Any], bad: list[Any]) -> None:
    assert all(map(field.allows, good)) and not any(map(field.allows, bad))


def test_each_setting_with_a_tooltip_is_in_the_pages_tooltips() -> None:
    assert {name for name, f in REQUEST_FIELDS.items() if f.tooltip} < {*accordion_tooltips()}
    assert {*UNIT_FIELDS} - {"enabled"} < {*unit_tooltips()}


def test_loras_are_parsed_once_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    parse = request_module.parse_picks
    monkeypatch.setattr(request_module, "parse_picks", lambda recipe: (calls.append(recipe), parse(recipe))[1])
    passes = Passes(Request(enabled=True, loras="a:1:end=0.5"), Request(enabled=True, loras="b"))
    for i in range(11):
        assert passes.active(i / 10, hires=False) == (i <= 5, False)
        assert passes.active(i / 10, hires=True) == (False, True)
        assert passes.first.differs_at(i / 10) is (i <= 5)
    assert passes.first.lambda_over_run() is passes.first.lambda_over_run()
    assert calls == ["a:1:end=0.5", "b"]


def test_a_range_includes_its_limits_despite_rounding() -> None:
    assert covers(0.1 + 0.2, 0.6, 0.3) and covers(0, 0.3, 0.1 + 0.2)
    assert not covers(0.3, 0.6, 0.2999) and not covers(0.3, 0.6, 0.6001)


def test_importing_the_table_and_the_tooltips_imports_no_torch() -> None:
    code = "import sys, lib_delta.page.tooltips, lib_delta.request.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
