"""The evidence: style, content and diversity over lambda, baselines, ranges and samplers (``python -m demo.evaluate``).

Every figure is measured on the same prompts and seeds.  The share of style is the way from the target
alone (0) to the adapted model alone (1); content is relative to the target alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from demo import pipeline
from demo.embedded import MODELS, Embedded
from demo.metrics import Scores, judge
from demo.pipeline import Alone, Batch, Branch, Settings, decode, draw, with_delta
from demo.samplers import NAMES, denoise_from, noise_levels
from lib_delta.source import Source
from lib_delta.strength import Strength

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
HAND_OFFS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
RANGES = ((0.0, 0.33), (0.33, 0.67), (0.67, 1.0), (0.0, 0.67), (0.33, 1.0))
SAMPLERS = ("ddim", "ddpm", "euler", "heun", "dpm_2", "dpmpp_2m", "gradient_estimation", "unipc")
PROMPTS_AT_ONCE = 6


@dataclass(frozen=True)
class Bench:
    """What a figure is measured on."""

    embedded: Embedded
    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: Settings

    def measure(self, title: str, pictures_of: Callable[[Batch], Tensor]) -> Scores:
        """Make the pictures of every prompt and seed and judge them."""
        made = []
        for first in tqdm(range(0, len(self.prompts), PROMPTS_AT_ONCE), desc=title, leave=False):
            made.append(pictures_of(Batch(self.prompts[first : first + PROMPTS_AT_ONCE], self.seeds)))
        pictures = torch.cat(made).unflatten(0, (len(self.prompts), len(self.seeds)))
        names = torch.tensor([self.embedded.names.index(prompt) for prompt in self.prompts])
        return judge(self.embedded.judges, pictures, names)

    def only(self, prompts: int, sampler: str) -> Bench:
        """Return the bench with fewer prompts and another sampler."""
        return replace(self, prompts=self.prompts[:prompts], settings=replace(self.settings, sampler=sampler))

    def target(self, batch: Batch) -> Tensor:
        """Draw with the target alone."""
        model = self.embedded.target
        return decode(model, self._draw(Alone(model, batch, self.settings), model, batch))

    def adapted(self, batch: Batch) -> Tensor:
        """Draw with the adapted source alone."""
        return decode(self.embedded.base, self._adapted_latents(batch))

    def _adapted_latents(self, batch: Batch) -> Tensor:
        branch = Branch(self._source(batch), self.settings.cfg, adapted=True)
        return self._draw(branch, self.embedded.base, batch)

    def delta(self, batch: Batch, strength: Strength) -> Tensor:
        """Draw with the target and the delta."""
        model = self.embedded.target
        target = Alone(model, batch, self.settings)
        denoiser = with_delta(target, model, self._source(batch), self.embedded.base, strength, self.settings)
        return decode(model, self._draw(denoiser, model, batch))

    def img2img(self, batch: Batch, share: float) -> Tensor:
        """Draw with the adapted source, then redraw the last ``share`` of the steps with the target."""
        model, schedule = self.embedded.target, self.embedded.target.parameterization.schedule
        levels = noise_levels(self.settings.steps, schedule)
        levels = levels[self.settings.steps - round(share * self.settings.steps) :]
        # A noise of its own, as img2img draws it: the one that made the picture would bring it back.
        noise = Batch(batch.prompts, [seed + 10_000 for seed in batch.seeds]).noise(model, self.settings)
        noisy = self._adapted_latents(batch) + levels[0] * noise
        with torch.no_grad():
            latents = denoise_from(self.settings.sampler, Alone(model, batch, self.settings), noisy, levels, batch.seeds[0])
        return decode(model, latents)

    def _source(self, batch: Batch) -> Source:
        return self.embedded.adapted.source(batch, self.settings)

    def _draw(self, denoiser: pipeline.Denoiser, model: pipeline.Model, batch: Batch) -> Tensor:
        return draw(denoiser, model, batch, self.settings, torch.device("cpu"))


@dataclass(frozen=True)
class Ends:
    """The two ends of the scale: what target and adapted model draw alone."""

    target: Scores
    adapted: Scores

    def figures(self, scores: Scores) -> dict[str, float]:
        """Express scores as shares of the way, rounded for print."""
        return {
            "style_share": round(_share(scores.style, self.target.style, self.adapted.style), 3),
            "ink_share": round(_share(scores.ink, self.target.ink, self.adapted.ink), 3),
            "content_ratio": round(scores.content / max(self.target.content, 1e-9), 3),
            "diversity": round(scores.diversity, 3),
        }


def _share(value: float, start: float, end: float) -> float:
    return (value - start) / (end - start)


def evidence(bench: Bench, sampler_prompts: int) -> dict[str, object]:
    """Measure everything that ``evidence.json`` holds."""
    ends = Ends(bench.measure("target alone", bench.target), bench.measure("adapted alone", bench.adapted))

    def delta(strength: Strength) -> Callable[[Batch], Tensor]:
        return lambda batch: bench.delta(batch, strength)

    def hand_off(share: float) -> Callable[[Batch], Tensor]:
        return lambda batch: bench.img2img(batch, share)

    sweep = {str(v): ends.figures(bench.measure(f"lambda {v}", delta(Strength(v)))) for v in LAMBDAS}
    best = best_lambda(sweep)
    hand_offs = {str(s): ends.figures(bench.measure(f"img2img {s}", hand_off(s))) for s in HAND_OFFS}
    ranges = {
        f"{start:g}-{end:g}": ends.figures(bench.measure(f"range {start:g}-{end:g}", delta(Strength(best, start, end))))
        for start, end in RANGES
    }
    return {
        "cases": len(bench.prompts) * len(bench.seeds),
        "settings": asdict(bench.settings),
        "ends": {"target_alone": asdict(ends.target), "adapted_alone": asdict(ends.adapted)},
        "lambda": sweep,
        "best_lambda": best,
        "baseline": {
            "adapted_alone": ends.figures(ends.adapted),
            "img2img": hand_offs[best_hand_off(hand_offs, sweep[str(best)]["content_ratio"])],
            "img2img_by_strength": hand_offs,
        },
        "range": ranges,
        "samplers": _samplers(bench, best, sampler_prompts),
    }


def _samplers(bench: Bench, best: float, prompts: int) -> dict[str, dict[str, float]]:
    """Measure each sampler against its own two ends, on fewer prompts."""
    rows = {}
    for sampler in SAMPLERS:
        part = bench.only(prompts, sampler)
        ends = Ends(part.measure(f"{sampler}: target", part.target), part.measure(f"{sampler}: adapted", part.adapted))
        scores = part.measure(f"{sampler}: delta", lambda batch, part=part: part.delta(batch, Strength(best)))
        rows[sampler] = ends.figures(scores)
    return rows


def best_lambda(sweep: dict[str, dict[str, float]], content: float = 0.9) -> float:
    """Return the lambda of most style among those that keep ``content``; of most content if none does."""
    keeping = {k: v for k, v in sweep.items() if v["content_ratio"] >= content}
    if keeping:
        return float(max(keeping, key=lambda k: keeping[k]["style_share"]))
    return float(max(sweep, key=lambda k: sweep[k]["content_ratio"]))


def best_hand_off(rows: dict[str, dict[str, float]], content: float) -> str:
    """Return the img2img strength of most style among those whose content is at least ``content``, or of most content."""
    keeping = {k: v for k, v in rows.items() if v["content_ratio"] >= content}
    if keeping:
        return max(keeping, key=lambda k: keeping[k]["style_share"])
    return max(rows, key=lambda k: rows[k]["content_ratio"])


def plot(figures: dict[str, dict[str, float]], hand_offs: dict[str, dict[str, float]], path: Path) -> None:
    """Draw style against content: the lambda sweep and the img2img hand-off."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for rows, label, marker in ((figures, "delta sampling, by lambda", "o-"), (hand_offs, "img2img hand-off, by strength", "s--")):
        axes.plot([r["style_share"] for r in rows.values()], [r["content_ratio"] for r in rows.values()], marker, label=label)
        for name, row in rows.items():
            axes.annotate(name, (row["style_share"], row["content_ratio"]), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.axhline(0.9, color="grey", linewidth=0.8, linestyle=":")
    axes.axvline(0.8, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("style: share of the way from target alone to adapted alone")
    axes.set_ylabel("content: retrieval, relative to the target alone")
    axes.legend(loc="lower left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(figures: dict[str, dict[str, float]], title: str) -> str:
    """Format rows of figures as a Markdown table."""
    columns = list(next(iter(figures.values())))
    lines = [f"| {title} | {' | '.join(c.replace('_', ' ') for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[c]:.2f}' for c in columns)} |" for name, row in figures.items()]
    return "\n".join(lines)


def chosen_prompts(names: Sequence[str], count: int) -> list[str]:
    """Return ``count`` emoji names spread evenly over the alphabet."""
    return [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="evaluate", description="Measure what Delta Sampling does with the embedded models.")
    parser.add_argument("--prompts", type=int, default=100, help="emoji names, spread over the alphabet")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each name")
    parser.add_argument("--sampler-prompts", type=int, default=40, help="names for the table of samplers")
    parser.add_argument("--sampler", choices=NAMES, default=Settings.sampler)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--cfg", type=float, default=Settings.cfg)
    parser.add_argument("--models", type=Path, default=MODELS, help="the folder of the models")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("evidence.json"))
    options = parser.parse_args()
    embedded = Embedded.load(options.models)
    settings = Settings(options.sampler, options.steps, options.cfg)
    bench = Bench(embedded, chosen_prompts(embedded.names, options.prompts), range(options.seeds), settings)
    figures = evidence(bench, options.sampler_prompts)
    options.out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    baseline = figures["baseline"]
    plot(figures["lambda"], baseline["img2img_by_strength"], options.out.with_suffix(".png"))
    for key, title in (("lambda", "lambda"), ("range", "range of the run"), ("samplers", "sampler")):
        print(table(figures[key], title), end="\n\n")
    print(table(baseline["img2img_by_strength"], "img2img strength"))
    print(f"\nbest lambda {figures['best_lambda']}; written to {options.out} and {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
