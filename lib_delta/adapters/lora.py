"""LoRA and LoCon: a layer's difference as a product of two or three small factors.

LoRA: Hu et al. 2021 (arXiv 2106.09685).  LoCon is its form for convolutions, with or without a
Tucker core: LyCORIS (arXiv 2309.14859).  The tensors' names are those of kohya's sd-scripts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Size, Tensor

from lib_delta.errors import AdapterError
from lib_delta.fork import ForkedLayer, Linear

UP, DOWN, MID, ALPHA = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"


@dataclass(frozen=True)
class Lora:
    """``dW = scale * up @ down``, or ``scale * up @ mid @ down`` with a Tucker core.

    For a linear layer ``down`` is ``(rank, in)`` and ``up`` is ``(out, rank)``.  For a convolution
    ``down`` is ``(rank, in, k, k)`` and ``up`` is ``(out, rank, 1, 1)``; with a core ``mid`` of
    ``(rank, rank, k, k)``, ``down`` is ``(rank, in, 1, 1)``.
    """

    up: Tensor
    down: Tensor
    mid: Tensor | None
    scale: float

    def fit(self, shape: Size) -> Lora:
        """Return the factors with the dimensions of a weight of ``shape`` (``(out, in)`` or ``(out, in, k, k)``)."""
        if len(shape) not in (2, 4):
            raise AdapterError(f"the model's layer has weights of shape {tuple(shape)}, which a LoRA cannot adapt")
        kernel = tuple(shape[2:])
        if self.mid is None:
            core, inner = None, kernel
        else:
            core, inner = _reshaped(self.mid, (self.up.shape[1], self.down.shape[0], *kernel), MID), (1,) * len(kernel)
        up = _reshaped(self.up, (shape[0], self.up.shape[1], *(1,) * len(kernel)), UP)
        down = _reshaped(self.down, (self.down.shape[0], shape[1], *inner), DOWN)
        return dataclasses.replace(self, up=up, down=down, mid=core)

    def merged_difference(self, weight: Tensor) -> Tensor:
        up, down = (t.to(weight.device).float().flatten(1) for t in (self.up, self.down))
        if self.mid is None:
            return (up @ down).mul_(self.scale).view(weight.shape)
        mid = self.mid.to(weight.device).float().flatten(2)
        core = (up @ mid.flatten(1)).unflatten(1, mid.shape[1:])  # (out, rank, k * k)
        return (core.transpose(1, 2) @ down).transpose(1, 2).mul(self.scale).reshape(weight.shape)

    def bias_difference(self, bias: Tensor) -> None:
        return None

    def bypass(self, layer: ForkedLayer, x: Tensor) -> Tensor:
        """Return ``up(down(x))``; the factor that has the layer's kernel takes its stride and padding."""
        if isinstance(layer, Linear):
            hidden = F.linear(x, self.down)
            return F.linear(hidden.mul(self.scale), self.up)
        if self.mid is None:
            hidden = layer.apply_weights(x, self.down, None)
        else:
            hidden = layer.apply_weights(F.conv2d(x, self.down), self.mid, None)
        return F.conv2d(hidden.mul(self.scale), self.up)

    def map(self, function: Callable[[Tensor], Tensor]) -> Lora:
        mid = None if self.mid is None else function(self.mid)
        return dataclasses.replace(self, up=function(self.up), down=function(self.down), mid=mid)


def match(tensors: Mapping[str, Tensor]) -> Lora | None:
    """Make a layer's LoRA of its tensors; a missing ``alpha`` counts as the rank (scale 1).

    Returns None for tensors of another algorithm; raises :class:`AdapterError` for factors that
    are incomplete or whose ranks disagree.
    """
    if not tensors.keys() & {UP, DOWN, MID} or tensors.keys() - {UP, DOWN, MID, ALPHA}:
        return None
    for name in (UP, DOWN):
        if name not in tensors:
            raise AdapterError(f"{name} is missing, and a LoRA needs {UP} and {DOWN}")
    up, down, mid = tensors[UP], tensors[DOWN], tensors.get(MID)
    for name in (UP, DOWN, MID):
        if name in tensors and tensors[name].ndim not in (2, 4):
            raise AdapterError(f"{name} has shape {tuple(tensors[name].shape)}, and 2 or 4 dimensions are needed")
    rank = down.shape[0]
    inner = (rank, rank) if mid is None else (mid.shape[0], mid.shape[1])
    if (up.shape[1], rank) != inner or inner[0] != inner[1]:
        raise AdapterError(f"the ranks of its factors disagree ({_ranks(tensors)}), and they must be the same")
    alpha = _scalar(tensors[ALPHA]) if ALPHA in tensors else float(rank)
    return Lora(up, down, mid, alpha / rank)


def _scalar(alpha: Tensor) -> float:
    if alpha.numel() != 1 or not math.isfinite(alpha.item()):
        raise AdapterError(f"alpha has shape {tuple(alpha.shape)} or is not finite, and one finite number is needed")
    return float(alpha.item())


def _ranks(tensors: Mapping[str, Tensor]) -> str:
    shapes = {name: tuple(tensors[name].shape) for name in (UP, MID, DOWN) if name in tensors}
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _reshaped(factor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """View a factor in the layer's number of dimensions: trainers store 1x1 convolutions either way."""
    ones = (1,) * abs(len(shape) - factor.ndim)
    padded = tuple(factor.shape) + ones if factor.ndim < len(shape) else tuple(factor.shape)
    if padded != (shape + ones if factor.ndim > len(shape) else shape):
        raise AdapterError(f"{name} has shape {tuple(factor.shape)} where the model's layer needs {shape}")
    return factor.reshape(shape)
