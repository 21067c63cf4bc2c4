"""Compare the same style trained with every algorithm of adapters.

Every file is measured on the same prompts and seeds and on one scale of style, from the target by itself (0) to the
LoRA's adapted model by itself (1).  Errors are standard errors over the choice of prompts, by bootstrap: prompts are
resampled with replacement, the same ones for all files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from demo.embedded import LORA
from demo.grid import draw_grid
from demo.pipeline import Settings, decode
from demo.studio import Figures, Result, Studio, Task, Workers
from lib_delta.core.strength import Strength

FILES = {
    "LoRA": LORA,
    "LoRA, second seed": "lineart-seed2.safetensors",
    "LoRA, third seed": "lineart-seed3.safetensors",
    "LoHa": "lineart-loha.safetensors",
    "LoKr": "lineart-lokr.safetensors",
    "(IA)^3": "lineart-ia3.safetensors",
    "OFT": "lineart-oft.safetensors",
    "full fine-tune": "lineart-full.safetensors",
}
LAMBDAS = (1.0, 1.5)
PICTURED = ("snowman", "cupcake", "crescent moon", "octopus", "footprints")
DRAWS = 2000
NAMES = ("style_share", "ink_share", "content_ratio", "near_ratio", "diversity")


def there(models: Path) -> dict[str, str]:
    """Return the files of :data:`FILES` that exist in ``models``."""
    return {name: file for name, file in FILES.items() if (models / file).exists()}


def measure(
    workers: Workers, models: Path, prompts: tuple[str, ...], seeds: tuple[int, ...], settings: Settings
) -> dict[str, Any]:
    """Measure each file's delta; returns tables ``{"lambda 1": {"LoRA": figures}}``."""
    target, files = Task("target", prompts, seeds, settings), there(models)
    ways = {f"lambda {v:g}": replace(target, kind="delta", strength=Strength(v)) for v in LAMBDAS}
    tasks = {f"{way} of {name}": replace(ways[way], adapters=(file,)) for way in ways for name, file in files.items()}
    results = workers.run({"target": target, "alone of LoRA": replace(target, kind="adapted"), **tasks})
    draws = _draws(len(prompts))
    means = {key: draws @ _by_prompt(result) for key, result in results.items()}
    ends = means["target"], means["alone of LoRA"]
    tables = {way: _table({name: means[f"{way} of {name}"] for name in files}, *ends) for way in ways}
    return {"cases": len(prompts) * len(seeds), **tables}


def _by_prompt(result: Result) -> Tensor:
    """Return the scores of each prompt, ``(prompts, 5)``."""
    rows = [(s.style, s.ink, s.content, s.near, s.diversity) for s in result.by_prompt]
    return torch.tensor(rows, dtype=torch.float64)


def _draws(prompts: int) -> Tensor:
    """Return the weight of each prompt in each mean, ``(1 + DRAWS, prompts)``: the original sample, then resamples."""
    chosen = torch.randint(prompts, (DRAWS, prompts), generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(chosen, prompts).sum(1)
    return torch.cat((torch.ones(1, prompts), counts)).double() / prompts


def _table(rows: Mapping[str, Tensor], target: Tensor, alone: Tensor) -> dict[str, Figures]:
    """Express means ``(1 + DRAWS, 5)`` as shares and ratios, with errors, and as differences to the LoRA's style."""
    shares = {name: _shares(means, target, alone) for name, means in rows.items()}
    out = {}
    for name, own in shares.items():
        figures: Figures = {}
        columns = {**dict(zip(NAMES, own.T)), "style_difference": own[:, 0] - shares["LoRA"][:, 0]}
        for column, values in columns.items():
            figures[column], figures[f"{column}_error"] = _with_error(values)
        out[name] = figures
    return out


def _shares(means: Tensor, target: Tensor, alone: Tensor) -> Tensor:
    style = (means[:, :2] - target[:, :2]) / (alone[:, :2] - target[:, :2])
    return torch.cat((style, means[:, 2:4] / target[:, 2:4], means[:, 4:]), 1)


def _with_error(values: Tensor) -> tuple[float | None, float | None]:
    # A target without any recognised emoji has no content to preserve or lose.
    figure, redrawn = values[0], values[1:][values[1:].isfinite()]
    return (round(float(figure), 3), round(float(redrawn.std()), 3)) if figure.isfinite() else (None, None)


def table(figures: Mapping[str, Figures], title: str) -> str:
    """Format one table as Markdown, errors after the figures."""
    columns = [column for column in next(iter(figures.values())) if not column.endswith("_error")]
    lines = [f"| {title} | {' | '.join(c.replace('_', ' ') for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in figures.items():
        cells = ("-" if row[c] is None else f"{row[c]:.2f} ± {row[f'{c}_error']:.2f}" for c in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sheet(models: Path, settings: Settings) -> Image.Image:
    """Draw a few prompts by the target by itself and with each file's delta at the highest lambda."""
    studio = Studio(models)
    target = Task("target", PICTURED, (0,), settings)
    delta = replace(target, kind="delta", strength=Strength(LAMBDAS[-1]))
    tasks = {"target alone": target, **{name: replace(delta, adapters=(file,)) for name, file in there(models).items()}}
    rows = [decode(studio.embedded.target, studio.run(task).latents) for task in tasks.values()]
    return draw_grid(torch.stack(rows), list(tasks), PICTURED)
