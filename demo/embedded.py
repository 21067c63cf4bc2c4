"""The models that come with the project."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.metrics import Judges, load_judges
from demo.pipeline import AdaptedModel, Adapter, Model, Place, Settings, Steering, load_model

MODELS = Path(__file__).parent / "models"
LORA = "lineart.safetensors"
EDGES, IMAGE_PROMPT, IMAGE_ENCODER = "edges.safetensors", "image-prompt.safetensors", "image-encoder.safetensors"


# Without guidance the base reports the prompt's change to the present picture; with guidance it imposes its shapes.
SETTINGS = Settings(steps=20, source_cfg=1.0)


@dataclass(frozen=True)
class Embedded:
    """Base, target, the base with its line-art LoRA or other adapters, and the judges of their pictures.

    Base and target know ``names``; only an adapter teaches ``concepts``.
    """

    base: Model
    target: Model
    adapted: AdaptedModel
    judges: Judges
    names: list[str]
    concepts: list[str]

    @property
    def judged(self) -> list[str]:
        """The names that the judge of content distinguishes, in its order."""
        return self.names + self.concepts

    @classmethod
    def load(
        cls, folder: Path = MODELS, adapters: Sequence[Adapter] = (), controls: Sequence[Steering] = ()
    ) -> Embedded:
        """Load the models on the CPU; attach the line-art LoRA unless adapters or controls are given."""
        place, tokenizer = Place.cpu(), folder / "tokenizer"
        base = load_model(folder / "base.safetensors", place, tokenizer)
        return cls(
            base=base,
            target=load_model(folder / "target.safetensors", place, tokenizer),
            adapted=AdaptedModel(
                base, adapters if adapters or controls else [Adapter(folder / LORA)], controls=controls
            ),
            judges=load_judges(folder / "metrics.safetensors"),
            names=json.loads((folder / "names.json").read_text("utf-8")),
            concepts=json.loads((folder / "concepts.json").read_text("utf-8")),
        )
