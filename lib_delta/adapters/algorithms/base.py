"""The interface of adapter algorithms.

An algorithm is a module with two members.  ``TENSORS`` declares the names that files give to its tensors.
``match(tensors)`` takes one layer's tensors by these names (``lora_down.weight``) and returns a frozen
dataclass, or None if the tensors belong to another algorithm.  It raises :class:`AdapterError` for tensors
that belong to it and cannot be used.  :mod:`lib_delta.adapters.algorithms.registry` lists the modules.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Size, Tensor

from lib_delta.errors import AdapterError
from lib_delta.models.forked_layers import ForkedLayer

AdapterT = TypeVar("AdapterT", bound="LayerAdapter")


class LayerAdapter(ABC):
    """One layer's part of an adapter, independent of the user's weight for it.

    Subclasses are frozen dataclasses whose tensors are fields.  An adapter is a difference from its layer, so that any
    number of them add up in any order.
    """

    @property
    @abstractmethod
    def algorithm(self) -> str:
        """The algorithm's name, for reports."""

    @property
    def bypasses(self) -> bool:
        """Whether :meth:`bypass` can compute the effect on the layer's output from small factors."""
        return False

    def bypass_cost(self, shape: Size) -> float:
        """Return the multiplications of :meth:`bypass` as a share of those of a layer with weights of ``shape``."""
        return sum(t.numel() for t in self._tensors().values()) / max(shape.numel(), 1)

    def memory(self) -> int:
        """Return the bytes of its tensors."""
        tensors: list[Tensor] = []
        self.map(lambda t: tensors.append(t) or t)  # type: ignore[func-returns-value]
        return sum(t.nbytes for t in tensors)

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def rank(self) -> int | None:
        """The rank of its factors; None if the algorithm has none."""
        return None

    @property
    def changes_bias(self) -> bool:
        """Whether it has a difference for the layer's bias."""
        return False

    @abstractmethod
    def fit(self: AdapterT, shape: Size) -> AdapterT:
        """Return the adapter in the layout of a weight of ``shape``; raise :class:`AdapterError` if it does not fit."""

    @abstractmethod
    def merged_difference(self, weight: Tensor) -> Tensor:
        """Return W' - W for the layer's ``weight``: in its shape, on its device, computed in fp32."""

    def add_difference(self, total: Tensor, weight: Tensor, factor: float) -> None:
        """Add ``factor`` times :meth:`merged_difference` to ``total``: fp32, contiguous, the weight's shape."""
        total.add_(self.merged_difference(weight), alpha=factor)

    def bias_difference(self, bias: Tensor) -> Tensor | None:
        """Return b' - b in fp32; None if the bias does not change."""
        return None

    def bypass(self, layer: ForkedLayer, x: Tensor, y: Tensor) -> Tensor:
        """Return the difference of the layer's output ``y`` for ``x`` of shape ``(N, ...)``."""
        raise NotImplementedError(f"{self.algorithm} has no bypass form")

    def plus_bypass(self, total: Tensor, layer: ForkedLayer, x: Tensor, y: Tensor, factor: float) -> Tensor:
        """Return ``total``, of the shape of ``y``, plus ``factor`` times :meth:`bypass`."""
        return torch.add(total, self.bypass(layer, x, y), alpha=factor)

    def map(self: AdapterT, function: Callable[[Tensor], Tensor]) -> AdapterT:
        """Return the same adapter with ``function`` applied to its tensors (a move, a cast)."""
        changed = {name: function(tensor) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]


def unchanged(tensor: Tensor) -> Tensor:
    """Return the tensor."""
    return tensor


class TensorName(NamedTuple):
    """A name that files give to one of a layer's tensors.

    ``pattern`` is a regular expression of the stored name.  ``name`` is what :meth:`Algorithm.match` calls the tensor,
    where peft and diffusers store it under another name; None keeps the stored one.  ``convert`` then turns the stored
    tensor into the named one.
    """

    pattern: str
    name: str | None = None
    convert: Callable[[Tensor], Tensor] = unchanged


def named(*names: str) -> tuple[TensorName, ...]:
    """Declare tensors whose stored name is the same in all dialects."""
    return tuple(TensorName(re.escape(name)) for name in names)


class HasTensorNames(Protocol):
    """A module that declares the names of tensors."""

    TENSORS: tuple[TensorName, ...]


class Algorithm(HasTensorNames, Protocol):
    """A module of this package that implements one algorithm."""

    def match(self, tensors: Mapping[str, Tensor]) -> Any:
        """Return the layer adapter made of ``tensors``, or None if they belong to another algorithm."""
        ...


def require(tensors: Mapping[str, Tensor], names: tuple[str, ...], what: str) -> None:
    """Raise :class:`AdapterError` that names the first missing tensor."""
    for name in names:
        if name not in tensors:
            raise AdapterError(f"{name} is missing, and {what} needs {' and '.join(names)}")


def scale_of(tensors: Mapping[str, Tensor], rank: int) -> float:
    """Return alpha over the rank; a missing ``alpha`` equals the rank, and rank 0 returns 0."""
    if rank == 0:
        return 0.0
    return finite_scalar(tensors["alpha"], "alpha") / rank if "alpha" in tensors else 1.0


def finite_scalar(tensor: Tensor, name: str) -> float:
    """Return the number in a tensor of one finite number; raise :class:`AdapterError` for any other tensor."""
    if tensor.numel() != 1 or not math.isfinite(tensor.item()):
        raise AdapterError(f"{name} has shape {tuple(tensor.shape)} or is not finite, and one finite number is needed")
    return float(tensor.item())


def with_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """View a tensor in a layer's number of dimensions: trainers omit or add dimensions of length 1 at the end."""
    ones = (1,) * abs(len(shape) - tensor.ndim)
    padded = tuple(tensor.shape) + ones if tensor.ndim < len(shape) else tuple(tensor.shape)
    if padded != (shape + ones if tensor.ndim > len(shape) else shape):
        raise AdapterError(f"{name} has shape {tuple(tensor.shape)} where the model's layer needs {shape}")
    return tensor.reshape(shape)


def matrix_or_convolution(shape: Size, algorithm: str) -> None:
    """Raise :class:`AdapterError` for a layer whose weight is neither ``(out, in)`` nor ``(out, in, k, k)``."""
    if len(shape) not in (2, 4):
        raise AdapterError(f"the model's layer has weights of shape {tuple(shape)}, which {algorithm} cannot adapt")
