"""Adapter files: from a file's tensors to the layers that they adapt."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lib_delta.adapters import full, keys, lora
from lib_delta.adapters.full import Tuned
from lib_delta.adapters.keys import Place
from lib_delta.adapters.protocol import Algorithm, LayerAdapter
from lib_delta.checkpoint import TEXT_PREFIXES, WeightFile, detect_family, unet_prefix
from lib_delta.errors import AdapterError, CheckpointError
from lib_delta.families import Family
from lib_delta.models.text import load_towers
from lib_delta.models.unet import UNet

ALGORITHMS: tuple[Algorithm, ...] = (cast(Algorithm, lora), cast(Algorithm, full))

# How names tell families that no layer of a served UNet can have.
_FAMILY_NAMES = {
    "lora_unet_double_blocks_": Family.FLUX,
    "lora_unet_single_blocks_": Family.FLUX,
    "lora_unet_joint_blocks_": Family.SD3,
    "lora_unet_joint_transformer_blocks_": Family.SD3,
    "lora_te3_": Family.SD3,
    "lora_te2_": Family.SDXL,
}


@dataclass(frozen=True)
class AdapterFile:
    """What a file adapts: layers by module path, of the UNet and of each text encoder.

    ``unmatched`` are the file's keys that name no layer of the model at hand.
    """

    name: str
    unet: Mapping[str, LayerAdapter]
    text: tuple[Mapping[str, LayerAdapter], ...] = ()
    unmatched: tuple[str, ...] = ()

    def report(self) -> str:
        """Say in one sentence what matched, and count and name what did not."""
        text = sum(map(len, self.text))
        counts = f"{self.name} adapts {len(self.unet)} layers of the UNet and {text} of the text encoder"
        if not self.unmatched:
            return f"{counts}."
        shown = ", ".join(self.unmatched[:3]) + (", ..." if len(self.unmatched) > 3 else "")
        return f"{counts}; {len(self.unmatched)} of its keys match no layer ({shown})."


def load_adapter(path: str | os.PathLike[str], unet: UNet, towers: Sequence[nn.Module] = ()) -> AdapterFile:
    """Read an adapter for ``unet`` and its text encoders: a LoRA or LoCon, or a fine-tuned checkpoint.

    The UNet of a memory-mapped checkpoint is read layer by layer, and stays mapped.  A checkpoint
    without text encoders leaves the base's as they are.
    Raises :class:`AdapterError` for a file that cannot be read, is malformed, or is of another family.
    """
    try:
        with WeightFile.open(Path(path)) as file:
            prefix = unet_prefix(file.shapes)
            if prefix is None:
                return read_adapter(file.name, _Tensors(file), unet, towers)
            found = detect_family(file.shapes, file.name)
            if found is not family_of(unet):
                raise _other_family(file.name, found.label, unet)
            text = [(tower, tuned.state_dict()) for tower, tuned in zip(towers, _tuned_towers(file, found, towers))]
            return read_full(file.name, _Tensors(file.below(prefix)), unet, text)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def _tuned_towers(file: WeightFile, family: Family, towers: Sequence[nn.Module]) -> Sequence[nn.Module]:
    if not towers or not any(key.startswith(TEXT_PREFIXES) for key in file.shapes):
        return ()
    return load_towers(file, family, next(towers[0].parameters()).dtype)


class _Tensors(Mapping[str, Tensor]):
    """A file's tensors, each read when it is asked for."""

    def __init__(self, file: WeightFile) -> None:
        self._file = file

    def __getitem__(self, key: str) -> Tensor:
        return self._file.tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._file.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.shapes)

    def __len__(self) -> int:
        return len(self._file.shapes)


def read_adapter(name: str, tensors: Mapping[str, Tensor], unet: UNet, towers: Sequence[nn.Module] = ()) -> AdapterFile:
    """Make an :class:`AdapterFile` of the tensors of the file ``name``; raises as :func:`load_adapter`."""
    _refuse_other_family(name, tensors, unet)
    names = keys.kohya_names(unet, towers)
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        layer, below = keys.split(key)
        groups[layer][below] = tensor
    found: dict[Place, LayerAdapter] = {}
    unmatched: list[str] = []
    for layer, parts in groups.items():
        place = names.get(layer)
        if place is None:
            unmatched += [f"{layer}.{below}" for below in parts]
            continue
        if place in found:
            raise AdapterError(f"{name} names the layer {place.path} twice ({layer}), and one entry a layer is needed")
        try:
            found[place] = _layer(parts, _weight(unet, towers, place).shape)
        except AdapterError as error:
            raise AdapterError(f"{name} is malformed or for another model at {layer}: {error}") from error
    if not found:
        sample = next(iter(tensors), "it is empty")
        raise AdapterError(
            f"none of the {len(tensors)} keys of {name} ({sample}) names a layer of the base model: "
            f"a kohya LoRA or LoCon for {family_of(unet).label} is needed"
        )
    text = tuple({p.path: a for p, a in found.items() if p.tower == i} for i in range(len(towers)))
    return AdapterFile(name, {p.path: a for p, a in found.items() if p.tower is None}, text, tuple(unmatched))


