"""Draw and judge sets of pictures by the embedded models, in several processes."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from demo.embedded import LORA, Embedded
from demo.metrics import Scores, judge
from demo.pipeline import (
    AdaptedModel,
    Adapter,
    Alone,
    Batch,
    Branch,
    Denoiser,
    Model,
    Settings,
    decode,
    draw,
    with_delta,
)
from demo.samplers import denoise_from, noise_levels
from demo.targets import Way, bridge_file, bridge_of, load_target, target_file
from lib_delta.core.strength import Strength
from run import ONE_THREAD

PROMPTS_AT_ONCE = 6
JUDGED = 64  # pixels along a side
Figures = dict[str, float | None]


@dataclass(frozen=True)
class Task:
    """One set of pictures to draw and judge: every prompt with every seed.

    ``kind`` selects the model: the ``target``, the ``base``, the ``adapted`` model, the target with the ``delta`` of
    ``strength``, or ``img2img``.  In img2img the target redraws the last ``share`` of the steps of ``start``, the
    adapted model's latents.  ``adapters`` name the files that make the adapted model together.  ``target`` names one of
    :mod:`demo.targets` instead of the usual one, ``way`` the bridge for the delta.
    """

    kind: Literal["target", "base", "adapted", "delta", "img2img"]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Settings
    strength: Strength = field(default_factory=Strength)
    share: float = 0.0
    start: Tensor | None = None
    adapters: tuple[str, ...] = (LORA,)
    target: str = ""
    way: Way = "as it is"

    @property
    def title(self) -> str:
        """The progress bar's text."""
        detail = {
            "delta": f" {self.strength.value:g} {self.strength.start:g}-{self.strength.end:g}",
            "img2img": f" {self.share:g}",
        }
        return f"{self.settings.sampler} {self.kind}{detail.get(self.kind, '')}"


@dataclass(frozen=True)
class Result:
    """The scores of a task's pictures, in total and by prompt, and their latents."""

    scores: Scores
    by_prompt: tuple[Scores, ...]
    latents: Tensor


class Studio:
    """Draws and judges the pictures of tasks with the embedded models."""

    def __init__(self, models: Path) -> None:
        torch.set_num_threads(1)
        self.models, self.adapters = models, (LORA,)
        self.embedded = Embedded.load(models)
        self._targets = {"": self.embedded.target}

    def target(self, name: str) -> Model:
        """Return a target by name, loaded once; the usual one has no name."""
        if name not in self._targets:
            self._targets[name] = load_target(target_file(self.models, name), self.embedded.target)
        return self._targets[name]

    def run(self, task: Task) -> Result:
        """Draw and judge one task's pictures."""
        self._attach(task.adapters)
        latents, seeds = [], len(task.seeds)
        for first in range(0, len(task.prompts), PROMPTS_AT_ONCE):
            batch = Batch(task.prompts[first : first + PROMPTS_AT_ONCE], task.seeds)
            latents.append(self._latents(task, batch, slice(first * seeds, (first + PROMPTS_AT_ONCE) * seeds)))
        made = torch.cat(latents)
        model = self.embedded.base if task.kind in ("base", "adapted") else self.target(task.target)
        # The judges take pictures of one size.
        pictures = F.adaptive_avg_pool2d(decode(model, made), JUDGED).unflatten(0, (len(task.prompts), seeds))
        names = torch.tensor([self.embedded.judged.index(prompt) for prompt in task.prompts])
        judges = self.embedded.judges
        by_prompt = tuple(judge(judges, pictures[i : i + 1], names[i : i + 1]) for i in range(len(names)))
        return Result(judge(judges, pictures, names), by_prompt, made)

    def _attach(self, adapters: tuple[str, ...]) -> None:
        if adapters != self.adapters:
            adapted = AdaptedModel(self.embedded.base, [Adapter(self.models / name) for name in adapters])
            self.embedded, self.adapters = replace(self.embedded, adapted=adapted), adapters

    def _latents(self, task: Task, batch: Batch, rows: slice) -> Tensor:
        base, model, settings = self.embedded.base, self.target(task.target), task.settings
        if task.kind in ("base", "adapted"):
            source = self.embedded.adapted.source(batch, settings)
            branch = Branch(source, settings.cfg, adapted=task.kind == "adapted")
            return self._draw(branch, base, batch, settings)
        target = Alone(model, batch, settings)
        if task.kind == "target":
            return self._draw(target, model, batch, settings)
        if task.kind == "delta":
            source = self.embedded.adapted.source(batch, settings)
            bridge = bridge_of(task.way, base, model, bridge_file(self.models, task.target)) if task.target else None
            delta = with_delta(target, model, source, base, task.strength, settings, bridge)
            return self._draw(delta, model, batch, settings)
        assert task.start is not None
        return self._redraw(target, task.start[rows], task.share, batch, settings)

    def _draw(self, denoiser: Denoiser, model: Model, batch: Batch, settings: Settings) -> Tensor:
        return draw(denoiser, model, batch, settings, torch.device("cpu"))

    def _redraw(self, target: Alone, start: Tensor, share: float, batch: Batch, settings: Settings) -> Tensor:
        model = self.embedded.target
        levels = noise_levels(settings.steps, model.parameterization.schedule)
        levels = levels[settings.steps - round(share * settings.steps) :]
        # New noise, as in img2img: the original noise would reproduce the original picture.
        noise = Batch(batch.prompts, [seed + 10_000 for seed in batch.seeds]).noise(model, settings)
        with torch.no_grad():
            return denoise_from(settings.sampler, target, start + levels[0] * noise, levels, batch.seeds[0])


_studio: Studio | None = None


def _open_studio(models: Path) -> None:
    global _studio
    _studio = Studio(models)


def _run(task: Task) -> Result:
    assert _studio is not None
    return _studio.run(task)


class Workers:
    """Runs tasks in processes of one thread each, with one progress bar."""

    def __init__(self, models: Path, jobs: int) -> None:
        os.environ.update(ONE_THREAD)  # inherited by processes: torch sets its threads at import
        context = torch.multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(jobs, context, _open_studio, (models,))

    def run(self, tasks: dict[str, Task]) -> dict[str, Result]:
        """Return each task's result under its key."""
        futures = {key: self._pool.submit(_run, task) for key, task in tasks.items()}
        for future in tqdm(as_completed(futures.values()), total=len(futures), desc=next(iter(tasks.values())).title):
            future.result()
        return {key: future.result() for key, future in futures.items()}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Ends:
    """The two ends of the scale: scores of target and adapted model by themselves."""

    target: Scores
    adapted: Scores

    def figures(self, scores: Scores) -> Figures:
        """Express scores as shares of the scale, rounded for print."""
        return {
            "style_share": round(_share(scores.style, self.target.style, self.adapted.style), 3),
            "ink_share": round(_share(scores.ink, self.target.ink, self.adapted.ink), 3),
            "content_ratio": _ratio(scores.content, self.target.content),
            "near_ratio": _ratio(scores.near, self.target.near),
            "diversity": round(scores.diversity, 3),
        }


def _ratio(value: float, whole: float) -> float | None:
    # A target without any recognised emoji has no content to preserve or lose.
    return round(value / whole, 3) if whole else None


def _share(value: float, start: float, end: float) -> float:
    return (value - start) / (end - start)
