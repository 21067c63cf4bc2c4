"""Tiny UNets of the real architecture, and adaptations made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_delta.models.forked_layers import Adaptation, ForkedLayer
from lib_delta.models.unet import UNet, UNetConfig

TINY = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    levels=(32, 64),
    res_blocks=(1, 1),
    depth_in=(1, 1),
    depth_middle=1,
    depth_out=(1, 1, 0, 1),
    context_width=16,
    linear_projection=False,
    heads=2,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers that depend on nothing but the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_unet(config: UNetConfig = TINY, seed: int = 0) -> UNet:
    """A UNet with random weights of a scale at which every layer matters."""
    unet = UNet(config).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in unet.parameters():
        scale = 0.1 if weight.ndim == 1 else (weight[0].numel()) ** -0.5
        weight.normal_(std=scale, generator=generator)
    for name, weight in unet.named_parameters():
        if weight.ndim == 1 and name.endswith(".weight"):
            weight += 1
    return unet


@dataclass(frozen=True)
class NewWeights(Adaptation):
    """An adaptation that replaces a layer's weights."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, layer: ForkedLayer, x: Tensor) -> Tensor:
        return layer.apply_weights(x, self.weight, self.bias)


def adapt(unet: UNet, weights: Mapping[str, Tensor]) -> UNet:
    """Attach the given weights (by key) as the adapted model's; layers that are not named stay shared."""
    for name, layer in unet.named_modules():
        if isinstance(layer, ForkedLayer) and f"{name}.weight" in weights:
            bias = weights.get(f"{name}.bias", layer.bias)
            layer.adaptation = NewWeights(weights[f"{name}.weight"], bias)
    return unet
