"""Averages over areas, by operations that every device supports."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def averaged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average ``(N, C, H, W)`` down to ``(N, C, *size)``, as ``interpolate`` does in its mode "area".

    Apple's devices support that mode only for windows that divide the size.  This function transfers nothing to the
    device.
    """
    return _along(_along(x, 2, size[0]), 3, size[1])


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
