"""Patchers of models that a memory manager moves as a whole.

Forge Neo's and reForge's managers load as much of a model as fits, and cast what stays behind by hand as it is used;
so only layers of theirs can be.  A model of other layers would be left on the CPU, or be in two places.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from lib_delta.devices import indexed

# The methods by which managers load parts of models, and what they have to take.
PARTLY = {"load": "full_load", "partially_load": "extra_memory", "partially_unload": "memory_to_free"}


def whole(patcher: type[Any]) -> type[Any]:
    """Return a manager's class of patchers so that all of a model is moved, or nothing; as it is if it always does."""
    if not all(_takes(getattr(patcher, method, None), parameter) for method, parameter in PARTLY.items()):
        return patcher

    class WholePatcher(patcher):  # type: ignore[misc]
        """Loads all of its model; to be rid of a part, the manager has to unload all of it."""

        def model_size(self) -> int:
            """Return the bytes of the weights as they are now: adapters come and go."""
            return sum(weight.nbytes for weight in self._weights())

        def loaded_size(self) -> int:
            """Return how many of these bytes are where they are computed with."""
            device = indexed(self.load_device)
            return sum(weight.nbytes for weight in self._weights() if weight.device == device)

        def partially_load(self, device_to: torch.device, extra_memory: float = 0, **options: Any) -> int:
            """Load all, and return the bytes that this took, whatever was allowed."""
            before = self.loaded_size()
            try:
                self.load(device_to, full_load=True, **options)
            except BaseException:
                self.detach()
                raise
            return self.loaded_size() - before

        def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, **options: Any) -> int:
            """Unload nothing, and return that 0 bytes were freed, upon which the manager unloads all."""
            return 0

        def _weights(self) -> tuple[torch.Tensor, ...]:
            return *self.model.parameters(), *self.model.buffers()

    return WholePatcher


def _takes(method: Any, parameter: str) -> bool:
    return callable(method) and parameter in inspect.signature(method).parameters
