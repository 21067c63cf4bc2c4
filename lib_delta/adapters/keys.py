"""The names that adapter files give to layers, mapped to the paths of the real modules.

Trainers join a module's path with underscores, which module names contain themselves
(``to_out``, ``transformer_blocks``).  So nothing is parsed: every layer of the model at hand is
listed under each name it can have in a file, and a file's names are looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from lib_delta.fork import ForkedLayer
from lib_delta.models.unet import Downsample, ResBlock, SpatialTransformer, UNet, Upsample

# Within a block the two naming schemes differ by these alone.
_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE_BLOCKS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


class Place(NamedTuple):
    """A layer: its module path in the UNet (``tower`` None) or in a text encoder (``tower`` 0, 1)."""

    tower: int | None
    path: str


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold weights, by path: the UNet's forked layers, a text encoder's leaves."""
    if isinstance(model, UNet):
        return {path: m for path, m in model.named_modules() if isinstance(m, ForkedLayer)}
    return {path: m for path, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)}


def diffusers_paths(unet: UNet) -> dict[str, str]:
    """Map the path of every layer of the UNet to its path in diffusers' ``UNet2DConditionModel``."""
    blocks = dict(_blocks(unet))
    paths = {}
    for path in layers(unet):
        if path in _OUTSIDE_BLOCKS:
            paths[path] = _OUTSIDE_BLOCKS[path]
            continue
        block = ".".join(path.split(".")[: 2 if path.startswith("middle_block.") else 3])
        inside = path[len(block) + 1 :]
        if isinstance(unet.get_submodule(block), ResBlock):
            inside = _RES_BLOCK[inside]
        paths[path] = f"{blocks[block]}.{'conv' if inside == 'op' else inside}"
    return paths


def _blocks(unet: UNet) -> Iterator[tuple[str, str]]:
    """Yield the path of every block of the UNet with its path in diffusers' naming."""
    level, index = 0, 0
    for i, parts in enumerate(unet.input_blocks):
        if i == 0:
            continue
        for j, part in enumerate(parts):
            yield f"input_blocks.{i}.{j}", f"down_blocks.{level}.{_kind(part, index)}"
        level, index = (level + 1, 0) if isinstance(parts[0], Downsample) else (level, index + 1)

    counts = {"resnets": 0, "attentions": 0}
    for j, part in enumerate(unet.middle_block):
        kind = _kind(part, 0).split(".")[0]
        yield f"middle_block.{j}", f"mid_block.{kind}.{counts[kind]}"
        counts[kind] += 1

    level, index = 0, 0
    for i, parts in enumerate(unet.output_blocks):
        for j, part in enumerate(parts):
            yield f"output_blocks.{i}.{j}", f"up_blocks.{level}.{_kind(part, index)}"
        level, index = (level + 1, 0) if isinstance(parts[-1], Upsample) else (level, index + 1)


def _kind(block: nn.Module, index: int) -> str:
    if isinstance(block, ResBlock):
        return f"resnets.{index}"
    if isinstance(block, SpatialTransformer):
        return f"attentions.{index}"
    return "downsamplers.0" if isinstance(block, Downsample) else "upsamplers.0"


def kohya_names(unet: UNet, towers: Sequence[nn.Module]) -> dict[str, Place]:
    """List every layer under the names of kohya's sd-scripts and of LyCORIS.

    UNet layers have two, after the original and after diffusers' modules
    (``lora_unet_input_blocks_1_1_proj_in``, ``lora_unet_down_blocks_0_attentions_0_proj_in``).
    A single text encoder is ``lora_te``; SDXL's two are ``lora_te1`` and ``lora_te2``.
    """
    names = {}
    for path, other in diffusers_paths(unet).items():
        for name in (path, other):
            names[f"lora_unet_{name.replace('.', '_')}"] = Place(None, path)
    for tower, model in enumerate(towers):
        prefix = "lora_te" if len(towers) == 1 else f"lora_te{tower + 1}"
        for path in layers(model):
            # Files name transformers' modules; ``models.text.TextEncoder`` holds these in ``transformer``.
            names[f"{prefix}_{path.removeprefix('transformer.').replace('.', '_')}"] = Place(tower, path)
    return names


def split(key: str) -> tuple[str, str]:
    """Split a file's key into the layer's name and the tensor's (``lora_down.weight``)."""
    name, _, tensor = key.partition(".")
    return name, tensor
