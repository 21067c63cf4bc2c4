"""Evaluate the source near the size of its training instead of at the target's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_delta.bridges.base import Crossing
from lib_delta.bridges.resizing import averaged, resized, windows_of
from lib_delta.errors import SettingError

Noise = Literal["averaged", "unit"]
SIDE_MULTIPLE = 8  # a UNet halves its latents three times
NEAR = 0.1  # relative difference in size


@dataclass(frozen=True)
class ResolutionBridge:
    """Average the source's latents down to about ``side * side``, and enlarge the delta again.

    Latents of up to ``limit * limit`` pass unchanged.  Half the size is used if it is near ``side``, or with ``halves``
    if it is no more than ``limit * limit``.  Otherwise the aspect ratio is preserved as well as multiples of 8 allow.
    Latents of less than ``smallest * smallest`` are enlarged to twice the size, and the delta is averaged.

    ``noise`` selects how the noise is reduced.  "averaged" averages it with the rest, and evaluates the source at the
    lower sigma that results (2x2 averages halve it).  "unit" preserves its variance, and evaluates the source at the
    target's sigma.  Enlarged noise is white too (:func:`doubled_noise`).  "averaged" enlarges it so that its averages
    are the target's noise, and evaluates the source at twice the target's sigma.

    If the image can be ``tiled``, the delta is enlarged as if opposite edges met.
    """

    side: int
    limit: int
    noise: Noise = "averaged"
    tiled: bool = False
    halves: bool = False
    smallest: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.side <= self.limit:
            raise SettingError(f"resolution bridge: side must be from 1 to the limit {self.limit}, not {self.side}")
        if 2 * self.smallest > self.limit:
            raise SettingError(
                f"resolution bridge: smallest must be at most half of the limit {self.limit}, not {self.smallest}"
            )
        if self.noise not in get_args(Noise):
            raise SettingError(
                f"resolution bridge: noise must be one of {', '.join(get_args(Noise))}, not {self.noise!r}"
            )

    @property
    def label(self) -> str:
        return ""

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        if height * width < self.smallest**2:
            return 2 * height, 2 * width
        if height * width <= self.limit**2:
            return height, width
        # Learned maps predict latents at half the size.  At other sizes they are less accurate.
        if height % 2 == width % 2 == 0 and self._suits(math.sqrt(height * width) / 2):
            return height // 2, width // 2
        shrink = self.side / math.sqrt(height * width)
        # No side may grow, as one of a very elongated image would.
        across = [
            max(SIDE_MULTIPLE, round(length * shrink / SIDE_MULTIPLE) * SIDE_MULTIPLE) for length in (height, width)
        ]
        return min(height, across[0]), min(width, across[1])

    def _suits(self, half: float) -> bool:
        return abs(half / self.side - 1) < NEAR or (self.halves and half <= self.limit)

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        full = (x.shape[-2], x.shape[-1])
        size = self.source_size(*full)
        if size == full:
            return x, sigma, Crossing(denoised, target=denoised)
        if size[0] > full[0]:
            clean, noise = resized(denoised, size, tiled=self.tiled), doubled_noise(x - denoised)
            growth = 2 if self.noise == "averaged" else 1
            return clean + growth * noise, growth * sigma, Crossing(clean, target=denoised)
        clean = averaged(denoised, size)
        crossing = Crossing(clean, target=denoised)
        if self.noise == "averaged":
            return averaged(x, size), sigma * _noise_left(full, size), crossing
        # Each point of the noise is picked at most once, so the result is white again.
        return clean + F.interpolate(x - denoised, size, mode="nearest"), sigma, crossing

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        assert crossing.target is not None
        return resized(delta, (crossing.target.shape[-2], crossing.target.shape[-1]), tiled=self.tiled)


def doubled_noise(noise: Tensor) -> Tensor:
    """Return white noise ``(N, C, 2H, 2W)`` made of white noise ``(N, C, H, W)``, of the same variance.

    Its 2x2 averages are half the noise.  The rest of each square is the noise of distant points: an orthonormal (Haar)
    transform leaves both white.
    """
    down, across = (max(1, length // 3) for length in noise.shape[-2:])
    a, b = noise, noise.roll(down, -2)
    c, d = noise.roll(across, -1), noise.roll((down, across), (-2, -1))
    squares = torch.stack((a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d), 2) / 2
    return F.pixel_shuffle(squares.flatten(1, 2), 2)


def _noise_left(full: tuple[int, int], size: tuple[int, int]) -> float:
    """Return the standard deviation of averaged white noise of unit variance, over all averages."""
    return math.sqrt(math.prod(_mean_share(*lengths) for lengths in zip(full, size)))


def _mean_share(full: int, size: int) -> float:
    """Return the mean of 1 / n, if each of ``size`` averages takes n of ``full`` points."""
    return sum(1 / (end - start) for start, end in windows_of(full, size)) / size
