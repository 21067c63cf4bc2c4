"""Times side by side: every case once in each round, and ratios of the same round."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """What is timed, and what puts it in place beforehand."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def keep_memory() -> None:
    """Have the C library keep what is freed, as GPUs' allocators do.

    Else glibc gives large blocks back to the system at once, or does not, by what was freed before: page faults then
    are up to half of a pass's time, in some cases and not in others.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        ctypes.CDLL(None).mallopt(mmap_max, 0)
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return what a call takes: of the GPU's time, or of this process's own on a CPU, whatever else runs there."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.process_time()
    run()
    return time.process_time() - started


def rounds(cases: Mapping[str, Case], count: int, device: torch.device) -> dict[str, list[float]]:
    """Time all cases in turn, ``count`` times; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(count + 1):
        for name, case in cases.items():
            case.prepare()
            taken = seconds(case.run, device)
            if number:
                times[name].append(taken)
    return times


def ratios(times: Mapping[str, list[float]], divisor: str) -> dict[str, dict[str, float]]:
    """Return each case's median and range of ratios to another case of the same round, and its median seconds."""
    found = {}
    for name, own in times.items():
        quotients = [a / b for a, b in zip(own, times[divisor])]
        found[name] = {
            "ratio": round(statistics.median(quotients), 3),
            "lowest": round(min(quotients), 3),
            "highest": round(max(quotients), 3),
            "seconds": round(statistics.median(own), 4),
        }
    return found
