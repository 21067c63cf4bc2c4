"""Loads files of ControlNets, T2I-Adapters and IP-Adapters.

Dialects: the names of the original releases (with or without ``control_model.`` or ``adapter.``); diffusers' names;
"difference" ControlNets, which store their weights minus the base's; Control-LoRA, which stores low-rank factors
of that difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lib_delta.adapters import compatibility
from lib_delta.adapters.key_names import diffusers_paths
from lib_delta.errors import AdapterError, CheckpointError
from lib_delta.files import sidecar_config
from lib_delta.files.checkpoint import detect_family, unet_prefix
from lib_delta.files.file_kinds import CONTROL_LORA, CONTROLNET, IP_ADAPTER, T2I_ADAPTER, Role, kind_of
from lib_delta.files.sidecar_config import ModelConfig
from lib_delta.files.stored_file import Shapes
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.controlnet import ControlNet, T2IAdapter, T2IConfig
from lib_delta.models.ip_adapter import (
    HEAD_WIDTH,
    IPAdapter,
    PatchProjection,
    Projection,
    Resampler,
    TokenProjection,
    cross_attentions,
)
from lib_delta.models.loading import load_weights
from lib_delta.models.unet import UNet

ControlT = TypeVar("ControlT", bound=nn.Module)
NEEDED = "a ControlNet, T2I-Adapter or IP-Adapter is needed"
POOLING = "global_average_pooling"  # a key in a release's .yaml
FACE_WIDTH = 512  # of the face embeddings that FaceID models use

# diffusers' names of the convolutions that read the map: the first, those between, the last.
_HINT = re.compile(r"controlnet_cond_embedding\.(?:(conv_in)|blocks\.(\d+)|(conv_out))\.")


@dataclass(frozen=True, eq=False)
class ControlFile:
    """A file's model, and its ``kind`` for messages.

    With ``pooled``, its residuals are averaged over the picture.  With ``fills``, it fills the hidden parts of its map.
    Weights show neither; the model's name and the configuration next to it do.
    """

    name: str
    kind: str
    model: ControlNet | T2IAdapter | IPAdapter
    pooled: bool = False
    fills: bool = False


def load_control(
    path: Path, unet: UNet, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> ControlFile:
    """Load a file for ``unet``, the base; dtype and device default to the base's.

    Raises :class:`AdapterError` for a file that cannot be read, is something else, or is of another family.
    """
    like = unet.time_embed["0"].weight
    place = (dtype or like.dtype, device or like.device)
    try:
        with WeightFile.open(path) as file:
            kind, read = _detect_kind(file)
            words = sidecar_config.words_of(sidecar_config.known_as(path))
            # "inpaint_depth_hand" repairs hands by a depth map without hidden parts.
            fills = bool(words & {"inpaint", "inpainting"}) and "depth" not in words
            return ControlFile(file.name, kind, read(file, unet, *place), _pooled(path, words), fills)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def _pooled(path: Path, words: frozenset[str]) -> bool:
    """Return whether a ControlNet's residuals are averaged, by its configuration, or else by its name."""
    if sidecar_config.named_by_diffusers(path):
        stated = sidecar_config.settings(path, sidecar_config.DIFFUSERS).get("global_pool_conditions")
        if isinstance(stated, bool):
            return stated
    config = ModelConfig.beside(path)
    stated = "" if config is None else config.text(POOLING) or config.text("control_stage_config", "params", POOLING)
    return stated.lower() == "true" if stated else "shuffle" in words


def prompts_with_pictures(path: Path) -> bool:
    """Return whether a file is an IP-Adapter's, which reads pictures instead of maps, by its header."""
    try:
        with WeightFile.open(path) as file:
            kind = kind_of(file.shapes, Role.CONTROL)
    except CheckpointError:
        return False  # loading it reports the fault
    return kind is not None and kind.name == IP_ADAPTER


ControlLoader = Callable[[WeightFile, UNet, torch.dtype, "torch.device | str"], Any]


def _detect_kind(file: WeightFile) -> tuple[str, ControlLoader]:
    """Return the name of a file's kind, and its loader."""
    shapes = file.shapes
    unsupported = kind_of(shapes, Role.UNSUPPORTED_CONTROL, Role.TRANSFORMER_CONTROL)
    if unsupported is not None:
        raise AdapterError(f"{file.name} is {unsupported.sentence}: {NEEDED} of a kind that is")
    kind = kind_of(shapes, Role.CONTROL)
    if kind is not None:
        return kind.name, _LOADERS[kind.name]
    if unet_prefix(shapes) is not None:
        family = detect_family(shapes, file.name).label
        raise AdapterError(f"{file.name} is a checkpoint of {family}: {NEEDED}")
    other = kind_of(shapes, Role.ADAPTER, Role.OTHER)
    if other is not None:
        raise AdapterError(f"{file.name} is {other.sentence}: {NEEDED}")
    raise AdapterError(f"{file.name} is of no kind that is known ({next(iter(shapes), 'it is empty')}): {NEEDED}")


