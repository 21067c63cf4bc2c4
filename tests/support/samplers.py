"""Closed-form denoisers, and the samplers of k-diffusion that run them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from lib_delta.diffusion.parameterization import Parameterization, Schedule, denoiser
from tests.support.tiny_unet import randn

SD = Schedule.stable_diffusion()
SIGMAS = torch.tensor([14.0, 7.0, 3.0, 1.2, 0.4, 0.1, 0.0])


def model(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A closed-form denoiser: eps is the noise of a picture that only the seed decides, bent a little by x."""
    picture = randn(1, 4, 8, 8, seed=seed)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return x - 0.3 * picture + 0.1 * torch.sin(x + t[:, None, None, None] / 200)

    return denoiser(network, Parameterization("eps", SD))


TARGET, BASE, ADAPTED = model(1), model(2), model(3)


def k_diffusion_samplers() -> list[str]:
    try:
        from k_diffusion import sampling
    except ImportError:
        return []
    return [name.removeprefix("sample_") for name in dir(sampling) if name.startswith("sample_")]


def run(name: str, denoise: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    from k_diffusion import sampling

    sample = getattr(sampling, f"sample_{name}")
    asked = inspect.signature(sample).parameters
    if "sigma_min" in asked:
        levels = {"sigma_min": 0.1, "sigma_max": 14.0, **({"n": 7} if "n" in asked else {})}
    else:
        levels = {"sigmas": SIGMAS}
    torch.manual_seed(5)
    return sample(denoise, 14 * randn(2, 4, 8, 8), **levels, disable=True)
