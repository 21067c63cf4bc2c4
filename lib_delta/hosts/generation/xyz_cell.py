"""Cells of an XYZ plot: their axes' values, the grid's infotext, and the picture of a cell that failed."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from modules import images, processing
from PIL import Image, ImageDraw
from torch import Tensor

from lib_delta.hosts.generation import nested_runs
from lib_delta.hosts.generation.state import AXES_ATTRIBUTE, axes_of

PLOT = "x/y/z plot"
# The WebUI sets this label only while it writes the grid's infotext.
SCRIPT = "Script"


class LastCell:
    """The cell that was processed last, whose axes also apply to the generations within it (those of faces)."""

    def __init__(self) -> None:
        self._job: float | None = None
        self._axes: dict[str, Any] = {}

    def axes_of(self, p: Any) -> dict[str, Any]:
        """Return a generation's axes, which are stored on it if they are those of the cell around it."""
        if hasattr(p, AXES_ATTRIBUTE):
            self._job, self._axes = nested_runs.job(), axes_of(p)
        elif nested_runs.job() is not None and self._job == nested_runs.job():
            setattr(p, AXES_ATTRIBUTE, self._axes)
        return axes_of(p)


def chosen_script(p: Any) -> str:
    """Return the title, in lower case, of the script that is selected below the accordions; empty for none."""
    chosen = next(iter(getattr(p, "script_args", None) or ()), 0)
    selectable = getattr(getattr(p, "scripts", None), "selectable_scripts", ())
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 < chosen <= len(selectable):
        return ""
    return str(selectable[chosen - 1].title()).lower()


def is_xyz_cell(p: Any) -> bool:
    """Return whether a generation is a cell of an XYZ plot."""
    return chosen_script(p) == PLOT


def write_infotext_of_grid(p: Any, entries: dict[str, str]) -> None:
    """Write entries into the grid's infotext, and leave those of the cell as they are."""
    if "callable" not in processing.create_infotext.__code__.co_names:
        return  # an older WebUI takes only strings
    params = p.extra_generation_params
    for label, value in entries.items():
        if params.get(label) != value:
            params[label] = _only_in_grid(value, params.get(label))


def _only_in_grid(value: str, in_cell: str | None) -> Callable[..., Any]:
    return lambda **state: value if SCRIPT in state["p"].extra_generation_params else in_cell


class DecodedImages(list[Tensor]):
    """Images ``(3, H, W)`` from -1 to 1, which the WebUI takes instead of latents."""

    already_decoded = True


def error_images(p: Any, message: str) -> DecodedImages:
    """Return a batch of pictures that show a message."""
    size = max(11, min(p.width, p.height) // 24)
    font = images.get_font(size)
    lines = textwrap.wrap(message, max(8, int(p.width / (0.55 * size)) - 2))
    picture = Image.new("RGB", (p.width, p.height), "white")
    ImageDraw.Draw(picture).multiline_text((size, size), "\n".join(lines), fill="black", font=font, spacing=size // 3)
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return DecodedImages([pixels] * len(p.prompts))
