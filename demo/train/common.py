"""The training loop of all models: seeded, resumable, with a progress bar and averaged weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Run:
    """The length and the rate of one model's training."""

    steps: int
    batch: int
    rate: float
    warmup: int = 200
    average: float = 0.998
    seed: int = 0
    save_seconds: float = 120


def train(
    name: str,
    model: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    folder: Path,
    run: Run,
    parameters: Iterable[nn.Parameter] | None = None,
) -> nn.Module:
    """Minimise ``loss`` over the model's (or the given) parameters and return it with averaged weights.

    Every step draws from a generator seeded by the run and the step's number.  So an interrupted run continues from its
    last save (``folder/NAME.train.pt``) with the same result.
    """
    trained = list(model.parameters() if parameters is None else parameters)
    optimizer = torch.optim.AdamW(trained, lr=run.rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = copy.deepcopy(model).requires_grad_(False)
    saved, first = folder / f"{name}.train.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
        }
        partial = saved.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(saved)

    smoothed, last_save = 0.0, time.monotonic()
    bar = tqdm(range(first, run.steps), desc=name, initial=first, total=run.steps, mininterval=5)
    for step in bar:
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        value = loss(generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = run.rate * _schedule(step, run)
        optimizer.step()
        _follow(average, model, min(run.average, (step + 1) / (step + 10)))
        smoothed += (value.item() - smoothed) * (1 / (step - first + 1) if step - first < 100 else 0.01)
        bar.set_postfix(loss=f"{smoothed:.4f}", refresh=False)
        if time.monotonic() - last_save > run.save_seconds:
            save(step + 1)
            last_save = time.monotonic()
    if first < run.steps:
        save(run.steps)
    return average


def _schedule(step: int, run: Run) -> float:
    """Warm up linearly, hold, then decay to 0 over the last 40 % along a cosine."""
    progress = (step / run.steps - 0.6) / 0.4
    return min(1.0, (step + 1) / run.warmup) * (0.5 + 0.5 * math.cos(math.pi * min(max(progress, 0.0), 1.0)))


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    mine, theirs = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(mine, theirs, 1 - decay)
