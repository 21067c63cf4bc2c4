"""One forward pass for two models: layers whose activations have a leading branch axis.

The base and the adapted model differ only in the layers with an adaptation.  They are evaluated together on
activations of shape ``(R, N, ...)``.  ``R`` is 1 while the two models agree.  From the first layer at which they
differ, ``R`` is 2: branch 0 is the base, branch 1 the adapted model.  Residual additions broadcast; :func:`cat` and
:func:`attention` expand first.

These layers call ``torch.nn.functional`` directly and do not derive from torch's.  WebUIs replace the ``forward`` of
``torch.nn.Linear`` and similar classes for their models, and must not change the side model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_delta.devices import free_memory

# The memory for the scores of one attention call without a fused kernel: enough to keep a device busy.
MAX_SCORE_BYTES = 512 * 2**20


class Adaptation(Protocol):
    """The adapted model's version of a layer."""

    def __call__(self, layer: ForkedLayer, x: Tensor) -> Tensor:
        """Return the adapted model's output for ``x`` of shape ``(N, ...)``."""
        ...

    def forked(self, layer: ForkedLayer, x: Tensor) -> Tensor:
        """Return both models' outputs ``(2, N, ...)`` for ``x`` of shape ``(R, N, ...)``."""
        return torch.stack((layer.base(x[0]), self(layer, x[-1])))


class ForkedLayer(nn.Module):
    """A layer for both branches: shared by default, forked with an adaptation."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.adaptation: Adaptation | None = None
        # The dtype of the computation if the weight is stored in a smaller one (:meth:`store_as`); else None.
        self.compute_dtype: torch.dtype | None = None
        # The branch to evaluate if the two are evaluated one after the other (:func:`single_branch`); else None.
        self.branch: int | None = None

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the layer for ``x`` of shape ``(N, ...)`` with the given weights."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation."""
        return self.compute_dtype or self.weight.dtype

    def store_as(self, dtype: torch.dtype) -> None:
        """Store the weight in a smaller dtype such as fp8; it is cast at every use."""
        self.compute_dtype = self.dtype
        self.weight = nn.Parameter(self.weight.to(dtype), requires_grad=False)

    def base_weight(self) -> Tensor:
        """Return the base model's weight in the dtype of the computation."""
        return self.weight if self.compute_dtype is None else self.weight.to(self.compute_dtype)

    def base(self, x: Tensor) -> Tensor:
        """Compute the base model's layer for ``x`` of shape ``(N, ...)``."""
        return self.apply_weights(x, self.base_weight(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(R, N, ...)`` to ``(R', N, ...)``; ``R'`` is 2 if the layer is adapted and evaluates both branches."""
        if self.adaptation is None or self.branch == 0:
            return self.base(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.branch == 1:
            return self.adaptation(self, x[0])[None]
        return self.adaptation.forked(self, x)


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
        # Whether the padding continues at the opposite edge, for pictures that can be tiled.
        self.circular = False
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.circular and self.padding:
            return F.conv2d(F.pad(x, (self.padding,) * 4, mode="circular"), weight, bias, self.stride)
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


def set_tiling(model: nn.Module, circular: bool) -> None:
    """Make a model's convolutions wrap around at a picture's edges, or pad with zeros."""
    for layer in model.modules():
        if isinstance(layer, Conv2d):
            layer.circular = circular


@contextmanager
def single_branch(model: nn.Module, branch: int) -> Iterator[None]:
    """Make a model's layers evaluate only one branch, on activations of ``R = 1``."""
    layers = [layer for layer in model.modules() if isinstance(layer, ForkedLayer)]
    try:
        for layer in layers:
            layer.branch = branch
        yield
    finally:
        for layer in layers:
            layer.branch = None


def is_adapted(model: nn.Module) -> bool:
    """Return whether any layer of a model is adapted."""
    return any(isinstance(layer, ForkedLayer) and layer.adaptation is not None for layer in model.modules())


def expand(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Expand ``(R, N, ...)`` tensors to the same number of branches (views, no copies)."""
    branches = max(t.shape[0] for t in tensors)
    return tuple(t.expand(branches, *t.shape[1:]) for t in tensors)


def cat(*tensors: Tensor, dim: int) -> Tensor:
    """Concatenate ``(R, N, ...)`` tensors along ``dim``, expanded to the same branches."""
    return torch.cat(expand(*tensors), dim)


def expand_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Expand ``(R, N, ...)`` to one row for each of ``rows`` ``(M,)``, numbers of images, unless it has M rows."""
    return x if rows is None or x.shape[1] == len(rows) else x.index_select(1, rows)


def add_to_adapted(x: Tensor, added: Tensor) -> Tensor:
    """Add ``(N, ...)`` to the adapted branch of ``(R, N, ...)``; the result has ``R = 2``."""
    return torch.stack((x[0], x[-1] + added))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Compute multi-head attention of ``(R, N, T, C)`` queries over ``(R, N, S, C)`` keys and values."""
    q, k, v = expand(q, k, v)
    branches, batch = q.shape[:2]
    split = [t.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    return attend(*split).transpose(1, 2).flatten(2).unflatten(0, (branches, batch))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention of ``(N, heads, T, C)`` queries over ``(N, heads, S, C)`` keys and values.

    Without a fused kernel (Apple's and Intel's devices, DirectML, older ROCm) torch stores a score for each pair of
    query and key: 17 GB at 128x128 latents in fp16.  There, this function computes the queries in slices.
    """
    slices = 1 if _has_fused_attention(q, k, v) else _slices(q, k)
    if slices == 1:
        return F.scaled_dot_product_attention(q, k, v)
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.chunk(slices, 2)], 2)


def _has_fused_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether torch would use a kernel that never stores all scores."""
    try:
        return torch._fused_sdp_choice(q, k, v) != 0
    except (AttributeError, NotImplementedError, RuntimeError):
        return False  # a device without fused kernels, or a torch that does not report its choice


def _slices(q: Tensor, k: Tensor) -> int:
    scores = 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()  # before softmax and after it
    if scores <= MAX_SCORE_BYTES // 8:
        return 1
    free = free_memory(q.device)
    room = MAX_SCORE_BYTES if free is None else min(MAX_SCORE_BYTES, free // 2)
    return min(q.shape[2], -(-scores // max(room, 1)))
