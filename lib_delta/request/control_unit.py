"""Units: ControlNets, T2I-Adapters and IP-Adapters with their pictures, as the accordion and the API give them.

A unit's recipe is a line that people write and read, ``canny@control_v11p_sd15_canny:0.8:end=0.6``: the preprocessor
that makes the map, if any, then the model, its weight, and options.  It leaves the picture out.
Nothing here imports torch or an image library.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lib_delta.core.strength import covers
from lib_delta.errors import SettingError, shortened, shown
from lib_delta.request.fields import RECIPE_FIELDS, UNIT_FIELDS, Field, UnitFields, as_json
from lib_delta.request.lora_recipe import read_number, split, unquoted, written
from lib_delta.request.setting_choices import MODES, RESIZES

OFF = "off"  # the recipe of a unit that is off and precedes another
RECIPE_OPTIONS = "start=share, end=share, mode=, resize=, perfect=yes, res=pixels, a=, b=, type="
# The keys of ControlNet's API, and its values, by the names here.
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
_IGNORED_KEYS = ("low_vram", "lowvram", "save_detected_map")  # keys of ControlNet's API without effect here
_NUMERIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Unit(UnitFields):
    """A control model with one or more pictures.

    An IP-Adapter sees all its pictures together; maps go to the images of a batch, one by one.  ``image`` is a value
    of a widget or of the API: an image, a path, base64, or a list of these; ``images`` holds more of them.  A unit
    without pictures uses img2img's picture.  ``start`` and ``end`` are shares of the run.  ``resolution`` is the
    preprocessor's resolution, which ``pixel_perfect`` computes instead.
    """

    @property
    def pictures(self) -> list[Any]:
        """The pictures of ``image`` and ``images`` in one list."""
        lists = (value if isinstance(value, (list, tuple)) else [value] for value in (self.image, self.images))
        return [picture for pictures in lists for picture in pictures if picture is not None]

    @property
    def has_effect(self) -> bool:
        """Whether it adds anything at some point of the run."""
        return self.enabled and self.weight != 0

    def is_active(self, progress: float) -> bool:
        """Return whether it adds anything at a point of the run."""
        return self.has_effect and covers(self.start, self.end, progress)

    def check(self, number: int) -> None:
        """Raise :class:`SettingError` if the unit is enabled and a value is not allowed; ``number`` starts at 1."""
        if not self.enabled:
            return
        for name in CHECKED_FIELDS:
            value, field = getattr(self, name), UNIT_FIELDS[name]
            if not field.allows(value):
                raise SettingError(
                    f"Delta Sampling's unit {number} has {name} {as_json(value)}: {field.allowed} is needed"
                )
        if self.start > self.end:
            raise SettingError(
                f"Delta Sampling's unit {number} has start {self.start:g} and end {self.end:g}: "
                "two shares of the run from 0 to 1 are needed, the earlier first"
            )

    def __str__(self) -> str:
        """Return the unit's recipe."""
        if not self.enabled:
            return OFF
        values = {field: getattr(self, field.name) for field in _OPTIONS.values()}
        options = [
            f"{field.recipe}={_format_option(value)}" for field, value in values.items() if value != field.default
        ]
        weight = [written(self.weight)] if self.weight != 1 or options else []
        preprocessor = f"{_quoted(self.preprocessor)}@" if self.preprocessor else ""
        return ":".join([preprocessor + _quoted(self.model), *weight, *options])


CHECKED_FIELDS = tuple(name for name in RECIPE_FIELDS if name != "enabled")
_OPTIONS = {field.recipe: field for field in UNIT_FIELDS.values() if field.recipe}


def format_units(units: Sequence[Unit]) -> str:
    """Return the recipes of units for :func:`parse_units`, up to the last that is enabled."""
    last = max((i for i, unit in enumerate(units) if unit.enabled), default=-1)
    return ", ".join(map(str, units[: last + 1]))


def parse_units(recipes: str) -> tuple[Unit, ...]:
    """Parse recipes separated by commas.  Raises :class:`SettingError` that quotes an invalid part."""
    return tuple(parse_unit(recipe) for recipe in map(str.strip, split(recipes, ",\n")) if recipe)


def parse_unit(recipe: str) -> Unit:
    """Parse one recipe."""
    recipe = recipe.strip()
    if recipe == OFF:
        return Unit()
    head, *parts = split(recipe, ":")
    preprocessor, model = _parse_names(head, recipe)
    values: dict[str, Any] = {}
    for part in parts:
        key, _, text = part.strip().partition("=") if "=" in part else ("", "", part.strip())
        field = _OPTIONS.get(key) if key else UNIT_FIELDS["weight"]
        if field is None or field.name in values:
            raise SettingError(
                f"unit {shown(recipe)} cannot be read at {shown(part)}: "
                f"preprocessor@MODEL:weight is needed, and {RECIPE_OPTIONS}"
            )
        values[field.name] = _parse_option(field, text.strip(), recipe)
    return Unit(enabled=True, model=model, preprocessor=preprocessor, **values)


