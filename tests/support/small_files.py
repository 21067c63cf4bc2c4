"""Small files for the stand-ins: a checkpoint, what a LoRA makes of it (computed here), textual inversions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_delta.models.text import TextConfig, TextEncoder
from lib_delta.models.unet import UNet, UNetConfig

TOKENIZER = Path(__file__).resolve().parents[2] / "demo" / "models" / "tokenizer"
WIDTH = 32
UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    levels=(32,),
    res_blocks=(1,),
    depth_in=(0,),
    depth_middle=1,
    depth_out=(0, 1),
    context_width=WIDTH,
    linear_projection=False,
    heads=8,
)
TEXT = TextConfig(
    width=WIDTH, inner_width=64, layers=2, positions=77, vocabulary=1273, heads=1, activation="quick_gelu"
)
UNET_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "cond_stage_model.transformer."
RANK, ALPHA = 4, 2.0


@dataclass(frozen=True)
class Files:
    """A folder of checkpoints, one of LoRAs, one of embeddings.

    ``tuned`` is ``base`` with the LoRA at weight 1, ``half`` at weight 0.5, ``unet_only`` at 1 without
    the text encoder's part.
    """

    folder: Path
    base: str = "base"
    copy: str = "copy"
    tuned: str = "tuned"
    half: str = "half"
    unet_only: str = "unet-only"
    lora: str = "ink"
    embedding: str = "zwx"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def embeddings(self) -> Path:
        return self.folder / "embeddings"

    def checkpoint(self, name: str) -> Path:
        return self.checkpoints / f"{name}.safetensors"

    def lora_file(self, name: str | None = None) -> Path:
        return self.folder / "loras" / f"{name or self.lora}.safetensors"


def make_files(folder: Path) -> Files:
    """Write all files."""
    files = Files(folder)
    for path in (files.checkpoints, files.embeddings, files.lora_file().parent):
        path.mkdir(parents=True)
    weights = checkpoint()
    low_rank = lora_factors(weights)
    write(weights, files.checkpoint(files.base))
    write(weights, files.checkpoint(files.copy))
    for name, weight, text_weight in ((files.tuned, 1, 1), (files.half, 0.5, 0.5), (files.unet_only, 1, 0)):
        write(with_lora(weights, low_rank, weight, text_weight), files.checkpoint(name))
    write_lora(low_rank, files.lora_file())
    generator = torch.Generator().manual_seed(5)
    for name, width in ((files.embedding, WIDTH), ("wide", 2 * WIDTH)):
        vectors = torch.randn(3, width, generator=generator)
        save_file({"emb_params": vectors}, files.embeddings / f"{name}.safetensors")
    return files


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Return the weights of an SD 1.x checkpoint, random and of a scale at which every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for prefix, module in ((UNET_PREFIX, UNet(UNET)), (TEXT_PREFIX, TextEncoder(TEXT, True).transformer)):
        for name, weight in module.state_dict().items():
            if not name.endswith("position_ids"):
                weights[prefix + name] = _random(name, weight, generator)
    return weights


def _random(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(weight.shape, generator=generator)
    if weight.ndim == 1:
        return 0.1 * noise + (1 if "norm" in name and name.endswith(".weight") else 0)
    if "embedding" in name:
        return noise
    return noise / math.sqrt(weight[0].numel())


def lora_factors(weights: dict[str, Tensor], seed: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``(down, up)`` for attention projections, convolutions and the text encoder's layers."""
    generator = torch.Generator().manual_seed(seed)
    parts = ("to_q", "to_v", "in_layers.2", "emb_layers.1", "fc1", "v_proj")
    found = {}
    for name, weight in weights.items():
        if name.endswith(".weight") and any(part in name for part in parts):
            down = torch.randn(RANK, *weight.shape[1:], generator=generator) / math.sqrt(weight[0].numel())
            up = torch.randn(len(weight), RANK, *[1] * (weight.ndim - 2), generator=generator)
            found[name] = down, 0.4 * up
    return found


def with_lora(
    weights: dict[str, Tensor], low_rank: dict[str, tuple[Tensor, Tensor]], weight: float, text_weight: float
) -> dict[str, Tensor]:
    """Return the weights with the LoRA merged: ``W + weight * alpha / rank * up @ down``."""
    merged = dict(weights)
    for name, (down, up) in low_rank.items():
        scale = (weight if name.startswith(UNET_PREFIX) else text_weight) * ALPHA / RANK
        product = (up.flatten(1).double() @ down.flatten(1).double()).reshape(weights[name].shape)
        merged[name] = (weights[name].double() + scale * product).float()
    return merged


def write_lora(low_rank: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """Write factors as kohya's trainer does, in the original checkpoints' names."""
    tensors = {}
    for name, (down, up) in low_rank.items():
        module = name.removesuffix(".weight")
        kohya = module.replace(UNET_PREFIX, "lora_unet_").replace(TEXT_PREFIX, "lora_te_").replace(".", "_")
        tensors |= {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up}
        tensors[f"{kohya}.alpha"] = torch.tensor(ALPHA)
    _replace(tensors, path)


def write(weights: dict[str, Tensor], path: Path) -> None:
    """Write a checkpoint."""
    _replace({name: weight.contiguous() for name, weight in weights.items()}, path)


def _replace(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file anew: one that is there may be mapped into memory."""
    new = path.with_suffix(".new")
    save_file(tensors, new)
    new.replace(path)
