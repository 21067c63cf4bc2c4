"""Reads adapter files, and assigns their tensors to the layers that they adapt."""

from __future__ import annotations

import os
from collections import ChainMap, Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lib_delta.adapters import compatibility, key_names, numbered_format
from lib_delta.adapters.algorithms import biased, dora, full, ia3, lokr, lora, oft, registry
from lib_delta.adapters.algorithms.base import LayerAdapter, finite_scalar
from lib_delta.adapters.algorithms.biased import Biased
from lib_delta.adapters.algorithms.dora import Dora
from lib_delta.adapters.algorithms.full import FineTunedLayer
from lib_delta.adapters.algorithms.lora import Lora
from lib_delta.adapters.compatibility import unet_family
from lib_delta.adapters.key_names import LayerPath
from lib_delta.adapters.peft_config import PeftConfig, rank_of
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.parameterization import Prediction
from lib_delta.errors import AdapterError, CheckpointError
from lib_delta.files.checkpoint import TEXT_PREFIXES, detect_family, stated_prediction, unet_prefix
from lib_delta.files.stored_file import reshaped
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.text import TextEncoder, load_towers
from lib_delta.models.unet import UNet


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """The layers that a file adapts, by module path, of the UNet and of each text encoder.

    ``unmatched`` are the file's keys that name no layer of the base, out of ``total``.
    ``embeddings`` are textual inversions bundled with the file: ``(vectors, width)`` for each text encoder, by name.
    ``stated`` is the family that the file's header names; empty if it names none.
    """

    name: str
    unet: Mapping[str, LayerAdapter]
    text: tuple[Mapping[str, LayerAdapter], ...] = ()
    unmatched: tuple[str, ...] = ()
    total: int = 0
    embeddings: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    stated: str = ""

    def algorithms(self) -> dict[str, int]:
        """Return the number of layers that each algorithm adapts, largest first."""
        return dict(Counter(adapter.algorithm for adapter in self._layers()).most_common())

    def ranks(self) -> tuple[int, ...]:
        """Return the ranks in the file, sorted."""
        return tuple(sorted({adapter.rank for adapter in self._layers() if adapter.rank is not None}))

    def memory(self) -> int:
        """Return the bytes of its tensors."""
        embedded = sum(vectors.nbytes for parts in self.embeddings.values() for vectors in parts)
        return sum(adapter.memory() for adapter in self._layers()) + embedded

    def _layers(self) -> Iterator[LayerAdapter]:
        for layers in (self.unet, *self.text):
            yield from layers.values()

    def with_rank(self, rank: int | None) -> AdapterFile:
        """Return the file with only the first ``rank`` ranks of its LoRAs, as DyLoRAs allow; None for all ranks."""
        if rank is None:
            return self
        if not any(isinstance(adapter, Lora) for adapter in self._layers()):
            raise AdapterError(f"{self.name} has no ranks to choose from (dyn={rank}): a LoRA is needed")

        def cut(layers: Mapping[str, LayerAdapter]) -> dict[str, LayerAdapter]:
            return {path: a.truncated(rank) if isinstance(a, Lora) else a for path, a in layers.items()}

        return replace(self, unet=cut(self.unet), text=tuple(map(cut, self.text)))

    def report(self) -> str:
        """Describe the file in one sentence, with the numbers of matched layers and unmatched keys."""
        kinds, ranks = " and ".join(self.algorithms()), self.ranks()
        if ranks:
            kinds += f" of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        text = sum(map(len, self.text))
        sentence = f"{self.name} ({kinds or 'nothing changed'}) adapts {len(self.unet)} layers of the UNet"
        sentence += f" and {text} of the text encoder"
        if self.embeddings:
            sentence += f", and contains the embedding{'s' * (len(self.embeddings) > 1)} {', '.join(self.embeddings)}"
        if not self.unmatched:
            return f"{sentence}."
        return f"{sentence}; {len(self.unmatched)} of its {self.total} keys match no layer."


