"""The interface of bridges, and how a form of bridge declares itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lib_delta.diffusion.latent_spaces import Space


@dataclass(frozen=True)
class Crossing:
    """A bridge's record of one step, which carries the delta back.

    ``denoised`` is the clean part in the source's space.  ``target`` is the clean part in the target's space, if the
    way back needs it.  ``parts`` are the crossings of a composed bridge's parts.  ``known`` is the state map's reading
    of ``target``, if the way back shares it.
    """

    denoised: Tensor
    parts: tuple[Crossing, ...] = ()
    target: Tensor | None = None
    known: Tensor | None = None

    def of(self, images: Tensor) -> Crossing:
        """Return the crossing of the rows ``images`` ``(M,)``, which are numbers of images."""
        images = images.to(self.denoised.device)
        target, known = (None if each is None else each[images] for each in (self.target, self.known))
        return Crossing(self.denoised[images], tuple(part.of(images) for part in self.parts), target, known)


class Bridge(Protocol):
    """The way from the target's latent space to the source's and back, for one step at a time.

    Bridges are pure functions: the state of a step travels in its :class:`Crossing`.
    """

    @property
    def label(self) -> str:
        """The bridge's name in the status line; empty for a bridge that only changes size or noise."""
        ...

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        """Map the target's ``x`` ``(N, C, H, W)``, ``sigma`` ``(N,)`` and estimate to the source's x and sigma."""
        ...

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        """Map a delta in the source's space to the target's."""
        ...

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the source's latents for the target's ``height`` and ``width``."""
        ...


@dataclass(frozen=True)
class BridgeSettings:
    """The settings from which a bridge between two different spaces is made.

    ``resolution`` changes the size of latents.  ``tiled`` says whether the image's edges meet across from each other.
    ``autoencoders`` is the folder of tiny autoencoders.
    """

    source: Space
    target: Space
    resolution: Bridge
    tiled: bool = False
    autoencoders: Path | None = None


@dataclass(frozen=True)
class BridgeForm:
    """A form of bridge: its name in requests, its label in the status line, and the function that makes it.

    ``resizes`` says whether the bridge applies ``resolution`` itself.  Such a bridge is fitted to latents of real
    images, so it maps the target's full noise, and the side model's size may be automatic.  ``halves`` makes that half
    the image's size wherever the side model can work at it.
    """

    name: str
    label: str
    make: Callable[[BridgeSettings], Bridge]
    resizes: bool = True
    halves: bool = False
