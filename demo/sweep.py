"""The lambda sweep: base, adapted, target, then the target with the delta at each lambda.

Memory, for the user's files on a GPU of 12 GB, in half precision: UNets take 1.7 GB (SD 1.x, 2.x) or 5.1 GB (SDXL).
The base's adapted weights take up to another 1.7 GB (the form ``bypass`` holds only the adapters' factors).  Text
encoders take 0.25 to 1.6 GB.  An autoencoder takes 0.33 GB in single precision, and up to 6 GB while it decodes 1024
pixels.

An SD 1.5 source for an SDXL target thus needs at most 8.5 GB of weights and 2 GB of activations, if nothing else stays.
So all prompts are encoded first and the text encoders dropped.  Prompts are drawn one at a time.  The UNets are dropped
before the autoencoders move to the GPU and decode picture by picture.  Weights stay in the files' memory maps until
they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from demo.embedded import Embedded
from demo.metrics import Judges, judge
from demo.pipeline import (
    AdaptedModel,
    Adapter,
    Alone,
    Batch,
    Branch,
    Denoiser,
    Model,
    Place,
    Settings,
    Steering,
    decode,
    draw,
    load_model,
    with_delta,
)
from demo.samplers import prepare, run_levels
from lib_delta.adapters.attach import AdapterForm
from lib_delta.core.source import Source
from lib_delta.core.strength import Strength
from lib_delta.diffusion.parameterization import Prediction
from lib_delta.errors import DeltaError

EMBEDDED_AT_ONCE = 8


@dataclass(frozen=True)
class Plan:
    """The drawing plan: every prompt in every column, all from the noise of one seed."""

    prompts: Sequence[str]
    strengths: Sequence[Strength]
    settings: Settings
    seed: int = 0


@dataclass(frozen=True)
class OwnFiles:
    """The user's models; ``tokenizer`` None is that of the released CLIP models."""

    target: Path
    base: Path
    adapters: Sequence[Adapter]
    form: AdapterForm = "automatic"
    prediction: Prediction | None = None
    tokenizer: Path | None = None
    controls: Sequence[Steering] = ()


@dataclass(frozen=True)
class Column:
    """A finished column: pictures ``(prompts, 3, H, W)`` in [-1, 1], and their cost.

    ``seconds`` is the time of sampling without decoding; ``evaluations`` counts forward passes of UNets.
    """

    title: str
    pictures: Tensor
    seconds: float
    evaluations: int


@dataclass(frozen=True)
class Told:
    """Prompts that are drawn together, encoded for every model."""

    batch: Batch
    target: Alone
    source: Source

    @property
    def evaluations(self) -> int:
        return self.target.evaluations + self.source.evaluations


@dataclass(frozen=True)
class Sketch:
    """A column to draw: its denoiser, and the space of its latents."""

    title: str
    denoiser: Callable[[Told], Denoiser]
    model: Model


def embedded_sweep(embedded: Embedded, plan: Plan) -> list[Column]:
    """Draw the plan with the embedded models, on the CPU."""
    prepare(plan.settings.sampler, embedded.target.parameterization.schedule)
    told = _tell(embedded.adapted, embedded.target, plan, EMBEDDED_AT_ONCE)
    return _decoded(_sample(_sketches(embedded.base, embedded.target, plan), told, plan, torch.device("cpu")))


def own_sweep(files: OwnFiles, plan: Plan, place: Place) -> list[Column]:
    """Draw the plan with the user's models.

    Raises :class:`DeltaError` for files that cannot be used, and if the GPU's memory is too small.
    """
    try:
        return _own_sweep(files, plan, place)
    except torch.cuda.OutOfMemoryError as error:
        raise DeltaError(
            f"the GPU's memory does not hold these models at {plan.settings.size} pixels: "
            "use a smaller --size, --form bypass, or --device cpu"
        ) from error


def _own_sweep(files: OwnFiles, plan: Plan, place: Place) -> list[Column]:
    mapped = Place(torch.device("cpu"), place.dtype)
    base = load_model(files.base, mapped, files.tokenizer)
    target = load_model(files.target, mapped, files.tokenizer, files.prediction)
    prepare(plan.settings.sampler, target.parameterization.schedule)
    base.unet.to(place.device)
    told = _tell_own(files, base, target, plan, place.device)
    target.unet.to(place.device)
    drawn = _sample(_sketches(base, target, plan), told, plan, place.device)
    _give_up([base.unet, target.unet])
    for vae in (base.vae, target.vae):
        if vae is not None:
            vae.to(place.device)
    return _decoded(drawn)


def _tell_own(files: OwnFiles, base: Model, target: Model, plan: Plan, device: torch.device) -> list[Told]:
    """Attach the adapters and encode every prompt, each to be drawn by itself; drop the text encoders afterwards."""
    towers = [*base.conditioner.towers, *target.conditioner.towers]
    for tower in towers:
        tower.to(device)
    told = _tell(AdaptedModel(base, files.adapters, files.form, files.controls), target, plan, 1)
    _give_up(towers)
    return told


def _give_up(modules: Iterable[nn.Module]) -> None:
    """Free weights that are not needed again, on any device."""
    for module in modules:
        module.to("meta")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tell(adapted: AdaptedModel, target: Model, plan: Plan, at_once: int) -> list[Told]:
    batches = [Batch(plan.prompts[i : i + at_once], [plan.seed]) for i in range(0, len(plan.prompts), at_once)]
    return [Told(b, Alone(target, b, plan.settings), adapted.source(b, plan.settings)) for b in batches]


def _sketches(base: Model, target: Model, plan: Plan) -> list[Sketch]:
    cfg = plan.settings.cfg

    def at(strength: Strength) -> Callable[[Told], Denoiser]:
        return lambda told: with_delta(told.target, target, told.source, base, strength, plan.settings)

    return [
        Sketch("base", lambda told: Branch(told.source, cfg, adapted=False), base),
        Sketch("adapted", lambda told: Branch(told.source, cfg, adapted=True), base),
        Sketch("target", lambda told: told.target, target),
        *(Sketch(f"lambda {s.value:g}", at(s), target) for s in plan.strengths),
    ]


@dataclass(frozen=True)
class _Drawn:
    sketch: Sketch
    latents: Tensor
    seconds: float
    evaluations: int


def _sample(sketches: Sequence[Sketch], told: Sequence[Told], plan: Plan, device: torch.device) -> list[_Drawn]:
    total = len(sketches) * len(told) * plan.settings.steps
    drawn = []
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        for sketch in sketches:
            bar.set_description(f"{sketch.title:>10}")
            before, start, parts = sum(t.evaluations for t in told), time.perf_counter(), []
            for part in told:
                followed = _followed(sketch.denoiser(part), sketch.model, plan.settings, bar)
                # The time includes the copy to the CPU, because only that waits for the GPU.
                parts.append(draw(followed, sketch.model, part.batch, plan.settings, device).cpu())
                bar.update(-bar.n % plan.settings.steps)
            seconds, passes = time.perf_counter() - start, sum(t.evaluations for t in told) - before
            drawn.append(_Drawn(sketch, torch.cat(parts), seconds, passes))
    return drawn


def _followed(denoiser: Denoiser, model: Model, settings: Settings, bar: tqdm) -> Denoiser:
    """Advance the bar by noise levels, because samplers differ in their number of evaluations at a level."""
    levels = run_levels(settings.sampler, settings.steps, model.parameterization.schedule)
    start = bar.n

    def call(x: Tensor, sigma: Tensor, **kwargs: object) -> Tensor:
        denoised = denoiser(x, sigma, **kwargs)
        bar.update(start + int((levels >= sigma.max().cpu()).sum()) - bar.n)
        return denoised

    return call


def _decoded(drawn: Iterable[_Drawn]) -> list[Column]:
    return [Column(d.sketch.title, decode(d.sketch.model, d.latents), d.seconds, d.evaluations) for d in drawn]


@dataclass(frozen=True)
class Judgement:
    """The embedded judges' scores of a column, 0 to 1."""

    style: float
    content: float


def judge_column(judges: Judges, names: Sequence[str], prompts: Sequence[str], column: Column) -> Judgement:
    """Judge a column's style and content; its prompts are among the ``names``."""
    numbers = torch.tensor([names.index(prompt.strip().lower()) for prompt in prompts])
    scores = judge(judges, column.pictures[:, None], numbers)
    return Judgement(scores.style, scores.content)