def _parse_names(head: str, recipe: str) -> tuple[str, str]:
    """Return the names of preprocessor (or "") and model in ``preprocessor@MODEL``."""
    names = [name.strip() for name in split(head, "@")]
    if len(names) > 2 or not names[-1]:
        raise SettingError(f"unit {shown(recipe)} has no name of a model: preprocessor@MODEL:weight is needed")
    if _NUMERIC.fullmatch(names[-1]):
        raise SettingError(
            f"unit {shown(recipe)} has a number for a model: write 0.8 with a point, or put a name that is a number "
            "in quotes"
        )
    return unquoted(names[0]) if len(names) == 2 else "", unquoted(names[-1])


def _parse_option(field: Field, text: str, recipe: str) -> Any:
    """Parse an option's value.  Numbers are not checked here: :meth:`Unit.check` does, if the unit is used."""
    if field.choices:
        if not field.allows(text):
            raise SettingError(f"unit {shown(recipe)} has {field.name} {shown(text)}: {field.allowed} is needed")
        return text
    if field.value_type is bool:
        if text not in ("yes", "no"):
            raise SettingError(f"unit {shown(recipe)} has {field.recipe}={shortened(text)}: yes or no is needed")
        return text == "yes"
    return field.plain(read_number(text, f"unit {shown(recipe)} has {field.name}"))


def _format_option(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return written(value) if isinstance(value, (int, float)) else str(value)


def _quoted(name: str) -> str:
    """Return a name as a recipe needs it: in quotes if it could be read as something else."""
    ambiguous = re.search(r'[@,:"\n\\]', name) or _NUMERIC.fullmatch(name) or name in ("", OFF)
    return json.dumps(name, ensure_ascii=False) if ambiguous or name != name.strip() else name


def read_unit(given: Any, number: int) -> Unit:
    """Return the unit that an API call gives: a recipe, or a dictionary with keys of ControlNet's API or ours.

    A dictionary's ``recipe`` sets what no other key sets.  A unit is enabled unless it says otherwise.

    Raises:
        SettingError: A key is unknown.
    """
    if isinstance(given, Unit):
        return given
    if isinstance(given, str):
        return parse_unit(given)
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise SettingError(f"Delta Sampling's unit {number} is a {kind}: a dictionary or a recipe is needed")
    recipe = given.get("recipe", "")
    base = parse_unit(recipe) if recipe and isinstance(recipe, str) else Unit(enabled=True)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if _sets_field(key, value, number):
            name = str(_KEYS.get(key, key))
            values[name] = plain_value(name, value)
    return replace(base, **values)


def _sets_field(key: Any, value: Any, number: int) -> bool:
    """Return whether a key sets a field; raise :class:`SettingError` if it is unknown."""
    if key in ("recipe", *_IGNORED_KEYS) or (key == "mask" and value is None):
        return False
    if _KEYS.get(key, key) not in UNIT_FIELDS:
        close = difflib.get_close_matches(str(key), (*UNIT_FIELDS, *_KEYS), 1)
        hint = f": is {close[0]!r} meant?" if close else f", only {', '.join(UNIT_FIELDS)}"
        raise SettingError(f"Delta Sampling's unit {number} has no {shown(key)}{hint}")
    return True


def plain_value(name: str, value: Any) -> Any:
    """Return a value of a widget or of JSON in the field's type, if that loses nothing, or else as it is."""
    if name in ("model", "preprocessor") and isinstance(value, str) and value.lower() == "none":
        return ""  # ControlNet writes it in lower case
    if name == "mode":
        return _by_name_or_number(value, _MODES, MODES)
    if name == "resize":
        return _by_name_or_number(value, _RESIZES, RESIZES)
    if name == "image" and isinstance(value, Mapping) and value.get("mask") is None:
        return value.get("image")  # ControlNet's API sends an image with its mask
    if name == "images":
        return () if value is None else tuple(value) if isinstance(value, list) else value
    return UNIT_FIELDS[name].plain(value)


def _by_name_or_number(value: Any, names: Mapping[str, str], choices: Sequence[str]) -> Any:
    """Return the choice that ControlNet's API names or numbers, or the value as it is."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return choices[value]
    return names.get(value, value) if isinstance(value, str) else value
