"""Reach models that see squares of latent points as channels of one point, such as FLUX.2."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lib_delta.bridges.base import Bridge, Crossing


@dataclass(frozen=True)
class Packed:
    """Unpack the target's latents ``(N, C * side**2, H, W)`` for a bridge of ``(N, C, side * H, side * W)``.

    The point in row dy and column dx of a square is channel ``(c * side + dy) * side + dx``.
    """

    bridge: Bridge
    side: int

    @property
    def label(self) -> str:
        return self.bridge.label

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        return self.bridge.to_source(F.pixel_shuffle(x, self.side), sigma, F.pixel_shuffle(denoised, self.side))

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        return F.pixel_unshuffle(self.bridge.delta_to_target(delta, crossing), self.side)

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        return self.bridge.source_size(self.side * height, self.side * width)
