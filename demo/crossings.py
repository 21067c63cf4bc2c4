"""Measure deltas on targets with other latents: ways to map them, rules for noise, the side model's guidance.

Style is the share of the way from the target by itself to the adapted model by itself.  Content is relative to the
target by itself.  Both are as everywhere in the evidence, with each target as its reference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from demo.grid import draw_grid
from demo.pipeline import Settings, decode
from demo.studio import JUDGED, Ends, Figures, Studio, Task, Workers
from demo.targets import Way, target_file
from lib_delta.core.strength import Strength

LAMBDAS = (1.0, 1.5, 2.0)
WAYS: dict[str, tuple[Way, ...]] = {
    "own": ("scale", "learned", "decoded", "decoded state"),
    "flow": ("learned", "decoded", "decoded state"),
    "large": ("as it is", "averaged", "unit"),
}
SAMPLERS = {"flow": "euler"}
# A target that runs like few-step models, with a side model that does not.
FEW_STEPS, FEW_CFG = 6, 1.0
SIDE_CFGS = (1.0, 3.0, 5.0, 7.0)
SIDE_LAMBDAS = (0.5, 1.0, 1.5, 2.0)
SIDE_TARGETS = ("own",)
AT_STYLE = 0.5
PICTURED = ("cupcake", "fox", "red apple", "sailboat")


def settings_of(name: str, settings: Settings) -> Settings:
    """Return a target's sampling settings; the target of twice the size draws 128 pixels."""
    return replace(
        settings, size=2 * JUDGED if name == "large" else JUDGED, sampler=SAMPLERS.get(name, settings.sampler)
    )


def there(models: Path) -> tuple[str, ...]:
    """Return the names of the targets whose files exist in ``models``."""
    return tuple(name for name in WAYS if target_file(models, name).exists())


def measure(
    workers: Workers, models: Path, prompts: tuple[str, ...], seeds: tuple[int, ...], settings: Settings
) -> dict[str, Any]:
    """Measure every way to every available target, and the side model's guidance if the target has none."""
    adapted = Task("adapted", prompts, seeds, settings)
    found: dict[str, Any] = {"cases": len(prompts) * len(seeds), "settings": asdict(settings)}
    for name in there(models):
        own = Task("target", prompts, seeds, settings_of(name, settings), target=name)
        found[name] = _measured(workers, own, adapted, {way: replace(own, way=way) for way in WAYS[name]}, LAMBDAS)
    for name in ("", *(name for name in SIDE_TARGETS if name in there(models))):
        few = Task("target", prompts, seeds, replace(settings, steps=FEW_STEPS, cfg=FEW_CFG), target=name)
        few = replace(few, way="learned" if name else "as it is")
        scales = {f"{cfg:g}": replace(few, settings=replace(few.settings, source_cfg=cfg)) for cfg in SIDE_CFGS}
        found[f"side_cfg{name and f'_{name}'}"] = _measured(workers, few, adapted, scales, SIDE_LAMBDAS)
    return found


def _measured(
    workers: Workers, target: Task, adapted: Task, ways: dict[str, Task], lambdas: Sequence[float]
) -> dict[str, Any]:
    """Sweep lambda for every way, on the scale from ``target`` to ``adapted``."""
    rows = {
        f"{way}, lambda {value:g}": replace(task, kind="delta", strength=Strength(value))
        for way, task in ways.items()
        for value in lambdas
    }
    results = workers.run({"no delta": target, "adapted alone": adapted, **rows})
    scores = {key: result.scores for key, result in results.items()}
    ends = Ends(scores["no delta"], scores["adapted alone"])
    table = {key: ends.figures(each) for key, each in scores.items()}
    sweeps = {way: [table[f"{way}, lambda {value:g}"] for value in lambdas] for way in ways}
    return {
        "ends": {"no delta": asdict(ends.target), "adapted alone": asdict(ends.adapted)},
        "rows": table,
        f"near_ratio_at_style_{AT_STYLE:g}": {way: kept_at(AT_STYLE, sweep) for way, sweep in sweeps.items()},
    }


def kept_at(style: float, sweep: Sequence[Figures], mark: str = "near_ratio") -> float | None:
    """Return the share of content at a share of style, interpolated between the rows of a sweep over lambda.

    Returns None if the sweep does not reach that style.  Every sweep starts from the target by itself: no style, all of
    the content.
    """
    points = [(0.0, 1.0), *((row["style_share"] or 0.0, row[mark] or 0.0) for row in sweep)]
    for (low, here), (high, there) in pairwise(points):
        if low <= style <= high and low < high:
            return round(here + (there - here) * (style - low) / (high - low), 3)
    return None


def strip(models: Path, settings: Settings, name: str = "own", strength: float = 1.5) -> Image.Image:
    """Draw a few prompts by the target by itself, and with the delta mapped in each way."""
    studio = Studio(models)
    alone = Task("target", PICTURED, (0,), settings_of(name, settings), target=name)
    tasks = {"no delta": alone}
    for way in WAYS[name][:3]:
        tasks[way] = replace(alone, kind="delta", way=way, strength=Strength(strength))
    rows = [decode(studio.target(name), studio.run(task).latents) for task in tasks.values()]
    return draw_grid(torch.stack(rows), list(tasks), PICTURED)


def write(out: Path, tables: dict[str, Any], sheet: Image.Image) -> None:
    """Write the tables, and the strip next to them."""
    out.write_text(json.dumps(tables, indent=1) + "\n", "utf-8")
    sheet.quantize(256, dither=Image.Dither.NONE).save(out.with_suffix(".png"), optimize=True)
