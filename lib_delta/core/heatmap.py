"""A heat map of the delta: where it changed the target's estimate, and how much, on average over a run's steps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

# From no change to the largest: black, violet, red, orange, pale yellow.
COLOURS = np.array([(4, 4, 16), (82, 18, 124), (182, 54, 92), (250, 148, 30), (252, 250, 190)], np.float64)


class HeatMap:
    """The sum of the sizes of a run's changes."""

    def __init__(self) -> None:
        self.steps = 0
        self._sum: Tensor | None = None

    def add(self, change: Tensor, denoised: Tensor) -> None:
        """Add the change of one step's estimate ``denoised``, both ``(N, C, ..., H, W)`` of any float type.

        The size at a pixel is the root mean square over channels (and frames), divided by the root mean square of
        the image's whole estimate.  If latents grow, as in hires fix, the sum so far is enlarged.
        """
        channels = tuple(range(1, change.dim() - 2))
        whole = denoised.float().square().mean(tuple(range(1, denoised.dim())), keepdim=True).sqrt()
        sizes = (change.float().square().mean(channels, keepdim=True).sqrt() / whole.clamp(min=1e-12)).flatten(1, -3)
        if self._sum is None:
            self._sum = torch.zeros_like(sizes)
        elif self._sum.shape[-2:] != sizes.shape[-2:]:
            self._sum = interpolate(self._sum, sizes.shape[-2:], mode="bilinear")
        self._sum = self._sum + sizes
        self.steps += 1

    def mean(self) -> npt.NDArray[np.float32]:
        """Return the mean over the steps, ``(N, H, W)``, on the CPU; at least one step must have been added."""
        assert self._sum is not None
        mean: npt.NDArray[np.float32] = (self._sum / self.steps)[:, 0].cpu().numpy()
        return mean


def colour_map(sizes: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return sizes ``(H, W)`` as an RGB image ``(height, width, 3)`` in which the largest size is the brightest."""
    smooth = interpolate(torch.from_numpy(sizes)[None, None], (height, width), mode="bilinear")[0, 0].numpy()
    share = smooth / max(float(smooth.max()), 1e-12)
    at = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(share, at, channel) for channel in COLOURS.T], -1).round().astype(np.uint8)