def load_adapter(
    path: str | os.PathLike[str],
    unet: UNet,
    towers: Sequence[nn.Module] = (),
    prediction: Prediction | None = None,
) -> AdapterFile:
    """Read an adapter for ``unet`` and its text encoders: a LoRA, a LyCORIS file or a fine-tuned checkpoint.

    ``prediction`` is the base's prediction type, which a fine-tuned checkpoint has to share.  A checkpoint without text
    encoders does not change the base's.
    Raises :class:`AdapterError` for a file that cannot be read, is malformed, or is of another family.
    """
    try:
        with WeightFile.open(Path(path)) as file:
            if unet_prefix(file.shapes) is None:
                return _load_layers(file, unet, towers)
            return _load_fine_tuned(file, unet, towers, prediction)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def _load_layers(file: WeightFile, unet: UNet, towers: Sequence[nn.Module]) -> AdapterFile:
    """Read a LoRA or LyCORIS file."""
    tensors: Mapping[str, Tensor] | None
    tensors = numbered_format.renamed(file.name, _Tensors(file), file.metadata, unet)
    if tensors is None:
        compatibility.refuse_unsupported_kinds(file.name, file.shapes)
        tensors = _Tensors(file)
    trained = PeftConfig.beside(file.path, file.metadata)
    return read_adapter(file.name, tensors, unet, towers, trained=trained, metadata=file.metadata)


def _load_fine_tuned(
    file: WeightFile, unet: UNet, towers: Sequence[nn.Module], prediction: Prediction | None
) -> AdapterFile:
    """Read a fine-tuned checkpoint."""
    family = detect_family(file.shapes, file.name)
    if family is not unet_family(unet):
        raise compatibility.other_family_error(file.name, family.label, unet)
    _refuse_other_prediction(file, prediction)
    text = [(tower, tuned.state_dict()) for tower, tuned in zip(towers, _fine_tuned_towers(file, family, towers))]
    return read_fine_tuned(file.name, _Tensors(file.below(unet_prefix(file.shapes) or "")), unet, text)


def _refuse_other_prediction(file: WeightFile, needed: Prediction | None) -> None:
    stated = stated_prediction(file)
    if needed is not None and stated is not None and stated != needed:
        raise AdapterError(
            f"{file.name} predicts {stated} where the base predicts {needed}, so their difference means nothing:"
            f" a checkpoint that predicts {needed} is needed"
        )


def _fine_tuned_towers(file: WeightFile, family: Family, towers: Sequence[nn.Module]) -> Sequence[nn.Module]:
    if not towers or not any(key.startswith(TEXT_PREFIXES) for key in file.shapes):
        return ()
    return load_towers(file, family, next(towers[0].parameters()).dtype)


class _Tensors(Mapping[str, Tensor]):
    """A file's tensors, each read on demand."""

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


def read_adapter(
    name: str,
    tensors: Mapping[str, Tensor],
    unet: UNet,
    towers: Sequence[nn.Module] = (),
    *,
    trained: PeftConfig | None = None,
    metadata: Mapping[str, str] | None = None,
) -> AdapterFile:
    """Make an :class:`AdapterFile` of the tensors of the file ``name``; raises as :func:`load_adapter`.

    ``trained`` is the trainer's configuration next to the file, ``metadata`` the file's header.
    """
    stated = compatibility.stated_family(metadata or {})
    groups, embeddings, unread = _group_by_layer(name, tensors)
    compatibility.refuse_other_family(name, groups, unet)
    names = key_names.layer_names(unet, towers)
    unmatched = _with_whole_weights(name, groups, {key: tensors[key] for key in unread}, names)
    adapters: dict[LayerPath, LayerAdapter] = {}
    for layer, group in groups.items():
        path = names.get(layer)
        if path is None:
            unmatched += group.stored
            continue
        if path in adapters:
            raise AdapterError(f"{name} names the layer {path.path} twice ({layer}), and one entry a layer is needed")
        if trained is not None:
            trained.complete(layer, group.stored[0], group.tensors)
        module = _module(unet, towers, path)
        unmatched += _without_more_inputs(group, module)
        try:
            adapters[path] = _layer_adapter(group.tensors, module)
        except AdapterError as error:
            raise AdapterError(f"{name} is malformed or for another model at {layer}: {error}") from error
    if not adapters:
        raise compatibility.no_match_error(name, list(tensors), unet, stated=stated, towers=len(towers))
    widths = _text_widths(unet, towers)
    return AdapterFile(
        name=name,
        unet=_of_tower(adapters, None),
        text=tuple(_of_tower(adapters, number) for number in range(len(towers))),
        unmatched=tuple(unmatched),
        total=len(tensors),
        embeddings={key: _embedding(name, key, parts, widths) for key, parts in embeddings.items()},
        stated=stated,
    )


