"""The maps that learned bridges are made of: from one latent space to another, for states and for differences."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]


class Filter(nn.Module):
    """A linear filter over a latent's surroundings, its edges repeated: ``(N, A, H, W)`` to ``(N, B, H, W)``."""

    def __init__(self, channels_in: int, channels_out: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels_out, channels_in, width, width))
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None

    def forward(self, z: Tensor) -> Tensor:
        reach = self.weight.shape[-1] // 2
        return F.conv2d(F.pad(z, [reach] * 4, mode="replicate"), self.weight, self.bias)


class Residual(nn.Module):
    """Two 3x3 convolutions, and what came in added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def _network(channels_in: int, hidden: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, hidden, 3, padding=1), *(Residual(hidden) for _ in range(blocks)), nn.ReLU()
    )


def _network_shape(shapes: Shapes) -> tuple[int, int]:
    """Read width and blocks of a network off its weights' shapes; 0 where there is none."""
    blocks = sum(1 for key in shapes if key.startswith("network.") and key.endswith("conv1.weight"))
    return shapes.get("network.0.weight", (0,))[0], blocks


class StateMap(nn.Module):
    """A target's clean latent ``(N, A, H, W)`` as the source's ``(N, B, H, W)``: a filter, and what a network adds."""

    def __init__(self, channels_in: int, channels_out: int, width: int = 5, hidden: int = 0, blocks: int = 0) -> None:
        super().__init__()
        self.filter = Filter(channels_in, channels_out, width, bias=True)
        self.network = _network(channels_in, hidden, blocks) if hidden else None
        self.head = Filter(hidden, channels_out, 3, bias=True) if hidden else None

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> StateMap:
        """Read the sizes off weight shapes; raises ``KeyError`` or ``ValueError`` if they are of something else."""
        channels_out, channels_in, width, _ = shapes["filter.weight"]
        return cls(channels_in, channels_out, width, *_network_shape(shapes))

    def forward(self, z: Tensor) -> Tensor:
        mapped: Tensor = self.filter(z)
        return mapped if self.network is None or self.head is None else mapped + self.head(self.network(z))


class DifferenceMap(nn.Module):
    """A difference of source latents ``(N, A, H, W)`` as one of the target's ``(N, B, H, W)``.

    A filter without offset: linear, so that a delta may be of any size, and nothing stays exactly nothing.
    """

    def __init__(self, channels_in: int, channels_out: int, width: int = 5) -> None:
        super().__init__()
        self.filter = Filter(channels_in, channels_out, width, bias=False)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> DifferenceMap:
        """Read the sizes off weight shapes; raises ``KeyError`` or ``ValueError`` if they are of something else."""
        channels_out, channels_in, width, _ = shapes["filter.weight"]
        return cls(channels_in, channels_out, width)

    def forward(self, difference: Tensor) -> Tensor:
        carried: Tensor = self.filter(difference)
        return carried
