"""Maps of two levels stay maps of two levels when they are scaled, and edges one pixel wide stay that.

ControlNets were trained with such edges.  The ControlNet extension scales maps to the same end; thinning by the
pairs of patterns of Golay's alphabet is a textbook's (Gonzalez and Woods, Digital Image Processing).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DARK, LIGHT = 16 / 255, 240 / 255  # of two levels, at most and at least
ROUNDS = 32  # of thinning; lines are but a few pixels wide
# What is around a pixel: 1 is of the line, -1 is not, 0 is either.
SIDE = ((-1, -1, -1), (0, 1, 0), (1, 1, 1))
CORNER = ((0, -1, -1), (1, 1, -1), (0, 1, 0))
SPURS = (((-1, -1, -1), (-1, 1, -1), (0, 0, -1)), ((-1, -1, -1), (-1, 1, -1), (-1, 0, 0)))
ACROSS = (((0, -1), (0, 1)), ((-1, 0), (1, 0)), ((-1, -1), (1, 1)), ((-1, 1), (1, -1)))  # neighbours along four lines
Pattern = tuple[tuple[int, int, int], ...]


def two_levels(picture: Tensor) -> bool:
    """Tell whether a picture ``(C, H, W)`` in [0, 1] has dark and light, and nothing in between."""
    low, high = float(picture.min()), float(picture.max())
    return low < DARK and high > LIGHT and bool(((picture == low) | (picture == high)).all())


def redrawn(before: Tensor, after: Tensor) -> Tensor:
    """Bring ``after``, what scaling has made of a picture of two levels, to two levels: ``(C, H, W)`` each."""
    lines, grey = _of_lines(before), (after.mean(0) * 255).round()
    if lines:
        grey = torch.where(_on_a_ridge(grey), grey, torch.zeros_like(grey))
    drawn = grey > threshold(grey)
    if lines:
        drawn = thinned(drawn, larger=after[0].numel() > before[0].numel())
    return drawn.to(after.dtype).expand_as(after)


def _of_lines(picture: Tensor) -> bool:
    """Tell whether more than half of what is light is gone where a square of 3 x 3 pixels does not fit in."""
    eroded = -F.max_pool2d(-picture[None], 3, 1, 1)
    opened = F.max_pool2d(eroded, 3, 1, 1)[0]
    return bool(2 * (opened < picture).sum() > (picture > 0.5).sum())


def _on_a_ridge(grey: Tensor) -> Tensor:
    """Tell which pixels of ``(H, W)`` neither neighbour surpasses, along one line at least."""
    height, width = grey.shape
    around = F.pad(grey, (1, 1, 1, 1), value=-1)
    found = torch.zeros_like(grey, dtype=torch.bool)
    for pair in ACROSS:
        highest = grey
        for down, right in pair:
            highest = torch.maximum(highest, around[1 + down : 1 + down + height, 1 + right : 1 + right + width])
        found |= highest == grey
    return found


def threshold(grey: Tensor) -> float:
    """Return the level, of 0 to 255, by which dark and light are apart most (Otsu, 1979); light is above it."""
    share = torch.bincount(grey.flatten().long(), minlength=256).double() / grey.numel()
    below = share.cumsum(0)
    dark = (share * torch.arange(256)).cumsum(0)
    above = 1 - below
    between = (dark[-1] * below - dark) ** 2 / (below * above).clamp(min=1e-12)
    between[(below < 1e-7) | (above < 1e-7)] = 0
    return float(between.argmax())


def thinned(drawn: Tensor, larger: bool) -> Tensor:
    """Make lines, true in ``(H, W)``, one pixel wide; where they were enlarged, their spurs go as well."""
    for _ in range(ROUNDS):
        before = drawn
        drawn = _without(drawn, (SIDE, CORNER))
        if torch.equal(before, drawn):
            break
    return _without(drawn, SPURS) if larger else drawn


def _without(drawn: Tensor, patterns: tuple[Pattern, ...]) -> Tensor:
    """Take away the pixels around which a pattern fits, pattern by pattern and turn by turn."""
    for turn in range(4):
        for pattern in patterns:
            drawn = drawn & ~_fits(drawn, torch.rot90(torch.tensor(pattern), turn).tolist())
    return drawn


def _fits(drawn: Tensor, pattern: list[list[int]]) -> Tensor:
    """Tell where a pattern fits; outside of the picture it does."""
    height, width = drawn.shape
    on, off = (F.pad(part.byte(), (1, 1, 1, 1), value=1).bool() for part in (drawn, ~drawn))
    found = torch.ones_like(drawn)
    for down, row in enumerate(pattern):
        for right, wanted in enumerate(row):
            if wanted:
                found &= (on if wanted > 0 else off)[down : down + height, right : right + width]
    return found
