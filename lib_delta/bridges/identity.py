"""Source and target share the latent space."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lib_delta.bridges.base import Crossing


@dataclass(frozen=True)
class SameSize:
    """What bridges share that leave the size of latents as it is."""

    @property
    def label(self) -> str:
        return ""

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width


@dataclass(frozen=True)
class IdentityBridge(SameSize):
    """Source and target share the latent, as SD 1.x and 2.x do; everything passes bit for bit."""

    @property
    def label(self) -> str:
        return "same as the side model's"

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        return x, sigma, Crossing(denoised)

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        return delta


SAME_SIZE = IdentityBridge()
