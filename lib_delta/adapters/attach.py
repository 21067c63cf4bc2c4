"""Attaches adapters to a base model: as a second branch, or as a second set of weights of a text encoder.

The base's weights are never written to, so that detaching restores it bit for bit.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import AdapterFile
from lib_delta.adapters.algorithms.base import LayerAdapter
from lib_delta.adapters.algorithms.full import FineTunedLayer
from lib_delta.devices import fetches, without_autocast
from lib_delta.errors import SettingError
from lib_delta.models.forked_layers import Adaptation, ForkedLayer
from lib_delta.models.network import Network
from lib_delta.models.text import TextEncoder

AdapterForm = Literal["automatic", "merged", "bypass"]
# Factors with more multiplications than this share of their layer's are slower than a second weight (measured in fp32
# on a CPU: at .33 faster by 4 %, at .67 slower by 8 %).
MAX_FACTOR_COST = 0.5
Weighted = tuple[LayerAdapter, float]
# One number for a whole adapter, or one for each layer, by its path.
Weight = float | Callable[[str], float]


class MergeOrigin:
    """The adapters and weights that were merged into a layer, by weak references."""

    def __init__(self, parts: Sequence[Weighted]) -> None:
        self._parts = [(weakref.ref(adapter), weight) for adapter, weight in parts]

    def same(self, parts: Sequence[Weighted]) -> bool:
        """Return whether the layer was made of these parts."""
        return len(parts) == len(self._parts) and all(
            ref() is adapter and before == weight for (ref, before), (adapter, weight) in zip(self._parts, parts)
        )


class Merged(nn.Module, Adaptation):
    """A second weight and, if it changes, a second bias, in the layer's dtype."""

    # Buffers follow the model from device to device.  They are not persistent, so its state dict lacks them.
    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, made_of: MergeOrigin) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.made_of = made_of

    def forward(self, layer: ForkedLayer, x: Tensor) -> Tensor:
        return layer.apply_weights(x, self.weight, layer.bias if self.bias is None else self.bias)