def _of_tower(adapters: Mapping[LayerPath, LayerAdapter], tower: int | None) -> dict[str, LayerAdapter]:
    return {path.path: adapter for path, adapter in adapters.items() if path.tower == tower}


@dataclass
class LayerTensors:
    """One layer's tensors by the names of :func:`key_names.parse_key`, and their stored keys."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)


def _group_by_layer(
    name: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, LayerTensors], dict[str, dict[str, Tensor]], list[str]]:
    """Return a file's tensors by layer, its bundled embeddings, and the keys that name neither."""
    groups: dict[str, LayerTensors] = defaultdict(LayerTensors)
    embeddings: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unread: list[str] = []
    for key, tensor in tensors.items():
        if bundled := key_names.EMBEDDING.fullmatch(key):
            # A single vector may be stored without the dimension of vectors.
            embeddings[bundled["name"]][bundled["part"]] = tensor[None] if tensor.ndim == 1 else tensor
            continue
        read = key_names.parse_key(key)
        if read is None:
            unread.append(key)
            continue
        group = groups[read.layer]
        if read.tensor in group.tensors:
            raise AdapterError(f"{name} holds {read.tensor} of {read.layer} twice ({key}), and one is needed")
        group.tensors[read.tensor] = read.convert(tensor)
        group.stored.append(key)
    return dict(groups), dict(embeddings), unread


# Tensors next to a layer's factors, in files of kinds that are not supported.
_UNSUPPORTED_TENSORS = {"lora_diag": " of KaSA"}
# With some settings peft also saves the base's weights, next to their replacements: they change nothing.
_BASE_WEIGHTS = "original_module."


def _with_whole_weights(
    name: str, groups: dict[str, LayerTensors], unread: Mapping[str, Tensor], names: Mapping[str, LayerPath]
) -> list[str]:
    """Add whole new weights of layers to ``groups``; return the keys that belong to no layer.

    Raises :class:`AdapterError` for any other tensor of a layer: without it, the layer would differ from the trained
    one.
    """
    factors = any(layer in names for layer in groups)
    left = []
    for key, tensor in unread.items():
        owner = key_names.owner(key, names)
        of_peft = factors or key.startswith("base_model.model.")
        whole = key_names.read_whole(key) if of_peft else None
        if owner is None or not of_peft:
            left.append(key)
        elif owner[1].startswith(_BASE_WEIGHTS):
            continue
        elif whole is None or whole.layer != owner[0]:
            algorithm = _UNSUPPORTED_TENSORS.get(owner[1], "")
            raise AdapterError(
                f"{name} holds a tensor {owner[1]}{algorithm} for the layer {owner[0]} ({key}), which no supported"
                " algorithm reads: without it the layer would differ from the trained one"
            )
        else:
            group = groups.setdefault(whole.layer, LayerTensors())
            # peft may save it under two names.
            if whole.tensor in group.tensors and not torch.equal(group.tensors[whole.tensor], tensor):
                raise AdapterError(f"{name} holds {whole.tensor} of {whole.layer} twice ({key}), and one is needed")
            group.tensors[whole.tensor] = tensor
            group.stored.append(key)
    return left


def _text_widths(unet: UNet, towers: Sequence[nn.Module]) -> list[int]:
    """Return the width of each text encoder; that of the UNet's text unless there are two."""
    widths = [tower.config.width for tower in towers if isinstance(tower, TextEncoder)]
    return widths if len(widths) > 1 else [unet.config.context_width]


