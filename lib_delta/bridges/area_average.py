"""Averages over areas, in terms that every device has."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def averaged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average ``(N, C, H, W)`` down to ``(N, C, *size)``, as ``interpolate`` does in its mode "area".

    Apple's devices have that only for windows that divide the size.  Nothing is brought to the device for it.
    """
    return _along(_along(x, 2, size[0]), 3, size[1])


def _along(x: Tensor, dim: int, size: int) -> Tensor:
    """Average along one dimension; the windows are the same in each of its periods."""
    periods = math.gcd(x.shape[dim], size)
    parts = x.unflatten(dim, (periods, -1))
    length, count = parts.shape[dim + 1], size // periods
    windows = [
        parts.narrow(dim + 1, start, end - start).mean(dim + 1, keepdim=True)
        for start, end in windows_of(length, count)
    ]
    return torch.cat(windows, dim + 1).flatten(dim, dim + 1)


def windows_of(length: int, count: int) -> list[tuple[int, int]]:
    """Return where each of ``count`` windows over a ``length`` starts and ends; those that do not divide it overlap."""
    return [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
