"""The maps that learned bridges are made of: from one latent space to another, for states and for differences."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Filter(nn.Module):
    """A linear filter over a latent's surroundings, its edges repeated: ``(N, A, H, W)`` to ``(N, B, H, W)``."""

    def __init__(self, channels_in: int, channels_out: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels_out, channels_in, width, width))
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None

    def forward(self, z: Tensor) -> Tensor:
        reach = self.weight.shape[-1] // 2
        return F.conv2d(F.pad(z, [reach] * 4, mode="replicate"), self.weight, self.bias)


class StateMap(nn.Module):
    """A target's clean latent ``(N, A, H, W)`` as the source's ``(N, B, H, W)``."""

    def __init__(self, channels_in: int, channels_out: int, width: int = 5) -> None:
        super().__init__()
        self.filter = Filter(channels_in, channels_out, width, bias=True)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> StateMap:
        """Read the sizes off weight shapes; raises ``KeyError`` or ``IndexError`` if they are of something else."""
        channels_out, channels_in, width, _ = shapes["filter.weight"]
        return cls(channels_in, channels_out, width)

    def forward(self, z: Tensor) -> Tensor:
        return self.filter(z)


class DifferenceMap(nn.Module):
    """A difference of source latents ``(N, A, H, W)`` as one of the target's ``(N, B, H, W)``.

    Linear in the difference, without an offset, whatever the state: nothing stays exactly nothing.
    """

    def __init__(self, channels_in: int, channels_out: int, width: int = 5) -> None:
        super().__init__()
        self.filter = Filter(channels_in, channels_out, width, bias=False)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> DifferenceMap:
        """Read the sizes off weight shapes; raises ``KeyError`` or ``IndexError`` if they are of something else."""
        channels_out, channels_in, width, _ = shapes["filter.weight"]
        return cls(channels_in, channels_out, width)

    def forward(self, difference: Tensor, target: Tensor) -> Tensor:
        return self.filter(difference)
