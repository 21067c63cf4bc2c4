"""Small ControlNets, an IP-Adapter and an image encoder beside the small checkpoint, where WebUIs keep theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_delta.models.controlnet import ControlNet
from lib_delta.models.ip_adapter import IPAdapter, TokenProjection, cross_attentions
from lib_delta.models.unet import UNet
from tests.support.small_files import UNET, WIDTH, Files

HINTS = (3, 8, 8, 16, 16, 24, 24, 32, 32)
SEEN = 24  # the width of the image encoder's embeddings


def make_controls(files: Files) -> Path:
    """Write ``models/ControlNet/{edges,look}`` and an encoder; return the folder of the first two."""
    folder = files.folder / "models" / "ControlNet"
    encoders = files.folder / "models" / "ControlNetPreprocessor"
    for path in (folder, encoders):
        path.mkdir(parents=True)
    save(filled(ControlNet(UNET, HINTS), 7), folder / "edges.safetensors")
    widths = [module.to_q.weight.shape[0] for _, module in cross_attentions(UNet(UNET))]
    save(filled(IPAdapter(TokenProjection(SEEN, WIDTH, 4), WIDTH, widths), 8), folder / "look.safetensors")
    save(filled(image_encoder(SEEN), 9), encoders / "seer.safetensors", {"delta.vision_heads": "2"})
    save(filled(image_encoder(2 * SEEN), 9), encoders / "another.safetensors", {"delta.vision_heads": "2"})
    return folder


def image_encoder(projection: int) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        hidden_act="gelu",
    )
    return CLIPVisionModelWithProjection(config)


def filled(module: nn.Module, seed: int) -> nn.Module:
    """Give a module random weights of a scale at which each matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.requires_grad_(False).named_parameters():
        scale = 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5
        weight.normal_(std=scale, generator=generator)
        if weight.ndim == 1 and name.endswith("weight"):
            weight += 1
    return module.eval()


def save(module: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    tensors = {name: weight.contiguous() for name, weight in module.state_dict().items() if weight.is_floating_point()}
    save_file(tensors, path, metadata)


def picture(seed: int = 0, height: int = 80, width: int = 64) -> Image.Image:
    """Return a picture of blocks, some of which have edges."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None] / 255
