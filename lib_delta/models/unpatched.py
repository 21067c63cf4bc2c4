"""Torch's original layers, for hosts that replace ``forward`` of torch's classes and cast weights in it.

AUTOMATIC1111 does this if a card cannot compute in the weights' dtype (GTX 16xx, Intel's).  Weights that were cast to
half and back stay rounded.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class Conv2d(nn.Conv2d):
    """A convolution with any padding mode."""

    def forward(self, x: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        around = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return F.conv2d(around, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


_UNPATCHED = {nn.Linear: _Linear, nn.LayerNorm: _LayerNorm, nn.Conv2d: Conv2d}


def unpatched(model: nn.Module) -> None:
    """Replace the layers of another library's model by layers that hosts do not patch; weights and names stay."""
    for module in model.modules():
        module.__class__ = _UNPATCHED.get(type(module), type(module))
