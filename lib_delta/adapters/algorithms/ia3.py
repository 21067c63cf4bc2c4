"""(IA)^3: multiplies each of a layer's outputs or inputs by a learned number.

Liu et al. 2022 (arXiv 2205.05638).  LyCORIS stores the difference from 1 in ``weight``, with ``on_input``.  peft
stores the number in ``ia3_l``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Size, Tensor

from lib_delta.adapters.algorithms.base import LayerAdapter, finite_scalar, matrix_or_convolution, named
from lib_delta.errors import AdapterError
from lib_delta.models.forked_layers import ForkedLayer, Linear

IA3_WEIGHT, ON_INPUT, IA3_L = "weight", "on_input", "ia3_l"
TENSORS = named(IA3_WEIGHT, ON_INPUT, IA3_L)


@dataclass(frozen=True)
class Ia3(LayerAdapter):
    """``dW = W * change``, for each output ``(out, 1)`` or each input ``(1, in)``.

    With ``on_input`` None, the layer's shape decides.  peft's layers scale the bias with the outputs.
    """

    change: Tensor
    on_input: bool | None
    with_bias: bool = False

    @property
    def algorithm(self) -> str:
        return "(IA)^3"

    @property
    def bypasses(self) -> bool:
        return True

    def fit(self, shape: Size) -> Ia3:
        matrix_or_convolution(shape, "(IA)^3")
        on_input = self.change.numel() != shape[0] if self.on_input is None else self.on_input
        side = shape[1] if on_input else shape[0]
        if self.change.numel() != side:
            raise AdapterError(f"it has {self.change.numel()} numbers where the model's layer needs {side}")
        flat = (1, side) if on_input else (side, 1)
        return dataclasses.replace(self, change=self.change.reshape(*flat, *(1,) * len(shape[2:])), on_input=on_input)

    def merged_difference(self, weight: Tensor) -> Tensor:
        return weight.float() * self.change.to(weight.device).float()

    def bias_difference(self, bias: Tensor) -> Tensor | None:
        if not self.with_bias or self.on_input:
            return None
        return bias.float() * self.change.to(bias.device).float().flatten()

    def bypass(self, layer: ForkedLayer, x: Tensor, y: Tensor) -> Tensor:
        change = self.change.flatten() if isinstance(layer, Linear) else self.change.reshape(-1, 1, 1)
        if self.on_input:
            return layer.apply_weights(x * change, layer.base_weight(), None)
        if layer.bias is None or self.with_bias:
            return y * change
        bias = layer.bias if isinstance(layer, Linear) else layer.bias[:, None, None]
        return (y - bias) * change


def match(tensors: Mapping[str, Tensor]) -> Ia3 | None:
    """Make a layer's (IA)^3 of its tensors; raises :class:`AdapterError` for vectors of other shapes."""
    if IA3_L in tensors and not tensors.keys() - {IA3_L, ON_INPUT}:
        multiplier = tensors[IA3_L].float()
        if multiplier.ndim not in (2, 4) or multiplier.numel() != max(multiplier.shape[:2]):
            raise AdapterError(f"{IA3_L} has shape {tuple(multiplier.shape)}, and (out, 1) or (1, in) is needed")
        on_input = _stated_side(tensors)
        # A convolution's vector has the same shape on either side.
        if on_input is None and multiplier.ndim == 2 and multiplier.numel() > 1:
            on_input = multiplier.shape[0] == 1
        return Ia3(multiplier - 1, on_input, with_bias=True)
    if IA3_WEIGHT not in tensors or tensors.keys() - {IA3_WEIGHT, ON_INPUT}:
        return None
    change = tensors[IA3_WEIGHT]
    if change.numel() != max(change.shape, default=1):
        raise AdapterError(f"{IA3_WEIGHT} has shape {tuple(change.shape)}, and one number an output or input is needed")
    return Ia3(change, _stated_side(tensors))


def _stated_side(tensors: Mapping[str, Tensor]) -> bool | None:
    return bool(finite_scalar(tensors[ON_INPUT], ON_INPUT)) if ON_INPUT in tensors else None
