"""Resize binary maps (two grey levels) so that they stay binary, and lines one pixel wide stay one pixel wide.

ControlNets were trained with such lines.  The ControlNet extension resizes maps to the same end.  Thinning by pairs of
patterns of Golay's alphabet is textbook material (Gonzalez and Woods, Digital Image Processing).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DARK, LIGHT = 16 / 255, 240 / 255  # the lightest dark level and the darkest light level of a binary map
MAX_ROUNDS = 32  # of thinning; lines are only a few pixels wide
# Patterns of a pixel's neighbourhood: 1 matches the line, -1 the background, 0 both.
SIDE = ((-1, -1, -1), (0, 1, 0), (1, 1, 1))
CORNER = ((0, -1, -1), (1, 1, -1), (0, 1, 0))
SPURS = (((-1, -1, -1), (-1, 1, -1), (0, 0, -1)), ((-1, -1, -1), (-1, 1, -1), (-1, 0, 0)))
# Offsets (down, right) of both neighbours of a pixel, along four lines.
ACROSS = (((0, -1), (0, 1)), ((-1, 0), (1, 0)), ((-1, -1), (1, 1)), ((-1, 1), (1, -1)))
Pattern = tuple[tuple[int, int, int], ...]


def is_binary(picture: Tensor) -> bool:
    """Return whether a picture ``(C, H, W)`` in [0, 1] has one dark and one light level, and no others."""
    low, high = float(picture.min()), float(picture.max())
    return low < DARK and high > LIGHT and bool(((picture == low) | (picture == high)).all())


def rebinarized(before: Tensor, after: Tensor) -> Tensor:
    """Make ``after``, the resized version of the binary picture ``before``, binary; both are ``(C, H, W)``.

    A picture of areas is thresholded.  A picture of lines is reduced to its ridges, thresholded and thinned.
    """
    grey = (after.mean(0) * 255).round()
    if _is_line_art(before):
        grey = torch.where(_is_ridge(grey), grey, torch.zeros_like(grey))
        light = thinned(grey > otsu_threshold(grey), enlarged=after[0].numel() > before[0].numel())
    else:
        light = grey > otsu_threshold(grey)
    return light.to(after.dtype).expand_as(after)


def _is_line_art(picture: Tensor) -> bool:
    """Return whether the opening by a square of 3 x 3 pixels removes more than half of the light pixels."""
    eroded = -F.max_pool2d(-picture[None], 3, 1, 1)
    opened = F.max_pool2d(eroded, 3, 1, 1)[0]
    return bool(2 * (opened < picture).sum() > (picture > 0.5).sum())


def _is_ridge(grey: Tensor) -> Tensor:
    """Return the pixels of ``(H, W)`` that are at least as light as both neighbours along one of four lines."""
    height, width = grey.shape
    padded = F.pad(grey, (1, 1, 1, 1), value=-1)
    ridges = torch.zeros_like(grey, dtype=torch.bool)
    for pair in ACROSS:
        highest = grey
        for down, right in pair:
            highest = torch.maximum(highest, padded[1 + down : 1 + down + height, 1 + right : 1 + right + width])
        ridges |= highest == grey
    return ridges


def otsu_threshold(grey: Tensor) -> float:
    """Return Otsu's threshold (1979), from 0 to 255, which separates dark from light best; light is above it."""
    share = torch.bincount(grey.flatten().long(), minlength=256).double() / grey.numel()
    below = share.cumsum(0)
    dark = (share * torch.arange(256)).cumsum(0)
    above = 1 - below
    between = (dark[-1] * below - dark) ** 2 / (below * above).clamp(min=1e-12)
    between[(below < 1e-7) | (above < 1e-7)] = 0
    return float(between.argmax())


def thinned(lines: Tensor, *, enlarged: bool) -> Tensor:
    """Thin lines, true in ``(H, W)``, to one pixel; also remove their spurs if they were enlarged."""
    for _ in range(MAX_ROUNDS):
        before = lines
        lines = _without(lines, (SIDE, CORNER))
        if torch.equal(before, lines):
            break
    return _without(lines, SPURS) if enlarged else lines


def _without(lines: Tensor, patterns: tuple[Pattern, ...]) -> Tensor:
    """Remove the pixels that match a pattern, pattern by pattern and rotation by rotation."""
    for turn in range(4):
        for pattern in patterns:
            lines = lines & ~_matches(lines, torch.rot90(torch.tensor(pattern), turn).tolist())
    return lines


def _matches(lines: Tensor, pattern: list[list[int]]) -> Tensor:
    """Return where a pattern matches (hit-or-miss transform); pixels outside the picture match anything."""
    height, width = lines.shape
    line, background = (F.pad(part.byte(), (1, 1, 1, 1), value=1).bool() for part in (lines, ~lines))
    matches = torch.ones_like(lines)
    for down, row in enumerate(pattern):
        for right, expected in enumerate(row):
            if expected:
                matches &= (line if expected > 0 else background)[down : down + height, right : right + width]
    return matches
