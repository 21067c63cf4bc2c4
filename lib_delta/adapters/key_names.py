"""Maps the layers' names in adapter files to the paths of the model's modules.

kohya's scripts join a module's path with underscores, which module names also contain (``to_out``,
``transformer_blocks``).  Therefore paths are not parsed: :func:`layer_names` lists every layer of the model
under each of its possible names.  :func:`parse_key` turns a file's names, in any dialect, into that form.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, cast

from torch import Tensor, nn

from lib_delta.adapters.algorithms import registry
from lib_delta.adapters.algorithms.base import HasTensorNames, TensorName, unchanged
from lib_delta.models.forked_layers import ForkedLayer
from lib_delta.models.network import Network
from lib_delta.models.unet import Downsample, ResBlock, SpatialTransformer, UNet, Upsample

# Within a block the two naming schemes differ only in these.
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


class LayerPath(NamedTuple):
    """A layer: its module path in the UNet (``tower`` None) or in a text encoder (``tower`` 0, 1)."""

    tower: int | None
    path: str


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with weights, by path: the UNet's forked layers, or a text encoder's leaves."""
    if isinstance(model, Network):
        return {path: m for path, m in model.named_modules() if isinstance(m, ForkedLayer)}
    return {path: m for path, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)}


# A UNet's layers stay where they are, and walking it takes as long as reading a small file.
_DIFFUSERS_PATHS: weakref.WeakKeyDictionary[UNet, Mapping[str, str]] = weakref.WeakKeyDictionary()


def diffusers_paths(unet: UNet) -> Mapping[str, str]:
    """Map the path of every layer of the UNet to its path in diffusers' ``UNet2DConditionModel``."""
    paths = _DIFFUSERS_PATHS.get(unet)
    if paths is None:
        paths = _DIFFUSERS_PATHS[unet] = MappingProxyType(dict(_layer_paths(unet)))
    return paths


def _layer_paths(unet: UNet) -> Iterator[tuple[str, str]]:
    blocks = dict(_block_paths(unet))
    for path in named_layers(unet):
        if path in _OUTSIDE_BLOCKS:
            yield path, _OUTSIDE_BLOCKS[path]
            continue
        block = ".".join(path.split(".")[: 2 if path.startswith("middle_block.") else 3])
        inside = path[len(block) + 1 :]
        if isinstance(unet.get_submodule(block), ResBlock):
            inside = _RES_BLOCK[inside]
        yield path, f"{blocks[block]}.{'conv' if inside == 'op' else inside}"


def _block_paths(unet: UNet) -> Iterator[tuple[str, str]]:
    """Yield the path of every block of the UNet with its path in diffusers' naming."""
    level, index = 0, 0
    for i, parts in enumerate(unet.input_blocks):
        if i == 0:
            continue
        for j, part in enumerate(parts):
            yield f"input_blocks.{i}.{j}", f"down_blocks.{level}.{_block_kind(part, index)}"
        level, index = (level + 1, 0) if isinstance(parts[0], Downsample) else (level, index + 1)

    counts = {"resnets": 0, "attentions": 0}
    for j, part in enumerate(unet.middle_block):
        kind = _block_kind(part, 0).split(".")[0]
        yield f"middle_block.{j}", f"mid_block.{kind}.{counts[kind]}"
        counts[kind] += 1

    level, index = 0, 0
    for i, parts in enumerate(unet.output_blocks):
        for j, part in enumerate(parts):
            yield f"output_blocks.{i}.{j}", f"up_blocks.{level}.{_block_kind(part, index)}"
        level, index = (level + 1, 0) if isinstance(parts[-1], Upsample) else (level, index + 1)


def _block_kind(block: nn.Module, index: int) -> str:
    if isinstance(block, ResBlock):
        return f"resnets.{index}"
    if isinstance(block, SpatialTransformer):
        return f"attentions.{index}"
    return "downsamplers.0" if isinstance(block, Downsample) else "upsamplers.0"


def layer_names(unet: UNet, towers: Sequence[nn.Module]) -> dict[str, LayerPath]:
    """Map the names of :func:`parse_key`, which are those of kohya's sd-scripts, to the layers.

    UNet layers have two names, after the original and after diffusers' modules
    (``lora_unet_input_blocks_1_1_proj_in``, ``lora_unet_down_blocks_0_attentions_0_proj_in``).
    A single text encoder is ``lora_te`` or ``lora_te1``; SDXL's two are ``lora_te1`` and ``lora_te2``.
    """
    names = {}
    for path, other in diffusers_paths(unet).items():
        for name in (path, other):
            names[f"lora_unet_{name.replace('.', '_')}"] = LayerPath(None, path)
    for tower, model in enumerate(towers):
        prefixes = ("lora_te", "lora_te1") if len(towers) == 1 else (f"lora_te{tower + 1}",)
        for path in named_layers(model):
            for prefix in prefixes:
                # Files name transformers' modules; ``models.text.TextEncoder`` holds these in ``transformer``.
                names[f"{prefix}_{path.removeprefix('transformer.').replace('.', '_')}"] = LayerPath(tower, path)
    return names


class TensorKey(NamedTuple):
    """A layer and one of its tensors, by the names of kohya's scripts or LyCORIS.

    ``convert`` turns the stored tensor into the named one.
    """

    layer: str
    tensor: str
    convert: Callable[[Tensor], Tensor]