def _layer(tensors: Mapping[str, Tensor], shape: torch.Size) -> LayerAdapter:
    for below, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{below} holds NaN or infinity, and finite numbers are needed")
    for algorithm in ALGORITHMS:
        adapter = algorithm.match(tensors)
        if adapter is not None:
            return cast(LayerAdapter, adapter.fit(shape))
    names = ", ".join(sorted(tensors))
    raise AdapterError(f"its tensors ({names}) are of an algorithm that is not served, and LoRA or LoCon is needed")


def read_full(
    name: str,
    tensors: Mapping[str, Tensor],
    unet: UNet,
    towers: Sequence[tuple[nn.Module, Mapping[str, Tensor]]] = (),
) -> AdapterFile:
    """Make an adaptation of a fine-tuned model: every layer in which it differs from the base.

    Args:
        name: the file, for messages.
        tensors: the tuned UNet's weights, by their keys below ``model.diffusion_model.``.
        unet: the base. A layer whose tuned weights, stored in the base's dtype, are bit-identical
            to it stays shared.
        towers: each base text encoder with its tuned weights, by the encoder's own names.

    Raises :class:`AdapterError` where the tuned weights are missing, of another shape, or not finite.
    """
    width = next((tensors[k].shape[1] for k in tensors if k.endswith("attn2.to_k.weight")), None)
    if width is not None and width != unet.config.context_width:
        raise _other_family(name, _described(width), unet)
    text = tuple(_tuned_layers(name, weights, tower) for tower, weights in towers)
    return AdapterFile(name, _tuned_layers(name, tensors, unet), text)


def _tuned_layers(name: str, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, LayerAdapter]:
    changed: dict[str, LayerAdapter] = {}
    for path, layer in keys.layers(model).items():
        differs = False
        tuned: dict[str, Tensor] = {}
        for key, base in layer.named_parameters(recurse=False):
            tuned[key] = _tuned(name, tensors, f"{path}.{key}", base)
            differs = differs or full.changed(base, tuned[key])
        if differs:
            changed[path] = Tuned(tuned["weight"], tuned.get("bias"))
    return changed


def _tuned(name: str, tensors: Mapping[str, Tensor], key: str, base: Tensor) -> Tensor:
    if key not in tensors:
        raise AdapterError(f"{name} has no {key}, and a full checkpoint of the base model's architecture is needed")
    tensor = tensors[key]
    if _without_ones(tensor) != _without_ones(base):
        raise AdapterError(
            f"{name} has {key} of shape {tuple(tensor.shape)}, and the base model's shape {tuple(base.shape)} is needed"
        )
    if not torch.isfinite(tensor.to(base.dtype)).all():
        raise AdapterError(f"{name} has NaN or infinity in {key}, and finite weights are needed")
    return tensor.reshape(base.shape)


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    # A 1x1 convolution may be stored as a matrix.
    return tuple(n for n in tensor.shape if n != 1)


def _weight(unet: UNet, towers: Sequence[nn.Module], place: Place) -> Tensor:
    model: nn.Module = unet if place.tower is None else towers[place.tower]
    return cast(Tensor, model.get_submodule(place.path).weight)


def family_of(unet: UNet) -> Family:
    """Tell a UNet's family by its layout, whatever its width."""
    if unet.config.label_width:
        return Family.SDXL
    return Family.SD2 if unet.config.linear_projection else Family.SD1


def _context_widths(tensors: Mapping[str, Tensor]) -> Iterator[int]:
    for key, tensor in tensors.items():
        if key.endswith(("attn2_to_k.lora_down.weight", "attn2_to_k.diff")) and tensor.ndim >= 2:
            yield tensor.shape[1]


def _described(context_width: int) -> str:
    label = next((f.label for f in Family if f.context_width == context_width), "another model")
    return f"{label} (text {context_width} wide)"


def _refuse_other_family(name: str, tensors: Mapping[str, Tensor], unet: UNet) -> None:
    """Compare what the file's names and cross-attention say about its model with the model at hand."""
    own = family_of(unet)
    for key in tensors:
        family = next((f for prefix, f in _FAMILY_NAMES.items() if key.startswith(prefix)), own)
        if family is not own:
            raise _other_family(name, family.label, unet)
    width = next(_context_widths(tensors), unet.config.context_width)
    if width != unet.config.context_width:
        raise _other_family(name, _described(width), unet)


def _other_family(name: str, found: str, unet: UNet) -> AdapterError:
    needed = f"{family_of(unet).label} (text {unet.config.context_width} wide)"
    return AdapterError(f"{name} is made for {found}, and one for the source's base model, {needed}, is needed")
