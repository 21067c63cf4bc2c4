"""The evidence: style, content and diversity over lambda, baselines, ranges and samplers (``python -m demo.evaluate``).

Every figure is measured on the same prompts and seeds.  The share of style is the way from the target
alone (0) to the adapted model alone (1); content is relative to the target alone.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.multiprocessing
from torch import Tensor
from tqdm import tqdm

from demo.embedded import MODELS, Embedded
from demo.metrics import Scores, judge
from demo.pipeline import Alone, Batch, Branch, Denoiser, Model, Settings, decode, draw, with_delta
from demo.samplers import NAMES, denoise_from, noise_levels
from lib_delta.strength import Strength

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
HAND_OFFS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
RANGES = ((0.0, 0.33), (0.33, 0.67), (0.67, 1.0))
SAMPLERS = ("ddim", "ddpm", "euler", "heun", "dpm_2", "dpmpp_2m", "gradient_estimation", "unipc")
PROMPTS_AT_ONCE = 6
Figures = dict[str, float | None]


@dataclass(frozen=True)
class Task:
    """One set of pictures to make and judge: every prompt with every seed.

    ``kind`` is what draws: the ``target``, the ``adapted`` model, the target with the ``delta`` of
    ``strength``, or ``img2img``: the target redrawing the last ``share`` of the steps of ``start``,
    the adapted model's latents.
    """

    kind: Literal["target", "adapted", "delta", "img2img"]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Settings
    strength: Strength = field(default_factory=Strength)
    share: float = 0.0
    start: Tensor | None = None

    @property
    def title(self) -> str:
        """What the progress bar says."""
        detail = {
            "delta": f" {self.strength.value:g} {self.strength.start:g}-{self.strength.end:g}",
            "img2img": f" {self.share:g}",
        }
        return f"{self.settings.sampler} {self.kind}{detail.get(self.kind, '')}"


@dataclass(frozen=True)
class Result:
    scores: Scores
    latents: Tensor


class Studio:
    """Makes and judges the pictures of tasks with the embedded models."""

    def __init__(self, models: Path) -> None:
        torch.set_num_threads(1)
        self.embedded = Embedded.load(models)

    def run(self, task: Task) -> Result:
        """Make and judge one task's pictures."""
        latents, seeds = [], len(task.seeds)
        for first in range(0, len(task.prompts), PROMPTS_AT_ONCE):
            batch = Batch(task.prompts[first : first + PROMPTS_AT_ONCE], task.seeds)
            latents.append(self._latents(task, batch, slice(first * seeds, (first + PROMPTS_AT_ONCE) * seeds)))
        made = torch.cat(latents)
        model = self.embedded.base if task.kind == "adapted" else self.embedded.target
        pictures = decode(model, made).unflatten(0, (len(task.prompts), seeds))
        names = torch.tensor([self.embedded.names.index(prompt) for prompt in task.prompts])
        return Result(judge(self.embedded.judges, pictures, names), made)

    def _latents(self, task: Task, batch: Batch, rows: slice) -> Tensor:
        base, model, settings = self.embedded.base, self.embedded.target, task.settings
        if task.kind == "adapted":
            return self._draw(
                Branch(self.embedded.adapted.source(batch, settings), settings.cfg, adapted=True), base, batch, settings
            )
        target = Alone(model, batch, settings)
        if task.kind == "target":
            return self._draw(target, model, batch, settings)
        if task.kind == "delta":
            source = self.embedded.adapted.source(batch, settings)
            return self._draw(with_delta(target, model, source, base, task.strength, settings), model, batch, settings)
        assert task.start is not None
        return self._redraw(target, task.start[rows], task.share, batch, settings)

    def _draw(self, denoiser: Denoiser, model: Model, batch: Batch, settings: Settings) -> Tensor:
        return draw(denoiser, model, batch, settings, torch.device("cpu"))

    def _redraw(self, target: Alone, start: Tensor, share: float, batch: Batch, settings: Settings) -> Tensor:
        model = self.embedded.target
        levels = noise_levels(settings.steps, model.parameterization.schedule)
        levels = levels[settings.steps - round(share * settings.steps) :]
        # A noise of its own, as img2img draws it: the one that made the picture would bring it back.
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
    """The two ends of the scale: what target and adapted model draw alone."""

    target: Scores
    adapted: Scores

    def figures(self, scores: Scores) -> Figures:
        """Express scores as shares of the way, rounded for print."""
        return {
            "style_share": round(_share(scores.style, self.target.style, self.adapted.style), 3),
            "ink_share": round(_share(scores.ink, self.target.ink, self.adapted.ink), 3),
            "content_ratio": _ratio(scores.content, self.target.content),
            "near_ratio": _ratio(scores.near, self.target.near),
            "diversity": round(scores.diversity, 3),
        }


