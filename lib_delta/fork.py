"""One pass for two models: layers whose activations carry a leading branch axis.

The base and the adapted model are one network but for the layers that an adaptation touches.  They
are evaluated together on activations of shape ``(R, N, ...)``: ``R`` is 1 for as long as the two
models agree, and 2 (branch 0 the base, branch 1 the adapted model) from the first layer at which
they differ.  Residual adds broadcast by themselves; :func:`cat` and :func:`attention` expand first.

The layers are classes of our own that call ``torch.nn.functional`` directly.  WebUIs replace the
``forward`` of ``torch.nn.Linear`` and its like for their own models, and these must not be hit.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adaptation(Protocol):
    """What an adapted layer is told about its second branch."""

    def __call__(self, layer: ForkedLayer, x: Tensor) -> Tensor:
        """Return what the adapted model's layer gives for ``x`` of shape ``(N, ...)``."""
        ...


class ForkedLayer(nn.Module):
    """A layer that serves both branches: shared by default, forked where an adaptation is attached."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.adaptation: Adaptation | None = None

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the layer for ``x`` of shape ``(N, ...)`` with the given weights."""
        raise NotImplementedError

    def base(self, x: Tensor) -> Tensor:
        """Compute the base model's layer for ``x`` of shape ``(N, ...)``."""
        return self.apply_weights(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(R, N, ...)`` to ``(R', N, ...)``; ``R'`` is 2 where the layer is adapted."""
        if self.adaptation is None:
            return self.base(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return torch.stack((self.base(x[0]), self.adaptation(self, x[-1])))


class Linear(ForkedLayer):
    """Affine map of the last dimension; ``weight`` is ``(out, in)``."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class Conv2d(ForkedLayer):
    """Square convolution on ``(N, C, H, W)`` with "same" padding; ``weight`` is ``(out, in, k, k)``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.padding = stride, kernel_size // 2
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding)


class GroupNorm(ForkedLayer):
    """Group normalisation of ``(N, C, H, W)``."""

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, self.groups, weight, bias, self.eps)


class LayerNorm(ForkedLayer):
    """Layer normalisation of the last dimension."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def expand(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Give ``(R, N, ...)`` tensors the same number of branches (a view, no copy)."""
    branches = max(t.shape[0] for t in tensors)
    return tuple(t.expand(branches, *t.shape[1:]) for t in tensors)


def cat(*tensors: Tensor, dim: int) -> Tensor:
    """Concatenate ``(R, N, ...)`` tensors along ``dim`` after giving them the same branches."""
    return torch.cat(expand(*tensors), dim)


def add_to_adapted(x: Tensor, added: Tensor) -> Tensor:
    """Add ``(N, ...)`` to the adapted model's branch of ``(R, N, ...)``, which forks here if it had not before."""
    return torch.stack((x[0], x[-1] + added))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention of ``(R, N, T, C)`` queries over ``(R, N, S, C)`` keys and values."""
    q, k, v = expand(q, k, v)
    branches, batch = q.shape[:2]
    split = [t.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*split)
    return out.transpose(1, 2).flatten(2).unflatten(0, (branches, batch))
