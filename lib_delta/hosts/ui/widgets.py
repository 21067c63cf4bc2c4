"""Parts that several boxes of the accordion share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from modules.ui_common import create_refresh_button

from lib_delta.request.fields import Field
from lib_delta.request.setting_choices import NONE

GRADIO_4 = int(gr.__version__.split(".")[0]) >= 4
ElemId = Callable[[str], str]  # returns the DOM id of an element of the tab for a name
QUIET = {"queue": False, "show_progress": "hidden"}  # arguments of an event
# Arguments of a row; of a widget that only the page's script uses; of a line with a message.
ROW = {"elem_classes": ["delta-sampling-row"]}
HIDDEN = {"elem_classes": ["delta-sampling-hidden"]}
MESSAGE = {"elem_classes": ["delta-sampling-said"]}


class FieldWidgets:
    """Makes the widgets of a field table's settings; ``made`` has them by the names of the fields.

    ``options`` of each method are gradio's, and replace the values from the table.
    """

    def __init__(self, fields: Mapping[str, Field], elem_id: ElemId, label_suffix: str = "") -> None:
        self.fields, self.elem_id, self.label_suffix = fields, elem_id, label_suffix
        self.made: dict[str, Any] = {}

    def slider(self, name: str, **options: Any) -> None:
        """Make a slider for a number with limits."""
        field = self.fields[name]
        self._make(gr.Slider, name, minimum=field.minimum, maximum=field.maximum, step=field.step, **options)

    def radio(self, name: str, **options: Any) -> None:
        """Make a row of buttons, for a few choices."""
        self._make(gr.Radio, name, choices=list(self.fields[name].choices), **options)

    def dropdown(self, name: str, **options: Any) -> None:
        """Make a list of choices."""
        self._make(gr.Dropdown, name, **{"choices": list(self.fields[name].choices), **options})

    def checkbox(self, name: str, **options: Any) -> None:
        """Make a checkbox."""
        self._make(gr.Checkbox, name, **options)

    def textbox(self, name: str, **options: Any) -> None:
        """Make a box for a text."""
        self._make(gr.Textbox, name, placeholder=self.fields[name].placeholder, **options)

    def number(self, name: str, **options: Any) -> None:
        """Make a box for a number."""
        self._make(gr.Number, name, **options)

    def file_list(self, name: str, choices: Callable[[], list[str]], refresh: Callable[[], None]) -> None:
        """Make a list of files with the WebUI's refresh button."""
        # Without allow_custom_value, a pasted name that is not in the list shows as nothing.
        self.dropdown(name, choices=choices(), value=NONE, allow_custom_value=True)
        refresh_button(self.made[name], refresh, choices, self.elem_id(f"refresh_{name}"))

    def _make(self, kind: Callable[..., Any], name: str, **options: Any) -> None:
        field = self.fields[name]
        texts = {"label": field.label + self.label_suffix, "elem_id": self.elem_id(name)}
        # Always with ``value=``: pasting converts to the type of the widget's default.
        self.made[name] = kind(**{**texts, "value": field.default, **options})


def refresh_button(dropdown: Any, refresh: Callable[[], None], choices: Callable[[], list[str]], elem_id: str) -> None:
    """Make the WebUI's refresh button for a dropdown.  ``refresh`` updates the list that ``choices`` returns."""

    def update() -> dict[str, Any]:  # with labels if the dropdown has them: gradio 4 stores (label, value) pairs
        labelled = any(isinstance(choice, tuple) for choice in dropdown.choices)
        return {"choices": [(choice, choice) if labelled else choice for choice in choices()]}

    create_refresh_button(dropdown, refresh, update, elem_id)
