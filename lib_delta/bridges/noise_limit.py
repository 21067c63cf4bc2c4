"""Limit the source's noise level to that of its training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_delta.bridges.base import Crossing
from lib_delta.bridges.identity import SameSize
from lib_delta.diffusion.parameterization import per_image


@dataclass(frozen=True)
class NoiseLimitBridge(SameSize):
    """Show the source no more noise than ``sigma_max``.

    A target with zero terminal SNR starts at a sigma in the thousands, and one of flow matching at an unlimited one.
    There an eps model's estimate is its magnified error.  Above ``sigma_max`` the source receives the same clean part
    and the same noise, at ``sigma_max``.
    """

    sigma_max: float

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        limited = sigma.clamp(max=self.sigma_max)
        share = per_image(limited / sigma, x)
        # The x of images within the limit stays the same bit for bit.
        return torch.where(share < 1, denoised + share * (x - denoised), x), limited, Crossing(denoised)

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        return delta
