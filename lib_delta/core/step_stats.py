"""Statistics of steps.  They stay on the device until a later step waits for it anyway."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepStats:
    """The statistics of one step.

    Attributes:
        step: the step's number.
        sigma: its noise level.
        size: the norm of the delta as a share of the norm of the target's estimate.
        finite: whether every value of the delta is a finite number.
        zero: whether the delta is 0 everywhere.
        seconds: the time that the delta took, NaN if unknown.
    """

    step: int
    sigma: float
    size: float
    finite: bool
    zero: bool
    seconds: float


class Stopwatch:
    """Measures how long a device works, without waiting for it.

    It starts when it is made.  CUDA measures with events; a CPU has finished when its calls return.  On other devices
    the time is unknown, as it cannot be measured without waiting.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()
        self._end = self._start

    def stop(self) -> None:
        """Stop it."""
        self._end = self._now()

    def seconds(self) -> float:
        """Return the seconds from start to stop, NaN if unknown.  Call it when the device has finished."""
        if self._device.type == "cuda":
            return float(self._start.elapsed_time(self._end)) / 1000
        return self._end - self._start if self._device.type == "cpu" else math.nan

    def _now(self) -> Any:
        """Return an event recorded on CUDA's current stream, elsewhere the time in seconds."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class PendingStats:
    """The statistics of steps that are still on the device."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, Tensor, Stopwatch]] = []

    def add(self, step: int, sigma: Tensor, denoised: Tensor, changes: list[Tensor], stopwatch: Stopwatch) -> Tensor:
        """Add a step's statistics; return whether all changes are finite, ``()``, on their device.

        ``denoised`` is the target's estimate.  The size is that of the first of ``changes``.
        """
        finite = torch.stack([torch.isfinite(change).all() for change in changes]).all()
        nonzero = torch.stack([change.any() for change in changes]).any()
        size = changes[0].norm() / denoised.norm().clamp(min=1e-12)
        values = (sigma.max().to(size.device), size, finite, nonzero)
        self._steps.append((step, torch.stack([value.float() for value in values]), stopwatch))
        return finite

    def take(self, *values: Tensor) -> tuple[list[float], list[StepStats]]:
        """Return the numbers ``()`` in ``values`` and the statistics added since the last call, in one transfer."""
        steps, self._steps = self._steps, []
        rows = [*(value.float().reshape(1) for value in values), *(row for _, row, _ in steps)]
        if not rows:
            return [], []
        numbers = torch.cat([row.to(rows[-1].device) for row in rows]).cpu().tolist()
        stats = []
        for i, (step, _, stopwatch) in enumerate(steps):
            sigma, size, finite, nonzero = numbers[len(values) + 4 * i :][:4]
            stats.append(StepStats(step, sigma, size, bool(finite), not nonzero, stopwatch.seconds()))
        return numbers[: len(values)], stats
