"""GLoRA: a low-rank map of the layer's weight in addition to the low-rank difference.

Chavan et al. 2023 (arXiv 2306.07967), in the form and with the names of LyCORIS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from lib_delta.adapters.algorithms.base import (
    LayerAdapter,
    finite_scalar,
    matrix_or_convolution,
    named,
    require,
    with_shape,
)
from lib_delta.adapters.algorithms.lora import ALPHA, Lora
from lib_delta.errors import AdapterError
from lib_delta.models.forked_layers import ForkedLayer, Linear

A1, A2, B1, B2, BM = "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"
TENSORS = named(A1, A2, B1, B2, BM, ALPHA)


@dataclass(frozen=True)
class Glora(LayerAdapter):
    """``dW = scale * W @ (a1 @ a2) + b``, where ``b`` is a :class:`Lora` of the same scale.

    ``a1`` is ``(in, rank)`` and ``a2`` is ``(rank, in)``; a convolution's are 1x1.
    """

    a1: Tensor
    a2: Tensor
    b: Lora
    alpha: float | None

    @property
    def algorithm(self) -> str:
        return "GLoRA"

    @property
    def bypasses(self) -> bool:
        return True

    @property
    def rank(self) -> int:
        return self.b.rank

    @property
    def scale(self) -> float:
        """Return alpha over the rank; without an alpha, 1."""
        return self.b.scale

    def fit(self, shape: Size) -> Glora:
        matrix_or_convolution(shape, "a GLoRA")
        inputs, ones = shape[1], (1,) * len(shape[2:])
        a1, a2, b = self.a1, self.a2, self.b
        if (a1.shape[0], b.up.shape[0]) != (inputs, shape[0]):
            # The first versions swapped the names of the factors.
            a1, a2, b = a2, a1, dataclasses.replace(b, up=b.down, down=b.up)
        # Only the layer's shape shows which side of square factors is the rank.
        rank = a1.shape[1]
        ranks = (rank, a2.shape[0], b.up.shape[1], b.down.shape[0])
        if len(set(ranks)) > 1:
            raise AdapterError(f"the ranks of its factors disagree {ranks}, and must be the same")
        scale = 0.0 if rank == 0 else 1.0 if self.alpha is None else self.alpha / rank
        return dataclasses.replace(
            self,
            a1=with_shape(a1, (inputs, rank, *ones), A1),
            a2=with_shape(a2, (rank, inputs, *ones), A2),
            b=dataclasses.replace(b, scale=scale).fit(shape),
        )

    def bypass_cost(self, shape: Size) -> float:
        return (
            1 + super().bypass_cost(shape) + self.b.bypass_cost(shape)
        )  # one evaluation of the layer, on the mapped input

    def merged_difference(self, weight: Tensor) -> Tensor:
        a1, a2 = (t.to(weight.device).float().flatten(1) for t in (self.a1, self.a2))
        mapped = torch.einsum("oi...,ir,rj->oj...", weight.float(), a1, a2)
        return mapped.mul_(self.scale).add_(self.b.merged_difference(weight))

    def bypass(self, layer: ForkedLayer, x: Tensor, y: Tensor) -> Tensor:
        through = F.linear if isinstance(layer, Linear) else F.conv2d
        mapped = through(through(x, self.a2).mul(self.scale), self.a1)
        return layer.apply_weights(mapped, layer.base_weight(), None) + self.b.bypass(layer, x, y)

    def map(self, function: Callable[[Tensor], Tensor]) -> Glora:
        return dataclasses.replace(super().map(function), b=self.b.map(function))


def match(tensors: Mapping[str, Tensor]) -> Glora | None:
    """Make a layer's GLoRA of its tensors; a missing ``alpha`` equals the rank."""
    if not tensors.keys() & {A1, A2, B1, B2, BM} or tensors.keys() - {A1, A2, B1, B2, BM, ALPHA}:
        return None
    require(tensors, (A1, A2, B1, B2), "a GLoRA")
    a1, a2, b1, b2 = (tensors[name] for name in (A1, A2, B1, B2))
    if any(t.ndim not in (2, 4) for t in (a1, a2, b1, b2)):
        raise AdapterError("the factors of its GLoRA need 2 or 4 dimensions each")
    alpha = finite_scalar(tensors[ALPHA], ALPHA) if ALPHA in tensors else None
    return Glora(a1, a2, Lora(b1, b2, tensors.get(BM), 1.0), alpha)