class Bypass(nn.Module, Adaptation):
    """The low-rank factors, whose result is added to the layer's output (the smallest form)."""

    def __init__(self, adapters: Sequence[Weighted], made_of: MergeOrigin) -> None:
        super().__init__()
        self.adapters, self.made_of = tuple(adapters), made_of

    def forward(self, layer: ForkedLayer, x: Tensor) -> Tensor:
        return self._adapted(layer, x, layer.base(x))

    def forked(self, layer: ForkedLayer, x: Tensor) -> Tensor:
        """Compute the base's layer once, over the rows of both branches."""
        y = layer.base(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        # Not computed directly into the branch's slice: Apple's devices lose products that are written to a part of a
        # tensor (pytorch/pytorch#193385), and this takes no longer.
        return torch.stack((y[0], self._adapted(layer, x[-1], y[-1])))

    def _adapted(self, layer: ForkedLayer, x: Tensor, base: Tensor) -> Tensor:
        """Return the base's output plus each adapter's effect for ``x`` and that output."""
        total = base
        for adapter, weight in self.adapters:
            total = adapter.plus_bypass(total, layer, x, base, weight)
        return total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bypass:
        super()._apply(fn, recurse)
        self.adapters = self._mapped(fn)
        return self

    def on(self, device: torch.device) -> tuple[Weighted, ...]:
        """Return the factors on a device; those elsewhere are copied."""
        return self._mapped(lambda t: t.to(device, non_blocking=fetches(device)))

    def _mapped(self, fn: Callable[[Tensor], Tensor]) -> tuple[Weighted, ...]:
        return tuple((adapter.map(fn), weight) for adapter, weight in self.adapters)


def attach(unet: Network, adapters: Sequence[tuple[AdapterFile, Weight]], form: AdapterForm = "merged") -> None:
    """Give the UNet's layers a second branch: the sum of the adapters, each times its weight.

    This replaces earlier adaptations and reuses their memory; unchanged adaptations stay.  Layers without an adapter of
    nonzero weight stay shared.  The form ``bypass`` merges only the layers with an adapter that needs whole weights;
    the form ``automatic`` also merges the layers whose factors would cost more than a second weight.  A fine-tuned
    checkpoint is applied first: the other adapters adapt its layers.
    Raises :class:`SettingError` for a weight that is not finite or an unknown form, with nothing attached.
    """
    if form not in get_args(AdapterForm):
        raise SettingError(f"form is {form!r}, and one of {', '.join(get_args(AdapterForm))} is needed")
    try:
        weighted = _by_layer([(adapter.name, adapter.unet, weight) for adapter, weight in adapters])
        for path, layer in key_names.named_layers(unet).items():
            before, parts = layer.adaptation, weighted.get(path)
            layer.adaptation = None  # type: ignore[assignment]
            if parts:
                layer.adaptation = _adaptation(layer, parts, form, before)  # type: ignore[arg-type]
    except BaseException:
        detach(unet)
        raise


def detach(unet: Network) -> None:
    """Make every layer of the UNet shared again."""
    for layer in key_names.named_layers(unet).values():
        layer.adaptation = None  # type: ignore[assignment]


def adapted_text_parameters(
    tower: nn.Module, adapters: Sequence[tuple[AdapterFile, Weight]], index: int = 0
) -> dict[str, Tensor]:
    """Return the changed parameters of a text encoder, by name.

    Args:
        tower: the encoder that the adapters were read for, which does not change: evaluate
            ``torch.func.functional_call(tower, parameters, (tokens,))``.
        adapters: each with its weight for the text encoder, which may differ from the UNet's.
        index: the number of this text encoder in the model.
    """
    named = [(adapter.name, adapter.text[index], weight) for adapter, weight in adapters if index < len(adapter.text)]
    parameters = {}
    for path, parts in _by_layer(named).items():
        weight, bias = _merge(tower.get_submodule(path), parts)
        parameters[f"{path}.weight"] = weight
        if bias is not None:
            parameters[f"{path}.bias"] = bias
    return parameters


class AdaptedTextEncoder(TextEncoder):
    """A text encoder with other values for some parameters; the original encoder does not change."""

    def __init__(self, tower: TextEncoder, parameters: Mapping[str, Tensor]) -> None:
        nn.Module.__init__(self)
        self.config, self.final_norm, self.transformer = tower.config, tower.final_norm, tower.transformer
        self._changed = dict(parameters)

    def encode(self, tokens: Tensor, clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
        """Encode as :meth:`TextEncoder.forward` does, with the changed parameters."""
        return cast("tuple[Tensor, Tensor | None]", functional_call(self, self._changed, (tokens, clip_skip)))


def _by_layer(adapters: Sequence[tuple[str, Mapping[str, LayerAdapter], Weight]]) -> dict[str, list[Weighted]]:
    layers: dict[str, list[Weighted]] = defaultdict(list)
    for name, parts, weight in adapters:
        for path, adapter in parts.items():
            factor = weight(path) if callable(weight) else weight
            if not math.isfinite(factor):
                raise SettingError(f"the weight of {name} is {factor}, and a finite number is needed")
            if factor:
                layers[path].append((adapter, factor))
    return layers


def _adaptation(layer: ForkedLayer, parts: Sequence[Weighted], form: AdapterForm, before: object) -> Merged | Bypass:
    kind = Bypass if _as_factors(parts, form, layer.weight.shape) else Merged
    if isinstance(before, kind) and before.made_of.same(parts):
        return before
    made_of = MergeOrigin(parts)
    if kind is Merged:
        return Merged(*_merge(layer, parts, before.weight if isinstance(before, Merged) else None), made_of)
    place = layer.weight.device, layer.dtype
    return Bypass([(adapter.map(lambda t: t.to(*place)), weight) for adapter, weight in parts], made_of)


def _as_factors(parts: Sequence[Weighted], form: AdapterForm, shape: torch.Size) -> bool:
    """Return whether a layer's adapters stay factors, and are not merged."""
    if form == "merged" or not all(adapter.bypasses for adapter, _ in parts):
        return False
    return form == "bypass" or sum(adapter.bypass_cost(shape) for adapter, _ in parts) <= MAX_FACTOR_COST


def _reusable(memory: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    # Tensors that were moved in inference mode, as Forge does, can only be written to in that mode.
    fits = memory.shape == weight.shape and memory.dtype == dtype and memory.device == weight.device
    return fits and (torch.is_inference_mode_enabled() or not memory.is_inference())


@torch.no_grad()
def _merge(layer: Any, parts: Sequence[Weighted], into: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the layer's weight plus all differences, and its bias if that changes, summed in fp32.

    ``into`` is memory for the weight that may be overwritten.  A host's autocast would round the products to half.
    """
    weight: Tensor = layer.weight
    with without_autocast(weight.device):
        # A weight that is stored in fp8 would lose the difference if the sum were stored in fp8 too.
        dtype = getattr(layer, "compute_dtype", None) or weight.dtype
        if into is None or not _reusable(into, weight, dtype):
            into = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        in_place = weight.dtype == torch.float32
        total = into.copy_(weight) if in_place else weight.to(torch.float32, copy=True).contiguous()
        bias = _add_differences(total, weight, getattr(layer, "bias", None), parts)
        return total if total is into else into.copy_(total), bias


def _add_differences(total: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Weighted]) -> Tensor | None:
    """Add all weighted differences to ``total``; return the changed bias, None if it stays.

    Fine-tuned layers differ from the base.  All other adapters then differ from the fine-tuned result.
    """
    fine_tuned = [(layer, factor) for layer, factor in parts if isinstance(layer, FineTunedLayer)]
    others = [(adapter, factor) for adapter, factor in parts if not isinstance(adapter, FineTunedLayer)]
    changed: Tensor | None = None
    for layer, factor in fine_tuned:
        layer.add_difference(total, weight, factor)
        changed = _plus_bias_difference(changed, layer, bias, bias, factor=factor)

    origin = total.clone() if fine_tuned and others else weight
    origin_bias = bias if changed is None else changed
    for adapter, factor in others:
        adapter.add_difference(total, origin, factor)
        changed = _plus_bias_difference(changed, adapter, bias, origin_bias, factor=factor)
    return None if bias is None or changed is None else changed.to(bias.dtype)


def _plus_bias_difference(
    changed: Tensor | None, adapter: LayerAdapter, bias: Tensor | None, origin: Tensor | None, *, factor: float
) -> Tensor | None:
    """Return the changed bias in fp32 plus ``factor`` times the adapter's difference from ``origin``."""
    difference = None if origin is None else adapter.bias_difference(origin)
    if bias is None or difference is None:
        return changed
    return torch.add(bias.float() if changed is None else changed, difference, alpha=factor)
