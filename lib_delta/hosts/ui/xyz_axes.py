"""The axes of the XYZ plot: what they set, which values they offer, and which they refuse before anything is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

from modules import scripts

from lib_delta.errors import SettingError, shortened
from lib_delta.hosts import host
from lib_delta.hosts.ui.checkpoint_choices import checkpoint_choices
from lib_delta.hosts.ui.lora_box import lora_choices
from lib_delta.hosts.ui.unit_box import control_choices
from lib_delta.request.fields import CHECKPOINT_FIELDS, REQUEST_FIELDS, UNIT_FIELDS
from lib_delta.request.lora_recipe import parse_picks, quoted
from lib_delta.request.request import Request
from lib_delta.request.setting_choices import BRIDGES, CURVES, NONE, OFFERED_SIZES, QUALITIES

# Axes of the XYZ plot: the label, what it sets, and what changing it costs.  The WebUI changes the dearest least often,
# and its own checkpoint axis has cost 1.
AXES = (
    ("Lambda", "strength", 0.0),
    ("Start", "start", 0.0),
    ("End", "end", 0.0),
    ("Curve", "curve", 0.0),
    ("Base", "base", 0.9),
    ("Adapted", "adapted", 0.8),
    ("LoRAs", "loras", 0.6),
    ("LoRA weight", "lora_weight", 0.4),
    ("CFG", "cfg", 0.0),
    ("Size", "size", 0.0),
    ("Bridge", "bridge", 0.0),
    ("Quality", "quality", 0.0),
    ("Quality steps", "every", 0.0),
    ("Quality moved", "moved", 0.0),
    ("Unit weight", "unit_weight", 0.0),
    ("Unit start", "unit_start", 0.0),
    ("Unit end", "unit_end", 0.0),
    ("Unit model", "unit_model", 0.5),
)
CHOICES: dict[str, Callable[[], list[str]]] = {
    "curve": lambda: list(CURVES),
    "base": lambda: [NONE, *host().catalog.bases()],
    "adapted": lambda: [NONE, *host().catalog.bases()],
    "loras": lambda: [NONE, *map(quoted, host().catalog.loras())],
    "size": lambda: list(OFFERED_SIZES),
    "bridge": lambda: list(BRIDGES),
    "quality": lambda: list(QUALITIES),
    "unit_model": control_choices,
}
RANGES = {name: field.limits for name, field in REQUEST_FIELDS.items() if field.is_number}
RANGES |= {f"unit_{name}": UNIT_FIELDS[name].limits for name in ("weight", "start", "end")}


def add_axes() -> None:
    """Add the axes to the XYZ plot, if it is there and does not have them yet."""
    modules = (data.module for data in scripts.scripts_data)
    grid = next((m for m in modules if m.__name__ in ("xyz_grid.py", "scripts.xyz_grid")), None)
    if grid is None:
        return
    known = {option.label for option in grid.axis_options}
    for name, target, cost in AXES:
        label = f"[Delta] {name}"
        if label not in known:
            option = grid.AxisOption(
                label,
                str if target in CHOICES else float,
                partial(set_axis, target),
                confirm=partial(confirm_axis, label, target),
                cost=cost,
                choices=CHOICES.get(target),
            )
            grid.axis_options.append(option)


def set_axis(target: str, p: Any, value: Any, values: Sequence[Any]) -> None:
    """Note one axis' value for a cell; cells are shallow copies of one object, so the dictionary is a new one."""
    if target in CHECKPOINT_FIELDS:
        value = find_checkpoint(value)
    if target == "loras" and value in host().catalog.loras():
        value = quoted(value)  # a name may hold what separates LoRAs
    if value == NONE:
        value = ""
    p.delta_sampling_axes = {**getattr(p, "delta_sampling_axes", {}), "enabled": True, target: value}


def confirm_axis(label: str, target: str, p: Any, values: Sequence[Any]) -> None:
    """Refuse values that are not allowed, before anything is generated."""
    for value in values:
        if target in RANGES:
            low, high = RANGES[target]
            if not low <= value <= high:
                raise SettingError(f'{label} "{value:g}" is not allowed: a number from {low:g} to {high:g} is')
        elif target in CHECKPOINT_FIELDS:
            if find_checkpoint(value) is None:
                raise SettingError(f'{label} "{shortened(value)}" is no checkpoint: {listed(checkpoint_choices())}')
        elif target in ("curve", "bridge", "quality", "unit_model") and value not in CHOICES[target]():
            raise SettingError(f'{label} "{shortened(value)}" is not allowed: {listed(CHOICES[target]())}')
        elif target == "size":
            Request(enabled=True, size=value)
        elif target == "loras" and value not in (NONE, *host().catalog.loras()):
            for pick in parse_picks(value):
                if pick.name not in host().catalog.loras():
                    raise SettingError(f'{label} "{shortened(pick.name)}" is no LoRA: {listed(lora_choices())}')


def find_checkpoint(name: str) -> str | None:
    """Return the checkpoint that is meant, by its full name or without folder, ending and hash, or None."""
    known = checkpoint_choices()
    if name in known:
        return name
    for short in (short_name, lambda checkpoint: short_name(without_hash(checkpoint))):
        found = [other for other in known if short(other) == short(name)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def short_name(checkpoint: str) -> str:
    """Return a checkpoint's name without folder, ending and case."""
    name = PurePath(checkpoint.replace("\\", "/")).name.casefold()
    return name.removesuffix(".safetensors").removesuffix(".ckpt")


def without_hash(checkpoint: str) -> str:
    """Return a checkpoint's title without the hash at its end, if that is one."""
    return re.sub(r" \[\w+\]$", "", checkpoint)


def listed(names: Sequence[str], shown: int = 12) -> str:
    """Return the allowed values for an error."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return "one of " + ", ".join(names[:shown]) + more + " is"
