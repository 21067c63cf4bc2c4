"""The accordion's presets: a list to load from, and buttons that save and delete."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr
from modules.ui_components import FormRow, ToolButton

from lib_delta.errors import SettingError, shown
from lib_delta.hosts import host
from lib_delta.hosts.settings import option, units_shown
from lib_delta.hosts.ui import unit_box
from lib_delta.hosts.ui.unit_box import UnitBox, restoring
from lib_delta.hosts.ui.widgets import HIDDEN, MESSAGE, QUIET, ROW, ElemId, refresh_button
from lib_delta.request.fields import CHECKPOINT_FIELDS, RECIPE_FIELDS, UNIT_FIELDS
from lib_delta.request.presets import SAVED
from lib_delta.request.request import Request
from lib_delta.request.setting_choices import NONE

SAVE, DELETE = "\N{FLOPPY DISK}", "\N{WASTEBASKET}\ufe0f"


class PresetRow:
    """The widgets, and the events between them and the accordion's."""

    def __init__(self, elem_id: ElemId) -> None:
        with gr.Row(**ROW):
            with gr.Column(min_width=240), FormRow():
                self.name = gr.Dropdown(
                    label="Preset",
                    choices=preset_choices(),
                    value=NONE,
                    interactive=True,  # gradio makes a widget read-only that is no event's input
                    elem_id=elem_id("preset"),
                )
                refresh_button(self.name, _nothing, preset_choices, elem_id("refresh_preset"))
                self.delete = ToolButton(DELETE, elem_id=elem_id("delete_preset"))
            with gr.Column(min_width=240), FormRow():
                # A box next to the list, since gradio 3's dropdown accepts a typed name only with the Enter key.
                self.saved_as = gr.Textbox(
                    label="Save preset as", placeholder="a name", lines=1, elem_id=elem_id("preset_name")
                )
                self.save = ToolButton(SAVE, elem_id=elem_id("save_preset"))
        self.message = gr.HTML("", elem_id=elem_id("preset_said"), **MESSAGE)
        # The page's script clicks it once, when the page is complete.
        self.default = gr.Button("Load the default preset", elem_id=elem_id("default_preset"), **HIDDEN)
        self.confirming = gr.State("")  # the name of a preset that the next save may replace
        for widget in (self.name, self.saved_as):
            widget.do_not_save_to_config = True

    def connect(self, widgets: Mapping[str, Any], prompts: Any, units: UnitBox) -> None:
        """Connect the row with the widgets that presets save and fill.

        ``widgets`` are those of the settings by name; ``prompts`` is the accordion around the side model's prompts.
        """
        saved = [*(widgets[f.name] for f in SAVED), *(widget for widget, _ in units.restored)]
        row = [self.message, self.name, self.saved_as]
        filled = [*saved, prompts, units.accordion, *row]
        self.name.select(load_selected, inputs=[], outputs=filled, **QUIET)
        self.default.click(load_default, inputs=[], outputs=filled, **QUIET)
        inputs = [self.saved_as, self.confirming, *saved]
        self.save.click(save, inputs=inputs, outputs=[*row, self.confirming], **QUIET)
        self.delete.click(delete, inputs=[self.name], outputs=row, **QUIET)


def preset_choices() -> list[str]:
    """Return the choices of the preset list."""
    return [NONE, *host().presets().names()]


def load_selected(selected: gr.SelectData) -> list[Any]:
    """Load the preset that the user selected in the list; None loads the defaults."""
    if selected.value != NONE:
        return load(selected.value)
    return [*filling(Request(enabled=True)), *row_updates("the settings are the defaults")]


def load_default() -> list[Any]:
    """Load the preset that the settings page names, if any."""
    return load(str(option("preset", NONE)))


def load(name: str) -> list[Any]:
    """Return a preset's values and updates for ``filled``: the settings, the two inner accordions, and the row."""
    unchanged = [gr.update() for _ in (*SAVED, *unit_fields(), "prompts", "units")]
    if name == NONE:
        return [*unchanged, *row_updates()]
    try:
        request = host().presets().load(name)
    except SettingError as error:
        return [*unchanged, *row_updates(str(error))]
    return [*filling(request), *row_updates("", name)]


def filling(request: Request) -> list[Any]:
    """Return a request's values and updates for the settings, the units, and the two inner accordions."""
    return [*widget_values(request), unfolded(request), unit_box.unfold(request.infotext())]


def row_updates(message: str = "", name: str = "") -> tuple[str, Any, Any]:
    """Return a message as HTML, and updates that put a name into the list and the box; without one, both stay."""
    html = f"<div>{escape(message[:1].upper() + message[1:])}</div>" if message else ""
    if not name:
        return html, gr.update(), gr.update()
    return html, gr.update(choices=preset_choices(), value=name), gr.update(value="" if name == NONE else name)


def widget_values(request: Request) -> list[Any]:
    """Return a request's values for the widgets of settings and units; empty dropdowns show None."""
    settings = [(f.name, getattr(request, f.name)) for f in SAVED]
    # Infotext stores units as a preset does: by their recipes, without pictures.
    infotext = request.infotext()
    of_units = [restoring(index, name)(infotext) for index, name in unit_fields()]
    return [
        *(value or NONE if name in CHECKPOINT_FIELDS else value for name, value in settings),
        *(gr.update() if value is None else value for value in of_units),
    ]


def unit_fields() -> list[tuple[int, str]]:
    """Return the unit's index and the field's name for each widget of the units that a preset fills."""
    return [(index, name) for index in range(units_shown()) for name in RECIPE_FIELDS]


def unfolded(request: Request) -> Any:
    """Return the update that unfolds the side model's prompts if there are any."""
    has_prompts = request.prompt or request.negative_prompt or request.adapted_prompt
    return gr.update(open=True) if has_prompts else gr.update()


def save(name: str, confirming: str, *values: Any) -> tuple[str, Any, Any, str]:
    """Save the values of the widgets under a name; return the row's updates, and the name that a second click replaces.

    The first click on the name of an existing preset only asks, because its settings would be lost.
    """
    name = name.strip()
    if name in host().presets().names() and name != confirming:
        return *row_updates(f"there is a preset {shown(name)} already: save again to replace it"), name
    of_units = dict(zip(unit_fields(), values[len(SAVED) :]))
    units = [of_units.get((index, field)) for index in range(units_shown()) for field in UNIT_FIELDS]
    try:
        saved_as = host().presets().save(name, Request.from_arguments([True, *values[: len(SAVED)], *units]))
    except SettingError as error:
        return *row_updates(str(error)), ""
    message, _, box = row_updates(f"saved as {shown(saved_as)}", saved_as)
    # Not selected in the list: gradio 4 fires ``select`` only if the choice changes, so it could not be loaded.
    return message, gr.update(choices=preset_choices(), value=NONE), box, ""


def delete(name: str) -> tuple[str, Any, Any]:
    """Delete a preset, and return the row's updates."""
    if name == NONE:
        return row_updates("choose the preset to delete in the list")
    try:
        host().presets().delete(name)
    except SettingError as error:
        return row_updates(str(error))
    return row_updates(f"{shown(name)} is deleted; the settings are still as they are", NONE)


def _nothing() -> None:
    """Refresh nothing: ``preset_choices`` reads the file."""
