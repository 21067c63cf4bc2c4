"""Measure the effect with fewer evaluations of the source, on the embedded models: ``python -m demo.quality``.

For each plan of :mod:`lib_delta.core.delta_reuse`, two means over prompts.  The share of the exact effect: the change
with reused deltas, projected onto the exact change.  The distance from the exact picture, relative to the exact change.
A slightly smaller lambda at full cost is included for comparison.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from demo.embedded import MODELS
from demo.pipeline import AdaptedModel, Adapter, Alone, Batch, Place, Settings, decode, draw, load_model, with_delta
from lib_delta.core.delta_reuse import REUSE_PLANS, DeltaReuse, ReusePlan
from lib_delta.core.strength import Strength

TRIED = {
    **REUSE_PLANS,
    "every 2nd, held": ReusePlan(2),
    "every 3rd, linear": ReusePlan(3, linear=True),
    "every 3rd, held": ReusePlan(3),
    "every 4th, linear": ReusePlan(4, linear=True),
    "moved by 20 %": ReusePlan(moved=0.2),
    "moved by 30 %": ReusePlan(moved=0.3),
}


class Studio:
    """The embedded models, and one batch of prompts."""

    def __init__(self, folder: Path, prompts: list[str], seed: int, settings: Settings) -> None:
        place = Place.cpu()
        self.place, self.settings, self.batch = place, settings, Batch(prompts, [seed])
        tokenizer = folder / "tokenizer"
        self.target = load_model(folder / "target.safetensors", place, tokenizer)
        self.base = load_model(folder / "base.safetensors", place, tokenizer, with_vae=False)
        adapted = AdaptedModel(self.base, [Adapter(folder / "lineart.safetensors")])
        self.source = adapted.source(self.batch, settings)
        self.alone = Alone(self.target, self.batch, settings)

    def pictures(self, strength: float, plan: ReusePlan) -> tuple[Tensor, int]:
        """Return pictures ``(N, pixels)`` and the number of the source's evaluations."""
        before = self.source.evaluations
        denoiser = with_delta(self.alone, self.target, self.source, self.base, Strength(strength), self.settings)
        denoiser.guidance = replace(denoiser.guidance, reuse=DeltaReuse(plan))
        latents = draw(denoiser, self.target, self.batch, self.settings, self.place.device)
        return decode(self.target, latents).flatten(1), self.source.evaluations - before


def measure(studio: Studio, strength: float, less: float) -> dict[str, dict[str, float]]:
    """Return cost, effect and distance of every plan."""
    plain, _ = studio.pictures(0.0, ReusePlan())
    exact, every = studio.pictures(strength, ReusePlan())
    change = exact - plain

    def figures(pictures: Tensor, evaluations: int) -> dict[str, float]:
        along = ((pictures - plain) * change).sum(1) / change.square().sum(1)
        distance = (pictures - exact).norm(dim=1) / change.norm(dim=1)
        found = evaluations / every, float(along.mean()), float(distance.mean())
        return dict(zip(("cost", "effect", "distance"), (round(value, 3) for value in found)))

    rows = {name: figures(*studio.pictures(strength, plan)) for name, plan in TRIED.items()}
    rows[f"lambda {less:g} for {strength:g}"] = figures(*studio.pictures(less, ReusePlan()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--strength", type=float, default=1.5)
    parser.add_argument("--samplers", nargs="+", default=["euler", "dpmpp_2m"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("quality.json"))
    options = parser.parse_args()
    names = json.loads((options.models / "names.json").read_text("utf-8"))
    chosen = [names[round(i * (len(names) - 1) / max(options.prompts - 1, 1))] for i in range(options.prompts)]
    figures = {}
    for sampler in options.samplers:
        settings = Settings(sampler, options.steps, options.cfg)
        studio = Studio(options.models, chosen, 0, settings)
        figures[sampler] = measure(studio, options.strength, options.strength - 0.1)
        print(f"| {sampler} | cost | effect | distance |\n|---|---|---|---|")
        for name, row in figures[sampler].items():
            print(f"| {name} | {row['cost']:.2f} | {row['effect']:.2f} | {row['distance']:.2f} |", flush=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
