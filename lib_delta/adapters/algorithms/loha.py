"""LoHa: a layer's difference as the elementwise product of two low-rank matrices.

FedPara: Hyeon-Woo et al. 2022 (arXiv 2108.06098).  LyCORIS (arXiv 2309.14859) adds a Tucker core.  The tensors have
the names of its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from lib_delta.adapters.algorithms.base import LayerAdapter, matrix_or_convolution, named, require, scale_of
from lib_delta.errors import AdapterError

HADA_W1_A, HADA_W1_B, HADA_W2_A, HADA_W2_B = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
HADA_T1, HADA_T2 = "hada_t1", "hada_t2"
_FACTORS = (HADA_W1_A, HADA_W1_B, HADA_W2_A, HADA_W2_B)
TENSORS = named(*_FACTORS, HADA_T1, HADA_T2, "alpha")


@dataclass(frozen=True)
class Loha(LayerAdapter):
    """``dW = scale * (w1_a @ w1_b) * (w2_a @ w2_b)``.

    ``w1_a`` is ``(out, rank)`` and ``w1_b`` is ``(rank, in * k * k)``.  With cores ``t1``, ``t2`` of
    ``(rank, rank, k, k)`` they are ``(rank, out)`` and ``(rank, in)``, on the core's first and second side.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None
    t2: Tensor | None
    scale: float

    @property
    def algorithm(self) -> str:
        return "LoHa"

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def fit(self, shape: Size) -> Loha:
        matrix_or_convolution(shape, "a LoHa")
        if self.t1 is not None and self.t2 is not None:
            made = (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])
        else:
            made = (self.w1_a.shape[0], self.w1_b.shape[1])
        needed = tuple(shape) if self.t1 is not None else (shape[0], shape[1:].numel())
        if made != needed:
            raise AdapterError(f"its factors make a weight of {made} where the model's layer needs {needed}")
        return self

    def merged_difference(self, weight: Tensor) -> Tensor:
        device = weight.device
        first = _product(self.w1_a.to(device), self.w1_b.to(device), None if self.t1 is None else self.t1.to(device))
        second = _product(self.w2_a.to(device), self.w2_b.to(device), None if self.t2 is None else self.t2.to(device))
        return first.mul_(second).mul_(self.scale).view(weight.shape)


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    if core is None:
        return a.float() @ b.float()
    return torch.einsum("ij...,ip,jr->pr...", core.float(), a.float(), b.float()).contiguous()


def match(tensors: Mapping[str, Tensor]) -> Loha | None:
    """Make a layer's LoHa of its tensors; a missing ``alpha`` equals the rank."""
    if not tensors.keys() & {*_FACTORS, HADA_T1, HADA_T2} or tensors.keys() - {*_FACTORS, HADA_T1, HADA_T2, "alpha"}:
        return None
    require(tensors, _FACTORS, "a LoHa")
    if (HADA_T1 in tensors) != (HADA_T2 in tensors):
        raise AdapterError(f"one of {HADA_T1} and {HADA_T2} is missing, and a LoHa has both cores or none")
    w1_a, w1_b, w2_a, w2_b = (tensors[name] for name in _FACTORS)
    if any(t.ndim != 2 for t in (w1_a, w1_b, w2_a, w2_b)):
        raise AdapterError("the factors of its LoHa need 2 dimensions each")
    _check_halves(tensors)
    return Loha(w1_a, w1_b, w2_a, w2_b, tensors.get(HADA_T1), tensors.get(HADA_T2), scale_of(tensors, w1_b.shape[0]))


def _check_halves(tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`AdapterError` if ranks, sizes or kernels of the two products disagree."""
    tucker = HADA_T1 in tensors
    w1_a, w1_b, w2_a, w2_b = (tensors[name] for name in _FACTORS)
    for a, b, core in ((w1_a, w1_b, tensors.get(HADA_T1)), (w2_a, w2_b, tensors.get(HADA_T2))):
        inner = (a.shape[0], b.shape[0]) if core is not None else (a.shape[1], a.shape[1])
        if core is not None and (core.ndim != 4 or tuple(core.shape[:2]) != inner):
            raise AdapterError(f"a core of shape {tuple(core.shape)} does not fit factors of rank {inner}")
        if core is None and b.shape[0] != inner[0]:
            raise AdapterError(f"the ranks of its factors disagree ({inner[0]}, {b.shape[0]}), and must be the same")
    outputs = 1 if tucker else 0  # the dimension of w1_a that has the layer's outputs
    if w1_a.shape[outputs] != w2_a.shape[outputs] or w1_b.shape[1] != w2_b.shape[1]:
        raise AdapterError("the two halves of its LoHa are of different sizes, and must be the same")
    if tucker and tensors[HADA_T1].shape[2:] != tensors[HADA_T2].shape[2:]:
        raise AdapterError("the two cores of its LoHa have different kernels, and must have the same")
