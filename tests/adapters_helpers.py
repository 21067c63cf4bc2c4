"""Tiny base models and adapter files for the tests of adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lib_delta.adapters import keys
from lib_delta.fork import Conv2d, Linear
from lib_delta.models.unet import UNet, UNetConfig


def config(family: str = "SD1", context_width: int = 24) -> UNetConfig:
    """Return a narrow UNet of the family's layout: two levels, attention in the first."""
    xl = family == "SDXL"
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=32,
        levels=(32, 64),
        res_blocks=(1, 1),
        depth_in=(0, 2) if xl else (1, 0),
        depth_middle=2 if xl else 1,
        depth_out=(2, 2, 0, 0) if xl else (0, 0, 1, 1),
        context_width=context_width,
        linear_projection=family != "SD1",
        label_width=40 if xl else 0,
        head_width=None if family == "SD1" else 16,
    )


def make_unet(family: str = "SD1", seed: int = 0, context_width: int = 24) -> UNet:
    """Return a UNet with random weights of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    unet = UNet(config(family, context_width)).requires_grad_(False).eval()
    for parameter in unet.parameters():
        fan_in = max(1, parameter[0].numel())
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return unet


def inputs(batch: int = 2, context_width: int = 24, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents ``(1, N, 4, 8, 8)``, timesteps ``(N,)`` and a context ``(1, N, 5, width)``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, batch, 4, 8, 8, generator=generator)
    t = torch.linspace(100.0, 900.0, batch)
    return x, t, torch.randn(1, batch, 5, context_width, generator=generator)


def adapted_layers(unet: UNet) -> dict[str, nn.Module]:
    """Return the layers that a LoCon can have: linear maps and convolutions."""
    return {path: layer for path, layer in keys.layers(unet).items() if isinstance(layer, (Linear, Conv2d))}


def locon(
    unet: UNet, paths: list[str] | None = None, rank: int = 3, tucker: bool = False, seed: int = 2
) -> dict[str, Tensor]:
    """Return the tensors of a kohya file that adapts ``paths`` (all linear and convolution layers)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in adapted_layers(unet) if paths is None else paths:
        name = f"lora_unet_{path.replace('.', '_')}"
        out, inner, *kernel = unet.get_submodule(path).weight.shape
        ones = [1] * len(kernel)
        core = tucker and kernel[:1] == [3]
        shapes = {"down": (rank, inner, *(ones if core else kernel)), "up": (out, rank, *ones)}
        if core:
            shapes["mid"] = (rank, rank, *kernel)
        for part, shape in shapes.items():
            fan_in = torch.Size(shape[1:]).numel()
            tensors[f"{name}.lora_{part}.weight"] = torch.randn(shape, generator=generator) / fan_in**0.5
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors
