"""Measure the effect of an edge map and of a reference picture on the target, and draw the paper's Figure 2.

No prompt names the subject of its map or reference.  The maps (``demo/examples/edges``) are of Noto's drawings, which
the base has never seen.  The references (``demo/examples/references``) have unusual colours.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from demo.colours import similarity
from demo.edges import agreement, edge_maps
from demo.embedded import EDGES, IMAGE_ENCODER, IMAGE_PROMPT, Embedded
from demo.grid import draw_grid
from demo.pipeline import (
    AdaptedModel,
    Adapter,
    Alone,
    Batch,
    Branch,
    Model,
    Settings,
    Steering,
    decode,
    draw,
    with_delta,
)
from lib_delta.controls.control_file import load_control
from lib_delta.controls.control_map import ControlMap
from lib_delta.controls.guides import follow, prompt_by
from lib_delta.controls.image_encoder import image_tokens, load_image_encoder
from lib_delta.controls.picture_file import read_picture
from lib_delta.core.guides import Guide
from lib_delta.core.strength import Strength

EXAMPLES = Path(__file__).with_name("examples")
LAMBDAS = (0.5, 1.0, 2.0, 3.0)
AT_ONCE = 10
# How many of the cases are in a sheet, and how far apart: no multiple shares its map or reference with another.
SHEETS, SHOWN, STRIDE = Path(__file__).parents[1] / "docs", 6, 17
FIGURE_PROMPTS = ("cupcake", "house", "mushroom", "rocket", "teapot")
FIGURE_MAPS, FIGURE_REFERENCE = ("owl", "sailboat", "cactus", "bell", "snowman"), "frog"
FINE_TUNE, LORA = "lineart-full.safetensors", "pixelart.safetensors"


@dataclass(frozen=True)
class Example:
    """A map or a reference: the name of its subject, and its pixels ``(1, 3, H, W)`` in [0, 1]."""

    name: str
    picture: Tensor

    @classmethod
    def all(cls, kind: str) -> list[Example]:
        """Return the examples of a kind ("edges" or "references") by name."""
        return [
            cls(path.stem.replace("-", " "), read_picture(path)) for path in sorted((EXAMPLES / kind).glob("*.png"))
        ]


@dataclass(frozen=True)
class Maps:
    """Maps for the images of a batch, and the ControlNet that reads them.

    The mode is "control", because the prompt names something else: guidance then strengthens the control.
    """

    model: Path
    pictures: Tensor

    def guide(self, base: Model) -> Guide:
        return follow(load_control(self.model, base.unet), base.unet, ControlMap(self.pictures), mode="control")


@dataclass(frozen=True)
class Reference:
    """A reference picture for all images of a batch, with the IP-Adapter and its image encoder."""

    models: Path
    picture: Tensor

    def guide(self, base: Model) -> Guide:
        file = load_control(self.models / IMAGE_PROMPT, base.unet)
        encoder = load_image_encoder(self.models / IMAGE_ENCODER)
        return prompt_by(file, base.unet, image_tokens(file, encoder, [self.picture]))


@dataclass(frozen=True)
class Case:
    """A batch: its prompts, its examples, and its control."""

    prompts: tuple[str, ...]
    shown: tuple[Example, ...]
    steering: Steering


def of_maps(models: Path, prompts: Sequence[str]) -> list[Case]:
    """Pair each prompt with the map of something else, batch by batch."""
    examples, cases = Example.all("edges"), []
    for first in range(0, len(prompts), AT_ONCE):
        part = tuple(prompts[first : first + AT_ONCE])
        shown = tuple(_other(examples, first + i, prompt) for i, prompt in enumerate(part))
        cases.append(Case(part, shown, Maps(models / EDGES, torch.cat([example.picture for example in shown]))))
    return cases


def of_references(models: Path, prompts: Sequence[str]) -> list[Case]:
    """Pair each batch of prompts with a reference that none names; prompts that name it move last, to another one."""
    examples, cases, left = Example.all("references"), [], []
    for number, first in enumerate(range(0, len(prompts), AT_ONCE)):
        example, part = examples[number % len(examples)], prompts[first : first + AT_ONCE]
        left += [prompt for prompt in part if prompt == example.name]
        cases.append(_referred(models, [prompt for prompt in part if prompt != example.name], example))
    if left:
        cases.append(_referred(models, left, next(example for example in examples if example.name not in left)))
    return cases


def _referred(models: Path, prompts: Sequence[str], example: Example) -> Case:
    return Case(tuple(prompts), (example,) * len(prompts), Reference(models, example.picture))


def _other(examples: Sequence[Example], number: int, prompt: str) -> Example:
    example = examples[number % len(examples)]
    return example if example.name != prompt else examples[(number + 1) % len(examples)]


class Drawn:
    """The pictures of cases, column by column: ``pictures[column]`` is ``(N, 3, H, W)`` in [-1, 1]."""

    def __init__(self, embedded: Embedded, cases: Sequence[Case], settings: Settings) -> None:
        self.embedded, self.settings = embedded, settings
        self.prompts = [prompt for case in cases for prompt in case.prompts]
        self.shown = [example for case in cases for example in case.shown]
        parts: dict[str, list[Tensor]] = {}
        for case in tqdm(cases, desc="controls"):
            for column, pictures in self._of(case).items():
                parts.setdefault(column, []).append(pictures)
        self.pictures = {column: torch.cat(pictures) for column, pictures in parts.items()}

    def _of(self, case: Case) -> dict[str, Tensor]:
        base, target, settings = self.embedded.base, self.embedded.target, self.settings
        batch = Batch(case.prompts, (0,))
        source = AdaptedModel(base, [], controls=[case.steering]).source(batch, settings)
        alone = Alone(target, batch, settings)
        columns = {
            "target alone": (alone, target),
            "base alone": (Branch(source, settings.cfg, adapted=False), base),
            "adapted alone": (Branch(source, settings.cfg, adapted=True), base),
        }
        for value in LAMBDAS:
            denoiser = with_delta(alone, target, source, base, Strength(value), settings)
            columns[f"lambda {value:g}"] = (denoiser, target)
        return {
            name: decode(model, draw(denoiser, model, batch, settings, torch.device("cpu")))
            for name, (denoiser, model) in columns.items()
        }

    def figures(self, agreement_of: Callable[[Tensor], Tensor], measure: str) -> dict[str, dict[str, float]]:
        """Measure each column: its likeness to the example, and whether prompt or example is recognised.

        "likeness" is the cosine between the content encoder's embeddings of a picture and of the example's subject.
        """
        names = self.embedded.judged
        prompted = torch.tensor([names.index(prompt) for prompt in self.prompts])
        shown = torch.tensor([names.index(example.name) for example in self.shown])
        rows = {}
        for column, pictures in self.pictures.items():
            with torch.no_grad():
                alike = self.embedded.judges.content.similarity(pictures)
            near = alike.topk(10).indices
            rows[column] = {
                measure: _mean(agreement_of(pictures)),
                "likeness": _mean(alike.gather(1, shown[:, None])),
                "content": _mean(near[:, 0] == prompted),
                "near": _mean((near == prompted[:, None]).any(1)),
                "shown_instead": _mean((near == shown[:, None]).any(1)),
            }
        return rows


def _mean(values: Tensor) -> float:
    return round(float(values.float().mean()), 3)


def measure(options: argparse.Namespace, prompts: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Measure both controls, draw Figure 2, and write ``controls.json`` and the sheets."""
    torch.set_num_threads(1)
    models: Path = options.models
    embedded = Embedded.load(models)
    followed = Drawn(embedded, of_maps(models, prompts), settings)
    coloured = Drawn(embedded, of_references(models, prompts), settings)
    figures = {
        "settings": asdict(settings),
        "cases": {"edges": len(followed.prompts), "image_prompt": len(coloured.prompts)},
        "edges": edge_figures(followed),
        "image_prompt": colour_figures(coloured),
    }
    options.controls_out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    save(sheet(followed, SHOWN), SHEETS / "controls-edges.png")
    save(sheet(coloured, SHOWN), SHEETS / "controls-image.png")
    save(figure_2(embedded, models, settings), SHEETS / "controls-figure-2.png")
    return figures


def edge_figures(drawn: Drawn) -> dict[str, dict[str, float]]:
    """Measure the agreement of pictures' edges with their maps."""
    wanted = torch.cat([example.picture for example in drawn.shown]).mean(1).round()
    return drawn.figures(lambda pictures: agreement(edge_maps(pictures), wanted), "edge_f1")


def colour_figures(drawn: Drawn) -> dict[str, dict[str, float]]:
    """Measure the agreement of pictures' colours with their references."""
    references = 2 * torch.cat([example.picture for example in drawn.shown]) - 1
    return drawn.figures(lambda pictures: similarity(pictures, references), "colour")


def sheet(drawn: Drawn, rows: int) -> Image.Image:
    """Show some cases: the example, and each column's picture."""
    chosen = [STRIDE * i % len(drawn.prompts) for i in range(rows)]
    columns = {"shown": torch.cat([2 * example.picture - 1 for example in drawn.shown]), **drawn.pictures}
    pictures = torch.stack([pictures[chosen] for pictures in columns.values()], 1)
    return draw_grid(pictures, [drawn.prompts[i] for i in chosen], list(columns))


def figure_2(embedded: Embedded, models: Path, settings: Settings) -> Image.Image:
    """Compose a fine-tuned checkpoint, a LoRA, a ControlNet and an image prompt, as the paper's Figure 2 does."""
    maps = {example.name: example for example in Example.all("edges")}
    reference = next(example for example in Example.all("references") if example.name == FIGURE_REFERENCE)
    edges = Maps(models / EDGES, torch.cat([maps[name].picture for name in FIGURE_MAPS]))
    image = Reference(models, reference.picture)
    tuned, lora = Adapter(models / FINE_TUNE, 0.6), Adapter(models / LORA)
    ways: dict[str, tuple[list[Adapter], list[Steering]]] = {
        "+ fine-tune": ([tuned], []),
        "+ LoRA": ([lora], []),
        "+ ControlNet": ([], [edges]),
        "+ image prompt": ([], [image]),
        "+ ControlNet, image": ([], [edges, image]),
        "all four": ([tuned, lora], [edges, image]),
    }
    batch = Batch(FIGURE_PROMPTS, (0,))
    alone = Alone(embedded.target, batch, settings)
    columns = {
        "map": 2 * edges.pictures - 1,
        "reference": (2 * reference.picture - 1).expand(len(batch.prompts), -1, -1, -1),
    }
    columns["target alone"] = _drawn(alone, embedded.target, batch, settings)
    for name, (adapters, controls) in ways.items():
        source = AdaptedModel(embedded.base, adapters, controls=controls).source(batch, settings)
        denoiser = with_delta(alone, embedded.target, source, embedded.base, Strength(1.0), settings)
        columns[name] = _drawn(denoiser, embedded.target, batch, settings)
    return draw_grid(torch.stack(list(columns.values()), 1), FIGURE_PROMPTS, list(columns))


def _drawn(denoiser: Callable[..., Tensor], model: Model, batch: Batch, settings: Settings) -> Tensor:
    return decode(model, draw(denoiser, model, batch, settings, torch.device("cpu")))


def save(picture: Image.Image, path: Path) -> None:
    """Write a sheet in 256 colours."""
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