class _TensorPatterns(NamedTuple):
    """The tensors' names that the algorithms declare, as expressions of whole keys."""

    same: re.Pattern[str]
    renamed: tuple[tuple[re.Pattern[str], TensorName], ...]


@functools.lru_cache(maxsize=4)
def _patterns(modules: tuple[HasTensorNames, ...]) -> _TensorPatterns:
    declared = [tensor for module in modules for tensor in module.TENSORS]
    same = "|".join(dict.fromkeys(tensor.pattern for tensor in declared if tensor.name is None))
    return _TensorPatterns(
        re.compile(rf"(?P<layer>.+?)\.(?P<tensor>{same})(?:\.default)?"),
        tuple((re.compile(rf"(?P<layer>.+?)\.(?:{t.pattern})"), t) for t in declared if t.name is not None),
    )


# diffusers' LoRAs of 2023: the attention of its text encoders, and the UNet's attention processors.
_OLD_TEXT = re.compile(r"(?P<block>.+\.self_attn)\.to_(?P<layer>q|k|v|out)_lora\.(?P<side>up|down)\.weight")
_PROCESSOR = re.compile(r"(?P<block>.+)\.processor\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.(?P<side>up|down)\.weight")

_ONE_WORD = ("lora_", "lycoris_", "oft_")

# Prefixes of a layer's path, and kohya's prefix for each; the first match wins.
_PREFIXES = (
    (r"lora_(?:unet|te\d?)_", None),
    # kohya's scripts name the layers of an OFT in this way.
    (r"oft_(?=unet_)", "lora_"),
    (r"lycoris_(?=unet_|te\d?_)", "lora_"),
    (r"lycoris_(?=text_model_)", "lora_te_"),
    (r"lycoris_", "lora_unet_"),
    # ComfyUI's names for a checkpoint's text encoders.
    (r"text_encoders\.clip_l\.transformer\.", "lora_te1_"),
    (r"text_encoders\.clip_g\.transformer\.", "lora_te2_"),
    (r"(?:base_model\.model\.)?text_encoder_(\d)\.", r"lora_te\1_"),
    (r"(?:base_model\.model\.)?text_encoder\.(?:base_model\.model\.)?", "lora_te1_"),
    (r"(?:base_model\.model\.)?(?=text_model\.)", "lora_te_"),
    (r"(?:base_model\.model\.)?unet\.(?:base_model\.model\.)?", "lora_unet_"),
    (r"(?:base_model\.model\.)?(?:model\.)?(?:diffusion_model\.)?", "lora_unet_"),
)


def parse_key(key: str) -> TensorKey | None:
    """Parse a file's key in any dialect; None for a key that names no adapter's tensor.

    Dialects: kohya (``lora_unet_..., lora_te_...``), LyCORIS (``lycoris_...``), diffusers and peft
    (dotted paths after ``unet.``, ``text_encoder.``, ``base_model.model.`` or nothing).
    """
    if match := _PROCESSOR.fullmatch(key):
        inner = {"to_out": "to_out.0"}.get(match["layer"], match["layer"])
        return TensorKey(_layer_name(f"{match['block']}.{inner}"), f"lora_{match['side']}.weight", unchanged)
    if match := _OLD_TEXT.fullmatch(key):
        return TensorKey(
            _layer_name(f"{match['block']}.{match['layer']}_proj"), f"lora_{match['side']}.weight", unchanged
        )
    patterns = _patterns((*registry.ALGORITHMS, *registry.WRAPPERS))
    for pattern, tensor in patterns.renamed:
        if match := pattern.fullmatch(key):
            return TensorKey(_layer_name(match["layer"]), cast(str, tensor.name), tensor.convert)
    match = patterns.same.fullmatch(key)
    if match is None:
        return None
    # In a model's file these are the layer's weights.  In an adapter's file the layer is one word.
    one_word = match["layer"].startswith(_ONE_WORD) and "." not in match["layer"]
    if match["tensor"] in ("weight", "rescale", "scale", "scalar") and not one_word:
        return None
    return TensorKey(_layer_name(match["layer"]), match["tensor"], unchanged)


# Whole new tensors of a layer, in peft's ``modules_to_save`` and with its ``bias="all"``.
_WHOLE = re.compile(r"(?P<layer>.+?)(?:\.modules_to_save(?:\.\w+)?)?\.(?P<tensor>weight|bias)")


def read_whole(key: str) -> TensorKey | None:
    """Parse the key of a layer's whole new weight or bias; None for any other key."""
    match = _WHOLE.fullmatch(key)
    # In early extracts, ``bias`` next to kohya's factors was a remainder of the weight.
    if match is None or match["layer"].startswith(_ONE_WORD):
        return None
    return TensorKey(_layer_name(match["layer"]), f"base_layer.{match['tensor']}", unchanged)


def owner(key: str, names: Mapping[str, LayerPath]) -> tuple[str, str] | None:
    """Return a key's layer in ``names`` and its tensor's name; None for a key of no layer."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        layer = _layer_name(".".join(parts[:end]))
        if layer in names:
            return layer, ".".join(parts[end:])
    return None


def _layer_name(path: str) -> str:
    for prefix, instead in _PREFIXES:
        if match := re.match(prefix, path):
            name = path if instead is None else match.expand(instead) + path[match.end() :]
            return name.replace(".", "_")
    return path


EMBEDDING = re.compile(r"bundle_emb\.(?P<name>.+)\.(?P<part>string_to_param\.\*|emb_params|clip_l|clip_g)")
