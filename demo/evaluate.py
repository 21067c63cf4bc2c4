"""Measure the evidence: style, content and diversity over lambda, ranges, samplers, algorithms.

Run by ``python -m demo.evaluate``.  Every figure is measured on the same prompts and seeds.  The share of style runs
from the target by itself (0) to the adapted model by itself (1).  Content is relative to the target by itself.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from demo import algorithms, bridges, composition, controls, crossings
from demo.embedded import MODELS, SETTINGS
from demo.pipeline import Settings
from demo.samplers import NAMES
from demo.studio import Ends, Figures, Task, Workers
from demo.train import bridges as bridges_stage
from lib_delta.core.strength import Strength

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
HAND_OFFS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
RANGES = ((0.0, 0.33), (0.33, 0.67), (0.67, 1.0), (0.2, 1.0))
SAMPLERS = ("ddim", "ddpm", "euler", "heun", "dpm_2", "dpmpp_2m", "gradient_estimation", "unipc")


def evidence(
    workers: Workers, prompts: tuple[str, ...], seeds: tuple[int, ...], settings: Settings, fewer: int
) -> dict[str, Any]:
    """Measure all figures of ``evidence.json``; ranges and samplers on ``fewer`` prompts."""
    whole = Task("target", prompts, seeds, settings)
    sweep = {f"{value}": replace(whole, kind="delta", strength=Strength(value)) for value in LAMBDAS}
    alone = {"target": whole, "base": replace(whole, kind="base"), "adapted": replace(whole, kind="adapted")}
    first = workers.run({**alone, **sweep})
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
        "ends": {f"{name}_alone": asdict(first[name].scores) for name in alone},
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
    """Apply the delta during only a part of the run."""
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
    """Measure each sampler on the scale between its target and its adapted model."""
    tasks = {}
    for sampler in SAMPLERS:
        own = replace(part, settings=replace(part.settings, sampler=sampler))
        for kind in ("target", "adapted", "delta"):
            tasks[f"{sampler} {kind}"] = replace(own, kind=kind)
    results = {key: result.scores for key, result in workers.run(tasks).items()}
    return {s: Ends(results[f"{s} target"], results[f"{s} adapted"]).figures(results[f"{s} delta"]) for s in SAMPLERS}


def best_lambda(sweep: dict[str, Figures]) -> float:
    """Return the lambda above 0 with the largest product of style and content."""
    above = {k: v for k, v in sweep.items() if float(k) > 0}
    return float(max(above, key=lambda k: (above[k]["style_share"] * (above[k]["content_ratio"] or 0), float(k))))


def best_hand_off(rows: dict[str, Figures], content: float) -> str:
    """Return the img2img strength with most style among those with ``content``; with most content if none has."""
    keeping = {k: v for k, v in rows.items() if (v["content_ratio"] or 0) >= content}
    if keeping:
        return max(keeping, key=lambda k: keeping[k]["style_share"])
    return max(rows, key=lambda k: (rows[k]["content_ratio"] or 0, rows[k]["style_share"]))


def plot(figures: dict[str, Figures], hand_offs: dict[str, Figures], path: Path) -> None:
    """Draw style against content: the lambda sweep and the img2img hand-off; rows without content are omitted."""
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
    options = _options()
    if options.only == "bridges":
        bridges.measure(options)
        return
    names = json.loads((options.models / "names.json").read_text("utf-8"))
    settings = Settings(options.sampler, options.steps, options.cfg, options.source_cfg)
    if options.only == "controls":
        figures = controls.measure(options, chosen_prompts(names, options.prompts), settings)
        for kind in ("edges", "image_prompt"):
            print("\n" + table(figures[kind], kind.replace("_", " ")))
        return
    workers, seeds = Workers(options.models, options.jobs), tuple(range(options.seeds))
    try:
        if options.only == "targets":
            _targets(workers, options, names, seeds, settings)
            return
        if options.only:
            figures = json.loads(options.out.read_text("utf-8"))
            settings = Settings(**figures["settings"])
        else:
            chosen = tuple(chosen_prompts(names, options.prompts))
            figures = evidence(workers, chosen, seeds, settings, options.fewer_prompts)
        chosen = tuple(chosen_prompts(names, options.algorithm_prompts))
        if options.only in (None, "algorithms"):
            figures["algorithms"] = algorithms.measure(workers, options.models, chosen, seeds, settings)
        if options.only in (None, "composition") and composition.there(options.models):
            new = tuple(json.loads((options.models / "concepts.json").read_text("utf-8")))
            best = figures["best_lambda"]
            figures["composed"] = composition.composed(workers, chosen, seeds, settings, best)
            figures["concepts"] = composition.concepts(workers, new, seeds, settings)
            figures["figure_3"] = composition.similarity_and_diversity(workers, chosen, seeds, settings, best)
        if options.only is None and crossings.there(options.models):
            _targets(workers, options, names, seeds, settings)
    finally:
        workers.close()
    options.out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    _show(figures, options, settings)


def _targets(
    workers: Workers, options: argparse.Namespace, names: Sequence[str], seeds: tuple[int, ...], settings: Settings
) -> None:
    """Measure the targets with other latents, and write and print their tables."""
    chosen = tuple(chosen_prompts(names, options.algorithm_prompts))
    found = crossings.measure(workers, options.models, chosen, seeds, settings)
    crossings.write(options.targets_out, found, crossings.strip(options.models, settings))
    for key, part in found.items():
        if isinstance(part, dict) and "rows" in part:
            print(table(part["rows"], key.replace("_", " ")), end="\n\n")
    print(f"written to {options.targets_out}, and pictures beside it")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate", description="Measure what Delta Sampling does with the embedded models."
    )
    parser.add_argument("--prompts", type=int, default=20, help="emoji names, spread over the alphabet")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each name")
    parser.add_argument("--fewer-prompts", type=int, default=10, help="names for the tables of ranges and samplers")
    parser.add_argument("--algorithm-prompts", type=int, default=25, help="names for the tables of algorithms")
    parts = ("algorithms", "composition", "bridges", "controls", "targets")
    parser.add_argument("--only", choices=parts, help="measure this anew and keep the rest of --out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--sampler", choices=NAMES, default=SETTINGS.sampler)
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--cfg", type=float, default=SETTINGS.cfg)
    parser.add_argument(
        "--source-cfg", type=float, default=SETTINGS.source_cfg, help="of base and adapted model in the delta"
    )
    parser.add_argument("--models", type=Path, default=MODELS, help="the folder of the models")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("evidence.json"))
    bridges_stage.add_options(parser)
    parser.add_argument("--photos", type=Path, help="bridges: a folder of photos (scikit-image's public-domain ones)")
    parser.add_argument("--bridges-out", type=Path, default=Path(__file__).with_name("bridges.json"))
    parser.add_argument("--targets-out", type=Path, default=Path(__file__).with_name("targets.json"))
    parser.add_argument("--controls-out", type=Path, default=Path(__file__).with_name("controls.json"))
    return parser.parse_args()


def _show(figures: dict[str, Any], options: argparse.Namespace, settings: Settings) -> None:
    """Print the figures as tables, and draw the plot and the sheet of algorithms next to ``--out``."""
    if options.only is None:
        baseline = figures["baseline"]
        plot(figures["lambda"], baseline["img2img_by_strength"], options.out.with_suffix(".png"))
        for key, title in (("lambda", "lambda"), ("range", "range of the run"), ("samplers", "sampler")):
            print(table(figures[key], title), end="\n\n")
        print(table(baseline["img2img_by_strength"], "img2img strength"))
        print(f"\nbest lambda {figures['best_lambda']}")
    for key in [key for key in ("composed", "concepts", "figure_3") if key in figures]:
        print("\n" + table(figures[key], key.replace("_", " ")))
    sheet = algorithms.sheet(options.models, settings)
    # 256 colours suffice, as the pictures are mostly black and white, and make a far smaller file.
    sheet.quantize(256, dither=Image.Dither.NONE).save(options.out.with_name("algorithms.png"), optimize=True)
    for title, rows in figures["algorithms"].items():
        if isinstance(rows, dict):
            print(f"\n{algorithms.table(rows, title)}")
    print(f"\nwritten to {options.out}, and pictures beside it")


if __name__ == "__main__":
    main()
