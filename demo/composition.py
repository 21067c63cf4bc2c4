"""Measure adapters together, and the effect of an adapter of content, for the evidence."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from demo.embedded import LORA
from demo.metrics import Scores
from demo.pipeline import Settings
from demo.studio import Task, Workers
from lib_delta.core.strength import Strength

PIXEL_ART, CONCEPTS = "pixelart.safetensors", "concepts.safetensors"
CONCEPT_LAMBDAS = (1.0, 1.5, 2.0, 3.0)
STYLES = {"line art": (LORA,), "pixel art": (PIXEL_ART,), "line art + pixel art": (LORA, PIXEL_ART)}
WAYS = {"LoRA": LORA, "LoHa": "lineart-loha.safetensors"}  # as in the paper's Figure 3


def there(models: Path) -> bool:
    """Return whether ``models`` has the adapters for these figures."""
    return all((models / file).exists() for file in (PIXEL_ART, CONCEPTS))


def composed(
    workers: Workers, prompts: tuple[str, ...], seeds: tuple[int, ...], settings: Settings, strength: float
) -> dict[str, dict[str, float]]:
    """Score the target by itself and with the deltas of two styles, each and both; each style has its measure."""
    target = Task("target", prompts, seeds, settings)
    delta = replace(target, kind="delta", strength=Strength(strength))
    tasks = {"target alone": target, **{name: replace(delta, adapters=files) for name, files in STYLES.items()}}
    return {name: _figures(result.scores, "style", "mosaic", "content") for name, result in workers.run(tasks).items()}


def concepts(
    workers: Workers, names: tuple[str, ...], seeds: tuple[int, ...], settings: Settings
) -> dict[str, dict[str, float]]:
    """Measure how often names are recognised that only an adapter teaches, unseen by base and target."""
    target = Task("target", names, seeds, settings, adapters=(CONCEPTS,))
    tasks = {"target alone": target, "base alone": replace(target, kind="base")}
    tasks |= {"adapted alone": replace(target, kind="adapted")}
    for value in CONCEPT_LAMBDAS:
        tasks[f"lambda {value:g}"] = replace(target, kind="delta", strength=Strength(value))
    return {name: _figures(result.scores, "content", "near") for name, result in workers.run(tasks).items()}


def similarity_and_diversity(
    workers: Workers, prompts: tuple[str, ...], seeds: tuple[int, ...], settings: Settings, strength: float
) -> dict[str, dict[str, float]]:
    """Compare style with diversity, as in the paper's Figure 3: target, its deltas, adapted model by itself."""
    target = Task("target", prompts, seeds, settings)
    delta = replace(target, kind="delta", strength=Strength(strength))
    tasks = {"target alone": target, "adapted alone": replace(target, kind="adapted")}
    tasks |= {f"target + {name}": replace(delta, adapters=(file,)) for name, file in WAYS.items()}
    return {name: _figures(result.scores, "style", "diversity") for name, result in workers.run(tasks).items()}


def _figures(scores: Scores, *names: str) -> dict[str, float]:
    return {name: round(value, 3) for name, value in asdict(scores).items() if name in names}
