"""What is told of the main checkpoint, which a WebUI runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from lib_delta.diffusion.families import Family
    from lib_delta.models.token_merging import TokenMerging


@dataclass(frozen=True)
class MainModel:
    """The main checkpoint: its family, the largest noise level of its schedule, and whether it is one of flow matching.

    Samplers of such a model hold ``(1 - t) * x0 + t * noise`` and call t sigma; its largest level is infinite.
    ``merging`` is the token merging that it runs with now; ``tiled`` tells whether its pictures' edges meet.
    """

    family: Family
    sigma_max: float
    flow: bool = False
    merging: TokenMerging | None = None
    tiled: bool = False


def tiles(model: nn.Module | None) -> bool:
    """Tell whether a model makes pictures that can be tiled: its convolutions then go on at the other edge.

    What was asked for does not say so, for not every WebUI does it, and a refiner may do otherwise.
    """
    for layer in () if model is None else model.modules():
        mode = getattr(layer, "padding_mode", None)
        if mode is not None and getattr(layer, "padding", 0) not in (0, (0, 0)):
            return bool(mode == "circular")
    return False
