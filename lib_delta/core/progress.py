"""How far along a run a noise level is."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor


class Progress:
    """How far along a run a noise level is."""

    def __init__(self, sigmas: Tensor) -> None:
        """Take the run's noise levels ``(steps,)`` or ``(steps + 1,)``, in any order."""
        # A final 0 is where the run ends; a level at which a model is asked it is in Forge Neo's flow schedule alone.
        self._levels = np.unique(sigmas[sigmas > 0].detach().cpu().double().log().numpy())

    @property
    def levels(self) -> int:
        """The number of the run's noise levels."""
        return len(self._levels)

    def __call__(self, sigma: Tensor) -> float:
        """Return :meth:`at` the largest of noise levels ``(N,)``, for which a device is waited for."""
        return self.at(float(sigma.max()))

    def at(self, level: float) -> float:
        """Return 0 at the first level, 1 at the last and below, and by steps between; samplers ask in any order."""
        if level <= 0:
            return 1.0
        along = np.linspace(0, 1, len(self._levels))[::-1]
        return float(np.interp(math.log(level), self._levels, along))
