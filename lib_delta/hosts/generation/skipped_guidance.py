"""Whether a WebUI leaves out guidance in a step to save time: each has rules of its own, and what it does is seen."""

from __future__ import annotations

from typing import Any

from torch import nn


class Shown:
    """Counts the rows that a model is shown, until it is closed: that is known without waiting for the device."""

    def __init__(self, model: nn.Module) -> None:
        self.rows = 0
        self._hook = model.register_forward_pre_hook(self._count)

    def _count(self, _model: nn.Module, shown: tuple[Any, ...]) -> None:
        # Keywords are not told to a hook of this kind, and no rows are what none are known by.
        self.rows += len(shown[0]) if shown else 0

    def close(self) -> None:
        """Count no more."""
        self._hook.remove()
