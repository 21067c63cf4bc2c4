"""Random models of full-size layouts: ours and diffusers' on the same weights, and LoRAs for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lib_delta.adapters.adapter_file import AdapterFile, read_adapter
from lib_delta.files.checkpoint import UNET_PREFIX
from lib_delta.models.controlnet import ControlNet
from lib_delta.models.forked_layers import Conv2d, Linear
from lib_delta.models.unet import UNet, UNetConfig

Model = TypeVar("Model", bound=nn.Module)
_CROSS, _PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


@dataclass(frozen=True)
class Layout:
    """A family's architecture, for us and in diffusers' words."""

    ours: UNetConfig
    theirs: Mapping[str, Any]


def sd15(width: int = 320) -> Layout:
    """Return SD 1.5's layout at any width; 320 is its own."""
    ours = UNetConfig.sd15(width)
    return Layout(ours, {"block_out_channels": ours.levels, "attention_head_dim": 8, "cross_attention_dim": 768})


def sdxl(width: int = 320) -> Layout:
    """Return SDXL's layout at any width."""
    levels = (width, 2 * width, 4 * width)
    ours = UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=width,
        levels=levels,
        res_blocks=(2, 2, 2),
        depth_in=(0, 0, 2, 2, 10, 10),
        depth_middle=10,
        depth_out=(10, 10, 10, 2, 2, 2, 0, 0, 0),
        context_width=2048,
        linear_projection=True,
        label_width=2816,
        head_width=64,
    )
    theirs = {
        "block_out_channels": levels,
        "attention_head_dim": tuple(channels // 64 for channels in levels),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": [_PLAIN[0], _CROSS[0], _CROSS[0]],
        "up_block_types": [_CROSS[1], _CROSS[1], _PLAIN[1]],
    }
    return Layout(ours, theirs)


def random_unet(layout: Layout, device: torch.device, dtype: torch.dtype) -> UNet:
    """Return our UNet with random weights that keep activations near unit size."""
    return _randomized(UNet(layout.ours), device, dtype)


def random_control(layout: Layout, device: torch.device, dtype: torch.dtype) -> ControlNet:
    """Return a ControlNet of a layout's UNet, with random weights, that reads maps as the released ones do."""
    widths = (3, 16, 16, 32, 32, 96, 96, 256, layout.ours.model_channels)
    return _randomized(ControlNet(layout.ours, widths), device, dtype)


def _randomized(model: Model, device: torch.device, dtype: torch.dtype) -> Model:
    model.requires_grad_(False).eval().to(device, dtype)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)
        else:
            weight.normal_(std=0.1)
    for name, weight in model.named_parameters():
        if weight.ndim == 1 and name.endswith("weight"):
            weight += 1
    return model


def diffusers_unet(layout: Layout, unet: UNet) -> nn.Module:
    """Return diffusers' UNet on the weights of ours, which are stored once."""
    from diffusers import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.convert_from_ckpt import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        reference: nn.Module = UNet2DConditionModel(**layout.theirs).eval()
    settings = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None, **layout.theirs}
    weights = {f"{UNET_PREFIX}{key}": tensor for key, tensor in unet.state_dict().items()}
    reference.load_state_dict(convert_ldm_unet_checkpoint(weights, settings), assign=True)
    return reference.requires_grad_(False)


def random_lora(unet: UNet, rank: int, only: str) -> AdapterFile:
    """Return a LoRA of random factors for the layers whose path contains ``only``."""
    tensors: dict[str, Tensor] = {}
    for path, layer in unet.named_modules():
        if isinstance(layer, (Linear, Conv2d)) and only in path:
            key = "lora_unet_" + path.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = 0.01 * torch.randn(rank, *layer.weight.shape[1:])
            tail = (1, 1) if layer.weight.ndim == 4 else ()
            tensors[f"{key}.lora_up.weight"] = 0.01 * torch.randn(layer.weight.shape[0], rank, *tail)
    return read_adapter("random LoRA", tensors, unet)
