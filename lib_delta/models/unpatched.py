"""Torch's layers as they are, in hosts that replace ``forward`` of torch's classes and cast weights in it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


_OWN = {nn.Linear: _Linear, nn.LayerNorm: _LayerNorm, nn.Conv2d: _Conv2d}


def unpatched(model: nn.Module) -> None:
    """Give a model of another library layers that hosts do not patch; weights and their names stay."""
    for module in model.modules():
        module.__class__ = _OWN.get(type(module), type(module))
