"""LoKr: a layer's difference as a Kronecker product of two small matrices, each whole or of low rank.

LyCORIS (arXiv 2309.14859).  The tensors have the names of its files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from lib_delta.adapters.algorithms.base import LayerAdapter, matrix_or_convolution, named, scale_of
from lib_delta.errors import AdapterError
from lib_delta.models.forked_layers import ForkedLayer, Linear

LOKR_W1, LOKR_W1_A, LOKR_W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
LOKR_W2, LOKR_W2_A, LOKR_W2_B, LOKR_T2 = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"
_TENSOR_NAMES = {LOKR_W1, LOKR_W1_A, LOKR_W1_B, LOKR_W2, LOKR_W2_A, LOKR_W2_B, LOKR_T2, "alpha"}
# No LoKr has a core of its first factor (lokr_t1); files with one are refused.
TENSORS = named(*sorted(_TENSOR_NAMES), "lokr_t1")


@dataclass(frozen=True)
class Lokr(LayerAdapter):
    """``dW = scale * kron(left, right)``: ``(a * b, c * d, k, k)`` of ``(a, c)`` and ``(b, d, k, k)``.

    ``left`` is ``w1``, or ``w1_a @ w1_b`` of ``(a, rank)`` and ``(rank, c)``.  ``right`` is ``w2``, or ``w2_a @ w2_b``
    of ``(b, rank)`` and ``(rank, d * k * k)``.  With a core ``t2`` of ``(rank, rank, k, k)``, ``w2_a`` is ``(rank, b)``
    and ``w2_b`` is ``(rank, d)``.
    """

    w1: Tensor | None
    w1_a: Tensor | None
    w1_b: Tensor | None
    w2: Tensor | None
    w2_a: Tensor | None
    w2_b: Tensor | None
    t2: Tensor | None
    scale: float
    kernel: tuple[int, ...] = ()

    @property
    def algorithm(self) -> str:
        return "LoKr"

    @property
    def bypasses(self) -> bool:
        return True

    def bypass_cost(self, shape: Size) -> float:
        groups_out, groups_in = _left_size(self)
        # The right factor on each group of inputs, then the left one across the groups, with a kernel of 1.
        return 1 / groups_out + groups_in / (shape[1:].numel())

    @property
    def rank(self) -> int | None:
        # The rank of two whole factors is not known.
        factor = self.w1_b if self.w1_b is not None else self.w2_b
        return None if factor is None else factor.shape[0]

    def fit(self, shape: Size) -> Lokr:
        matrix_or_convolution(shape, "a LoKr")
        kernel = tuple(shape[2:])
        (a, c), (b, d) = _left_size(self), self._right_size(Size(kernel).numel())
        if (a * b, c * d) != tuple(shape[:2]) or self._kernel_of_factors() not in (None, kernel):
            made = (a * b, c * d, *(self._kernel_of_factors() or ()))
            raise AdapterError(f"its factors make a weight of {made} where the model's layer needs {tuple(shape)}")
        return dataclasses.replace(self, kernel=kernel)

    def _kernel_of_factors(self) -> tuple[int, ...] | None:
        """Return the kernel's size by the factors; None if they store it flat, or a 1x1 kernel as a matrix."""
        stated = self.t2 if self.t2 is not None else self.w2
        if stated is None or stated.ndim == 2:
            return None
        kernel = tuple(stated.shape[2:])
        return None if kernel == (1, 1) else kernel

    def _right_size(self, pixels: int) -> tuple[int, int]:
        if self.w2 is not None:
            return self.w2.shape[0], self.w2.shape[1]
        assert self.w2_a is not None and self.w2_b is not None
        if self.t2 is not None:
            return self.w2_a.shape[1], self.w2_b.shape[1]
        inner, left_over = divmod(self.w2_b.shape[1:].numel(), pixels)
        return self.w2_a.shape[0], 0 if left_over else inner

    def left(self) -> Tensor:
        """Return ``(a, c)``."""
        if self.w1 is not None:
            return self.w1
        assert self.w1_a is not None and self.w1_b is not None
        return self.w1_a @ self.w1_b

    def right(self) -> Tensor:
        """Return ``(b, d, k, k)``; for a linear layer ``(b, d)``."""
        if self.w2 is not None:
            return self.w2.reshape(*self.w2.shape[:2], *self.kernel)
        assert self.w2_a is not None and self.w2_b is not None
        if self.t2 is not None:
            return torch.einsum("ij...,ip,jr->pr...", self.t2, self.w2_a, self.w2_b)
        return (self.w2_a @ self.w2_b.flatten(1)).view(len(self.w2_a), -1, *self.kernel)

    def merged_difference(self, weight: Tensor) -> Tensor:
        exact = self.map(lambda t: t.to(weight.device).float())
        left = exact.left()[(...,) + (None,) * len(self.kernel)]
        return torch.kron(left, exact.right().contiguous()).mul_(self.scale)

    def bypass(self, layer: ForkedLayer, x: Tensor, y: Tensor) -> Tensor:
        """Apply ``right`` to every group of inputs, then ``left`` across the groups."""
        left, right = self.left().mul(self.scale), self.right()
        if isinstance(layer, Linear):
            grouped = F.linear(x.unflatten(-1, (left.shape[1], -1)), right)  # (..., c, b)
            return torch.einsum("ac,...cb->...ab", left, grouped).flatten(-2)
        grouped = layer.apply_weights(x.unflatten(1, (left.shape[1], -1)).flatten(0, 1), right, None)
        grouped = grouped.unflatten(0, (len(x), -1))  # (N, c, b, H, W)
        return torch.einsum("ac,ncbhw->nabhw", left, grouped).flatten(1, 2)


