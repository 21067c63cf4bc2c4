"""The accordion's presets: a list to load from, and buttons that save and delete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import gradio as gr
from modules.ui_components import FormRow, ToolButton

from lib_delta.errors import SettingError, shown
from lib_delta.hosts import host
from lib_delta.hosts.settings import option, units_shown
from lib_delta.hosts.ui import unit_box
from lib_delta.hosts.ui.unit_box import UnitBox, restoring
from lib_delta.hosts.ui.widgets import HIDDEN, MESSAGE, QUIET, ROW, refresh_button
from lib_delta.request.control_unit import RECIPE_FIELDS, UNIT_FIELDS
from lib_delta.request.presets import SAVED
from lib_delta.request.request import NONE, Request

SAVE, DELETE = "\N{FLOPPY DISK}", "\N{WASTEBASKET}\ufe0f"


class PresetRow:
    """The widgets, and what they do to the accordion's."""

    def __init__(self, elem_id: Callable[[str], str]) -> None:
        """Make them; ``elem_id`` completes a name to the id of an element of the tab."""
        with gr.Row(**ROW):
            with gr.Column(min_width=240), FormRow():
                self.name = gr.Dropdown(
                    label="Preset",
                    choices=preset_choices(),
                    value=NONE,
                    interactive=True,  # gradio takes a widget that is no event's input for one that only shows
                    elem_id=elem_id("preset"),
                )
                refresh_button(self.name, _nothing, preset_choices, elem_id("refresh_preset"))
                self.delete = ToolButton(DELETE, elem_id=elem_id("delete_preset"))
            with gr.Column(min_width=240), FormRow():
                # Not the list's own box: on gradio 3 what is typed there counts after the Enter key alone.
                self.saved_as = gr.Textbox(
                    label="Save preset as", placeholder="a name", lines=1, elem_id=elem_id("preset_name")
                )
                self.save = ToolButton(SAVE, elem_id=elem_id("save_preset"))
        self.said = gr.HTML("", elem_id=elem_id("preset_said"), **MESSAGE)
        # The script of the page clicks it once, when the page is there.
        self.default = gr.Button("Load the default preset", elem_id=elem_id("default_preset"), **HIDDEN)
        for widget in (self.name, self.saved_as):
            widget.do_not_save_to_config = True

    def connect(self, widgets: Mapping[str, Any], prompts: Any, units: UnitBox) -> None:
        """Let presets fill the widgets, which are those of the settings by name, and the units'.

        ``prompts`` unfolds with them.
        """
        saved = [*(widgets[f.name] for f in SAVED), *(widget for widget, _ in units.infotext_fields)]
        told = [self.said, self.name, self.saved_as]
        filled = [*saved, prompts, units.accordion, *told]
        self.name.select(chosen, inputs=[], outputs=filled, **QUIET)
        self.default.click(default, inputs=[], outputs=filled, **QUIET)
        self.save.click(save, inputs=[self.saved_as, *saved], outputs=told, **QUIET)
        self.delete.click(delete, inputs=[self.name], outputs=told, **QUIET)


def preset_choices() -> list[str]:
    """Return what the list of presets offers."""
    return [NONE, *host().presets().names()]


def chosen(selected: gr.SelectData) -> list[Any]:
    """Load the preset that was chosen from the list."""
    return filled(selected.value)


def default() -> list[Any]:
    """Load the preset that the settings page names, if it names one."""
    return filled(str(option("preset", NONE)))


def filled(name: str) -> list[Any]:
    """Return what each widget is set to by a preset, whether prompts and units unfold, and what is told."""
    unchanged = [gr.update() for _ in (*SAVED, *unit_fields(), "prompts", "units")]
    if name == NONE:
        return [*unchanged, *message_and_choice()]
    try:
        request = host().presets().load(name)
    except SettingError as error:
        return [*unchanged, *message_and_choice(str(error))]
    return [*values(request), unfolded(request), unit_box.unfold(request.infotext()), *message_and_choice("", name)]


def message_and_choice(sentence: str = "", name: str = "") -> tuple[str, Any, Any]:
    """Return what is said of a preset, and the list and the box with its name; without one, these stay as they are."""
    said = f"<div>{escape(sentence[:1].upper() + sentence[1:])}</div>" if sentence else ""
    if not name:
        return said, gr.update(), gr.update()
    return said, gr.update(choices=preset_choices(), value=name), gr.update(value="" if name == NONE else name)


def values(request: Request) -> list[Any]:
    """Return the widgets' values for settings and units: an empty dropdown shows None."""
    found = [(f.name, getattr(request, f.name)) for f in SAVED]
    # A picture's text holds the units as a preset does: by their recipes, and without the pictures.
    text = request.infotext()
    of_units = [restoring(place, name)(text) for place, name in unit_fields()]
    return [
        *(value or NONE if name in ("base", "adapted") else value for name, value in found),
        *(gr.update() if value is None else value for value in of_units),
    ]


def unit_fields() -> list[tuple[int, str]]:
    """Return the place of a unit and the name of a field for each widget of the units that a preset fills."""
    return [(place, name) for place in range(units_shown()) for name in RECIPE_FIELDS]


def unfolded(request: Request) -> Any:
    """Return the update that unfolds the side model's prompts, where there are any."""
    told = request.prompt or request.negative_prompt or request.adapted_prompt
    return gr.update(open=True) if told else gr.update()


def save(name: str, *given: Any) -> tuple[str, Any, Any]:
    """Save what the widgets hold, and return what is told."""
    of_units = dict(zip(unit_fields(), given[len(SAVED) :]))
    units = [of_units.get((place, field)) for place in range(units_shown()) for field in UNIT_FIELDS]
    try:
        kept = host().presets().save(name, Request.from_arguments([True, *given[: len(SAVED)], *units]))
    except SettingError as error:
        return message_and_choice(str(error))
    said, _, named = message_and_choice(f"saved as {shown(kept)}", kept)
    # Not chosen yet: gradio 4 tells of a choice only where it is another than before.
    return said, gr.update(choices=preset_choices(), value=NONE), named


def delete(name: str) -> tuple[str, Any, Any]:
    """Delete a preset, and return what is told."""
    try:
        host().presets().delete(name)
    except SettingError as error:
        return message_and_choice(str(error))
    return message_and_choice(f"{shown(name)} is deleted; the settings are still as they are", NONE)


def _nothing() -> None:
    """Look for nothing: the list is read from its file whenever it is asked for."""
