"""Files of ControlNets, T2I-Adapters and IP-Adapters: what a file is, and the model in it.

Dialects: the original releases' names (with or without ``control_model.`` or ``adapter.``), diffusers'
names, "difference" ControlNets, which leave out the base's part of their weights, and Control-LoRA, which
has low-rank factors of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
POOLING = "global_average_pooling"  # in the .yaml of a release
FACE_WIDTH = 512  # of the faces' embeddings that FaceID models look at

# diffusers' name for each convolution that reads the map: first, those between, last.
_HINT = re.compile(r"controlnet_cond_embedding\.(?:(conv_in)|blocks\.(\d+)|(conv_out))\.")


@dataclass(frozen=True, eq=False)
class ControlFile:
    """What a file holds: the ``kind`` for messages, and the model.

    ``pooled`` says whether what it adds is averaged over the picture, ``fills`` whether it fills what is hidden of its
    map: no weight tells, but the words of the model's name do, and what lies beside it.
    """

    name: str
    kind: str
    model: ControlNet | T2IAdapter | IPAdapter
    pooled: bool = False
    fills: bool = False


def load_control(
    path: Path, unet: UNet, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> ControlFile:
    """Read a file for ``unet``, the base; type and place are the base's own unless given.

    Raises :class:`AdapterError` for a file that cannot be read, is something else, or is of another family.
    """
    like = unet.time_embed["0"].weight
    place = (dtype or like.dtype, device or like.device)
    try:
        with WeightFile.open(path) as file:
            kind, read = _detect_kind(file)
            words = sidecar_config.words_of(sidecar_config.known_as(path))
            # "inpaint_depth_hand" mends hands by a map of depth, of which nothing is hidden.
            fills = bool(words & {"inpaint", "inpainting"}) and "depth" not in words
            return ControlFile(file.name, kind, read(file, unet, *place), _pooled(path, words), fills)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def _pooled(path: Path, words: frozenset[str]) -> bool:
    """Tell whether a ControlNet's residuals are averaged, as its configuration says, or else its name."""
    if sidecar_config.named_by_diffusers(path):
        stated = sidecar_config.settings(path, sidecar_config.DIFFUSERS).get("global_pool_conditions")
        if isinstance(stated, bool):
            return stated
    config = ModelConfig.beside(path)
    stated = "" if config is None else config.text(POOLING) or config.text("control_stage_config", "params", POOLING)
    return stated.lower() == "true" if stated else "shuffle" in words


def prompts_with_pictures(path: Path) -> bool:
    """Tell an IP-Adapter's file, which looks at pictures, from those that read maps; by its header."""
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
        own = _real(weights, key)
        return own.float() + base[key].to("cpu", torch.float32).reshape(own.shape) if key in base else own

    names = {key: key for key in weights.shapes}
    return _made(
        file.name,
        lambda: ControlNet(unet.config, _hint_widths(file.name, weights.shapes)),
        names,
        stored,
        dtype,
        device,
    )


def _diffusers_control_net(file: WeightFile, unet: UNet, dtype: torch.dtype, device: torch.device | str) -> ControlNet:
    names = _renamed(file.shapes, unet)
    shapes = {own: file.shapes[key] for own, key in names.items()}
    _refuse_other_family(file.name, {**file.shapes, **shapes}, unet)
    make = lambda: ControlNet(unet.config, _hint_widths(file.name, shapes))  # noqa: E731
    return _made(file.name, make, names, lambda own: file.tensor(names[own]), dtype, device)


def _renamed(shapes: Shapes, unet: UNet) -> dict[str, str]:
    """Map our keys to a diffusers file's."""
    ours = {other: path for path, other in diffusers_paths(unet).items()}
    blocks = 1 + max((int(m[2]) for key in shapes if (m := _HINT.match(key)) and m[2]), default=-1)
    names = {}
    for key in shapes:
        layer, _, tensor = key.rpartition(".")
        if found := _HINT.match(key):
            number = 0 if found[1] else blocks + 1 if found[3] else int(found[2]) + 1
            own = f"input_hint_block.{2 * number}"
        elif layer.startswith("controlnet_down_blocks."):
            own = f"zero_convs.{layer.rpartition('.')[2]}.0"
        elif layer == "controlnet_mid_block":
            own = "middle_block_out.0"
        else:
            own = ours.get(layer, layer)
        names[f"{own}.{tensor}"] = key
    return names


def _control_lora(file: WeightFile, unet: UNet, dtype: torch.dtype, device: torch.device | str) -> ControlNet:
    base = unet.state_dict()
    for key, shape in file.shapes.items():
        own = base.get(f"{key.removesuffix('.up')}.weight") if key.endswith(".up") else None
        if own is not None and shape[0] != own.shape[0]:
            raise AdapterError(
                f"{file.name} has {key} for {shape[0]} channels, and the base's layer has {own.shape[0]}:"
                " a Control-LoRA of the base's family is needed"
            )

    def stored(key: str) -> Tensor:
        layer = key.removesuffix(".weight")
        if key in file.shapes:
            return file.tensor(key)
        weight = base[key].to("cpu", torch.float32)
        if f"{layer}.up" not in file.shapes or key == layer:
            return weight
        up, down = (_real(file, f"{layer}.{side}").float().flatten(1) for side in ("up", "down"))
        if up.shape[1] != down.shape[0] or up.shape[0] * down.shape[1] != weight.numel():
            raise AdapterError(f"{file.name} has factors at {layer} that do not fit the base's {tuple(weight.shape)}")
        return weight + (up @ down).reshape(weight.shape)

    names = {key: key for key in (*base, *file.shapes)}
    return _made(
        file.name, lambda: ControlNet(unet.config, _hint_widths(file.name, file.shapes)), names, stored, dtype, device
    )


