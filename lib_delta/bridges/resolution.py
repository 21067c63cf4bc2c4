"""Evaluate the source at the size of its training instead of the target's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

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

    ``noise`` selects how the noise is reduced.  "averaged" averages it with the rest, and evaluates the source at the
    lower sigma that results (2x2 averages halve it).  "unit" preserves its variance, and evaluates the source at the
    target's sigma.

    If the image can be ``tiled``, the delta is enlarged as if opposite edges met.
    """

    side: int
    limit: int
    noise: Noise = "averaged"
    tiled: bool = False
    halves: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.side <= self.limit:
            raise SettingError(f"resolution bridge: side must be from 1 to the limit {self.limit}, not {self.side}")
        if self.noise not in get_args(Noise):
            raise SettingError(
                f"resolution bridge: noise must be one of {', '.join(get_args(Noise))}, not {self.noise!r}"
            )

    @property
    def label(self) -> str:
        return ""

    def source_size(self, height: int, width: int) -> tuple[int, int]:
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
        clean = averaged(denoised, size)
        crossing = Crossing(clean, target=denoised)
        if self.noise == "averaged":
            return averaged(x, size), sigma * _noise_left(full, size), crossing
        # Each point of the noise is picked at most once, so the result is white again.
        return clean + F.interpolate(x - denoised, size, mode="nearest"), sigma, crossing

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        assert crossing.target is not None
        return resized(delta, (crossing.target.shape[-2], crossing.target.shape[-1]), tiled=self.tiled)


def _noise_left(full: tuple[int, int], size: tuple[int, int]) -> float:
    """Return the standard deviation of averaged white noise of unit variance, over all averages."""
    return math.sqrt(math.prod(_mean_share(*lengths) for lengths in zip(full, size)))


def _mean_share(full: int, size: int) -> float:
    """Return the mean of 1 / n, if each of ``size`` averages takes n of ``full`` points."""
    return sum(1 / (end - start) for start, end in windows_of(full, size)) / size
