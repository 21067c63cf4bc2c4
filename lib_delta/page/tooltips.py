"""The accordion's tooltips: those of the settings come from the field table, those of buttons and lists from here."""

from __future__ import annotations

from collections.abc import Mapping

from lib_delta.request.fields import REQUEST_FIELDS, UNIT_FIELDS, Field

# Widgets that hold no setting, by the ends of their DOM ids.
ACCORDION_WIDGETS = {
    "add_lora": "Adds the chosen LoRA to the list, with the weight noted on its card, or 1.",
    "cards": "While the accordion is open, a click on a card of the Lora tab adds that LoRA here instead of to the "
    "main prompt; a second click removes it.",
    "preset": "Saved settings of this accordion: choose a preset to load it. None loads the defaults.",
    "delete_preset": "Delete the chosen preset",
    "preset_name": "A name for the accordion's current settings; an existing preset of this name is replaced after "
    "a second click.",
    "save_preset": "Save the settings under this name",
    "refresh_status": "Show what is loaded now.",
    "unload": "Free the side models' memory. The next generation loads them again.",
}
UNIT_WIDGETS = {"preview": "Show the map that the preprocessor makes of the first picture."}


def accordion_tooltips() -> dict[str, str]:
    """Return the tooltips of the accordion's widgets by the ends of their DOM ids."""
    return _of_fields(REQUEST_FIELDS) | ACCORDION_WIDGETS


def unit_tooltips() -> dict[str, str]:
    """Return the tooltips of each unit's widgets by the ends of their DOM ids, after ``unit1_`` and so on."""
    return _of_fields(UNIT_FIELDS) | UNIT_WIDGETS


def _of_fields(table: Mapping[str, Field]) -> dict[str, str]:
    return {name: field.tooltip for name, field in table.items() if field.tooltip}