def _control_net(file: WeightFile, unet: UNet, dtype: torch.dtype, device: torch.device | str) -> ControlNet:
    if any(key.startswith("controlnet_cond_embedding.") for key in file.shapes):
        return _diffusers_control_net(file, unet, dtype, device)
    weights = file.below("control_model." if any(k.startswith("control_model.") for k in file.shapes) else "")
    _refuse_other_family(file.name, weights.shapes, unet)
    base: Mapping[str, Tensor] = {}
    if "difference" in file.shapes or "difference" in weights.shapes:
        base = unet.state_dict()

    def stored(key: str) -> Tensor:
        tensor = _floating_point(weights, key)
        if key not in base:
            return tensor
        return tensor.float() + base[key].to("cpu", torch.float32).reshape(tensor.shape)

    make = lambda: ControlNet(unet.config, _hint_widths(file.name, weights.shapes))  # noqa: E731
    return _build(file.name, make, weights.shapes, stored, dtype=dtype, device=device)


def _diffusers_control_net(file: WeightFile, unet: UNet, dtype: torch.dtype, device: torch.device | str) -> ControlNet:
    names = _renamed(file.shapes, unet)
    shapes = {path: file.shapes[key] for path, key in names.items()}
    _refuse_other_family(file.name, {**file.shapes, **shapes}, unet)
    make = lambda: ControlNet(unet.config, _hint_widths(file.name, shapes))  # noqa: E731
    return _build(file.name, make, names, lambda path: file.tensor(names[path]), dtype=dtype, device=device)


def _renamed(shapes: Shapes, unet: UNet) -> dict[str, str]:
    """Map the modules' keys to those of a diffusers file."""
    paths = {other: path for path, other in diffusers_paths(unet).items()}
    blocks = 1 + max((int(m[2]) for key in shapes if (m := _HINT.match(key)) and m[2]), default=-1)
    names = {}
    for key in shapes:
        layer, _, tensor = key.rpartition(".")
        if match := _HINT.match(key):
            number = 0 if match[1] else blocks + 1 if match[3] else int(match[2]) + 1
            path = f"input_hint_block.{2 * number}"
        elif layer.startswith("controlnet_down_blocks."):
            path = f"zero_convs.{layer.rpartition('.')[2]}.0"
        elif layer == "controlnet_mid_block":
            path = "middle_block_out.0"
        else:
            path = paths.get(layer, layer)
        names[f"{path}.{tensor}"] = key
    return names


def _control_lora(file: WeightFile, unet: UNet, dtype: torch.dtype, device: torch.device | str) -> ControlNet:
    base = unet.state_dict()
    _refuse_other_channels(file, base)

    def stored(key: str) -> Tensor:
        layer = key.removesuffix(".weight")
        if key in file.shapes:
            return file.tensor(key)
        weight = base[key].to("cpu", torch.float32)
        if f"{layer}.up" not in file.shapes or key == layer:
            return weight
        up, down = (_floating_point(file, f"{layer}.{side}").float().flatten(1) for side in ("up", "down"))
        if up.shape[1] != down.shape[0] or up.shape[0] * down.shape[1] != weight.numel():
            raise AdapterError(f"{file.name} has factors at {layer} that do not fit the base's {tuple(weight.shape)}")
        return weight + (up @ down).reshape(weight.shape)

    make = lambda: ControlNet(unet.config, _hint_widths(file.name, file.shapes))  # noqa: E731
    return _build(file.name, make, {*base, *file.shapes}, stored, dtype=dtype, device=device)


def _refuse_other_channels(file: WeightFile, base: Mapping[str, Tensor]) -> None:
    """Raise :class:`AdapterError` if a Control-LoRA's factors have other outputs than the base's layers."""
    for key, shape in file.shapes.items():
        weight = base.get(f"{key.removesuffix('.up')}.weight") if key.endswith(".up") else None
        if weight is not None and shape[0] != weight.shape[0]:
            raise AdapterError(
                f"{file.name} has {key} for {shape[0]} channels, and the base's layer has {weight.shape[0]}:"
                " a Control-LoRA of the base's family is needed"
            )


