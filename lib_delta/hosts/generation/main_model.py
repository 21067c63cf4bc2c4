"""The main checkpoint, which the WebUI samples with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from lib_delta.diffusion.families import Family
    from lib_delta.models.token_merging import TokenMerging


@dataclass(frozen=True)
class MainModel:
    """The properties of the main checkpoint that the delta depends on.

    ``sigma_max`` is the largest noise level of its schedule.  ``flow`` marks flow matching: its samplers work with
    ``(1 - t) * x0 + t * noise`` and call t sigma, and ``sigma_max`` is infinite.  ``merging`` is the token merging
    that it runs with now.  ``tiled`` tells that opposite edges of its images match.
    """

    family: Family
    sigma_max: float
    flow: bool = False
    merging: TokenMerging | None = None
    tiled: bool = False


def tiles(model: nn.Module | None) -> bool:
    """Return whether a model makes tileable images: its convolutions pad with the opposite edge.

    The request's setting is no measure: not every WebUI follows it, and a refiner may differ.
    """
    for layer in () if model is None else model.modules():
        mode = getattr(layer, "padding_mode", None)
        if mode is not None and getattr(layer, "padding", 0) not in (0, (0, 0)):
            return bool(mode == "circular")
    return False
