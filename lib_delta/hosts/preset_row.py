"""The accordion's presets: a list to load from, and buttons that save and delete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import gradio as gr
from modules.ui_components import FormRow, ToolButton

from lib_delta.errors import SettingError, shown
from lib_delta.hosts import host
from lib_delta.hosts.lora_box import QUIET, refresh_button
from lib_delta.hosts.settings import option
from lib_delta.presets import SAVED
from lib_delta.request import NONE, Request

SAVE, DELETE = "\N{FLOPPY DISK}", "\N{WASTEBASKET}\ufe0f"


class PresetRow:
    """The widgets, and what they do to the accordion's."""

    def __init__(self, elem_id: Callable[[str], str]) -> None:
        """Make them; ``elem_id`` completes a name to the id of an element of the tab."""
        with FormRow():
            self.name = gr.Dropdown(
                label="Preset",
                choices=preset_choices(),
                value=NONE,
                allow_custom_value=True,  # a new one's name
                elem_id=elem_id("preset"),
            )
            refresh_button(self.name, _nothing, preset_choices, elem_id("refresh_preset"))
            self.save = ToolButton(SAVE, elem_id=elem_id("save_preset"))
            self.delete = ToolButton(DELETE, elem_id=elem_id("delete_preset"))
        self.said = gr.HTML("", elem_id=elem_id("preset_said"), elem_classes=["delta-sampling-said"])
        # The script of the page clicks it once, when the page is there.
        self.default = gr.Button(
            "Load the default preset", elem_id=elem_id("default_preset"), elem_classes=["delta-sampling-hidden"]
        )
        self.name.do_not_save_to_config = True

    def connect(self, widgets: Mapping[str, Any], prompts: Any) -> None:
        """Let presets fill the widgets, which are those of the settings by name; ``prompts`` unfolds with them."""
        saved = [widgets[f.name] for f in SAVED]
        filled = [*saved, prompts, self.said, self.name]
        self.name.select(chosen, inputs=[], outputs=filled, **QUIET)
        self.default.click(default, inputs=[], outputs=filled, **QUIET)
        self.save.click(save, inputs=[self.name, *saved], outputs=[self.said, self.name], **QUIET)
        self.delete.click(delete, inputs=[self.name], outputs=[self.said, self.name], **QUIET)


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
    """Return what each widget is set to by a preset, whether the prompts unfold, and what is said of it."""
    unchanged = [gr.update() for _ in SAVED]
    if name == NONE:
        return [*unchanged, gr.update(), "", gr.update()]
    try:
        request = host().presets().load(name)
    except SettingError as error:
        return [*unchanged, gr.update(), _sentence(str(error)), gr.update()]
    return [*values(request), unfolded(request), "", gr.update(choices=preset_choices(), value=name)]


def values(request: Request) -> list[Any]:
    """Return the widgets' values for settings: an empty dropdown shows None."""
    found = [(f.name, getattr(request, f.name)) for f in SAVED]
    return [value or NONE if name in ("base", "adapted") else value for name, value in found]


def unfolded(request: Request) -> Any:
    """Return the update that unfolds the side model's prompts, where there are any."""
    told = request.prompt or request.negative_prompt or request.adapted_prompt
    return gr.update(open=True) if told else gr.update()


def save(name: str | None, *given: Any) -> tuple[str, Any]:
    """Save what the widgets hold, and return what is said of it with the list."""
    try:
        kept = host().presets().save(_name(name), Request.from_arguments([True, *given]))
    except SettingError as error:
        return _sentence(str(error)), gr.update()
    return _sentence(f"saved as {shown(kept)}"), gr.update(choices=preset_choices(), value=kept)


def delete(name: str | None) -> tuple[str, Any]:
    """Delete a preset, and return what is said of it with the list."""
    try:
        host().presets().delete(_name(name))
    except SettingError as error:
        return _sentence(str(error)), gr.update()
    said = f"{shown(name)} is deleted; what it held is still in the settings below"
    return _sentence(said), gr.update(choices=preset_choices(), value=NONE)


def _name(name: str | None) -> str:
    return "" if name in (None, NONE) else str(name)


def _sentence(text: str) -> str:
    return f"<div>{escape(text[:1].upper() + text[1:])}</div>"


def _nothing() -> None:
    """Look for nothing: the list is read from its file whenever it is asked for."""
