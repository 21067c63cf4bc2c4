"""UNets of ours beside diffusers' with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_delta.files.checkpoint import UNET_PREFIX
from lib_delta.models.unet import UNet, UNetConfig

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def blocks(*kinds: tuple[str, str]) -> dict[str, Any]:
    return {"down_block_types": [k[0] for k in kinds], "up_block_types": [k[1] for k in reversed(kinds)]}


# The released models' configurations with fewer channels; head counts and head widths are theirs.
SD1 = {"block_out_channels": (32, 64, 128, 128), "attention_head_dim": 8, "cross_attention_dim": 48}
SD1_FULL = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768}
SD2 = {
    "block_out_channels": (64, 128, 256, 256),
    "attention_head_dim": (1, 2, 4, 4),
    "cross_attention_dim": 96,
    "use_linear_projection": True,
}
SDXL = {
    "block_out_channels": (64, 128, 256),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 80,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 40 + 6 * 256,
    **blocks(PLAIN, CROSS, CROSS),
}


APART = 997  # a prime, so that no tensor has another one's rows in another order


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    """Give a module weights that keep activations near unit size, biases and norms included.

    Each is cut from the same random numbers, at a place of its own: a full model's own would take seconds to draw.
    """
    parameters = list(module.parameters())
    drawn = max(parameter.numel() for parameter in parameters) + APART * len(parameters)
    numbers = torch.randn(drawn, generator=torch.Generator().manual_seed(seed))
    for i, parameter in enumerate(parameters):
        parameter.copy_(numbers[APART * i :][: parameter.numel()].view_as(parameter))
        if parameter.ndim > 1:
            parameter.mul_(parameter[0].numel() ** -0.5)
        else:
            parameter.mul_(0.1)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.add_(1)


def ldm_config(config: Mapping[str, Any]) -> UNetConfig:
    """Translate a diffusers configuration by hand."""
    levels = tuple(config["block_out_channels"])
    kinds = config.get("down_block_types", [CROSS[0]] * (len(levels) - 1) + [PLAIN[0]])
    layers = config.get("transformer_layers_per_block", 1)
    per_level = layers if isinstance(layers, tuple) else (layers,) * len(levels)
    depths = [d if kind == CROSS[0] else 0 for d, kind in zip(per_level, kinds)]
    return UNetConfig(
        in_channels=config.get("in_channels", 4),
        out_channels=4,
        model_channels=levels[0],
        levels=levels,
        res_blocks=(2,) * len(levels),
        depth_in=tuple(d for d in depths for _ in range(2)),
        depth_middle=per_level[-1],
        depth_out=tuple(d for d in reversed(depths) for _ in range(3)),
        context_width=config["cross_attention_dim"],
        linear_projection=config.get("use_linear_projection", False),
        label_width=config.get("projection_class_embeddings_input_dim", 0),
        head_width=64 if config.get("use_linear_projection") else None,
    )


def convert(checkpoint: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    settings = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None, **config}
    conversion = pytest.importorskip("diffusers.pipelines.stable_diffusion.convert_from_ckpt")
    return dict(conversion.convert_ldm_unet_checkpoint(checkpoint, settings))


def empty_reference(config: Mapping[str, Any]) -> nn.Module:
    """Make diffusers' UNet without memory for its weights."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model: nn.Module = diffusers.UNet2DConditionModel(**config).eval()
    return model


def pair(config: Mapping[str, Any]) -> tuple[UNet, nn.Module]:
    """Make our UNet and diffusers' with the same weights, which are stored once."""
    theirs = empty_reference(config)
    ours = narrow(config)
    converted = convert({f"{UNET_PREFIX}{k}": v for k, v in ours.state_dict().items()}, config)
    theirs.load_state_dict(converted, strict=True, assign=True)
    return ours, theirs


def draw(config: Mapping[str, Any], size: tuple[int, int], batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = {
        "x": torch.randn(batch, config.get("in_channels", 4), *size, generator=generator),
        "t": torch.tensor([801.0, 13.25])[:batch],
        "context": torch.randn(batch, 7, config["cross_attention_dim"], generator=generator),
    }
    if "addition_embed_type" in config:
        drawn["pooled"] = torch.randn(batch, 40, generator=generator)
    return drawn


def narrow(config: Mapping[str, Any]) -> UNet:
    unet = UNet(ldm_config(config)).eval().requires_grad_(False)
    randomize(unet)
    return unet
