"""Measure how well the colours of pictures agree."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 4  # of each channel: 64 colours in all
WHITE = 0.85  # a pixel is paper if all its channels, in [-1, 1], are above this


def histogram(pictures: Tensor) -> Tensor:
    """Return the shares ``(N, 64)`` of 64 colours among the non-paper pixels of ``(N, 3, H, W)`` in [-1, 1]."""
    levels = ((pictures.clamp(-1, 1) + 1) / 2 * LEVELS).long().clamp(max=LEVELS - 1)
    places = torch.tensor([LEVELS**2, LEVELS, 1], device=pictures.device)[:, None, None]
    colours = F.one_hot((levels * places).sum(1), LEVELS**3).float()
    drawn = (pictures.amin(1) < WHITE).float()[..., None]
    counts = (colours * drawn).sum((1, 2))
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def similarity(pictures: Tensor, references: Tensor) -> Tensor:
    """Return the overlap of pictures' colours with those of references, ``(N,)``; 1 is complete."""
    return torch.minimum(histogram(pictures), histogram(references)).sum(1)