def _floating_point(file: WeightFile, key: str) -> Tensor:
    """Return a tensor of floating-point numbers; refuse integers, which are quantised with an unknown scale."""
    tensor = file.tensor(key)
    if not tensor.is_floating_point():
        raise AdapterError(f"{file.name} has {key} of type {tensor.dtype}, and floating-point numbers are needed")
    return tensor


def _hint_widths(name: str, shapes: Shapes) -> list[int]:
    """Return the channels before, between and after the convolutions that read the map."""
    convolutions = [s for i in range(32) if (s := shapes.get(f"input_hint_block.{2 * i}.weight")) is not None]
    chained = all(a[0] == b[1] for a, b in pairwise(convolutions) if len(a) == len(b) == 4)
    if len(convolutions) < 4 or len(convolutions) % 2 or not chained or any(len(s) != 4 for s in convolutions):
        raise AdapterError(f"{name} is damaged: the convolutions that read the map do not follow each other")
    return [convolutions[0][1], *(shape[0] for shape in convolutions)]


def _refuse_other_family(name: str, shapes: Shapes, unet: UNet) -> None:
    """Raise :class:`AdapterError` if the text's width or the first layer's channels differ from the base's."""
    width = next((s[1] for k, s in shapes.items() if k.endswith("attn2.to_k.weight") and len(s) == 2), None)
    if width is not None and width != unet.config.context_width:
        raise compatibility.other_family_error(name, compatibility.family_label(width), unet)
    first = shapes.get("input_blocks.0.0.weight")
    if first is not None and tuple(first[:2]) != (unet.config.model_channels, unet.config.in_channels):
        raise AdapterError(
            f"{name} starts with {first[0]} channels of {first[1]}, and the base has {unet.config.model_channels} of"
            f" {unet.config.in_channels}: a ControlNet of the base's family is needed"
        )


def _t2i_adapter(file: WeightFile, unet: UNet, dtype: torch.dtype, device: torch.device | str) -> T2IAdapter:
    weights = file.below("adapter." if any(k.startswith("adapter.") for k in file.shapes) else "")
    names = _flat_blocks(weights.shapes)
    shapes = {path: weights.shapes[key] for path, key in names.items()}
    config = _t2i_config(file.name, shapes, unet)
    stored = lambda path: weights.tensor(names[path])  # noqa: E731
    return _build(file.name, lambda: T2IAdapter(config), names, stored, dtype=dtype, device=device)


def _flat_blocks(shapes: Shapes) -> dict[str, str]:
    """Map the release's keys to the file's: diffusers numbers a full adapter's blocks within each level."""
    light = any(key.endswith("out_conv.weight") for key in shapes)
    inside = r"body\.(\d+)\.resnets\.(\d+)\.(.+)"
    per_level = 1 + max((int(m[2]) for key in shapes if (m := re.match(inside, key))), default=-1)
    names = {}
    for key in shapes:
        path = key
        if match := re.match(inside, key):
            level, block, rest = int(match[1]), int(match[2]), match[3]
            path = f"body.{level}.body.{block}.{rest}" if light else f"body.{level * per_level + block}.{rest}"
        elif per_level and not light and (match := re.match(r"body\.(\d+)\.(in_conv.+)", key)):
            path = f"body.{int(match[1]) * per_level}.{match[2]}"
        names[path] = key
    return names