def _ratio(value: float, whole: float) -> float | None:
    # Of a target that shows no emoji at all nothing can be kept or lost.
    return round(value / whole, 3) if whole else None


def _share(value: float, start: float, end: float) -> float:
    return (value - start) / (end - start)


def evidence(
    workers: Workers, prompts: tuple[str, ...], seeds: tuple[int, ...], settings: Settings, fewer: int
) -> dict[str, Any]:
    """Measure everything that ``evidence.json`` holds; ranges and samplers on ``fewer`` prompts."""
    whole = Task("target", prompts, seeds, settings)
    sweep = {f"{value}": replace(whole, kind="delta", strength=Strength(value)) for value in LAMBDAS}
    first = workers.run({"target": whole, "adapted": replace(whole, kind="adapted"), **sweep})
    ends = Ends(first["target"].scores, first["adapted"].scores)
    by_lambda = {key: ends.figures(first[key].scores) for key in sweep}
    best = best_lambda(by_lambda)
    redrawn = replace(whole, kind="img2img", start=first["adapted"].latents)
    second = workers.run({f"{share}": replace(redrawn, share=share) for share in HAND_OFFS})
    by_share = {key: ends.figures(result.scores) for key, result in second.items()}
    part = replace(whole, prompts=prompts[:: max(1, len(prompts) // fewer)], strength=Strength(best))
    return {
        "cases": len(prompts) * len(seeds),
        "settings": asdict(settings),
        "ends": {"target_alone": asdict(ends.target), "adapted_alone": asdict(ends.adapted)},
        "lambda": by_lambda,
        "best_lambda": best,
        "baseline": {
            "adapted_alone": ends.figures(ends.adapted),
            "img2img": by_share[best_hand_off(by_share, by_lambda[str(best)]["content_ratio"] or 0)],
            "img2img_by_strength": by_share,
        },
        "fewer_cases": len(part.prompts) * len(seeds),
        "range": _ranges(workers, part),
        "samplers": _samplers(workers, part),
    }


def _ranges(workers: Workers, part: Task) -> dict[str, Figures]:
    """Apply the delta during a third of the run only."""
    whole = part.strength
    tasks = {
        f"{start:g}-{end:g}": replace(part, kind="delta", strength=replace(whole, start=start, end=end))
        for start, end in RANGES
    }
    tasks |= {"target": part, "adapted": replace(part, kind="adapted"), "0-1": replace(part, kind="delta")}
    results = workers.run(tasks)
    ends = Ends(results.pop("target").scores, results.pop("adapted").scores)
    return {key: ends.figures(result.scores) for key, result in results.items()}


def _samplers(workers: Workers, part: Task) -> dict[str, Figures]:
    """Measure each sampler against its own two ends."""
    tasks = {}
    for sampler in SAMPLERS:
        own = replace(part, settings=replace(part.settings, sampler=sampler))
        for kind in ("target", "adapted", "delta"):
            tasks[f"{sampler} {kind}"] = replace(own, kind=kind)
    results = {key: result.scores for key, result in workers.run(tasks).items()}
    return {s: Ends(results[f"{s} target"], results[f"{s} adapted"]).figures(results[f"{s} delta"]) for s in SAMPLERS}


def best_lambda(sweep: dict[str, Figures], content: float = 0.9) -> float:
    """Return the lambda above 0 of most style among those that keep ``content``; of most of both if none does."""
    above = {k: v for k, v in sweep.items() if float(k) > 0}
    keeping = {k: v for k, v in above.items() if (v["content_ratio"] or 0) >= content}
    if keeping:
        return float(max(keeping, key=lambda k: keeping[k]["style_share"]))
    return float(max(above, key=lambda k: (above[k]["style_share"] * (above[k]["content_ratio"] or 0), float(k))))


def best_hand_off(rows: dict[str, Figures], content: float) -> str:
    """Return the img2img strength of most style among those that keep ``content``; of most content if none does."""
    keeping = {k: v for k, v in rows.items() if (v["content_ratio"] or 0) >= content}
    if keeping:
        return max(keeping, key=lambda k: keeping[k]["style_share"])
    return max(rows, key=lambda k: (rows[k]["content_ratio"] or 0, rows[k]["style_share"]))


def plot(figures: dict[str, Figures], hand_offs: dict[str, Figures], path: Path) -> None:
    """Draw style against content: the lambda sweep and the img2img hand-off; rows without a content are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for rows, label, marker in (
        (figures, "delta sampling, by lambda", "o-"),
        (hand_offs, "img2img hand-off, by strength", "s--"),
    ):
        points = {
            name: (row["style_share"], row["content_ratio"])
            for name, row in rows.items()
            if row["content_ratio"] is not None
        }
        axes.plot([x for x, _ in points.values()], [y for _, y in points.values()], marker, label=label)
        for name, point in points.items():
            axes.annotate(name, point, textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.axhline(0.9, color="grey", linewidth=0.8, linestyle=":")
    axes.axvline(0.8, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("style: share of the way from target alone to adapted alone")
    axes.set_ylabel("content: retrieval, relative to the target alone")
    axes.legend(loc="lower left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(figures: dict[str, Figures], title: str) -> str:
    """Format rows of figures as a Markdown table."""
    columns = list(next(iter(figures.values())))
    lines = [f"| {title} | {' | '.join(c.replace('_', ' ') for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(_cell(row[c]) for c in columns)} |" for name, row in figures.items()]
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def chosen_prompts(names: Sequence[str], count: int) -> list[str]:
    """Return ``count`` emoji names spread evenly over the alphabet."""
    return [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="evaluate", description="Measure what Delta Sampling does with the embedded models."
    )
    parser.add_argument("--prompts", type=int, default=100, help="emoji names, spread over the alphabet")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each name")
    parser.add_argument("--fewer-prompts", type=int, default=15, help="names for the tables of ranges and samplers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--sampler", choices=NAMES, default=Settings.sampler)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--cfg", type=float, default=Settings.cfg)
    parser.add_argument("--source-cfg", type=float, help="of base and adapted model in the delta (the target's)")
    parser.add_argument("--models", type=Path, default=MODELS, help="the folder of the models")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("evidence.json"))
    options = parser.parse_args()
    names = json.loads((options.models / "names.json").read_text("utf-8"))
    settings = Settings(options.sampler, options.steps, options.cfg, options.source_cfg)
    workers = Workers(options.models, options.jobs)
    try:
        chosen = tuple(chosen_prompts(names, options.prompts))
        figures = evidence(workers, chosen, tuple(range(options.seeds)), settings, options.fewer_prompts)
    finally:
        workers.close()
    options.out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    baseline = figures["baseline"]
    plot(figures["lambda"], baseline["img2img_by_strength"], options.out.with_suffix(".png"))
    for key, title in (("lambda", "lambda"), ("range", "range of the run"), ("samplers", "sampler")):
        print(table(figures[key], title), end="\n\n")
    print(table(baseline["img2img_by_strength"], "img2img strength"))
    print(f"\nbest lambda {figures['best_lambda']}; written to {options.out} and {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