def _left_size(adapter: Lokr) -> tuple[int, int]:
    if adapter.w1 is not None:
        return adapter.w1.shape[0], adapter.w1.shape[1]
    assert adapter.w1_a is not None and adapter.w1_b is not None
    return adapter.w1_a.shape[0], adapter.w1_b.shape[1]


def match(tensors: Mapping[str, Tensor]) -> Lokr | None:
    """Make a layer's LoKr of its tensors.

    The rank is that of the low-rank factors.  If both factors are whole, ``alpha`` is ignored and the scale is 1, as in
    LyCORIS.
    """
    if not tensors.keys() & (_TENSOR_NAMES - {"alpha"}) or tensors.keys() - _TENSOR_NAMES:
        return None
    for whole, a, b in ((LOKR_W1, LOKR_W1_A, LOKR_W1_B), (LOKR_W2, LOKR_W2_A, LOKR_W2_B)):
        if (whole in tensors) == (a in tensors and b in tensors) or (a in tensors) != (b in tensors):
            raise AdapterError(f"its tensors do not make a factor, and a LoKr needs {whole}, or {a} and {b}")
    _check_shapes(tensors)
    ranks = {tensors[name].shape[0] for name in (LOKR_W1_B, LOKR_W2_B) if name in tensors}
    if len(ranks) > 1:
        raise AdapterError(f"the ranks of its factors disagree ({', '.join(map(str, sorted(ranks)))})")
    scale = scale_of(tensors, ranks.pop()) if ranks else 1.0
    w1, w1_a, w1_b, w2, w2_a, w2_b, t2 = (
        tensors.get(name) for name in (LOKR_W1, LOKR_W1_A, LOKR_W1_B, LOKR_W2, LOKR_W2_A, LOKR_W2_B, LOKR_T2)
    )
    return Lokr(w1, w1_a, w1_b, w2, w2_a, w2_b, t2, scale)


def _check_shapes(tensors: Mapping[str, Tensor]) -> None:
    for name in (LOKR_W1, LOKR_W1_A, LOKR_W1_B, LOKR_W2_A):
        if name in tensors and tensors[name].ndim != 2:
            raise AdapterError(f"{name} has shape {tuple(tensors[name].shape)}, and 2 dimensions are needed")
    for name in (LOKR_W2, LOKR_W2_B):
        if name in tensors and tensors[name].ndim not in (2, 4):
            raise AdapterError(f"{name} has shape {tuple(tensors[name].shape)}, and 2 or 4 dimensions are needed")
    if LOKR_W1_A in tensors and tensors[LOKR_W1_A].shape[1] != tensors[LOKR_W1_B].shape[0]:
        raise AdapterError(f"the ranks of {LOKR_W1_A} and {LOKR_W1_B} disagree, and must be the same")
    if LOKR_W2_A not in tensors:
        if LOKR_T2 in tensors:
            raise AdapterError(f"{LOKR_T2} is a core for {LOKR_W2_A} and {LOKR_W2_B}, which are missing")
        return
    a, b, core = tensors[LOKR_W2_A], tensors[LOKR_W2_B], tensors.get(LOKR_T2)
    if core is None and a.shape[1] != b.shape[0]:
        raise AdapterError(f"the ranks of {LOKR_W2_A} and {LOKR_W2_B} disagree, and must be the same")
    if core is not None and (core.ndim != 4 or b.ndim != 2 or tuple(core.shape[:2]) != (len(a), len(b))):
        raise AdapterError(f"{LOKR_T2} has shape {tuple(core.shape)}, which does not fit its factors")
