"""What a bridge is: the target's noisy state seen in the source's latent space, and the delta carried back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Crossing:
    """What a bridge remembers of one step.

    ``denoised`` is the source's clean part, ``target`` what it was made from where the way back needs
    its size, ``parts`` the crossings of a bridge's parts, if it has parts.
    """

    denoised: Tensor
    parts: tuple[Crossing, ...] = ()
    target: Tensor | None = None

    def of(self, images: Tensor) -> Crossing:
        """Return the crossing of as many states as ``images`` ``(M,)`` has numbers, each one's that of its image."""
        images = images.to(self.denoised.device)
        target = None if self.target is None else self.target[images]
        return Crossing(self.denoised[images], tuple(part.of(images) for part in self.parts), target)


class Bridge(Protocol):
    """The way from the target's latent to the source's and back, for one step at a time.

    Bridges are pure functions: what a step needs of its state travels in the crossing.
    """

    @property
    def label(self) -> str:
        """What the status line calls it; empty for one that leaves latents as they are."""
        ...

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        """Map the target's ``x`` ``(N, C, H, W)``, ``sigma`` ``(N,)`` and estimate to the source's x and sigma."""
        ...

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        """Map the delta found in the source's latent to the target's."""
        ...

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        """Tell how large the source's latents are for a target's of ``height`` and ``width``."""
        ...