def _real(file: WeightFile, key: str) -> Tensor:
    """Return a tensor that is to be computed with; quantised ones are whole numbers, and their scale is not known."""
    tensor = file.tensor(key)
    if not tensor.is_floating_point():
        raise AdapterError(f"{file.name} has {key} of type {tensor.dtype}, and floating-point numbers are needed")
    return tensor


def _hint_widths(name: str, shapes: Shapes) -> list[int]:
    """Read the channels of the convolutions that look at the map."""
    convolutions = [s for i in range(32) if (s := shapes.get(f"input_hint_block.{2 * i}.weight")) is not None]
    chained = all(a[0] == b[1] for a, b in pairwise(convolutions) if len(a) == len(b) == 4)
    if len(convolutions) < 4 or len(convolutions) % 2 or not chained or any(len(s) != 4 for s in convolutions):
        raise AdapterError(f"{name} is damaged: the convolutions that read the map do not follow each other")
    return [convolutions[0][1], *(shape[0] for shape in convolutions)]


def _refuse_other_family(name: str, shapes: Shapes, unet: UNet) -> None:
    """Compare the width of the text, and whether there is a label, with the base's."""
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
    shapes = {own: weights.shapes[key] for own, key in names.items()}
    config = _t2i_config(file.name, shapes, unet)
    return _made(file.name, lambda: T2IAdapter(config), names, lambda own: weights.tensor(names[own]), dtype, device)


def _flat_blocks(shapes: Shapes) -> dict[str, str]:
    """Map the release's keys to the file's: diffusers counts a full adapter's blocks level by level."""
    light = any(key.endswith("out_conv.weight") for key in shapes)
    inside = r"body\.(\d+)\.resnets\.(\d+)\.(.+)"
    per_level = 1 + max((int(m[2]) for key in shapes if (m := re.match(inside, key))), default=-1)
    names = {}
    for key in shapes:
        own = key
        if found := re.match(inside, key):
            level, block, rest = int(found[1]), int(found[2]), found[3]
            own = f"body.{level}.body.{block}.{rest}" if light else f"body.{level * per_level + block}.{rest}"
        elif per_level and not light and (found := re.match(r"body\.(\d+)\.(in_conv.+)", key)):
            own = f"body.{int(found[1]) * per_level}.{found[2]}"
        names[own] = key
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
            found = tuple(shapes[f"body.{i}.out_conv.weight"][0] for i in range(levels))
        else:
            folded, inner = shapes["conv_in.weight"][1], ()
            total = len({m[1] for key in shapes if (m := re.match(r"body\.(\d+)\.", key))})
            count = max(1, total // levels)
            found = tuple(shapes[f"body.{i * count}.block1.weight"][0] for i in range(levels))
    except (KeyError, IndexError) as error:
        raise AdapterError(f"{name} is damaged or no T2I-Adapter for the base (no usable entry {error})") from error
    channels = folded // unshuffled**2
    if found != widths or channels not in (1, 3) or folded % unshuffled**2:
        raise AdapterError(
            f"{name} has levels of {found} channels and reads a map of {folded} folded ones, and the base needs"
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
    found = sum(key.endswith("to_k_ip.weight") for key in shapes)
    if found != len(layers):
        raise AdapterError(
            f"{file.name} is made for {found} cross-attentions, and the base has {len(layers)}:"
            " an IP-Adapter of the base's family is needed"
        )
    widths = [module.to_q.weight.shape[0] for module in layers]
    try:
        projection, names = _projection(shapes, unet.config.context_width)
    except (KeyError, IndexError) as error:
        raise AdapterError(f"{file.name} is damaged or of a form that is not supported (no usable {error})") from error
    names |= {key: key for key in shapes if key.startswith("ip_adapter.")}
    make = lambda: IPAdapter(projection(), unet.config.context_width, widths)  # noqa: E731
    return _made(file.name, make, names, lambda own: file.tensor(names[own]), dtype, device)


def _refuse_faces(name: str, shapes: Shapes) -> None:
    first = shapes.get("image_proj.proj.0.weight", (0, 0))
    with_lora = any("to_q_lora" in key or ".lora_" in key for key in shapes)
    if with_lora or any("perceiver_resampler" in k for k in shapes) or first[-1] == FACE_WIDTH:
        raise AdapterError(
            f"{name} is an IP-Adapter FaceID, which looks at faces through InsightFace, a model that is not supported:"
            " an IP-Adapter that looks at pictures (base, light, plus, plus-face, full-face) is needed"
        )


def _projection(shapes: Shapes, context_width: int) -> tuple[Callable[[], Projection], dict[str, str]]:
    """Tell a projection's form by its shapes; return how it is made, and our keys for the file's."""
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

    def ours(key: str) -> str:
        found = re.fullmatch(r"(image_proj\.layers\.\d+\.1)\.([013])\.(\w+)", key)
        return f"{found[1]}.{parts[found[2]]}.{found[3]}" if found else key

    return lambda: Resampler(seen, width, context_width, tokens, depth, heads, inner), {ours(k): k for k in names}


_LOADERS: Mapping[str, ControlLoader] = {
    CONTROL_LORA: _control_lora,
    CONTROLNET: _control_net,
    IP_ADAPTER: _ip_adapter,
    T2I_ADAPTER: _t2i_adapter,
}


def _made(
    name: str,
    make: Callable[[], ControlT],
    known: Mapping[str, object],
    stored: Callable[[str], Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
) -> ControlT:
    """Make a module of the tensors that ``stored`` gives for its keys."""
    with torch.device("meta"):
        module = make()
    tensors = {key: stored(key) for key in module.state_dict() if key in known}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"{name} holds NaN or infinity in {key}, and finite numbers are needed")
    load_weights(module, tensors, name, dtype, device)
    return module
