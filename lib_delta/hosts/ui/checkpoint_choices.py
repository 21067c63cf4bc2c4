"""What the dropdowns of checkpoints offer."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lib_delta.hosts import host
from lib_delta.request.setting_choices import NONE

ALL = "... show all checkpoints"  # at the end of a list of those that can be a base


def checkpoint_choices() -> list[str]:
    """Return what the checkpoint dropdowns offer."""
    return [NONE, *host().catalog.checkpoints()]


def base_choices() -> list[str]:
    """Return what the checkpoint dropdowns offer at first: those that can be a base, or adapt one."""
    fitting = host().catalog.bases()
    return [NONE, *fitting, *([ALL] if len(fitting) < len(host().catalog.checkpoints()) else [])]


def whole_list(value: str, selected: gr.SelectData) -> Any:
    """Offer all checkpoints, where that is what was chosen."""
    return gr.update(choices=checkpoint_choices(), value=NONE) if selected.value == ALL else value
