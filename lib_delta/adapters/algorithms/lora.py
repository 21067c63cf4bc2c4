"""LoRA and LoCon: a layer's difference as a product of two or three small factors.

LoRA: Hu et al. 2021 (arXiv 2106.09685).  LoCon is its form for convolutions, with or without a Tucker core: LyCORIS
(arXiv 2309.14859).  The tensors have the names of kohya's sd-scripts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from lib_delta.adapters.algorithms.base import (
    LayerAdapter,
    TensorName,
    matrix_or_convolution,
    named,
    require,
    scale_of,
    with_shape,
)
from lib_delta.errors import AdapterError
from lib_delta.models.forked_layers import ForkedLayer, Linear

UP, DOWN, MID, ALPHA = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"
# Older tools' factors of the whole difference; the reader replaces them by alpha.
SCALE, SCALAR = "scale", "scalar"


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT if tensor.ndim == 2 else tensor


# peft puts the adapter's name inside (``lora_A.default.weight``).
TENSORS = (
    *named(UP, DOWN, MID, ALPHA, SCALE, SCALAR),
    TensorName(r"lora_A(?:\.\w+)?\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight", DOWN),
    TensorName(r"lora_B(?:\.\w+)?\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight", UP),
    # An embedding's factors make the transposed difference: (up @ down).T = down.T @ up.T.
    TensorName(r"lora_embedding_A(?:\.\w+)?", UP, _transposed),
    TensorName(r"lora_embedding_B(?:\.\w+)?", DOWN, _transposed),
)


@dataclass(frozen=True)
class Lora(LayerAdapter):
    """``dW = scale * up @ down``, or ``scale * up @ mid @ down`` with a Tucker core.

    For a linear layer ``down`` is ``(rank, in)`` and ``up`` is ``(out, rank)``.  For a convolution
    ``down`` is ``(rank, in, k, k)`` and ``up`` is ``(out, rank, 1, 1)``; with a core ``mid`` of
    ``(rank, rank, k, k)``, ``down`` is ``(rank, in, 1, 1)``.
    """

    up: Tensor
    down: Tensor
    mid: Tensor | None
    scale: float

    @property
    def algorithm(self) -> str:
        return "LoRA"

    @property
    def bypasses(self) -> bool:
        return True

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def fit(self, shape: Size) -> Lora:
        matrix_or_convolution(shape, "a LoRA")
        kernel = tuple(shape[2:])
        if self.mid is None:
            core, inner = None, kernel
        else:
            core, inner = with_shape(self.mid, (self.up.shape[1], self.down.shape[0], *kernel), MID), (1,) * len(kernel)
        up = with_shape(self.up, (shape[0], self.up.shape[1], *(1,) * len(kernel)), UP)
        needed = (self.down.shape[0], shape[1], *inner)
        # The blocks of a DyLoRA store a convolution's factor as a matrix.
        flat = self.down.shape == (needed[0], Size(needed[1:]).numel())
        down = self.down.reshape(needed) if flat else with_shape(self.down, needed, DOWN)
        return dataclasses.replace(self, up=up, down=down, mid=core)

    def merged_difference(self, weight: Tensor) -> Tensor:
        up, down = (t.to(weight.device).float().flatten(1) for t in (self.up, self.down))
        if self.mid is None:
            return (up @ down).mul_(self.scale).view(weight.shape)
        mid = self.mid.to(weight.device).float().flatten(2)
        core = (up @ mid.flatten(1)).unflatten(1, mid.shape[1:])  # (out, rank, k * k)
        return (core.transpose(1, 2) @ down).transpose(1, 2).mul(self.scale).reshape(weight.shape)

    def add_difference(self, total: Tensor, weight: Tensor, factor: float) -> None:
        if self.mid is not None:
            super().add_difference(total, weight, factor)
            return
        # In one operation: an intermediate difference of the layer's size would double the time of a swap.
        up, down = (t.to(weight.device).float().flatten(1) for t in (self.up, self.down))
        total.view(len(total), -1).addmm_(up, down, alpha=factor * self.scale)

    def bypass(self, layer: ForkedLayer, x: Tensor, y: Tensor) -> Tensor:
        """Return ``up(down(x))``."""
        if isinstance(layer, Linear):
            return F.linear(F.linear(x, self.down).mul(self.scale), self.up)
        return F.conv2d(self._hidden(layer, x).mul(self.scale), self.up)

    def plus_bypass(self, total: Tensor, layer: ForkedLayer, x: Tensor, y: Tensor, factor: float) -> Tensor:
        # In one operation: no intermediate output of the layer's size.
        if isinstance(layer, Linear):
            hidden = F.linear(x, self.down).flatten(0, -2)
            rows = total.reshape(-1, total.shape[-1])
            return torch.addmm(rows, hidden, self.up.t(), alpha=factor * self.scale).view(total.shape)
        hidden = self._hidden(layer, x).flatten(2)
        up = self.up.flatten(1).expand(len(hidden), -1, -1)
        return torch.baddbmm(total.flatten(2), up, hidden, alpha=factor * self.scale).view(total.shape)

    def _hidden(self, layer: ForkedLayer, x: Tensor) -> Tensor:
        """Return the activations between a convolution's factors; the factor with the kernel has the stride."""
        if self.mid is None:
            return layer.apply_weights(x, self.down, None)
        return layer.apply_weights(F.conv2d(x, self.down), self.mid, None)

    def truncated(self, rank: int) -> Lora:
        """Return only the first ``rank`` ranks, as a DyLoRA allows (arXiv 2210.07558); the scale stays."""
        if self.mid is not None or rank >= self.rank:
            return self
        return dataclasses.replace(self, up=self.up[:, :rank], down=self.down[:rank])


def match(tensors: Mapping[str, Tensor]) -> Lora | None:
    """Make a layer's LoRA of its tensors; a missing ``alpha`` equals the rank (scale 1).

    Returns None for tensors of another algorithm; raises :class:`AdapterError` for incomplete factors and for ranks
    that disagree.
    """
    if not tensors.keys() & {UP, DOWN, MID} or tensors.keys() - {UP, DOWN, MID, ALPHA}:
        return None
    require(tensors, (UP, DOWN), "a LoRA")
    up, down, mid = tensors[UP], tensors[DOWN], tensors.get(MID)
    for name in (UP, DOWN, MID):
        if name in tensors and tensors[name].ndim not in (2, 4):
            raise AdapterError(f"{name} has shape {tuple(tensors[name].shape)}, and 2 or 4 dimensions are needed")
    rank = down.shape[0]
    inner = (rank, rank) if mid is None else (mid.shape[0], mid.shape[1])
    if (up.shape[1], rank) != inner or inner[0] != inner[1]:
        raise AdapterError(f"the ranks of its factors disagree ({_ranks(tensors)}), and they must be the same")
    return Lora(up, down, mid, scale_of(tensors, rank))


def _ranks(tensors: Mapping[str, Tensor]) -> str:
    shapes = {name: tuple(tensors[name].shape) for name in (UP, MID, DOWN) if name in tensors}
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