def _embedding(name: str, key: str, parts: Mapping[str, Tensor], widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Return an embedding's vectors for each text encoder: CLIP-L's before OpenCLIP-G's."""
    vectors = [parts[part] for part in sorted(parts, key=lambda part: part == "clip_g")]
    if len(vectors) != len(widths) or len({len(v) for v in vectors}) != 1:
        raise AdapterError(
            f"{name} contains an embedding {key!r} with {', '.join(parts)}, and as many vectors for each of the base's"
            f" text encoders ({len(widths)}) are needed"
        )
    for part, width in zip(vectors, widths):
        _refuse_embedding(name, key, part, width)
    return tuple(vectors)


def _refuse_embedding(name: str, key: str, vectors: Tensor, width: int) -> None:
    fits = vectors.ndim == 2 and vectors.shape[1] == width and vectors.is_floating_point()
    if not fits or not torch.isfinite(vectors.float()).all():
        raise AdapterError(
            f"{name} contains an embedding {key!r} of shape {tuple(vectors.shape)} and type {vectors.dtype},"
            f" and finite vectors of width {width} are needed"
        )


# Input channels of the first layer in depth, edit and inpainting models: the latent's, and more after them.
_MORE_INPUTS = (5, 8, 9)
_FIRST = "input_blocks.0.0.weight"


def _without_more_inputs(group: LayerTensors, layer: nn.Module) -> list[str]:
    """Drop the channels for mask and picture from an inpainting model's first layer; return their description."""
    needed = cast(Tensor, layer.weight).shape
    if len(needed) != 4 or needed[1] in _MORE_INPUTS:
        return []
    dropped = []
    for name in (lora.DOWN, full.DIFF, full.NEW):
        tensor = group.tensors.get(name)
        if tensor is not None and tensor.ndim == 4 and tensor.shape[1] in _MORE_INPUTS and tensor.shape[1] > needed[1]:
            group.tensors[name] = tensor[:, : needed[1]].contiguous()
            stored = next((key for key in group.stored if key.endswith(name)), group.stored[0])
            dropped.append(f"{stored} (input channels {needed[1] + 1} to {tensor.shape[1]})")
    return dropped


# Tensors of one number, which may be stored as an integer.
_NUMBERS = (lora.ALPHA, ia3.ON_INPUT, oft.PEFT_TERMS, lora.SCALE, lora.SCALAR)


def _layer_adapter(tensors: Mapping[str, Tensor], layer: nn.Module) -> LayerAdapter:
    for tensor_name, tensor in tensors.items():
        # Integers in any other tensor are quantised factors, whose scale is not known.
        if not tensor.is_floating_point() and tensor_name not in _NUMBERS:
            raise AdapterError(f"{tensor_name} is stored as {tensor.dtype}, and floating-point numbers are needed")
    tensors = _scaled(tensors)
    if lokr.LOKR_W1 in tensors and lokr.LOKR_W2 in tensors:
        # Alpha means nothing with two whole factors, and exceeds fp16's range in some files.
        tensors = {tensor_name: tensor for tensor_name, tensor in tensors.items() if tensor_name != lora.ALPHA}
    for tensor_name, tensor in tensors.items():
        # In fp32: torch lacks isfinite for smaller types, or a cast to fp16 would change the result.
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"{tensor_name} holds NaN or infinity, and finite numbers are needed")
    adapter = _matched(tensors).fit(cast(Tensor, layer.weight).shape)
    if adapter.changes_bias and getattr(layer, "bias", None) is None:
        raise AdapterError("it changes a bias that the model's layer does not have")
    return adapter


