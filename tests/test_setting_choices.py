"""The choices of requests, which import no torch, equal those of the modules that do."""

from __future__ import annotations

from typing import get_args

from lib_delta.bridges import form_names
from lib_delta.controls.control_map import ResizeMode
from lib_delta.controls.guides import Mode, WeightType
from lib_delta.core.delta_reuse import Quality
from lib_delta.core.strength import Curve
from lib_delta.request.setting_choices import BRIDGES, CURVES, MODES, QUALITIES, RESIZES, WEIGHT_TYPES


def test_the_choices_equal_those_of_the_engine() -> None:
    assert form_names() == BRIDGES
    assert get_args(Curve) == CURVES and get_args(Quality) == QUALITIES
    assert get_args(Mode) == MODES and get_args(ResizeMode) == RESIZES and get_args(WeightType) == WEIGHT_TYPES
