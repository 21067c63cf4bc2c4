"""The models that come with the project."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from demo.metrics import Judges, load_judges
from demo.pipeline import AdaptedModel, Adapter, Model, Place, load_model

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Embedded:
    """Base, target, the base with its line-art LoRA, and what judges their pictures."""

    base: Model
    target: Model
    adapted: AdaptedModel
    judges: Judges
    names: list[str]

    @classmethod
    def load(cls, folder: Path = MODELS, adapter: str = "lineart.safetensors") -> Embedded:
        """Load the models on the CPU; ``adapter`` names the LoRA or the full fine-tune."""
        place, tokenizer = Place.cpu(), folder / "tokenizer"
        base = load_model(folder / "base.safetensors", place, tokenizer)
        return cls(
            base=base,
            target=load_model(folder / "target.safetensors", place, tokenizer),
            adapted=AdaptedModel(base, [Adapter(folder / adapter)]),
            judges=load_judges(folder / "metrics.safetensors"),
            names=json.loads((folder / "names.json").read_text("utf-8")),
        )
