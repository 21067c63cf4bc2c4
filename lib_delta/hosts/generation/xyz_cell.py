"""Cells of an XYZ plot: what sets them apart from other generations, and the picture of one that cannot be made."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import torch
from modules import images, processing
from PIL import Image, ImageDraw
from torch import Tensor

PLOT = "x/y/z plot"
# The text that a WebUI writes into the plot's own picture is told by it from those of its cells.
SCRIPT = "Script"


def chosen_script(p: Any) -> str:
    """Return the title, in small letters, of the script that is chosen below the accordions; empty for none."""
    chosen = next(iter(getattr(p, "script_args", None) or ()), 0)
    selectable = getattr(getattr(p, "scripts", None), "selectable_scripts", ())
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 < chosen <= len(selectable):
        return ""
    return str(selectable[chosen - 1].title()).lower()


def is_xyz_cell(p: Any) -> bool:
    """Tell whether a generation is a cell of the plot."""
    return chosen_script(p) == PLOT


def write_infotext_of_grid(p: Any, claims: dict[str, str]) -> None:
    """Have the plot's own text say what its cells ask for, where a cell's own text says something else, or nothing."""
    if "callable" not in processing.create_infotext.__code__.co_names:
        return  # an older WebUI writes texts alone
    said = p.extra_generation_params

    def claim(value: str, of_cell: str | None) -> Any:
        return lambda **about: value if SCRIPT in about["p"].extra_generation_params else of_cell

    for label, value in claims.items():
        if said.get(label) != value:
            said[label] = claim(value, said.get(label))


class DecodedImages(list[Tensor]):
    """Pictures ``(3, H, W)`` from -1 to 1, in place of latents."""

    already_decoded = True


def error_images(p: Any, sentence: str) -> DecodedImages:
    """Return a batch of pictures that bear a sentence: without, the cell would be black."""
    size = max(11, min(p.width, p.height) // 24)
    font = images.get_font(size)
    lines = textwrap.wrap(sentence, max(8, int(p.width / (0.55 * size)) - 2))
    picture = Image.new("RGB", (p.width, p.height), "white")
    ImageDraw.Draw(picture).multiline_text((size, size), "\n".join(lines), fill="black", font=font, spacing=size // 3)
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return DecodedImages([pixels] * len(p.prompts))
