"""The progress of a run, from its noise levels."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor


class Progress:
    """Maps a noise level to the progress of its run, 0 to 1."""

    def __init__(self, sigmas: Tensor) -> None:
        """Take the run's noise levels ``(steps,)`` or ``(steps + 1,)``, in any order."""
        # A final 0 is the end of the run.  Only Forge Neo's flow schedule evaluates a model there.
        self._levels = np.unique(sigmas[sigmas > 0].detach().cpu().double().log().numpy())

    @property
    def levels(self) -> int:
        """The number of the run's noise levels."""
        return len(self._levels)

    def __call__(self, sigma: Tensor) -> float:
        """Return :meth:`at` the largest of noise levels ``(N,)``; this waits for the device."""
        return self.at(float(sigma.max()))

    def at(self, level: float) -> float:
        """Return 0 at the first level and 1 at the last or below.

        Each step between them adds as much; levels between two steps are interpolated in log sigma.
        """
        if level <= 0:
            return 1.0
        along = np.linspace(0, 1, len(self._levels))[::-1]
        return float(np.interp(math.log(level), self._levels, along))
