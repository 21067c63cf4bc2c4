"""Patchers of models that a memory manager moves only as a whole.

The managers of Forge Neo and reForge load as much of a model as fits, and cast the rest by hand in each forward pass.
That works only with their layers.  Other layers would stay on the CPU, or be split over two devices.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from lib_delta.devices import indexed

# The methods by which managers load parts of models, and the parameters that they need to have.
PARTLY = {"load": "full_load", "partially_load": "extra_memory", "partially_unload": "memory_to_free"}


def whole(patcher: type[Any]) -> type[Any]:
    """Return a manager's class of patchers so that it moves whole models; the class itself if it always does."""
    if not all(_takes(getattr(patcher, method, None), parameter) for method, parameter in PARTLY.items()):
        return patcher

    class WholePatcher(patcher):  # type: ignore[misc]
        """Loads or unloads all of its model."""

        def model_size(self) -> int:
            """Return the bytes of the weights, which change with the adapters."""
            return sum(weight.nbytes for weight in self._weights())

        def loaded_size(self) -> int:
            """Return the bytes of the weights that are on the computing device."""
            device = indexed(self.load_device)
            return sum(weight.nbytes for weight in self._weights() if weight.device == device)

        def partially_load(self, device_to: torch.device, extra_memory: float = 0, **options: Any) -> int:
            """Load all weights, whatever the limit; return the bytes that this took."""
            before = self.loaded_size()
            try:
                self.load(device_to, full_load=True, **options)
            except BaseException:
                self.detach()
                raise
            return self.loaded_size() - before

        def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, **options: Any) -> int:
            """Return 0 freed bytes; the manager then unloads the whole model."""
            return 0

        def _weights(self) -> tuple[torch.Tensor, ...]:
            return *self.model.parameters(), *self.model.buffers()

    return WholePatcher


def _takes(method: Any, parameter: str) -> bool:
    return callable(method) and parameter in inspect.signature(method).parameters
