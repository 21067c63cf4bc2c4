"""Attaching adapters to a base model: its second branch, or a text encoder's second set of weights.

The base's own weights are never written to, so detaching leaves it as it was, bit for bit.
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
from lib_delta.models.text import TextEncoder
from lib_delta.models.unet import UNet

AdapterForm = Literal["automatic", "merged", "bypass"]
# Factors that multiply more than this share of what their layer does are slower than a second weight (measured in fp32
# on a CPU: at .33 faster by 4 %, at .67 slower by 8 %).
MAX_FACTOR_COST = 0.5
Weighted = tuple[LayerAdapter, float]
# One number for a whole adapter, or one for each layer, by its path.
Weight = float | Callable[[str], float]


class MergeOrigin:
    """Which adapters, each with its weight, were put on a layer; it keeps none of them in memory."""

    def __init__(self, parts: Sequence[Weighted]) -> None:
        self._parts = [(weakref.ref(adapter), weight) for adapter, weight in parts]

    def same(self, parts: Sequence[Weighted]) -> bool:
        """Tell whether it is these."""
        return len(parts) == len(self._parts) and all(
            ref() is adapter and before == weight for (ref, before), (adapter, weight) in zip(self._parts, parts)
        )


class Merged(nn.Module, Adaptation):
    """A second weight and, where it changes, a second bias, in the layer's dtype."""

    # Buffers follow the model from device to device; not persistent, they are no part of its weights.
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
    """The low-rank factors themselves, added to the layer's output (the smallest form)."""

    def __init__(self, adapters: Sequence[Weighted], made_of: MergeOrigin) -> None:
        super().__init__()
        self.adapters, self.made_of = tuple(adapters), made_of

    def forward(self, layer: ForkedLayer, x: Tensor) -> Tensor:
        return self._adapted(layer, x, layer.base(x))

    def forked(self, layer: ForkedLayer, x: Tensor) -> Tensor:
        """Compute the base's layer once, over the rows of both branches."""
        y = layer.base(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        # Never computed straight into the branch's place: Apple's devices lose products that are written to a part of a
        # tensor (pytorch/pytorch#193385), and a pass takes no longer.
        return torch.stack((y[0], self._adapted(layer, x[-1], y[-1])))

    def _adapted(self, layer: ForkedLayer, x: Tensor, base: Tensor) -> Tensor:
        """Return the base's output plus what each adapter makes of ``x`` and of that output."""
        total = base
        for adapter, weight in self.adapters:
            total = adapter.plus_bypass(total, layer, x, base, weight)
        return total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bypass:
        super()._apply(fn, recurse)
        self.adapters = self._mapped(fn)
        return self

    def on(self, device: torch.device) -> tuple[Weighted, ...]:
        """Return the factors on a device, those that are elsewhere as copies."""
        return self._mapped(lambda t: t.to(device, non_blocking=fetches(device)))

    def _mapped(self, fn: Callable[[Tensor], Tensor]) -> tuple[Weighted, ...]:
        return tuple((adapter.map(fn), weight) for adapter, weight in self.adapters)


def attach(unet: UNet, adapters: Sequence[tuple[AdapterFile, Weight]], form: AdapterForm = "merged") -> None:
    """Give the UNet's layers a second branch: the sum of the adapters, each times its weight.

    What was attached before is replaced, and its memory is used again; layers that stay adapted as they
    were are left alone.  Layers that no adapter of a weight other than 0 touches stay shared.  In the form
    ``bypass``, layers with an adapter that needs whole weights are merged; in the form ``automatic``, those
    as well whose factors would cost more than a second weight.  A fine-tuned checkpoint counts first: the
    others adapt what it has made.
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


def detach(unet: UNet) -> None:
    """Make every layer of the UNet shared again."""
    for layer in key_names.named_layers(unet).values():
        layer.adaptation = None  # type: ignore[assignment]


def adapted_text_parameters(
    tower: nn.Module, adapters: Sequence[tuple[AdapterFile, Weight]], index: int = 0
) -> dict[str, Tensor]:
    """Return the adapted parameters of a text encoder, by name; only those that change.

    Args:
        tower: the encoder that the adapters were read for, which is left alone: evaluate
            ``torch.func.functional_call(tower, parameters, (tokens,))``.
        adapters: each with its weight for the text encoder, which need not be the UNet's.
        index: which of the model's text encoders this is.
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
    """A text encoder seen with other values for some of its parameters; the encoder itself is left alone."""

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
            own = weight(path) if callable(weight) else weight
            if not math.isfinite(own):
                raise SettingError(f"the weight of {name} is {own}, and a finite number is needed")
            if own:
                layers[path].append((adapter, own))
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
    """Tell whether a layer's adapters are kept as the factors that they are."""
    if form == "merged" or not all(adapter.bypasses for adapter, _ in parts):
        return False
    return form == "bypass" or sum(adapter.bypass_cost(shape) for adapter, _ in parts) <= MAX_FACTOR_COST


def _reusable(memory: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    # What was moved in inference mode, as Forge does, can be written to in that mode alone.
    fits = memory.shape == weight.shape and memory.dtype == dtype and memory.device == weight.device
    return fits and (torch.is_inference_mode_enabled() or not memory.is_inference())


@torch.no_grad()
def _merge(layer: Any, parts: Sequence[Weighted], into: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the layer's weight plus all differences, and its bias if that changes, summed in fp32.

    ``into`` is memory for the weight that may be overwritten.  A host's autocast would round the products to half.
    """
    weight: Tensor = layer.weight
    with without_autocast(weight.device):
        return _summed(layer, weight, parts, into)


def _summed(layer: Any, weight: Tensor, parts: Sequence[Weighted], into: Tensor | None) -> tuple[Tensor, Tensor | None]:
    # A weight that is stored in fp8 would lose the difference, if the sum were.
    dtype = getattr(layer, "compute_dtype", None) or weight.dtype
    if into is None or not _reusable(into, weight, dtype):
        into = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    total = into.copy_(weight) if weight.dtype == torch.float32 else weight.to(torch.float32, copy=True).contiguous()
    own: Tensor | None = getattr(layer, "bias", None)
    bias: Tensor | None = None
    origin, own_bias = weight, own
    tuned = [part for part in parts if isinstance(part[0], FineTunedLayer)]
    for adapter, factor in (*tuned, *(part for part in parts if not isinstance(part[0], FineTunedLayer))):
        if tuned and origin is weight and not isinstance(adapter, FineTunedLayer):
            origin, own_bias = total.clone(), own if bias is None else bias
        adapter.add_difference(total, origin, factor)
        difference = None if own_bias is None else adapter.bias_difference(own_bias)
        if own is not None and difference is not None:
            bias = torch.add(own.float() if bias is None else bias, difference, alpha=factor)
    merged = total if total is into else into.copy_(total)
    return merged, None if own is None or bias is None else bias.to(own.dtype)
