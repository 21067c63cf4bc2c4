"""What steps came to is noted where it was computed, and read in one transfer."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch

from lib_delta.core.step_stats import PendingStats, Stopwatch
from tests.support.stand_in_device import DEVICE, stand_in_device

X = torch.full((1, 4, 8, 8), 2.0)


class Taken(Stopwatch):
    """A stopwatch that has measured a given time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(torch.device("cpu"))
        self._taken = seconds

    def seconds(self) -> float:
        return self._taken


def noted(numbers: PendingStats, step: int, *changes: torch.Tensor) -> bool:
    finite = numbers.add(step, torch.tensor([0.5, 0.25]).to(X), X, list(changes), Taken(0.1 * step))
    return bool(finite)


def test_figures_say_what_a_step_came_to() -> None:
    numbers = PendingStats()
    assert noted(numbers, 3, 3 * X, torch.zeros_like(X))
    assert not noted(numbers, 4, torch.zeros_like(X), X.clone().index_fill_(1, torch.tensor([2]), math.nan))
    assert noted(numbers, 5, torch.zeros_like(X))
    (level,), (first, second, third) = numbers.take(torch.tensor(7.0))
    assert level == 7
    assert (first.step, first.sigma, first.size, first.finite, first.zero) == (3, 0.5, 3.0, True, False)
    assert (second.step, second.size, second.finite) == (4, 0.0, False)
    assert third.zero and third.finite and third.seconds == 0.5
    assert numbers.take() == ([], [])


def test_all_of_them_are_one_transfer() -> None:
    with stand_in_device() as transfers:
        there, sigma = X.to(DEVICE), torch.tensor([0.5]).to(DEVICE)
        numbers = PendingStats()
        transfers.clear()
        for step in range(3):
            numbers.add(step, sigma, there, [step * there, there], Taken(0.0))
        assert not transfers
        read, figures = numbers.take(sigma[0], sigma.max())
        assert transfers == {"from the device": 1}
    assert read == [0.5, 0.5] and [f.size for f in figures] == [0, 1, 2]


def stopped(device: torch.device) -> float:
    stopwatch = Stopwatch(device)
    stopwatch.stop()
    return stopwatch.seconds()


class Event:
    """A CUDA event that says what it is asked."""

    recorded: ClassVar[list[Event]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, _stream: object) -> None:
        self.recorded.append(self)

    def elapsed_time(self, end: Event) -> float:
        assert self.recorded == [self, end]
        return 1500.0


def test_a_step_on_cuda_is_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    assert stopped(torch.device("cuda")) == 1.5


def test_seconds_are_unknown_where_a_device_does_not_say() -> None:
    assert math.isnan(stopped(torch.device("meta")))
    assert 0 <= stopped(torch.device("cpu")) < 60
