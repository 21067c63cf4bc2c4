"""Parts that several boxes of the accordion share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from modules.ui_common import create_refresh_button

GRADIO_4 = int(gr.__version__.split(".")[0]) >= 4
QUIET = {"queue": False, "show_progress": "hidden"}  # arguments of an event
# Arguments of a row; of a widget that only the page's script uses; of a line with a message.
ROW = {"elem_classes": ["delta-sampling-row"]}
HIDDEN = {"elem_classes": ["delta-sampling-hidden"]}
MESSAGE = {"elem_classes": ["delta-sampling-said"]}


def refresh_button(dropdown: Any, refresh: Callable[[], None], choices: Callable[[], list[str]], elem_id: str) -> None:
    """Make the WebUI's refresh button for a dropdown.  ``refresh`` updates the list that ``choices`` returns."""

    def update() -> dict[str, Any]:  # with labels if the dropdown has them: gradio 4 stores (label, value) pairs
        labelled = any(isinstance(choice, tuple) for choice in dropdown.choices)
        return {"choices": [(choice, choice) if labelled else choice for choice in choices()]}

    create_refresh_button(dropdown, refresh, update, elem_id)
