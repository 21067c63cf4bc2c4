"""Read pictures as tensors ``(1, 3, H, W)`` in [0, 1], and hash them."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lib_delta.errors import SettingError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000  # of one picture


def read_picture(source: Path | bytes, name: str = "", ground: float = 0.0) -> Tensor:
    """Read a picture's file, or its content, as ``(1, 3, H, W)`` in [0, 1].

    Transparent pixels become ``ground``: 0 (black), the background of maps, or 1 (white), that of photographs of
    objects.  Raises :class:`SettingError` for a file that is no picture or is too large.
    """
    from PIL import Image

    if isinstance(source, Path):
        name, where = name or source.name, str(source)
    else:
        name = where = name or "a picture"
    with _reading(where), Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as picture:
        return pixels_of(picture, name, ground)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn PIL's errors about a picture's content into :class:`SettingError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        # The message of UnidentifiedImageError shows the file object, and no reason.
        reason = "it has no format that is known" if isinstance(error, UnidentifiedImageError) else error
        raise SettingError(f"{name} cannot be read as a picture ({reason}): a .png, .jpg or .webp is needed") from error


def pixels_of(picture: Image, name: str, ground: float = 0.0) -> Tensor:
    """Convert a PIL image to ``(1, 3, H, W)`` in [0, 1], upright; ``ground`` as in :func:`read_picture`."""
    if picture.width * picture.height > MAX_PIXELS:
        raise SettingError(
            f"{name} has {picture.width} x {picture.height} pixels, and up to {MAX_PIXELS // 10**6} million"
            " are read: make it smaller"
        )
    with _reading(name):
        array = np.asarray(_plain_mode(_upright(picture)))
    return pixels(array, ground)


def _upright(picture: Image) -> Image:
    """Rotate a picture by its EXIF data; leave it as it is if they are broken, as the WebUIs do."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error):
        return picture


def _plain_mode(picture: Image) -> Image:
    if picture.mode.startswith(("I", "F")):
        return picture
    return picture.convert("RGBA" if "A" in picture.mode or "transparency" in picture.info else "RGB")


def pixels(array: np.ndarray, ground: float = 0.0) -> Tensor:  # type: ignore[type-arg]
    """Convert an array of pixels, ``(H, W)`` or ``(H, W, 1, 3 or 4)``, to ``(1, 3, H, W)`` in [0, 1].

    The type and range distinguish 8 bits, 16 bits (also in 32), and floats in [0, 1].  Transparent pixels become
    ``ground``.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise SettingError(f"a picture has shape {array.shape}: height, width and 1, 3 or 4 channels are needed")
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not torch.isfinite(values).all():
        raise SettingError("a picture has pixels that are no numbers: an ordinary picture is needed")
    if array.dtype.kind in "iu":
        values = values / (255.0 if array.dtype == np.uint8 or values.max() <= 255 else 65535.0)
    values = values.clamp(0, 1)
    if values.shape[2] == 4:
        values = values[..., :3] * values[..., 3:] + ground * (1 - values[..., 3:])
    return values.expand(-1, -1, 3).permute(2, 0, 1)[None].contiguous()


def picture_digest(pictures: Sequence[Tensor]) -> str:
    """Return a hash of pictures ``(1, C, H, W)`` in [0, 1], equal for equal pixels at 16 bits."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(repr(tuple(picture.shape)).encode())
        digest.update((picture.detach().cpu() * 65535).round().to(torch.int32).contiguous().numpy().tobytes())
    return digest.hexdigest()
