"""The request of a batch: the accordion's settings, its prompts' tags, and the values of an XYZ plot's axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from modules import processing

from lib_delta.errors import DeltaError
from lib_delta.hosts.control_units.units import UNIT_AXES, with_unit_axes
from lib_delta.hosts.generation import prompt_tags
from lib_delta.hosts.generation.state import axes_of
from lib_delta.hosts.settings import option
from lib_delta.request.lora_recipe import format_picks
from lib_delta.request.passes import Passes
from lib_delta.request.request import Request
from lib_delta.request.setting_choices import NONE

LORA_WEIGHT_AXIS = "lora_weight"
# Axes whose cells may be left with no adaptation.
ADAPTATION_AXES = frozenset({"loras", "adapted", *UNIT_AXES})


def read_passes(p: Any, accordion: Request) -> Passes | DeltaError:
    """Return the requests of a batch's passes, or the error in its tags or axes."""
    axes = axes_of(p)

    def read(tags: list[list[str]]) -> Request:
        if axes.get("strength") == 0:
            return accordion
        request = _with_axes(accordion.with_tags(tags), axes)
        if request.wanted and not request.base:
            request = replace(request, base=_default_base())
        if isinstance(p, processing.StableDiffusionProcessingImg2Img):
            request = replace(request, hires="both")  # img2img has one pass, whatever was sent over from txt2img
        return request

    try:
        return prompt_tags.passes_of(p, read)
    except DeltaError as error:
        return error


def has_adaptation(passes: Passes) -> bool:
    """Return whether anything makes the adapted model differ from the base."""
    return any(r.wanted and (r.picks() or r.always_differs or r.has_units) for r in (passes.first, passes.hires))


def leaves_out_adaptation(p: Any, passes: Passes) -> bool:
    """Return whether a cell of an XYZ plot has no adaptation because of the plot's axes."""
    return bool(ADAPTATION_AXES & axes_of(p).keys()) and not has_adaptation(passes)


def request_fields(axes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of those axes that are fields of :class:`Request`."""
    return {name: value for name, value in axes.items() if name not in (LORA_WEIGHT_AXIS, *UNIT_AXES)}


def reading_error(error: Exception) -> DeltaError:
    """Return the error that tells the user why a request cannot be read."""
    from lib_delta.runtime.side_model import user_error

    fault = user_error(error, "reading the settings of Delta Sampling")
    if fault is not error:
        fault.__cause__ = error
    return fault


def _with_axes(request: Request, axes: Mapping[str, Any]) -> Request:
    """Return a request with the values of an XYZ cell, which enables the delta."""
    if not axes:
        return request
    request = with_unit_axes(replace(request, **{"enabled": True, **request_fields(axes)}), axes)
    weight = axes.get(LORA_WEIGHT_AXIS)
    if weight is None or not request.wanted:
        return request
    return replace(request, loras=format_picks([replace(pick, weight=float(weight)) for pick in request.picks()]))


def _default_base() -> str:
    choice = option("base", NONE)
    return "" if choice in (None, NONE) else str(choice)
