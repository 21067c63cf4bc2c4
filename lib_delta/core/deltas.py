"""The changes that an adaptation makes to the estimates of one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

# For each image, the weights of its prompts that are joined by AND.
PromptWeights = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class PromptParts:
    """The change of each prompt joined by AND, guided as if it were the only prompt of its image.

    ``change`` is ``(M, C, H, W)``, image after image, ``images`` ``(M,)`` the image of each part.  With u the
    change for the negative prompt, an image's guided estimate changes by ``u + sum(weight * (change - u))``.
    """

    change: Tensor
    weights: PromptWeights
    images: Tensor


class Deltas(NamedTuple):
    """The changes of a step's guided estimates, and of those for the negative prompts, ``(N, C, H, W)``.

    Both are one object if they cannot differ.  ``parts`` is None if each image has one prompt, or if base and adapted
    have different parts.
    """

    guided: Tensor
    uncond: Tensor
    parts: PromptParts | None = None


def map_changes(function: Callable[..., Tensor], *deltas: Deltas) -> Deltas:
    """Apply a function to the guided changes, to the negative prompts' changes, and to the parts' changes.

    ``function(images, *changes)`` gets the changes of one kind from each of ``deltas``, and returns the new ones.
    ``images`` are the indices ``(M,)`` of the images of a part's changes, and None for changes of all N images.
    The result shares one object for guided and uncond if all ``deltas`` do, and has parts if they all have.
    """
    guided = function(None, *(d.guided for d in deltas))
    shared = all(d.uncond is d.guided for d in deltas)
    uncond = guided if shared else function(None, *(d.uncond for d in deltas))
    parts = [d.parts for d in deltas if d.parts is not None]
    if len(parts) < len(deltas):
        return Deltas(guided, uncond)
    change = function(parts[-1].images, *(p.change for p in parts))
    return Deltas(guided, uncond, replace(parts[-1], change=change))


def distinct_changes(deltas: Deltas) -> list[Tensor]:
    """Return the changes without repeated objects, the guided estimate's first."""
    distinct = [deltas.guided] if deltas.uncond is deltas.guided else [deltas.guided, deltas.uncond]
    return distinct if deltas.parts is None else [*distinct, deltas.parts.change]


def select_images(tensor: Tensor, images: Tensor | None) -> Tensor:
    """Return the rows of ``(N, ...)`` for each change's image; all N if ``images`` is None."""
    return tensor if images is None else tensor[images.to(tensor.device)]
