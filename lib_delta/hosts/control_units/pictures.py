"""Read the units' pictures from any source: a widget, base64, a path on this machine, or img2img."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lib_delta.controls.control_map import ControlMap
from lib_delta.controls.picture_file import pixels, pixels_of, read_picture
from lib_delta.errors import SettingError, shown
from lib_delta.request.setting_choices import RESIZES, ResizeChoice

LONGEST_PATH = 4096  # in characters; longer texts are base64
JUST_RESIZE = 3  # img2img's resize mode for latents; its other modes equal those of units
WHITE, BLACK = 1.0, 0.0
_ADDRESS = re.compile(r"\s*([a-z][a-z0-9+.-]+://|//|\\\\)", re.IGNORECASE)
_DATA = re.compile(r"\s*data:[\w/+.-]*;base64,", re.IGNORECASE)


def pictures_of(sources: Sequence[Any], number: int, ground: float) -> list[Tensor]:
    """Return unit ``number``'s pictures, each ``(1, 3, H, W)`` in [0, 1]; transparent pixels become ``ground``.

    Raises :class:`SettingError` for anything that is no picture, is too large, or lies on another machine.
    """
    return [_picture(source, f"the picture of unit {number}", ground) for source in sources]


def _picture(given: Any, name: str, ground: float) -> Tensor:
    if isinstance(given, str):
        return _read_named(given, name, ground)
    if isinstance(given, bytes):
        return read_picture(given, name, ground)
    if hasattr(given, "getbands"):  # a PIL image, from widgets and img2img
        return pixels_of(given, name, ground)
    if isinstance(given, np.ndarray):
        return pixels(given, ground)
    kind = type(given).__name__
    raise SettingError(f"{name} is a {kind}: base64 or a path on this machine is needed")


def _read_named(text: str, name: str, ground: float) -> Tensor:
    if _ADDRESS.match(text):
        raise SettingError(
            f"{name} is {shown(text.strip(), 40)}, an address, and addresses are not fetched: "
            "give base64 or a path on this machine"
        )
    if data := _DATA.match(text):
        return read_picture(_decoded_base64(text[data.end() :], name), name, ground)
    if len(text) <= LONGEST_PATH and (file := _existing_file(text)):
        return read_picture(file, name, ground)
    return read_picture(_decoded_base64(text, name), name, ground)


def _existing_file(text: str) -> Path | None:
    try:
        path = Path(text)
        return path if path.is_file() else None
    except (OSError, ValueError):  # too long for a name, or with an invalid character
        return None


def _decoded_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SettingError(
            f"{name} is {shown(text, 40)}, neither a file on this machine nor base64: one of these is needed"
        ) from error


def img2img_pictures(p: Any) -> tuple[list[Tensor], ResizeChoice]:
    """Return img2img's pictures as they are sampled, and their resize mode; no pictures in txt2img."""
    pictures = [pixels_of(picture, "img2img's picture", WHITE) for picture in getattr(p, "init_images", None) or []]
    region = _region(p)
    if region is not None:
        return [_cut(picture, region) for picture in pictures], "resize and fill"
    mode = getattr(p, "resize_mode", 0)
    return pictures, RESIZES[0 if mode == JUST_RESIZE else mode]


def img2img_mask(p: Any) -> Tensor | None:
    """Return img2img's mask ``(1, 1, h, w)`` at the size of latents, 1 where it paints; None without a mask."""
    mask: Tensor | None = getattr(p, "nmask", None)
    # Forge and AUTOMATIC1111 repeat the mask for each channel of the latents.
    return None if mask is None else mask.reshape(-1, *mask.shape[-2:])[None, :1].float().cpu()


def cut_like_img2img(p: Any, pictures: Sequence[Tensor], resize: Any) -> list[Tensor]:
    """Cut a unit's pictures as inpainting "only masked" cuts img2img's picture; else return them unchanged."""
    region, images = _region(p), getattr(p, "init_images", None)
    if region is None or not images:
        return list(pictures)
    return [_cut(ControlMap(picture, resize).at(images[0].height, images[0].width, 3), region) for picture in pictures]


def _region(p: Any) -> tuple[int, int, int, int] | None:
    """Return left, top, width and height of the region of inpainting "only masked"; None without it."""
    if getattr(p, "image_mask", None) is None or not getattr(p, "inpaint_full_res", False):
        return None
    return getattr(p, "paste_to", None)


def _cut(picture: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    left, top, width, height = region
    return picture[..., top : top + height, left : left + width]


def in_bytes(picture: Tensor) -> np.ndarray[Any, Any]:
    """Return ``(1, 3, H, W)`` in [0, 1] as ``(H, W, 3)`` in bytes, the form that preprocessors take."""
    return (picture[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def same_size(pictures: Sequence[Tensor], resize: Any, height: int, width: int) -> list[Tensor]:
    """Resize pictures to one size, unless they share one already."""
    if len({picture.shape for picture in pictures}) <= 1:
        return list(pictures)
    return [ControlMap(picture, resize).at(height, width, 3) for picture in pictures]
