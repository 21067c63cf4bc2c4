"""Reads the first LoRA files (cloneofsimo's, from December 2022), which name layers by numbers.

``unet:7:up`` is the eighth layer of diffusers' UNet in the trainer's order: down blocks, up blocks, then the middle
block, as diffusers registers them.  There is no alpha.  The older ``.pt`` files are lists that alternate up and down.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from lib_delta.adapters import key_names
from lib_delta.errors import AdapterError
from lib_delta.models.unet import UNet

_KEY = re.compile(r"(?P<part>unet|text_encoder):(?P<number>\d+):(?P<side>up|down)")
_ATTENTION = tuple(f"to_{name}" for name in ("q", "k", "v", "out.0"))
_RESNET = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
# The order in which transformers registers a CLIP layer's projections.
_TEXT_LAYER = ("k_proj", "v_proj", "q_proj", "out_proj")
_GATED = "ff.net.0.proj"


def renamed(
    name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], unet: UNet
) -> dict[str, Tensor] | None:
    """Return the file's tensors by diffusers' names of layers; None for a file of another format.

    Bundled tokens get the names of OneTrainer's embeddings.
    """
    numbered = {key: match for key in tensors if (match := _KEY.fullmatch(key))}
    if not numbered:
        listed = _listed(name, tensors)
        return None if listed is None else renamed(name, listed, metadata, unet)
    gated_last = not _gated_is_second(tensors)
    paths = _unet_layers(unet, gated_last, "ResnetBlock2D" in metadata.get("unet", ""))
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key in numbered:
            match = numbered[key]
            layer = _layer_path(match["part"], int(match["number"]), paths)
            result[f"{layer}.lora.{match['side']}.weight"] = tensor
        elif tensor.ndim == 1:
            result[f"bundle_emb.{key}.emb_params"] = tensor
        else:
            result[key] = tensor
    if len(result) != len(tensors):
        raise AdapterError(f"{name} names a layer twice, and one entry a layer is needed")
    return result


def _listed(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Number the factors of a list; only the file's name distinguishes UNet and text encoder."""
    if not tensors or not all(key.isdecimal() and tensor.ndim >= 2 for key, tensor in tensors.items()):
        return None
    part = "text_encoder" if "text_encoder" in name else "unet"
    return {f"{part}:{int(key) // 2}:{('up', 'down')[int(key) % 2]}": tensor for key, tensor in tensors.items()}


def _gated_is_second(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the feed-forward layer lies between the attentions, by the fifth layer in a block of nine."""
    if "unet:0:up" not in tensors or "unet:4:up" not in tensors:
        return True
    return len(tensors["unet:4:up"]) == 8 * len(tensors["unet:0:up"])


def _unet_layers(unet: UNet, gated_last: bool, with_resnets: bool) -> list[str]:
    """List diffusers' paths of the layers in the trainer's order."""
    known = list(key_names.diffusers_paths(unet).values())
    first = [f"attn1.{name}" for name in _ATTENTION]
    second = [f"attn2.{name}" for name in _ATTENTION]
    inside = [*first, *second, _GATED] if gated_last else [*first, _GATED, *second]
    layers: list[str] = []
    blocks = dict.fromkeys(match[0] for path in known if (match := re.match(r"(down|up)_blocks\.\d+|mid_block", path)))
    for block in sorted(blocks, key=lambda block: (("down", "up", "mid").index(block.split("_")[0]), block)):
        inside_block = [path for path in known if path.startswith(f"{block}.")]
        stacks = dict.fromkeys(
            match[0] for path in inside_block if (match := re.match(r".+\.transformer_blocks\.\d+", path))
        )
        layers += [f"{stack}.{layer}" for stack in stacks for layer in inside]
        if with_resnets:
            resnets = dict.fromkeys(match[0] for path in inside_block if (match := re.match(r".+\.resnets\.\d+", path)))
            layers += [
                f"{resnet}.{layer}" for resnet in resnets for layer in _RESNET if f"{resnet}.{layer}" in inside_block
            ]
    return layers


def _layer_path(part: str, number: int, unet_layers: list[str]) -> str:
    if part == "unet":
        return f"unet.{unet_layers[number]}" if number < len(unet_layers) else f"unet.layer_{number}"
    layer, projection = divmod(number, len(_TEXT_LAYER))
    return f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{_TEXT_LAYER[projection]}"
