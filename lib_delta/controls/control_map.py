"""Control maps: the images that ControlNets and T2I-Adapters read, resized for each pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_delta.controls.line_art import is_binary, rebinarized
from lib_delta.errors import SettingError

MapSize = tuple[int, int]  # height first
ToSize = Callable[[Tensor, int, int], Tensor]
ResizeMode = Literal["just resize", "crop and resize", "resize and fill"]
FEW_COLOURS = 200  # a map with at most as many colours is a segmentation, whose colours must not be mixed


@dataclass(frozen=True)
class ControlMap:
    """One map, or one for each image: ``(count, channels, H, W)`` in [0, 1].

    ``resize`` selects how different proportions are handled.  ``hidden`` ``(count or 1, 1, H, W)`` is above 0.5 for
    hidden pixels, which become -1, the value that the ControlNet for inpainting was trained to fill.  ``larger`` are
    the same maps made for a larger pass; :meth:`at` resizes the ones nearest in size.

    ``frames`` pairs each size of a pass with the size of the image that the source sees in it.  If the proportions of
    the two differ, the source sees the image squeezed, and so the map is squeezed alike.

    Raises :class:`SettingError` for an unknown mode or an empty map.
    """

    pictures: Tensor
    resize: ResizeMode = "just resize"
    hidden: Tensor | None = None
    larger: Tensor | None = None
    frames: Sequence[tuple[MapSize, MapSize]] = ()

    def __post_init__(self) -> None:
        if self.resize not in get_args(ResizeMode):
            raise SettingError(
                f"the resize mode is {self.resize!r}: one of {', '.join(get_args(ResizeMode))} is needed"
            )
        if self.pictures.ndim != 4 or not self.pictures.numel():
            raise SettingError(f"the map has shape {tuple(self.pictures.shape)}, and pictures are needed")

    @property
    def count(self) -> int:
        """The number of maps."""
        return len(self.pictures)

    def at(self, height: int, width: int, channels: int) -> Tensor:
        """Return the maps as ``(count, channels, height, width)``; a single channel is the mean of three."""
        sizes = [self.pictures] if self.larger is None else [self.pictures, self.larger]
        pictures = min(sizes, key=lambda maps: _apart(maps.shape[2:], (height, width)))
        if pictures.shape[1] != channels:
            pictures = pictures.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        resized = self._resized(pictures, height, width, scaled).contiguous()
        if self.hidden is None:
            return resized
        return resized.masked_fill(self._resized(self.hidden, height, width, interpolated) > 0.5, -1)

    def _resized(self, pictures: Tensor, height: int, width: int, to_size: ToSize) -> Tensor:
        if self.resize == "just resize":
            return to_size(pictures, height, width)
        size = height, width
        frame = min(self.frames, key=lambda known: _apart(known[0], size))[1] if self.frames else size
        scales = [of_frame / side for of_frame, side in zip(frame, pictures.shape[2:])]
        scale = max(scales) if self.resize == "crop and resize" else min(scales)
        inner = [
            max(1, round(side * scale * of_pass / of_frame))
            for side, of_pass, of_frame in zip(pictures.shape[2:], size, frame)
        ]
        whole = to_size(pictures, *inner)
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        if self.resize == "crop and resize":
            return whole[..., -top : -top + height, -left : -left + width]
        # Replicate the border, as the WebUIs do: an empty frame would be a line to follow.
        return F.pad(whole, (left, width - inner[1] - left, top, height - inner[0] - top), mode="replicate")


def _apart(one: Sequence[int], other: MapSize) -> float:
    """Return the distance between two sizes: the log of the ratio of their areas."""
    return abs(math.log(one[0] * one[1] / (other[0] * other[1])))


def scaled(pictures: Tensor, height: int, width: int) -> Tensor:
    """Resize maps ``(N, C, H, W)``; labels remain labels, and lines remain lines."""
    if pictures.shape[2:] == (height, width):
        return pictures
    if _few_colours(pictures):
        return F.interpolate(pictures, (height, width), mode="nearest")
    pairs = zip(pictures, interpolated(pictures, height, width))
    return torch.stack([rebinarized(before, after) if is_binary(before) else after for before, after in pairs])


def interpolated(pictures: Tensor, height: int, width: int) -> Tensor:
    """Resize ``(N, C, H, W)``: by averages over areas to a smaller size, bicubic to a larger one."""
    if height <= pictures.shape[2] and width <= pictures.shape[3]:
        return F.interpolate(pictures, (height, width), mode="area")
    return F.interpolate(pictures, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def _few_colours(pictures: Tensor) -> bool:
    """Return whether the first map consists of labels: 3 to 200 colours, some of them not grey."""
    levels = (pictures[0] * 255).round().long()
    mixed = sum(channel * 256**i for i, channel in enumerate(levels[:3]))
    assert isinstance(mixed, Tensor)
    count = len(mixed.unique())
    return levels.shape[0] >= 3 and not bool((levels[0] == levels[1]).all()) and 2 < count <= FEW_COLOURS
