"""*Show the delta*: pictures of where and how much a run's delta changed the estimates, beside the result."""

from __future__ import annotations

from typing import Any

import numpy as np
from modules import images
from PIL import Image, ImageDraw

from lib_delta.core.heatmap import HeatMap, colour_map
from lib_delta.hosts.generation.xyz_cell import chosen_script

MAPS_ATTRIBUTE = "delta_sampling_maps"


def keep(p: Any, heat: HeatMap) -> None:
    """Keep a batch's maps until the generation ends."""
    maps = p.__dict__.setdefault(MAPS_ATTRIBUTE, [])
    maps += [(sizes, heat.steps) for sizes in heat.mean()]


def show(p: Any, processed: Any) -> None:
    """Put the maps beside the pictures that were made.

    Not where a script of the WebUI runs: it takes all pictures for its own, tiles and cells among them.
    """
    maps = p.__dict__.pop(MAPS_ATTRIBUTE, [])
    if not maps or chosen_script(p):
        return
    apart = getattr(processed, "extra_images", None)
    first = getattr(processed, "index_of_first_image", 0)  # a grid may go before
    texts = list(processed.infotexts[first:])
    for number, (sizes, steps) in enumerate(maps):
        height, width = p.height, p.width  # a picture of inpainting is larger where its mask alone was sampled
        if getattr(p, "enable_hr", False):
            height, width = p.hr_upscale_to_y or height, p.hr_upscale_to_x or width
        drawn = picture(sizes, steps, height, width)
        if apart is not None:
            apart.append(drawn)
        else:  # each picture has a text, by which the WebUI saves it
            processed.images.append(drawn)
            processed.infotexts.append(texts[number] if number < len(texts) else "")


def picture(sizes: Any, steps: int, height: int, width: int) -> Image.Image:
    """Draw a map ``(h, w)`` with a scale below, as large as the picture that it is of."""
    letters = max(10, min(height, width) // 32)
    bar = 2 * letters
    drawn = Image.new("RGB", (width, height), "black")
    drawn.paste(Image.fromarray(colour_map(sizes, height - bar, width)))
    scale = np.tile(np.linspace(0, 1, width, dtype=np.float32), (2, 1))
    drawn.paste(Image.fromarray(colour_map(scale, bar // 4, width)), (0, height - bar))
    pen, font = ImageDraw.Draw(drawn), images.get_font(letters)
    top = float(sizes.max())
    words = f"{100 * top:.2g}%" if top < 1 else f"{top:.0%}"
    line = height - bar + bar // 4
    pen.text((letters // 3, line), "0", fill="white", font=font)
    pen.text((width - letters // 3, line), words, fill="white", font=font, anchor="ra")
    pen.text((width // 2, line), _caption(font, steps, width - 8 * letters), fill="white", font=font, anchor="ma")
    return drawn


def _caption(font: Any, steps: int, width: float) -> str:
    """Return the longest caption that fits."""
    counted = f"mean of {steps} step{'' if steps == 1 else 's'}"
    captions = (f"the delta, as a share of the estimate, {counted}", f"the delta, {counted}", "the delta")
    return next((caption for caption in captions if font.getlength(caption) <= width), "")
