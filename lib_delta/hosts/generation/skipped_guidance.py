"""Detect whether a WebUI skips guidance in a step to save time.

Each WebUI has its own rules for it, so the number of rows that the model evaluates decides.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class RowCounter:
    """Counts the rows that a model evaluates until :meth:`close`, without waiting for the device."""

    def __init__(self, model: nn.Module) -> None:
        self.rows = 0
        self._hook = model.register_forward_pre_hook(self._count)

    def _count(self, _model: nn.Module, arguments: tuple[Any, ...]) -> None:
        # Hooks of this kind do not get keyword arguments; a call without others adds no rows.
        self.rows += len(arguments[0]) if arguments else 0

    def close(self) -> None:
        """Stop counting."""
        self._hook.remove()
