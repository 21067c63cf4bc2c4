"""Infotext: the settings in a picture's text, by the labels of the field table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lib_delta import __version__
from lib_delta.errors import SettingError
from lib_delta.request.control_unit import Unit, format_units, parse_units
from lib_delta.request.fields import CHECKPOINT_FIELDS, REQUEST_FIELDS, SETTINGS, UNITS
from lib_delta.request.lora_recipe import written
from lib_delta.request.setting_choices import LEGACY_BRIDGE

if TYPE_CHECKING:
    from lib_delta.request.request import Request

LORA_HASHES = "Delta LoRA hashes"
NOT_APPLIED = "Delta not applied"
VERSION = "Delta version"  # for readers: settings restore by their own labels
# Written even if it is the default: the bridge's default is another for pictures whose text names none.
ALWAYS_WRITTEN = ("strength", "bridge")
_HASHED = re.compile(r" \[([0-9a-f]{10})?\]$")  # the hash that WebUIs write after a checkpoint's name


def infotext_labels() -> dict[str, str]:
    """Return the labels of the settings in a picture's text, by the names of the fields."""
    return {field.name: field.infotext for field in (*SETTINGS, UNITS) if field.infotext}


def to_infotext(request: Request, hashes: Mapping[str, str]) -> dict[str, str]:
    """Return the text's values by label: lambda, the bridge, every setting that is not the default, and the version.

    ``hashes`` are short hashes by the names of the side files.
    """
    values: dict[str, str] = {}
    for field in SETTINGS:
        value = getattr(request, field.name)
        if field.infotext and (value != field.default or field.name in ALWAYS_WRITTEN):
            text = written(value) if field.is_number else value
            values[field.infotext] = _escaped(_with_hash(text, hashes) if field.name in CHECKPOINT_FIELDS else text)
    if request.has_units:
        values[UNITS.infotext] = _escaped(format_units(request.units))
    lora_hashes = [f"{pick.name}: {hashes[pick.name]}" for pick in request.picks() if pick.name in hashes]
    if lora_hashes:
        values[LORA_HASHES] = ", ".join(lora_hashes)
    values[VERSION] = __version__
    return values


def _with_hash(name: str, hashes: Mapping[str, str]) -> str:
    """Return a checkpoint's name with its hash.

    A name without a known hash gets an empty one if its end looks like a hash, or else reading would drop that end.
    """
    return f"{name} [{hashes.get(name, '')}]" if name in hashes or _HASHED.search(name) else name


def _escaped(text: str) -> str:
    """Return a text that survives the WebUI's parser, which strips quotes and blanks.

    The WebUI itself quotes texts with commas, colons and line ends.
    """
    if re.search("[,:\n]", text):
        return text
    return json.dumps(text, ensure_ascii=False) if text != text.strip() or re.fullmatch('".*"', text) else text


def from_infotext(values: Mapping[str, str], name: str) -> Any:
    """Return one field's value from a picture's text; its default if the text does not state it.

    ``enabled`` is true exactly for a picture with a delta.  Checkpoints lose their hashes: the name finds them.
    """
    if name == "enabled":
        return REQUEST_FIELDS["strength"].infotext in values
    if name == UNITS.name:
        return _units(values.get(UNITS.infotext, ""))
    field = REQUEST_FIELDS[name]
    text = _text(values, field.infotext)
    if text is None:
        return LEGACY_BRIDGE if name == "bridge" else field.default
    if field.is_number:
        return _number(text, field.default)
    return _HASHED.sub("", text) if name in CHECKPOINT_FIELDS else text


def _text(values: Mapping[str, str], label: str) -> str | None:
    """Return the text of a label.  The WebUI splits "512x512", which it reads as a picture's size, in two."""
    if f"{label}-1" in values and f"{label}-2" in values:
        return f"{values[f'{label}-1']}x{values[f'{label}-2']}"
    return values.get(label)


def _number(text: str, default: float) -> float:
    try:
        number = float(text)
    except ValueError:
        return default
    return number if math.isfinite(number) else default


def _units(text: str) -> tuple[Unit, ...]:
    try:
        return parse_units(text)
    except SettingError:  # somebody has edited the text
        return ()
