"""Detects adapters of other families, and files that are no adapters, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lib_delta.diffusion.families import Family
from lib_delta.errors import AdapterError
from lib_delta.files.file_kinds import Role, kind_of
from lib_delta.files.stored_file import Shapes
from lib_delta.models.unet import UNet

# Layers that no UNet of SD 1.x or 2.x has, by the names of ``key_names.parse_key``.
_OTHER_LAYERS: tuple[tuple[str, str], ...] = (
    (r"lora_unet_(single_transformer_blocks|single_blocks|double_blocks)_", Family.FLUX.label),
    (r"lora_unet_(joint_blocks|joint_transformer_blocks)_|lora_te3_", Family.SD3.label),
    (r"lora_unet_(lora_)?transformer_single_transformer_blocks_", Family.FLUX.label),
    (r"lora_unet_(lora_)?transformer_transformer_blocks_", "a transformer model (SD 3, Flux or later)"),
    (r"lora_unet_transformer_(?!blocks_)", "a transformer model (HunyuanVideo, Wan or the like)"),
    (r"lora_te2_", Family.SDXL.label),
    (r"lora_unet_\w+(_1|attentions_\d)_transformer_blocks_[1-9]_", Family.SDXL.label),
    (r"lora_unet_(blocks|layers|transformer_blocks)_\d+_", "a transformer model (of the kind of DiT)"),
)
# Families as headers name them: kohya's ``ss_base_model_version``, and ``modelspec.architecture``.
_STATED: tuple[tuple[str, str], ...] = (
    (r"sdxl|stable-diffusion-xl", Family.SDXL.label),
    (r"sd_?v?2|stable-diffusion-v2", Family.SD2.label),
    (r"sd_?v?1|stable-diffusion-v1", Family.SD1.label),
    (r"sd3|stable-diffusion-v?3", Family.SD3.label),
    (r"flux", Family.FLUX.label),
)
_NOT_ADAPTERS = (Role.CONTROL, Role.UNSUPPORTED_CONTROL, Role.OTHER)
_TEXT_KEYS = ("lora_te_", "lora_te1_", "lycoris_te", "text_encoder", "text_model.")


class HasTensors(Protocol):
    """One layer's tensors by name."""

    tensors: dict[str, Tensor]


def refuse_unsupported_kinds(name: str, shapes: Shapes) -> None:
    """Raise :class:`AdapterError` for a file that is no adapter of weights."""
    kind = kind_of(shapes, *_NOT_ADAPTERS)
    if kind is not None:
        raise AdapterError(f"{name} is {kind.sentence}: a LoRA, a LyCORIS file or a fine-tuned checkpoint is needed")
    if not shapes:
        raise AdapterError(f"{name} holds no weights: a LoRA, a LyCORIS file or a fine-tuned checkpoint is needed")


def unet_family(unet: UNet) -> Family:
    """Return a UNet's family by its layout, independent of its width."""
    if unet.config.label_width:
        return Family.SDXL
    return Family.SD2 if unet.config.linear_projection else Family.SD1


def stated_family(metadata: Mapping[str, str]) -> str:
    """Return the family that a file's header names; empty if it names none."""
    if metadata.get("ss_v2", "").lower() == "true":
        return Family.SD2.label
    for key in ("modelspec.architecture", "ss_base_model_version"):
        for pattern, label in _STATED:
            if re.search(pattern, metadata.get(key, "").lower()):
                return label
    return ""


def refuse_other_family(name: str, groups: Mapping[str, HasTensors], unet: UNet) -> None:
    """Raise :class:`AdapterError` if the layers' names or the cross-attention's width belong to another family."""
    needed = unet_family(unet)
    for layer in groups:
        label = next((label for pattern, label in _OTHER_LAYERS if re.match(pattern, layer)), needed.label)
        if label != needed.label:
            raise other_family_error(name, label, unet)
    for width in _context_widths(groups):
        if width != unet.config.context_width:
            raise other_family_error(name, family_label(width), unet)


def _context_widths(groups: Mapping[str, HasTensors]) -> list[int]:
    """Return the text's width for each of the file's cross-attention layers whose tensors show it."""
    return [
        width
        for layer, group in groups.items()
        if layer.endswith(("attn2_to_k", "attn2_to_v")) and (width := _inputs(group.tensors)) is not None
    ]


def _inputs(tensors: Mapping[str, Tensor]) -> int | None:
    """Return a linear layer's number of inputs; None if its tensors do not show it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.ndim >= 2}
    for name in ("lora_down.weight", "hada_w1_b", "diff"):
        if name in shapes:
            return shapes[name][1]
    left = shapes.get("lokr_w1") or shapes.get("lokr_w1_b")
    right = shapes.get("lokr_w2") or shapes.get("lokr_w2_b")
    return left[1] * right[1] if left and right else None


def family_label(context_width: int) -> str:
    """Name the family whose text has this width."""
    label = next((f.label for f in Family if f.context_width == context_width), "another model")
    return f"{label} (text {context_width} wide)"


def other_family_error(name: str, family: str, unet: UNet) -> AdapterError:
    """Return the error for a file of another family than the base; ``family`` names it."""
    needed = f"{unet_family(unet).label} (text {unet.config.context_width} wide)"
    sentence = f"{name} is made for {family}, and one for the base model, {needed}, is needed"
    fitting = next((known.label for known in Family if known.served and family.startswith(known.label)), "")
    return AdapterError(sentence + (f": choose an {fitting} base, or another file" if fitting else ""))


def no_match_error(name: str, stored: Sequence[str], unet: UNet, *, stated: str, towers: int) -> AdapterError:
    """Return the error for a file without a key that names a layer."""
    if stored and not towers and all(key.startswith(_TEXT_KEYS) for key in stored):
        return AdapterError(
            f"{name} adapts only the text encoder, and the base has none: a base with its text encoder is needed"
        )
    if stated and stated != unet_family(unet).label:
        return other_family_error(name, f"{stated}, as its header says", unet)
    if any(re.match(r"(unet\.)?(down|up)_blocks\.\d+\.\w+\.\d+\.\S+\.(weight|bias)$", key) for key in stored):
        return AdapterError(
            f"{name} holds whole weights by diffusers' names: a LoRA or LyCORIS file for {unet_family(unet).label} is"
            " needed, or a checkpoint, which diffusers' convert_diffusers_to_original_*.py makes of a UNet"
        )
    sample = stored[0] if stored else "it is empty"
    return AdapterError(
        f"{name} has no key that names a layer of the base model (number of keys: {len(stored)}; {sample}): "
        f"a LoRA or LyCORIS file for {unet_family(unet).label} is needed"
    )
