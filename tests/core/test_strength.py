"""Lambda over the run."""

from __future__ import annotations

import math

import pytest

from lib_delta.core.strength import Strength
from lib_delta.errors import SettingError


def test_constant_holds_over_the_whole_run() -> None:
    assert [Strength(2.5).at(p) for p in (0, 0.3, 1)] == [2.5, 2.5, 2.5]


def test_outside_its_range_it_is_exactly_zero() -> None:
    strength = Strength(1.0, start=0.25, end=0.75)
    assert [strength.at(p) for p in (0, 0.2499, 0.25, 0.75, 0.7501, 1)] == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("curve", ["linear", "cosine", "sigmoid"])
def test_curves_lead_from_first_to_last(curve: str) -> None:
    strength = Strength(4.0, 0.2, 0.6, curve, first=0.25, last=1.0)
    values = [strength.at(0.2 + 0.4 * i / 20) for i in range(21)]
    assert values[0] == pytest.approx(1.0)
    assert values[10] == pytest.approx(2.5)
    assert values[20] == pytest.approx(4.0)
    assert values == sorted(values)


def test_curves_have_their_names_shapes() -> None:
    def quarter(curve: str) -> float:
        return Strength(1.0, curve=curve, first=0.0).at(0.25)

    assert quarter("linear") == pytest.approx(0.25)
    assert quarter("cosine") == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    # A logistic curve of steepness 10, as often used for guidance, lies below the cosine at a quarter.
    assert quarter("sigmoid") == pytest.approx(1 / (1 + math.exp(2.5)), abs=0.01)


@pytest.mark.parametrize("curve", ["constant", "linear", "cosine", "sigmoid"])
def test_a_range_of_a_single_moment_is_served(curve: str) -> None:
    assert Strength(2.0, 0.5, 0.5, curve).at(0.5) == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value": -0.1}, "lambda must be between 0 and 10"),
        ({"value": 10.5}, "lambda must be between 0 and 10"),
        ({"value": math.nan}, "lambda must be between 0 and 10"),
        ({"start": -0.1}, "start must be between 0 and 1"),
        ({"end": 1.1}, "end must be between 0 and 1"),
        ({"start": 0.6, "end": 0.5}, "start .* must not come after end"),
        ({"first": 2.0}, "curve start must be between 0 and 1"),
        ({"curve": "step"}, "curve must be one of constant, linear, cosine, sigmoid"),
    ],
)
def test_settings_outside_their_limits_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Strength(**settings)
