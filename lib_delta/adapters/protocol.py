"""What every adapter algorithm offers, and the list of algorithms a file's layers are offered to.

An algorithm is a module with ``match(tensors) -> LayerAdapter | None``: it takes the tensors that a
file holds for one layer, by the names they have there below the layer's (``lora_down.weight``), and
returns a frozen dataclass, or None if these are another algorithm's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Size, Tensor

from lib_delta.fork import ForkedLayer


class LayerAdapter(Protocol):
    """One layer's part of an adapter, independent of the weight that the user gives it."""

    def fit(self, shape: Size) -> LayerAdapter:
        """Return the adapter laid out for a weight of ``shape``; raise :class:`AdapterError` if it is not for one."""
        ...

    def merged_difference(self, weight: Tensor) -> Tensor:
        """Return W' - W for the base's ``weight``: its shape and device, computed in fp32."""
        ...

    def bias_difference(self, bias: Tensor) -> Tensor | None:
        """Return b' - b in fp32, or None where the bias stays the base's."""
        ...


@runtime_checkable
class Bypassing(Protocol):
    """A layer adapter whose effect is an addition to the layer's output, computed from small factors."""

    def bypass(self, layer: ForkedLayer, x: Tensor) -> Tensor:
        """Return what is added to the layer's output for ``x`` of shape ``(N, ...)``."""
        ...

    def map(self, function: Callable[[Tensor], Tensor]) -> Bypassing:
        """Return the same adapter with ``function`` applied to its factors (a move, a cast)."""
        ...


class Algorithm(Protocol):
    """A module of this package that implements one algorithm."""

    def match(self, tensors: Mapping[str, Tensor]) -> Any:
        """Return the layer adapter made of ``tensors``, or None if they are another algorithm's."""
        ...
