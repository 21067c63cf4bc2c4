"""Units: ControlNets, T2I-Adapters and IP-Adapters with their pictures, as the accordion and the API give them.

A unit's recipe is one line that people write and read, ``canny@control_v11p_sd15_canny:0.8:end=0.6``: what
makes the map, if anything does, then the model, its weight, and options.  It says nothing of the picture.
Importing this module imports neither torch nor an image library.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lib_delta.core.strength import PROGRESS_TOLERANCE
from lib_delta.errors import SettingError, shortened, shown
from lib_delta.request.lora_recipe import read_number, split, unquoted, written

# Those of lib_delta.controls, which needs torch.
MODES = ("balanced", "prompt", "control")
RESIZES = ("just resize", "crop and resize", "resize and fill")
WEIGHT_TYPES = (
    *("linear", "ease in", "ease out", "ease in-out", "reverse in-out"),
    *("weak input", "weak middle", "weak output", "strong middle"),
)
MAX_UNIT_WEIGHT = 2
LARGEST_RESOLUTION = 4096
PREPROCESSOR_DEFAULT = -1  # as in ControlNet's API, what the preprocessor has of its own
OFF = "off"  # the recipe of a unit that is off and stands before another
RECIPE_OPTIONS = "start=share, end=share, mode=, resize=, perfect=yes, res=pixels, a=, b=, type="
# How ControlNet's API calls and writes things, in its order where it takes numbers.
_KEYS = {
    "module": "preprocessor",
    "input_image": "image",
    "guidance_start": "start",
    "guidance_end": "end",
    "guidance": "end",
    "control_mode": "mode",
    "resize_mode": "resize",
    "processor_res": "resolution",
}
_MODES = {
    "Balanced": "balanced",
    "My prompt is more important": "prompt",
    "ControlNet is more important": "control",
}
_RESIZES = {
    "Just Resize": "just resize",
    "Crop and Resize": "crop and resize",
    "Resize and Fill": "resize and fill",
    "Scale to Fit (Inner Fit)": "crop and resize",
    "Inner Fit (Scale to Fit)": "crop and resize",
    "Envelope (Outer Fit)": "resize and fill",
    "Outer Fit (Shrink to Fit)": "resize and fill",
}
_WITHOUT_MEANING = ("low_vram", "lowvram", "save_detected_map")  # here: taken, and left alone
_NUMERIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Unit:
    """One model with its picture, or with several: those of an IP-Adapter are seen together, maps go by image.

    ``image`` is what a widget or the API gave: an image, a path, base64, or a list of these; ``images`` are more of
    them.  Where neither has any, img2img's own picture is meant.  ``start`` and ``end`` are shares of the run;
    ``resolution`` is what the preprocessor works at, unless ``pixel_perfect`` finds it.  The order is that of the
    widgets.
    """

    enabled: bool = False
    image: Any = field(default=None, compare=False, repr=False)
    model: str = ""
    preprocessor: str = ""
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = MODES[0]
    resize: str = RESIZES[1]
    pixel_perfect: bool = False
    resolution: int = PREPROCESSOR_DEFAULT
    threshold_a: float = PREPROCESSOR_DEFAULT
    threshold_b: float = PREPROCESSOR_DEFAULT
    weight_type: str = WEIGHT_TYPES[0]
    images: Any = field(default=(), compare=False, repr=False)

    @property
    def pictures(self) -> list[Any]:
        """What it has been given to look at, one after another."""
        listed = (given if isinstance(given, (list, tuple)) else [given] for given in (self.image, self.images))
        return [picture for part in listed for picture in part if picture is not None]

    @property
    def has_effect(self) -> bool:
        """Whether it adds anything at some point of the run."""
        return self.enabled and self.weight != 0

    def is_active(self, progress: float) -> bool:
        """Tell whether it counts at a point of the run."""
        return self.has_effect and self.start - PROGRESS_TOLERANCE <= progress <= self.end + PROGRESS_TOLERANCE

    def check(self, number: int) -> None:
        """Raise :class:`SettingError` for a value that is not allowed, in a unit that is on; counted from 1."""
        if not self.enabled:
            return
        for name, (needed, good) in _ALLOWED.items():
            value = getattr(self, name)
            if not good(value):
                given = shortened(json.dumps(value, default=str))
                raise SettingError(f"Delta Sampling's unit {number} has {name} {given}: {needed} is needed")
        if self.start > self.end:
            raise SettingError(
                f"Delta Sampling's unit {number} is to count from {self.start:g} to {self.end:g}: "
                "two shares of the run from 0 to 1 are needed, the earlier first"
            )

    def __str__(self) -> str:
        if not self.enabled:
            return OFF
        options = [(key, getattr(self, name)) for key, name in _OPTIONS.items()]
        defaults = {f.name: f.default for f in fields(self)}
        stated = [f"{key}={_written_option(value)}" for key, value in options if value != defaults[_OPTIONS[key]]]
        weight = [written(self.weight)] if self.weight != 1 or stated else []
        made_by = f"{_name(self.preprocessor)}@" if self.preprocessor else ""
        return ":".join([made_by + _name(self.model), *weight, *stated])


_OPTIONS = {
    "start": "start",
    "end": "end",
    "mode": "mode",
    "resize": "resize",
    "perfect": "pixel_perfect",
    "res": "resolution",
    "a": "threshold_a",
    "b": "threshold_b",
    "type": "weight_type",
}


def _number_rule(low: float, high: float = math.inf, own: bool = False) -> tuple[str, Any]:
    def good(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return number and (low <= value <= high or (own and value == PREPROCESSOR_DEFAULT))

    needed = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number from {low:g} on"
    return f"{needed}, or {PREPROCESSOR_DEFAULT} for its own," if own else needed, good


def _one_of(choices: Sequence[str]) -> tuple[str, Any]:
    return f"one of {', '.join(choices)}", lambda value: value in choices


_NAME_RULE = "a name", lambda value: isinstance(value, str)
_ALLOWED: dict[str, tuple[str, Any]] = {
    "model": _NAME_RULE,
    "preprocessor": _NAME_RULE,
    "weight": _number_rule(0, MAX_UNIT_WEIGHT),
    "start": _number_rule(0, 1),
    "end": _number_rule(0, 1),
    "mode": _one_of(MODES),
    "resize": _one_of(RESIZES),
    "pixel_perfect": ("true or false", lambda value: isinstance(value, bool)),
    "resolution": _number_rule(64, LARGEST_RESOLUTION, own=True),
    "threshold_a": _number_rule(0, own=True),
    "threshold_b": _number_rule(0, own=True),
    "weight_type": _one_of(WEIGHT_TYPES),
}
UNIT_FIELDS = tuple(f.name for f in fields(Unit))
RECIPE_FIELDS = tuple(name for name in UNIT_FIELDS if name not in ("image", "images"))  # what a recipe can tell


def format_units(units: Sequence[Unit]) -> str:
    """Write units as :func:`parse_units` reads them; those after the last that is on are left out."""
    last = max((i for i, unit in enumerate(units) if unit.enabled), default=-1)
    return ", ".join(map(str, units[: last + 1]))


def parse_units(recipe: str) -> tuple[Unit, ...]:
    """Read a line of recipes between commas.  Raises :class:`SettingError` that quotes what cannot be read."""
    return tuple(parse_unit(item) for item in map(str.strip, split(recipe, ",\n")) if item)


def parse_unit(text: str) -> Unit:
    """Read one recipe."""
    text = text.strip()
    if text == OFF:
        return Unit()
    head, *rest = split(text, ":")
    names = split(head, "@")
    if len(names) > 2 or not names[-1].strip():
        raise SettingError(f"unit {shown(text)} has no name of a model: preprocessor@MODEL:weight is needed")
    if _NUMERIC.fullmatch(names[-1].strip()):
        raise SettingError(
            f"unit {shown(text)} has a number for a model: write 0.8 with a point, or a name that is one in quotes"
        )
    *made_by, model = (unquoted(name.strip()) for name in names)
    values: dict[str, Any] = {}
    for part in rest:
        key, _, value = part.strip().partition("=") if "=" in part else ("", "", part.strip())
        name = _OPTIONS.get(key) if key else "weight"
        if name is None or name in values:
            raise SettingError(
                f"unit {shown(text)} cannot be read at {shown(part)}: "
                f"preprocessor@MODEL:weight is needed, and {RECIPE_OPTIONS}"
            )
        values[name] = _option_value(name, value.strip(), text)
    return Unit(enabled=True, model=model, preprocessor=made_by[0] if made_by else "", **values)


def _option_value(name: str, value: str, text: str) -> Any:
    if name in ("mode", "resize", "weight_type"):
        choices = _ALLOWED[name]
        if not choices[1](value):
            raise SettingError(f"unit {shown(text)} has {name} {shown(value)}: {choices[0]} is needed")
        return value
    if name == "pixel_perfect":
        if value not in ("yes", "no"):
            raise SettingError(f"unit {shown(text)} has perfect={shortened(value)}: yes or no is needed")
        return value == "yes"
    number = read_number(value, f"unit {shown(text)} has {name}")
    return int(number) if name == "resolution" and number == int(number) else number


def _written_option(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return written(value) if isinstance(value, (int, float)) else str(value)


def _name(name: str) -> str:
    """Write a name, between quotes where it could be read as something else."""
    special = re.search(r'[@,:"\n\\]', name) or _NUMERIC.fullmatch(name) or name in ("", OFF)
    return json.dumps(name, ensure_ascii=False) if special or name != name.strip() else name


def read_unit(given: Any, number: int) -> Unit:
    """Read what an API call has for a unit: a recipe, or a dictionary with the keys of ControlNet's API or ours.

    In the latter a recipe may stand for what no other key says.  A unit that does not say whether it is on is on.
    Raises :class:`SettingError` for keys that are not known.
    """
    if isinstance(given, Unit):
        return given
    if isinstance(given, str):
        return parse_unit(given)
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise SettingError(f"Delta Sampling's unit {number} is a {kind}: a dictionary or a recipe is needed")
    recipe = given.get("recipe", "")
    written_out = parse_unit(recipe) if recipe and isinstance(recipe, str) else Unit(enabled=True)
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = _KEYS.get(key, key)
        if key in ("recipe", *_WITHOUT_MEANING) or (key == "mask" and value is None):
            continue
        if name not in UNIT_FIELDS:
            near = difflib.get_close_matches(str(key), (*UNIT_FIELDS, *_KEYS), 1)
            hint = f": is {near[0]!r} meant?" if near else f", only {', '.join(UNIT_FIELDS)}"
            raise SettingError(f"Delta Sampling's unit {number} has no {shown(key)}{hint}")
        values[name] = value
    return replace(written_out, **{name: plain_value(name, value) for name, value in values.items()})


def plain_value(name: str, value: Any) -> Any:
    """Turn what widgets and JSON give for a field into its own type, where nothing is lost."""
    if name in ("model", "preprocessor"):
        return "" if value is None or (isinstance(value, str) and value.lower() == "none") else value
    if name == "mode":
        return _by_name_or_number(value, _MODES, MODES)
    if name == "resize":
        return _by_name_or_number(value, _RESIZES, RESIZES)
    if name == "image" and isinstance(value, Mapping) and value.get("mask") is None:  # a form of ControlNet's API
        return value.get("image")
    if name == "images":
        return () if value is None else tuple(value) if isinstance(value, list) else value
    if name in ("weight", "start", "end", "threshold_a", "threshold_b") and type(value) is int:
        return float(value)
    if name == "resolution" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _by_name_or_number(value: Any, names: Mapping[str, str], choices: Sequence[str]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return choices[value]
    return names.get(value, value) if isinstance(value, str) else value