def _t2i_config(name: str, shapes: Shapes, unet: UNet) -> T2IConfig:
    xl = bool(unet.config.label_width)
    widths = (*unet.config.levels, unet.config.levels[-1]) if xl else unet.config.levels
    levels, unshuffled = len(widths), 16 if xl else 8
    halved = (2,) if xl else tuple(range(1, levels))
    try:
        light = any(key.endswith("out_conv.weight") for key in shapes)
        if light:
            folded = shapes["body.0.in_conv.weight"][1]
            inner = tuple(shapes[f"body.{i}.in_conv.weight"][0] for i in range(levels))
            count = len({m[1] for key in shapes if (m := re.match(r"body\.0\.body\.(\d+)\.", key))})
            stored_widths = tuple(shapes[f"body.{i}.out_conv.weight"][0] for i in range(levels))
        else:
            folded, inner = shapes["conv_in.weight"][1], ()
            total = len({m[1] for key in shapes if (m := re.match(r"body\.(\d+)\.", key))})
            count = max(1, total // levels)
            stored_widths = tuple(shapes[f"body.{i * count}.block1.weight"][0] for i in range(levels))
    except (KeyError, IndexError) as error:
        raise AdapterError(f"{name} is damaged or no T2I-Adapter for the base (no usable entry {error})") from error
    channels = folded // unshuffled**2
    if stored_widths != widths or channels not in (1, 3) or folded % unshuffled**2:
        raise AdapterError(
            f"{name} has levels of {stored_widths} channels and reads a map of {folded} folded ones, and the base needs"
            f" {widths} and {unshuffled**2} or {3 * unshuffled**2}: a T2I-Adapter of the base's family is needed"
        )
    return T2IConfig(channels, widths, count, unshuffled, halved, inner)


def _ip_adapter(file: WeightFile, unet: UNet, dtype: torch.dtype, device: torch.device | str) -> IPAdapter:
    shapes = file.shapes
    _refuse_faces(file.name, shapes)
    layers = [module for _, module in cross_attentions(unet)]
    width = next((s[1] for k, s in shapes.items() if k.endswith("to_k_ip.weight") and len(s) == 2), None)
    if width is not None and width != unet.config.context_width:
        raise compatibility.other_family_error(file.name, compatibility.family_label(width), unet)
    count = sum(key.endswith("to_k_ip.weight") for key in shapes)
    if count != len(layers):
        raise AdapterError(
            f"{file.name} is made for {count} cross-attentions, and the base has {len(layers)}:"
            " an IP-Adapter of the base's family is needed"
        )
    widths = [module.to_q.weight.shape[0] for module in layers]
    try:
        projection, names = _projection(shapes, unet.config.context_width)
    except (KeyError, IndexError) as error:
        raise AdapterError(f"{file.name} is damaged or of a form that is not supported (no usable {error})") from error
    names |= {key: key for key in shapes if key.startswith("ip_adapter.")}
    make = lambda: IPAdapter(projection(), unet.config.context_width, widths)  # noqa: E731
    return _build(file.name, make, names, lambda path: file.tensor(names[path]), dtype=dtype, device=device)


def _refuse_faces(name: str, shapes: Shapes) -> None:
    first = shapes.get("image_proj.proj.0.weight", (0, 0))
    with_lora = any("to_q_lora" in key or ".lora_" in key for key in shapes)
    if with_lora or any("perceiver_resampler" in k for k in shapes) or first[-1] == FACE_WIDTH:
        raise AdapterError(
            f"{name} is an IP-Adapter FaceID, which reads faces with InsightFace, a model that is not supported:"
            " an IP-Adapter for pictures (base, light, plus, plus-face, full-face) is needed"
        )


def _projection(shapes: Shapes, context_width: int) -> tuple[Callable[[], Projection], dict[str, str]]:
    """Return a function that makes the projection of these shapes, and the file's keys by the module's."""
    names = {key: key for key in shapes if key.startswith("image_proj.")}
    if "image_proj.proj.weight" in shapes:
        outputs, seen = shapes["image_proj.proj.weight"]
        return lambda: TokenProjection(seen, context_width, outputs // context_width), names
    if "image_proj.proj.3.weight" in shapes:
        seen = shapes["image_proj.proj.0.weight"][1]
        return lambda: PatchProjection(seen, context_width), names
    _, tokens, width = shapes["image_proj.latents"]
    seen, heads = shapes["image_proj.proj_in.weight"][1], shapes["image_proj.layers.0.0.to_q.weight"][0] // HEAD_WIDTH
    depth = len({m[1] for key in shapes if (m := re.match(r"image_proj\.layers\.(\d+)\.", key))})
    inner = shapes["image_proj.layers.0.1.1.weight"][0]
    parts = {"0": "norm", "1": "up", "3": "down"}

    def module_key(key: str) -> str:
        match = re.fullmatch(r"(image_proj\.layers\.\d+\.1)\.([013])\.(\w+)", key)
        return f"{match[1]}.{parts[match[2]]}.{match[3]}" if match else key

    def make() -> Resampler:
        return Resampler(seen, width, context_width, tokens=tokens, depth=depth, heads=heads, inner=inner)

    return make, {module_key(key): key for key in names}


_LOADERS: Mapping[str, ControlLoader] = {
    CONTROL_LORA: _control_lora,
    CONTROLNET: _control_net,
    IP_ADAPTER: _ip_adapter,
    T2I_ADAPTER: _t2i_adapter,
}


def _build(
    name: str,
    make: Callable[[], ControlT],
    known: Collection[str],
    stored: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> ControlT:
    """Build a module with the tensors that ``stored`` returns for its ``known`` keys."""
    with torch.device("meta"):
        module = make()
    tensors = {key: stored(key) for key in module.state_dict() if key in known}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"{name} holds NaN or infinity in {key}, and finite numbers are needed")
    load_weights(module, tensors, name, dtype=dtype, device=device)
    return module
