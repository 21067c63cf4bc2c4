"""What adapters do together, and what an adapter of content brings: figures for the evidence."""

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
    """Tell whether ``models`` holds the adapters that these figures are of."""
    return all((models / file).exists() for file in (PIXEL_ART, CONCEPTS))


def composed(
    workers: Workers, prompts: tuple[str, ...], seeds: tuple[int, ...], settings: Settings, strength: float
) -> dict[str, dict[str, float]]:
    """Score the target alone and with the deltas of two styles, one by one and both: each shows in its own measure."""
    target = Task("target", prompts, seeds, settings)
    delta = replace(target, kind="delta", strength=Strength(strength))
    tasks = {"target alone": target, **{name: replace(delta, adapters=files) for name, files in STYLES.items()}}
    return {name: _figures(result.scores, "style", "mosaic", "content") for name, result in workers.run(tasks).items()}


def concepts(
    workers: Workers, names: tuple[str, ...], seeds: tuple[int, ...], settings: Settings
) -> dict[str, dict[str, float]]:
    """Tell how often names are recognised that neither base nor target has seen, and an adapter teaches."""
    target = Task("target", names, seeds, settings, adapters=(CONCEPTS,))
    tasks = {"target alone": target, "base alone": replace(target, kind="base")}
    tasks |= {"adapted alone": replace(target, kind="adapted")}
    for value in CONCEPT_LAMBDAS:
        tasks[f"lambda {value:g}"] = replace(target, kind="delta", strength=Strength(value))
    return {name: _figures(result.scores, "content", "near") for name, result in workers.run(tasks).items()}


def similarity_and_diversity(
    workers: Workers, prompts: tuple[str, ...], seeds: tuple[int, ...], settings: Settings, strength: float
) -> dict[str, dict[str, float]]:
    """Set the wanted style against diversity, as Figure 3 of the paper: target, its deltas, the adapted model alone."""
    target = Task("target", prompts, seeds, settings)
    delta = replace(target, kind="delta", strength=Strength(strength))
    tasks = {"target alone": target, "adapted alone": replace(target, kind="adapted")}
    tasks |= {f"target + {name}": replace(delta, adapters=(file,)) for name, file in WAYS.items()}
    return {name: _figures(result.scores, "style", "diversity") for name, result in workers.run(tasks).items()}


def _figures(scores: Scores, *names: str) -> dict[str, float]:
    return {name: round(value, 3) for name, value in asdict(scores).items() if name in names}
