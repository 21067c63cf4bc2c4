"""Adaptation by whole weights: those of a fine-tuned checkpoint, or stored differences.

``diff`` and ``diff_b`` are the differences of a weight and a bias in LyCORIS (its "full" algorithm).  peft stores
whole new weights of layers that were trained together with factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Size, Tensor

from lib_delta.adapters.algorithms.base import LayerAdapter, named, with_shape
from lib_delta.errors import AdapterError

DIFF, DIFF_BIAS = "diff", "diff_b"
# The layer's new weight and bias (:func:`lib_delta.adapters.key_names.read_whole`, which parses these names).
NEW, NEW_BIAS = "base_layer.weight", "base_layer.bias"
TENSORS = named(DIFF, DIFF_BIAS)


@dataclass(frozen=True)
class FineTunedLayer(LayerAdapter):
    """``W' = weight`` and ``b' = bias``: a layer of a fine-tuned checkpoint, of any kind."""

    weight: Tensor
    bias: Tensor | None

    @property
    def algorithm(self) -> str:
        return "full fine-tune"

    @property
    def changes_bias(self) -> bool:
        return self.bias is not None

    def fit(self, shape: Size) -> FineTunedLayer:
        if self.bias is not None:
            _shaped(self.bias, shape[:1], "bias")
        return FineTunedLayer(_shaped(self.weight, shape, "weight"), self.bias)

    def merged_difference(self, weight: Tensor) -> Tensor:
        return self.weight.to(weight.device).float() - weight.float()

    def bias_difference(self, bias: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(bias.device).float() - bias.float()


@dataclass(frozen=True)
class Diff(LayerAdapter):
    """``W' = W + weight`` and ``b' = b + bias``."""

    weight: Tensor
    bias: Tensor | None
    name: str = "Full"

    @property
    def algorithm(self) -> str:
        return self.name

    @property
    def changes_bias(self) -> bool:
        return self.bias is not None

    def fit(self, shape: Size) -> Diff:
        if self.bias is not None:
            _shaped(self.bias, shape[:1], DIFF_BIAS)
        if self.weight.ndim != len(shape):  # a 1x1 convolution as a matrix, or the reverse
            return replace(self, weight=with_shape(self.weight, tuple(shape), DIFF))
        return replace(self, weight=_shaped(self.weight, shape, DIFF))

    def merged_difference(self, weight: Tensor) -> Tensor:
        return self.weight.to(weight.device).float()

    def bias_difference(self, bias: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(bias.device).float()


def match(tensors: Mapping[str, Tensor]) -> Diff | FineTunedLayer | None:
    """Make a layer's difference, or its new weights, of its tensors; None for tensors of another algorithm."""
    if NEW in tensors and not tensors.keys() - {NEW, NEW_BIAS}:
        return FineTunedLayer(tensors[NEW], tensors.get(NEW_BIAS))
    if DIFF not in tensors or tensors.keys() - {DIFF, DIFF_BIAS}:
        return None
    return Diff(tensors[DIFF], tensors.get(DIFF_BIAS))


def differs(base: Tensor, tuned: Tensor) -> bool:
    """Return whether ``tuned``, in the dtype of ``base``, differs from it in any bit."""
    return not bool((tuned.to(base.device, base.dtype) == base).all())


def _shaped(tensor: Tensor, shape: Size, name: str) -> Tensor:
    if tensor.shape != shape:
        raise AdapterError(f"{name} has shape {tuple(tensor.shape)} where the model's layer needs {tuple(shape)}")
    return tensor
