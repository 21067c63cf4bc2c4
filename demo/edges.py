"""Edge maps of pictures, as ControlNets for Canny edges read them, and the agreement of edges."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Thresholds on Sobel's 8-bit gradient, as in the WebUIs' preprocessors: to start a line, and to continue one.
LOW, HIGH = 100.0, 200.0
TOLERANCE = 1  # pixels between two lines that count as the same


def edge_maps(pictures: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """Find the edges of ``(N, 3, H, W)`` in [-1, 1] (Canny 1986, without a blur), as 0 or 1 in ``(N, H, W)``."""
    across, down = _gradient(pictures)
    strength = across.abs() + down.abs()
    thin = strength * _is_ridge(strength, across, down)
    found, possible = thin > high, thin > low
    while True:
        grown = (F.max_pool2d(found.float()[:, None], 3, 1, 1)[:, 0] > 0) & possible
        if torch.equal(grown, found):
            return found.float()
        found = grown


def _gradient(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return Sobel's gradient ``(N, H, W)`` across and down, from the channel with the largest one."""
    smooth, change = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack((smooth[:, None] * change, change[:, None] * smooth))[:, None]
    padded = F.pad(127.5 * (pictures.float() + 1), (1, 1, 1, 1), mode="replicate")
    both = F.conv2d(padded.flatten(0, 1)[:, None], kernels.to(pictures.device)).unflatten(0, pictures.shape[:2])
    best = both.abs().sum(2).argmax(1)[:, None, None].expand(-1, 1, 2, -1, -1)
    across, down = both.gather(1, best)[:, 0].unbind(1)
    return across, down


def _is_ridge(strength: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Return the pixels of ``(N, H, W)`` that are at least as strong as both neighbours along the gradient."""
    padded, (height, width) = F.pad(strength, (1, 1, 1, 1)), strength.shape[1:]

    def beside(x: int, y: int) -> Tensor:
        return padded[:, 1 + y : 1 + y + height, 1 + x : 1 + x + width]

    flat, steep = down.abs() < 0.4142 * across.abs(), down.abs() > 2.4142 * across.abs()
    falling = across * down > 0
    ways = ((1, 0), (0, 1), (1, 1), (-1, 1))
    which = torch.where(flat, 0, torch.where(steep, 1, torch.where(falling, 2, 3)))
    ridges = [(strength > beside(-x, -y)) & (strength >= beside(x, y)) for x, y in ways]
    return torch.stack(ridges).gather(0, which[None])[0]


def agreement(found: Tensor, wanted: Tensor, tolerance: int = TOLERANCE) -> Tensor:
    """Return the F1 score ``(N,)`` of edges ``(N, H, W)`` against others; 1 if each lies on one of the other."""
    precision, recall = _covered(found, wanted, tolerance), _covered(wanted, found, tolerance)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-6)


def _covered(edges: Tensor, by: Tensor, tolerance: int) -> Tensor:
    """Return the share of edges that lie on or next to others."""
    near = F.max_pool2d(by[:, None], 2 * tolerance + 1, 1, tolerance)[:, 0]
    return (edges * near).sum((1, 2)) / edges.sum((1, 2)).clamp(min=1)
