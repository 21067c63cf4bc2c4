"""Change the size of latents, by operations that every device supports."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resized(x: Tensor, size: tuple[int, int], *, tiled: bool = False) -> Tensor:
    """Return ``(N, C, H, W)`` at another size: averaged over areas along sides that shrink, bilinear along others.

    If the image can be ``tiled``, it is enlarged as if opposite edges met.
    """
    height, width = x.shape[-2:]
    x = averaged(x, (min(height, size[0]), min(width, size[1])))
    if x.shape[-2:] == size:
        return x
    return (_enlarged_tile if tiled else _enlarged)(x, *size)


def _enlarged(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)


def _enlarged_tile(x: Tensor, height: int, width: int) -> Tensor:
    """Enlarge after padding with as much of the opposite edges as makes whole points of the result."""
    rows, columns = x.shape[-2:]
    down, across = rows // math.gcd(rows, height), columns // math.gcd(columns, width)
    more_down, more_across = down * height // rows, across * width // columns
    around = F.pad(x, (across, across, down, down), mode="circular")
    enlarged = _enlarged(around, height + 2 * more_down, width + 2 * more_across)
    return enlarged[..., more_down : more_down + height, more_across : more_across + width]


def averaged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average ``(N, C, H, W)`` down to ``(N, C, *size)``, as ``interpolate`` does in its mode "area".

    Apple's devices support that mode only for windows that divide the size.  This function transfers nothing to the
    device.
    """
    for dim, length in ((2, size[0]), (3, size[1])):
        x = x if x.shape[dim] == length else _along(x, dim, length)
    return x


def _along(x: Tensor, dim: int, size: int) -> Tensor:
    """Average along one dimension, whose windows repeat with the period of the greatest common divisor."""
    periods = math.gcd(x.shape[dim], size)
    parts = x.unflatten(dim, (periods, -1))
    length, count = parts.shape[dim + 1], size // periods
    windows = [
        parts.narrow(dim + 1, start, end - start).mean(dim + 1, keepdim=True)
        for start, end in windows_of(length, count)
    ]
    return torch.cat(windows, dim + 1).flatten(dim, dim + 1)


def windows_of(length: int, count: int) -> list[tuple[int, int]]:
    """Return start and end of each of ``count`` windows over ``length``; windows that do not divide it overlap."""
    return [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
