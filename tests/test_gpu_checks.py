"""The checks for a CUDA card (tests/gpu), on the stand-in device at tiny width: they pass there, and they can fail."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_helpers import config
from stand_in_device import DEVICE, stand_in_device

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import checks

from lib_delta.adapters import apply
from lib_delta.models.unet import UNet


@pytest.fixture
def transfers() -> Iterator[Counter[str]]:
    with stand_in_device() as transfers:
        yield transfers


@pytest.fixture
def bench(transfers: Counter[str]) -> checks.Bench:
    return checks.Bench(DEVICE, config(), 8, lambda: 0)


@contextmanager
def short(share: float) -> Iterator[None]:
    """Have the UNet run out of memory for both branches, or for anything."""
    original = UNet.forward

    def forward(unet: UNet, *given: Any) -> torch.Tensor:
        output = original(unet, *given)
        if share == 0 or len(output) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return output

    UNet.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        UNet.forward = original  # type: ignore[method-assign]


def test_all_checks_pass_on_the_stand_in(bench: checks.Bench, transfers: Counter[str]) -> None:
    @contextmanager
    def watched() -> Iterator[Sequence[str]]:
        found: list[str] = []
        before = transfers["from the device"]
        yield found
        found += ["a transfer"] * (transfers["from the device"] - before)

    lines = [*checks.ambient(bench), *checks.shortage(bench, short), *checks.swaps(bench, 6)]
    lines += checks.placements(bench)
    lines += checks.synchronisation(bench, watched)
    assert all(line.good for line in lines), checks.table("on the stand-in", lines)


def test_a_merge_that_obeys_autocast_is_found(bench: checks.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original = apply._summed

    def rounded(*given: Any) -> Any:
        weight, bias = original(*given)
        return weight.bfloat16().to(weight.dtype), bias

    monkeypatch.setattr(
        apply, "_summed", lambda *given: (rounded if torch.is_autocast_cpu_enabled() else original)(*given)
    )
    monkeypatch.setattr(apply, "without_autocast", lambda _device: torch.enable_grad())
    assert [line.good for line in checks.ambient(bench)] == [True, False]


def test_what_grows_from_swap_to_swap_is_found(bench: checks.Bench) -> None:
    used = iter(range(0, 2**40, 2**20))
    growing = checks.Bench(bench.device, bench.config, bench.side, lambda: next(used))
    assert [line.good for line in checks.swaps(growing, 6)] == [False]


def test_the_table_can_be_pasted() -> None:
    lines = [checks.Line("a check", "1e-3 apart", True), checks.Line("another", "3 parts", False)]
    said = checks.table("a card", lines).splitlines()
    assert said[0] == "a card" and said[-2:] == ["| a check | 1e-3 apart | ok |", "| another | 3 parts | **not ok** |"]


def test_the_full_layout_is_that_of_sd_1_5() -> None:
    with torch.device("meta"):
        unet = UNet(checks.SD15)
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964
