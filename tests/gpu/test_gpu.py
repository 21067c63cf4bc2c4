"""The checks on a CUDA card, at the full width of SD 1.5 with random weights: ``python run.py test-gpu``."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import checks
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA card here")
LINES: list[checks.Line] = []


@pytest.fixture(scope="module")
def bench() -> Iterator[checks.Bench]:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield checks.Bench(device, checks.SD15, 64, torch.cuda.memory_allocated)
    peak = torch.cuda.max_memory_allocated() / 2**30
    head = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, peak {peak:.1f} GB, SD 1.5's layout, 64x64 latents"
    )
    print("\n\n" + checks.table(head, LINES) + "\n")


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def short(share: float) -> Iterator[None]:
    """Leave a share of what the last pass needed beside what is in use."""
    torch.cuda.synchronize()
    resting, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (resting + share * (peak - resting)) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def waits() -> Iterator[Sequence[str]]:
    """List the points at which torch itself says that it waits."""
    found: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
        found += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


CHECKS: dict[str, Callable[[checks.Bench], Iterator[checks.Line]]] = {
    "precision": checks.precision,
    "inference mode and autocast": checks.ambient,
    "memory that runs out in mid-step": lambda bench: checks.shortage(bench, short),
    "swaps": checks.swaps,
    "visits and streams": checks.placements,
    "no step waits for the device": lambda bench: checks.synchronisation(bench, waits),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_on_the_card(bench: checks.Bench, check: Callable[[checks.Bench], Iterator[checks.Line]]) -> None:
    torch.cuda.reset_peak_memory_stats()
    found = list(check(bench))
    LINES.extend(found)
    assert all(line.good for line in found), found
