"""What adapting a model changes in its estimates of one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

# For each image, the weights of its prompts joined by AND.
PromptWeights = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class PromptParts:
    """What is changed in the estimate of each prompt joined by AND, guided as if it were its image's only one.

    ``change`` is ``(M, C, H, W)``, image after image; ``weights`` say how the parts are joined, ``images`` ``(M,)``
    which image each is of.  With u the negative prompt's change, that of the guided estimate is
    ``u + sum(weight * (change - u))`` for each image.
    """

    change: Tensor
    weights: PromptWeights
    images: Tensor


class Deltas(NamedTuple):
    """What is changed in a step's guided estimates ``(N, C, H, W)``, and in those for the negative prompts.

    Where these are the same by necessity they are one object.  ``parts`` is None where each image has one prompt,
    and where base and adapted model are not told the same parts.
    """

    guided: Tensor
    uncond: Tensor
    parts: PromptParts | None = None


def map_changes(function: Callable[..., Tensor], *deltas: Deltas) -> Deltas:
    """Make deltas of what ``function(images, *changes)`` makes of each kind of change in those given.

    ``images`` are the numbers ``(M,)`` of the changes' images, or None where image after image has one.  All that
    are given are of the same things.
    """
    guided = function(None, *(d.guided for d in deltas))
    same = all(d.uncond is d.guided for d in deltas)
    uncond = guided if same else function(None, *(d.uncond for d in deltas))
    parts = [d.parts for d in deltas if d.parts is not None]
    if len(parts) < len(deltas):
        return Deltas(guided, uncond)
    change = function(parts[-1].images, *(p.change for p in parts))
    return Deltas(guided, uncond, replace(parts[-1], change=change))


def distinct_changes(deltas: Deltas) -> list[Tensor]:
    """Return the changes that are not the same object, the guided estimate's first."""
    different = [deltas.guided] if deltas.uncond is deltas.guided else [deltas.guided, deltas.uncond]
    return different if deltas.parts is None else [*different, deltas.parts.change]


def select_images(tensor: Tensor, images: Tensor | None) -> Tensor:
    """Give each change what its image has of ``(N, ...)``."""
    return tensor if images is None else tensor[images.to(tensor.device)]
