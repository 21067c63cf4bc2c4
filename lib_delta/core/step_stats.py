"""What steps came to, noted on the device: to look at it at once would be to wait for the step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepStats:
    """A step's number, noise level and seconds, and its delta's size as a share of the estimate's, and its kind."""

    step: int
    sigma: float
    size: float
    finite: bool
    zero: bool
    seconds: float


class PendingStats:
    """Figures of steps that are still on the device."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, Tensor, Callable[[], float]]] = []

    def add(
        self, step: int, sigma: Tensor, denoised: Tensor, changes: list[Tensor], taken: Callable[[], float]
    ) -> Tensor:
        """Note a step; returns whether all changes are finite, ``()``, on their device.

        The size is that of the first of ``changes``; ``taken`` gives the seconds, once the device is through.
        """
        finite = torch.stack([torch.isfinite(change).all() for change in changes]).all()
        nonzero = torch.stack([change.any() for change in changes]).any()
        size = changes[0].norm() / denoised.norm().clamp(min=1e-12)
        values = (sigma.max().to(size.device), size, finite, nonzero)
        self._steps.append((step, torch.stack([value.float() for value in values]), taken))
        return finite

    def take(self, *values: Tensor) -> tuple[list[float], list[StepStats]]:
        """Return numbers ``()`` of the device, and the figures noted since the last time, in one transfer."""
        steps, self._steps = self._steps, []
        rows = [*(value.float().reshape(1) for value in values), *(row for _, row, _ in steps)]
        if not rows:
            return [], []
        numbers = torch.cat([row.to(rows[-1].device) for row in rows]).cpu().tolist()
        figures = []
        for i, (step, _, taken) in enumerate(steps):
            sigma, size, finite, nonzero = numbers[len(values) + 4 * i :][:4]
            figures.append(StepStats(step, sigma, size, bool(finite), not nonzero, taken()))
        return numbers[: len(values)], figures


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start to measure what a device is given to do; call the result to stop, and what that returns for the seconds.

    CUDA says how long it took when it is through, and a CPU is through when calls return.  Elsewhere it is not a
    number, for it is not known without waiting.
    """
    if device.type != "cuda":
        started = time.perf_counter()

        def stop() -> Callable[[], float]:
            taken = time.perf_counter() - started if device.type == "cpu" else math.nan
            return lambda: taken

        return stop
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(torch.cuda.current_stream(device))

    def stop_there() -> Callable[[], float]:
        end.record(torch.cuda.current_stream(device))
        return lambda: float(begin.elapsed_time(end)) / 1000

    return stop_there
