"""The pictures of units, wherever they come from: a widget, base64, a path on this machine, img2img's own."""

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
from lib_delta.request.control_unit import RESIZES

LONGEST_PATH = 4096  # in characters; what is longer is base64
JUST_RESIZE = 3  # img2img's resize modes are those of units, and one more: resized as latents
WHITE, BLACK = 1.0, 0.0
_ADDRESS = re.compile(r"\s*([a-z][a-z0-9+.-]+://|//|\\\\)", re.IGNORECASE)
_DATA = re.compile(r"\s*data:[\w/+.-]*;base64,", re.IGNORECASE)


def pictures_of(given: Sequence[Any], number: int, ground: float) -> list[Tensor]:
    """Return unit ``number``'s pictures, each ``(1, 3, H, W)`` in [0, 1]; transparent becomes ``ground``.

    Raises :class:`SettingError` for what is no picture, is too large, or lies on another machine.
    """
    return [_picture(each, f"the picture of unit {number}", ground) for each in given]


def _picture(given: Any, name: str, ground: float) -> Tensor:
    if isinstance(given, str):
        return _read_named(given, name, ground)
    if isinstance(given, bytes):
        return read_picture(given, name, ground)
    if hasattr(given, "getbands"):  # PIL's, as widgets and img2img have them
        return pixels_of(given, name, ground)
    if isinstance(given, np.ndarray):
        return pixels(given, ground)
    kind = type(given).__name__
    raise SettingError(f"{name} is a {kind}: base64 or a path on this machine is needed")


def _read_named(text: str, name: str, ground: float) -> Tensor:
    if _ADDRESS.match(text):
        raise SettingError(
            f"{name} is {shown(text.strip(), 40)}, an address, and none are fetched: "
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
    except (OSError, ValueError):  # longer than names can be, or with a sign that none has
        return None


def _decoded_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SettingError(
            f"{name} is {shown(text, 40)}, neither a file on this machine nor base64: one of these is needed"
        ) from error


def own_pictures(p: Any) -> tuple[list[Tensor], str]:
    """Return img2img's own pictures as they are sampled, and how they are brought to size; none in txt2img."""
    taken = [pixels_of(picture, "img2img's picture", WHITE) for picture in getattr(p, "init_images", None) or []]
    region = _region(p)
    if region is not None:
        return [_cut(picture, region) for picture in taken], "resize and fill"
    mode = getattr(p, "resize_mode", 0)
    return taken, RESIZES[0 if mode == JUST_RESIZE else mode]


def own_mask(p: Any) -> Tensor | None:
    """Return where img2img paints, ``(1, 1, h, w)`` in latents of what is sampled, 1 inside; None where it has none."""
    mask: Tensor | None = getattr(p, "nmask", None)
    # Forge and AUTOMATIC1111 have it for each channel of the latents alike.
    return None if mask is None else mask.reshape(-1, *mask.shape[-2:])[None, :1].float().cpu()


def cut_like_own(p: Any, pictures: Sequence[Tensor], resize: Any) -> list[Tensor]:
    """Cut a unit's own pictures as inpainting "only masked" cuts img2img's, laid over it; else as they are."""
    region, own = _region(p), getattr(p, "init_images", None)
    if region is None or not own:
        return list(pictures)
    return [_cut(ControlMap(picture, resize).at(own[0].height, own[0].width, 3), region) for picture in pictures]


def _region(p: Any) -> tuple[int, int, int, int] | None:
    """Return what inpainting "only masked" works on: left, top, width, height."""
    if getattr(p, "image_mask", None) is None or not getattr(p, "inpaint_full_res", False):
        return None
    return getattr(p, "paste_to", None)


def _cut(picture: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    left, top, width, height = region
    return picture[..., top : top + height, left : left + width]


def in_bytes(picture: Tensor) -> np.ndarray[Any, Any]:
    """Return ``(1, 3, H, W)`` in [0, 1] as ``(H, W, 3)`` in bytes, as preprocessors take it."""
    return (picture[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def same_size(pictures: Sequence[Tensor], resize: Any, height: int, width: int) -> list[Tensor]:
    """Bring pictures to one size, if they are not of one already."""
    if len({picture.shape for picture in pictures}) <= 1:
        return list(pictures)
    return [ControlMap(picture, resize).at(height, width, 3) for picture in pictures]
