"""Bridges in sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lib_delta.bridges.base import Bridge, Crossing


@dataclass(frozen=True)
class Composed:
    """Bridges in sequence, from the target to the source."""

    bridges: tuple[Bridge, ...]

    @property
    def label(self) -> str:
        return ", ".join(bridge.label for bridge in self.bridges if bridge.label)

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        parts: list[Crossing] = []
        for bridge in self.bridges:
            x, sigma, crossing = bridge.to_source(x, sigma, denoised)
            denoised = crossing.denoised
            parts.append(crossing)
        return x, sigma, Crossing(denoised, tuple(parts))

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        for bridge, part in zip(reversed(self.bridges), reversed(crossing.parts), strict=True):
            delta = bridge.delta_to_target(delta, part)
        return delta

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        for bridge in self.bridges:
            height, width = bridge.source_size(height, width)
        return height, width
