"""The bridge between models that share a latent space."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lib_delta.bridges.base import Crossing


@dataclass(frozen=True)
class SameSize:
    """The base of bridges that preserve the size of latents."""

    @property
    def label(self) -> str:
        return ""

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width


@dataclass(frozen=True)
class IdentityBridge(SameSize):
    """Pass everything bit for bit, as source and target share the latent space (SD 1.x and 2.x do)."""

    @property
    def label(self) -> str:
        return "same as the side model's"

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        return x, sigma, Crossing(denoised)

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        return delta


SAME_SIZE = IdentityBridge()
