"""*Show the delta*: pictures of where, and by how much, a run's delta changed the estimates."""

from __future__ import annotations

from typing import Any

import numpy as np
from modules import images
from PIL import Image, ImageDraw

from lib_delta.core.heatmap import HeatMap, colour_map
from lib_delta.hosts.generation.xyz_cell import chosen_script

MAPS_ATTRIBUTE = "delta_sampling_maps"


def store_maps(p: Any, heat: HeatMap) -> None:
    """Store a batch's maps until the generation ends."""
    maps = vars(p).setdefault(MAPS_ATTRIBUTE, [])
    maps += [(sizes, heat.steps) for sizes in heat.mean()]


def show_maps(p: Any, processed: Any) -> None:
    """Add a generation's maps to its pictures.

    Scripts of the WebUI get none: they take every picture for one of theirs, such as a tile or a cell.
    """
    maps = vars(p).pop(MAPS_ATTRIBUTE, [])
    if not maps or chosen_script(p):
        return
    extra_images = getattr(processed, "extra_images", None)
    first = getattr(processed, "index_of_first_image", 0)  # after the grid, if there is one
    infotexts = list(processed.infotexts[first:])
    for number, (sizes, steps) in enumerate(maps):
        height, width = p.height, p.width  # not the picture's: inpainting only the mask returns a larger one
        if getattr(p, "enable_hr", False):
            height, width = p.hr_upscale_to_y or height, p.hr_upscale_to_x or width
        picture = draw_map(sizes, steps, height, width)
        if extra_images is not None:
            extra_images.append(picture)
        else:  # the WebUI saves each picture with its infotext
            processed.images.append(picture)
            processed.infotexts.append(infotexts[number] if number < len(infotexts) else "")


def draw_map(sizes: Any, steps: int, height: int, width: int) -> Image.Image:
    """Draw a map ``(h, w)`` above its colour scale, in an image of the given size."""
    font_size = max(10, min(height, width) // 32)
    bar = 2 * font_size
    image = Image.new("RGB", (width, height), "black")
    image.paste(Image.fromarray(colour_map(sizes, height - bar, width)))
    scale = np.tile(np.linspace(0, 1, width, dtype=np.float32), (2, 1))
    image.paste(Image.fromarray(colour_map(scale, bar // 4, width)), (0, height - bar))
    draw, font = ImageDraw.Draw(image), images.get_font(font_size)
    largest = float(sizes.max())
    label = f"{100 * largest:.2g}%" if largest < 1 else f"{largest:.0%}"
    line = height - bar + bar // 4
    draw.text((font_size // 3, line), "0", fill="white", font=font)
    draw.text((width - font_size // 3, line), label, fill="white", font=font, anchor="ra")
    draw.text((width // 2, line), _caption(font, steps, width - 8 * font_size), fill="white", font=font, anchor="ma")
    return image


def _caption(font: Any, steps: int, width: float) -> str:
    """Return the longest caption that fits."""
    mean = f"mean of {steps} step{'' if steps == 1 else 's'}"
    captions = (f"the delta, as a share of the estimate, {mean}", f"the delta, {mean}", "the delta")
    return next((caption for caption in captions if font.getlength(caption) <= width), "")
