"""The choices of the checkpoint dropdowns."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lib_delta.hosts import host
from lib_delta.request.setting_choices import NONE

ALL = "... show all checkpoints"  # ends a list that has only the possible bases


def checkpoint_choices() -> list[str]:
    """Return all checkpoints."""
    return [NONE, *host().catalog.checkpoints()]


def base_choices() -> list[str]:
    """Return the checkpoints that can be a base or adapt one, and ``ALL`` if there are others."""
    bases = host().catalog.bases()
    return [NONE, *bases, *([ALL] if len(bases) < len(host().catalog.checkpoints()) else [])]


def whole_list(value: str, selected: gr.SelectData) -> Any:
    """Return the update that shows all checkpoints if the user selected ``ALL``, or else the value."""
    return gr.update(choices=checkpoint_choices(), value=NONE) if selected.value == ALL else value