def _scaled(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Replace older tools' factors of the whole difference by alpha.

    ``scale`` replaces alpha over the rank, as in AUTOMATIC1111.  ``scalar`` is a trained factor, which some tools apply
    and others ignore.
    """
    rest = {tensor_name: tensor for tensor_name, tensor in tensors.items() if tensor_name not in ("scale", "scalar")}
    if "scalar" in tensors and finite_scalar(tensors["scalar"], "scalar") != 1:
        raise AdapterError(
            "it has a scalar other than 1, which is not supported: save it with its factors multiplied by the scalar"
        )
    if "scale" in tensors:
        rank = rank_of(rest)
        if rank is None:
            raise AdapterError("it has a scale, which is supported only with low-rank factors")
        rest[lora.ALPHA] = torch.tensor(finite_scalar(tensors["scale"], "scale") * rank, dtype=torch.float64)
    return rest


def _matched(tensors: Mapping[str, Tensor]) -> LayerAdapter:
    if dora.DORA_SCALE in tensors:
        return Dora(_matched({k: t for k, t in tensors.items() if k != dora.DORA_SCALE}), tensors[dora.DORA_SCALE])
    for bias in biased.BIAS_NAMES:
        if bias in tensors and not tensors.keys() & {full.DIFF, full.NEW}:
            return _with_bias({k: t for k, t in tensors.items() if k != bias}, bias, tensors[bias])
    for algorithm in registry.ALGORITHMS:
        adapter = algorithm.match(tensors)
        if adapter is not None:
            return cast(LayerAdapter, adapter)
    names = ", ".join(sorted(tensors))
    raise AdapterError(f"its tensors ({names}) are of an algorithm that is not supported, or incomplete")


def _with_bias(rest: Mapping[str, Tensor], name: str, bias: Tensor) -> Biased:
    inner = _matched(rest) if rest else None
    scale = inner.scale if name == biased.UP_BIAS and isinstance(inner, Lora) else 1.0
    return Biased(inner, bias, scale, replaces=name == biased.NEW_BIAS)


def read_fine_tuned(
    name: str,
    tensors: Mapping[str, Tensor],
    unet: UNet,
    towers: Sequence[tuple[nn.Module, Mapping[str, Tensor]]] = (),
) -> AdapterFile:
    """Make an adaptation of a fine-tuned model: all layers in which it differs from the base.

    Args:
        name: the file, for messages.
        tensors: the tuned UNet's weights, by their keys below ``model.diffusion_model.``.
        unet: the base. A layer whose tuned weights, stored in the base's dtype, are bit-identical
            to it, stays shared.
        towers: each base text encoder with its tuned weights, by the encoder's names.

    Raises :class:`AdapterError` if tuned weights are missing, of another shape, or not finite.
    """
    width = next((tensors[k].shape[1] for k in tensors if k.endswith("attn2.to_k.weight")), None)
    if width is not None and width != unet.config.context_width:
        raise compatibility.other_family_error(name, compatibility.family_label(width), unet)
    text = tuple(_fine_tuned_layers(name, weights, tower) for tower, weights in towers)
    first = LayerTensors({full.DIFF: tensors[_FIRST]}, [_FIRST]) if _FIRST in tensors else LayerTensors()
    dropped = _without_more_inputs(first, unet.get_submodule(_FIRST.removesuffix(".weight")))
    used = ChainMap({_FIRST: first.tensors[full.DIFF]}, tensors) if dropped else tensors  # type: ignore[arg-type]
    return AdapterFile(name, _fine_tuned_layers(name, used, unet), text, tuple(dropped), len(tensors))


def _fine_tuned_layers(name: str, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, LayerAdapter]:
    changed: dict[str, LayerAdapter] = {}
    for path, layer in key_names.named_layers(model).items():
        differs = False
        tuned: dict[str, Tensor] = {}
        for key, base in layer.named_parameters(recurse=False):
            tuned[key] = _fine_tuned_layer(name, tensors, f"{path}.{key}", base)
            differs = differs or full.differs(base, tuned[key])
        if differs:
            changed[path] = FineTunedLayer(tuned["weight"], tuned.get("bias"))
    return changed


def _fine_tuned_layer(name: str, tensors: Mapping[str, Tensor], key: str, base: Tensor) -> Tensor:
    if key not in tensors:
        raise AdapterError(f"{name} has no {key}, and a full checkpoint of the base model's architecture is needed")
    tensor = tensors[key]
    fitting = reshaped(tensor, base.shape)
    if fitting is None:
        raise AdapterError(
            f"{name} has {key} of shape {tuple(tensor.shape)}, and the base model's shape {tuple(base.shape)} is needed"
        )
    if not tensor.is_floating_point():
        raise AdapterError(f"{name} has {key} of type {tensor.dtype}, and floating-point weights are needed")
    if not torch.isfinite(tensor.to(base.dtype)).all():
        raise AdapterError(f"{name} has NaN or infinity in {key}, and finite weights are needed")
    return fitting


def _module(unet: UNet, towers: Sequence[nn.Module], path: LayerPath) -> nn.Module:
    model: nn.Module = unet if path.tower is None else towers[path.tower]
    return model.get_submodule(path.path)
