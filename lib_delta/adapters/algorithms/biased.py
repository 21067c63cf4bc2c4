"""A change of a layer's bias next to a change of its weight.

ComfyUI's nodes that extract and train LoRAs write ``diff_b`` next to the factors.  peft writes ``lora_B.bias`` with
``lora_bias=True``, scaled like the factors, and the whole new bias (``base_layer.bias``) with ``bias="lora_only"``
or ``"all"``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from lib_delta.adapters.algorithms.base import LayerAdapter, TensorName, named
from lib_delta.adapters.algorithms.full import DIFF_BIAS, NEW_BIAS
from lib_delta.errors import AdapterError

UP_BIAS = "lora_up.bias"
BIAS_NAMES = (DIFF_BIAS, UP_BIAS, NEW_BIAS)
TENSORS = (*named(DIFF_BIAS, NEW_BIAS), TensorName(r"lora_B(?:\.\w+)?\.bias", UP_BIAS))


@dataclass(frozen=True)
class Biased(LayerAdapter):
    """``inner``'s change of the weight (None: no change), and ``b' = b + scale * bias``, or ``b' = bias``."""

    inner: LayerAdapter | None
    bias: Tensor
    scale: float = 1.0
    replaces: bool = False

    @property
    def algorithm(self) -> str:
        return "bias" if self.inner is None else self.inner.algorithm

    @property
    def rank(self) -> int | None:
        return None if self.inner is None else self.inner.rank

    @property
    def changes_bias(self) -> bool:
        return True

    def fit(self, shape: Size) -> Biased:
        if self.bias.shape != shape[:1]:
            raise AdapterError(
                f"its bias has shape {tuple(self.bias.shape)} where the model's layer needs ({shape[0]},)"
            )
        return dataclasses.replace(self, inner=None if self.inner is None else self.inner.fit(shape))

    def merged_difference(self, weight: Tensor) -> Tensor:
        if self.inner is None:
            return torch.zeros(weight.shape, device=weight.device)
        return self.inner.merged_difference(weight)

    def add_difference(self, total: Tensor, weight: Tensor, factor: float) -> None:
        if self.inner is not None:
            self.inner.add_difference(total, weight, factor)

    def bias_difference(self, bias: Tensor) -> Tensor | None:
        stored = self.bias.to(bias.device).float()
        difference = stored - bias.float() if self.replaces else stored * self.scale
        inner = None if self.inner is None else self.inner.bias_difference(bias)
        return difference if inner is None else difference + inner

    def map(self, function: Callable[[Tensor], Tensor]) -> Biased:
        return dataclasses.replace(
            super().map(function), inner=None if self.inner is None else self.inner.map(function)
        )
