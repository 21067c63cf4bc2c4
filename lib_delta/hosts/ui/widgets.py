"""What several parts of the accordion share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from modules.ui_common import create_refresh_button

QUIET = {"queue": False, "show_progress": "hidden"}


def refresh_button(dropdown: Any, refresh: Callable[[], None], choices: Callable[[], list[str]], elem_id: str) -> None:
    """Make the WebUI's button that looks for what a dropdown offers anew."""

    def fresh() -> dict[str, Any]:  # in the form that the widget has them in: gradio 4 keeps a label with each
        labelled = any(isinstance(choice, tuple) for choice in dropdown.choices)
        return {"choices": [(choice, choice) if labelled else choice for choice in choices()]}

    create_refresh_button(dropdown, refresh, fresh, elem_id)


GRADIO_4 = int(gr.__version__.split(".")[0]) >= 4
ROW = {"elem_classes": ["delta-sampling-row"]}
