"""ControlNets, T2I-Adapters and IP-Adapters of tiny width, and what they look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_delta.core.conditioning import Conditioning
from lib_delta.models.controlnet import ControlNet
from lib_delta.models.unet import UNet
from tests.support.diffusers_unet import randomize
from tests.support.tiny_unet import randn

HINTS = (3, 16, 16, 32, 32, 96, 96, 256, 32)
PICTURE = randn(1, 3, 64, 64, seed=5).sigmoid()
TOLD = Conditioning(randn(1, 7, 16, seed=1), randn(1, 7, 16, seed=2))
X, SIGMA = 5 * randn(2, 4, 8, 8), torch.tensor([0.7, 6.0])


def save(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, str(path))
    return path


def image_tensors(form: str, unet: UNet, context: int, seen: int = 40) -> dict[str, Tensor]:
    """Random weights of an IP-Adapter in the release's names and order."""
    shapes: dict[str, tuple[int, ...]] = {}
    if form == "base":
        shapes |= {"proj.weight": (4 * context, seen), "proj.bias": (4 * context,)}
        shapes |= {"norm.weight": (context,), "norm.bias": (context,)}
    elif form == "full":
        shapes |= {"proj.0.weight": (seen, seen), "proj.0.bias": (seen,), "proj.2.weight": (context, seen)}
        shapes |= {"proj.2.bias": (context,), "proj.3.weight": (context,), "proj.3.bias": (context,)}
    else:
        width, inner = 64, 128
        shapes |= {"latents": (1, 5, width), "proj_in.weight": (width, seen), "proj_in.bias": (width,)}
        shapes |= {"proj_out.weight": (context, width), "proj_out.bias": (context,)}
        shapes |= {"norm_out.weight": (context,), "norm_out.bias": (context,)}
        for layer in range(4):
            own = f"layers.{layer}."
            for norm in ("0.norm1", "0.norm2", "1.0"):
                shapes |= {f"{own}{norm}.weight": (width,), f"{own}{norm}.bias": (width,)}
            shapes |= {f"{own}0.to_q.weight": (inner, width), f"{own}0.to_kv.weight": (2 * inner, width)}
            shapes |= {f"{own}0.to_out.weight": (width, inner)}
            shapes |= {f"{own}1.1.weight": (4 * width, width), f"{own}1.3.weight": (width, 4 * width)}
    tensors = {f"image_proj.{k}": randn(*s, seed=i) * (s[-1] ** -0.5) for i, (k, s) in enumerate(shapes.items())}
    widths = [
        module.attn2.to_q.weight.shape[0]
        for blocks in (unet.input_blocks, unet.output_blocks, unet.middle_block)
        for module in blocks.modules()
        if hasattr(module, "attn2")
    ]
    for i, width in enumerate(widths):
        for j, part in enumerate(("k", "v")):
            weight = randn(width, context, seed=500 + 2 * i + j) * context**-0.5
            tensors[f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight"] = weight
    return tensors


def tiny_control(unet: UNet, seed: int = 20) -> ControlNet:
    control = ControlNet(unet.config, HINTS).requires_grad_(False).eval()
    randomize(control, seed)
    return control


transformers = pytest.importorskip("transformers")


def their_encoder(folder: Path, projection: int = 40, activation: str = "gelu") -> tuple[Any, Path]:
    config = transformers.CLIPVisionConfig(
        hidden_size=40,
        intermediate_size=80,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        hidden_act=activation,
    )
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    path = folder / "encoder.safetensors"
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, str(path), {"delta.vision_heads": "4"})
    return theirs, path
