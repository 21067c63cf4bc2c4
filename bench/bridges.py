"""What a learned bridge costs in a step, beside the pass of the side model that it serves."""

from __future__ import annotations

import torch

from bench import operations
from lib_delta.bridges import choose_bridge
from lib_delta.diffusion.families import Family

SIDE = 128  # latents of 1024 x 1024 pixels


def gflop(target: Family) -> float:
    """Return the operations, in units of 10^9, of the way to SD 1.x and back for one picture of 1024 x 1024."""
    bridge, clean = choose_bridge(Family.SD1, target), torch.randn(1, target.latent_channels, SIDE, SIDE)

    def cross() -> None:
        x, _, crossing = bridge.to_source(clean, torch.ones(1), clean)
        bridge.delta_to_target(x, crossing)

    return operations.gflop(cross)
