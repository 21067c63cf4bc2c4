"""The axes of the XYZ plot.

The field table names them.  This module offers their values, checks them before the plot starts, and stores them for
each cell.
"""

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
from lib_delta.request.fields import CHECKPOINT_FIELDS, REQUEST_FIELDS, UNIT_FIELDS, Axis, Field
from lib_delta.request.lora_recipe import parse_picks, quoted
from lib_delta.request.request import Request
from lib_delta.request.setting_choices import NONE, OFFERED_SIZES

Check = Callable[[str, Any], None]  # of a label and a value; raises SettingError

LORA_WEIGHT = Field(name="lora_weight", default=1.0, axis=Axis("LoRA weight", cost=0.4))  # of all LoRAs in the box
UNIT_AXES = ("weight", "start", "end", "model")  # a new one goes to the end: API calls give an axis by its number


def axis_fields() -> dict[str, Field]:
    """Return the field of each axis by the key under which a cell stores its value, in the plot's order."""
    names = [name for name, field in REQUEST_FIELDS.items() if field.axis]
    after_loras = names.index("loras") + 1
    axes = {name: REQUEST_FIELDS[name] for name in names[:after_loras]}
    axes[LORA_WEIGHT.name] = LORA_WEIGHT
    axes |= {name: REQUEST_FIELDS[name] for name in names[after_loras:]}
    return axes | {f"unit_{name}": UNIT_FIELDS[name] for name in UNIT_AXES}


def add_axes() -> None:
    """Add the axes that the XYZ plot lacks, if it is loaded."""
    modules = (data.module for data in scripts.scripts_data)
    grid = next((m for m in modules if m.__name__ in ("xyz_grid.py", "scripts.xyz_grid")), None)
    if grid is None:
        return
    known = {option.label for option in grid.axis_options}
    for target, field in axis_fields().items():
        axis = field.axis or Axis(target)
        label = f"[Delta] {axis.label}"
        if label not in known:
            choices = choices_of(target, field)
            option = grid.AxisOption(
                label,
                str if choices else float,
                partial(set_axis, target),
                confirm=partial(confirm_axis, label, check_of(target, field)),
                cost=axis.cost,
                choices=choices,
            )
            grid.axis_options.append(option)


def choices_of(target: str, field: Field) -> Callable[[], list[str]] | None:
    """Return the function that lists an axis' values, or None for numbers."""
    if target in CHECKPOINT_FIELDS:
        return lambda: [NONE, *host().catalog.bases()]
    if target == "loras":
        return lambda: [NONE, *map(quoted, host().catalog.loras())]
    if target == "size":
        return lambda: list(OFFERED_SIZES)
    if target == "unit_model":
        return control_choices
    return partial(list, field.choices) if field.choices else None


def set_axis(target: str, p: Any, value: Any, values: Sequence[Any]) -> None:
    """Store an axis' value in a cell.

    Cells are shallow copies of one object, so each gets a new dictionary.
    """
    if target in CHECKPOINT_FIELDS:
        value = find_checkpoint(value)
    if target == "loras" and value in host().catalog.loras():
        value = quoted(value)  # the name may contain the characters that separate LoRAs
    if value == NONE:
        value = ""
    p.delta_sampling_axes = {**getattr(p, "delta_sampling_axes", {}), "enabled": True, target: value}


def confirm_axis(label: str, check: Check, p: Any, values: Sequence[Any]) -> None:
    """Raise :class:`SettingError` for a value that is not allowed, before the plot generates anything."""
    for value in values:
        check(label, value)


def check_of(target: str, field: Field) -> Check:
    """Return the function that checks one value of an axis."""
    if target in CHECKPOINT_FIELDS:
        return check_checkpoint
    if target == "loras":
        return check_loras
    if target == "size":
        return check_size
    choices = choices_of(target, field)
    return partial(check_choice, choices) if choices else partial(check_number, field)


def check_number(field: Field, label: str, value: float) -> None:
    """Check a number against the field's limits, if it has any."""
    low, high = field.limits
    if field.minimum is not None and not low <= value <= high:
        raise SettingError(f'{label} "{value:g}" is not allowed: a number from {low:g} to {high:g} is')


def check_choice(choices: Callable[[], list[str]], label: str, value: str) -> None:
    """Check that a value is in a list."""
    if value not in choices():
        raise SettingError(f'{label} "{shortened(value)}" is not allowed: {listed(choices())}')


def check_checkpoint(label: str, value: str) -> None:
    """Check that there is exactly one checkpoint of a name."""
    if find_checkpoint(value) is None:
        raise SettingError(f'{label} "{shortened(value)}" is no checkpoint: {listed(checkpoint_choices())}')


def check_size(label: str, value: str) -> None:
    """Check a size of the side model."""
    Request(enabled=True, size=value)


def check_loras(label: str, value: str) -> None:
    """Check that a recipe can be parsed, and that its LoRAs exist."""
    known = host().catalog.loras()
    if value in (NONE, *known):
        return
    for pick in parse_picks(value):
        if pick.name not in known:
            raise SettingError(f'{label} "{shortened(pick.name)}" is no LoRA: {listed(lora_choices())}')


def find_checkpoint(name: str) -> str | None:
    """Return the checkpoint of a name: the full name, or one without folder, ending and hash.

    Returns None if there is no such checkpoint, or more than one.
    """
    known = checkpoint_choices()
    if name in known:
        return name
    for shorten in (short_name, lambda checkpoint: short_name(without_hash(checkpoint))):
        matches = [checkpoint for checkpoint in known if shorten(checkpoint) == shorten(name)]
        if matches:
            return matches[0] if len(matches) == 1 else None
    return None


def short_name(checkpoint: str) -> str:
    """Return a checkpoint's name in lower case, without folder and ending."""
    name = PurePath(checkpoint.replace("\\", "/")).name.casefold()
    return name.removesuffix(".safetensors").removesuffix(".ckpt")


def without_hash(checkpoint: str) -> str:
    """Return a checkpoint's title without the hash at its end."""
    return re.sub(r" \[\w+\]$", "", checkpoint)


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return the end of an error: the allowed values, up to ``most`` of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "one of " + ", ".join(names[:most]) + more + " is"
