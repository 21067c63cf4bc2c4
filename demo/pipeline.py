"""From checkpoints to pictures, without a WebUI: loading, samplers, and one run with or without the delta."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from demo.samplers import run_levels, sample
from lib_delta.adapters.adapter_file import load_adapter
from lib_delta.adapters.attach import AdaptedTextEncoder, AdapterForm, adapted_text_parameters, attach
from lib_delta.bridges import Bridge, SideSize, choose_bridge, may_enlarge
from lib_delta.controls.control_file import load_control
from lib_delta.controls.control_map import ControlMap
from lib_delta.controls.guides import Mode, follow, prompt_by
from lib_delta.controls.image_encoder import image_tokens, load_image_encoder
from lib_delta.controls.picture_file import read_picture
from lib_delta.core.conditioning import Conditioning
from lib_delta.core.guidance import DeltaDenoiser, DeltaGuidance
from lib_delta.core.guides import Guide
from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.core.strength import Strength
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.parameterization import Parameterization, Prediction, Schedule
from lib_delta.errors import CheckpointError
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.loading import load_unet, load_vae
from lib_delta.models.text import Conditioner, load_tokenizer, sdxl_label
from lib_delta.models.unet import UNet
from lib_delta.models.vae import VAE

Denoiser = Callable[..., Tensor]
EMBEDDED_SIDE = 128  # the largest pictures of embedded models, in pixels


@dataclass(frozen=True)
class Place:
    """The device of models, and the type that they compute in."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def cpu(cls) -> Place:
        """Compute on the CPU in single precision."""
        return cls(torch.device("cpu"), torch.float32)

    @classmethod
    def best(cls) -> Place:
        """Choose the fastest available device; half precision on GPUs."""
        if torch.cuda.is_available():
            return cls(torch.device("cuda"), torch.float16)
        if torch.backends.mps.is_available():
            return cls(torch.device("mps"), torch.float16)
        return cls.cpu()


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint."""

    name: str
    family: Family
    unet: UNet
    conditioner: Conditioner
    vae: VAE | None
    parameterization: Parameterization


def load_model(
    path: Path, place: Place, tokenizer: Path | None, prediction: Prediction | None = None, with_vae: bool = True
) -> Model:
    """Load a checkpoint; ``tokenizer`` None is that of the released CLIP models."""
    with WeightFile.open(path) as file:
        unet, report = load_unet(file, place.dtype, place.device, prediction)
        if report.variant != "standard":
            raise CheckpointError(f"{file.name} is an {report.variant} model: the demo needs an ordinary checkpoint")
        conditioner = Conditioner.load(file, report.family, load_tokenizer(tokenizer), place.dtype, place.device)
        # The autoencoders of SDXL overflow in half precision.
        vae = load_vae(file, torch.float32, place.device) if with_vae else None
    schedule = Schedule.stable_diffusion(report.zero_terminal_snr)
    return Model(path.name, report.family, unet, conditioner, vae, Parameterization(report.prediction, schedule))


@dataclass(frozen=True)
class Settings:
    """Sampling settings; ``size`` is in pixels, ``source_cfg`` None is the target's ``cfg``."""

    sampler: str = "dpmpp_2m"
    steps: int = 16
    cfg: float = 3.0
    source_cfg: float | None = None
    size: int = 64
    negative: str = ""


@dataclass(frozen=True)
class Batch:
    """The pictures to draw: every prompt with every seed, ``len(prompts) * len(seeds)`` rows, prompt by prompt."""

    prompts: Sequence[str]
    seeds: Sequence[int]

    def noise(self, model: Model, settings: Settings) -> Tensor:
        """Return unit noise ``(N, C, H, W)``; a seed's noise is the same for all prompts, whatever the batch."""
        side = settings.size // (model.vae.config.factor if model.vae else 8)
        shape = (model.unet.config.out_channels, side, side)
        per_seed = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in self.seeds]
        return torch.stack(per_seed).repeat(len(self.prompts), 1, 1, 1)

    def encode(self, model: Model, conditioner: Conditioner, settings: Settings) -> Conditioning:
        """Encode every row's prompt and negative prompt."""
        # Encode each prompt by itself: its encoding must not depend on the others of the batch.
        parts = [_encode_one(model, conditioner, prompt, settings) for prompt in self.prompts]
        labels = [
            (p.cond_label, p.uncond_label) for p in parts if p.cond_label is not None and p.uncond_label is not None
        ]
        return Conditioning(
            self._rows([p.cond for p in parts]),
            self._rows([p.uncond for p in parts]),
            *(self._rows(list(half)) for half in zip(*labels)),
        )

    def _rows(self, parts: Sequence[Tensor]) -> Tensor:
        if parts[0].ndim == 3:
            length = math.lcm(*(p.shape[1] for p in parts))
            parts = [p.repeat(1, length // p.shape[1], 1) for p in parts]
        return torch.cat(tuple(parts)).repeat_interleave(len(self.seeds), 0)


def _encode_one(model: Model, conditioner: Conditioner, prompt: str, settings: Settings) -> Conditioning:
    encoded = conditioner([prompt, settings.negative])
    cond, uncond = encoded.context.split(1)
    if encoded.pooled is None:
        return Conditioning(cond, uncond)
    return Conditioning(cond, uncond, *sdxl_label(encoded.pooled, settings.size, settings.size).split(1))


class Alone:
    """A model by itself, as ``(x, sigma) -> denoised`` after classifier-free guidance."""

    def __init__(self, model: Model, batch: Batch, settings: Settings) -> None:
        # Without adapters, base and adapted are both this model.
        self._source = Source(model.unet, model.parameterization, batch.encode(model, model.conditioner, settings))
        self._cfg = settings.cfg

    def __call__(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        return self._source.denoised(SourceStep(x, sigma, self._cfg))[-1].to(x.device)

    @property
    def evaluations(self) -> int:
        """The number of forward passes of the UNet so far."""
        return self._source.evaluations


@dataclass(frozen=True)
class Adapter:
    """An adapter file (or fine-tuned checkpoint) and its weight."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Control:
    """A map to follow (edges, depth, a pose), and the ControlNet or T2I-Adapter that reads it."""

    model: Path
    picture: Path
    weight: float = 1.0
    mode: Mode = "balanced"

    def guide(self, base: Model) -> Guide:
        """Load both files, for a base's UNet."""
        picture = ControlMap(read_picture(self.picture), "crop and resize")
        return follow(load_control(self.model, base.unet), base.unet, picture, self.weight, mode=self.mode)


@dataclass(frozen=True)
class ImagePrompt:
    """A reference picture, the IP-Adapter that turns it into a prompt, and its image encoder."""

    model: Path
    encoder: Path
    picture: Path
    weight: float = 1.0

    def guide(self, base: Model) -> Guide:
        """Load the files, for a base's UNet."""
        file = load_control(self.model, base.unet)
        tokens = image_tokens(file, load_image_encoder(self.encoder), [read_picture(self.picture)])
        return prompt_by(file, base.unet, tokens, self.weight)


class Steering(Protocol):
    """A control for a base: a map with its model, or a picture with its models."""

    def guide(self, base: Model) -> Guide:
        """Load the files, for a base's UNet."""
        ...


class AdaptedModel:
    """A base with its adapters attached: the method's source."""

    def __init__(
        self,
        base: Model,
        adapters: Sequence[Adapter],
        form: AdapterForm = "automatic",
        controls: Sequence[Steering] = (),
    ) -> None:
        self.base = base
        self._guides = [control.guide(base) for control in controls]
        towers = base.conditioner.towers
        self.files = [load_adapter(adapter.path, base.unet, towers) for adapter in adapters]
        weighted = list(zip(self.files, (adapter.weight for adapter in adapters)))
        attach(base.unet, weighted, form)
        adapted_towers = [
            AdaptedTextEncoder(tower, adapted_text_parameters(tower, weighted, i)) for i, tower in enumerate(towers)
        ]
        self._conditioner = Conditioner(base.family, adapted_towers, base.conditioner.tokenizer)

    def source(self, batch: Batch, settings: Settings) -> Source:
        """Return base and adapted, conditioned on a batch's prompts."""
        told = [
            batch.encode(self.base, conditioner, settings) for conditioner in (self.base.conditioner, self._conditioner)
        ]
        return Source(self.base.unet, self.base.parameterization, *told, guides=self._guides)


class Branch:
    """One of the source's two models by itself, as ``(x, sigma) -> denoised``."""

    def __init__(self, source: Source, cfg: float, adapted: bool) -> None:
        self._source, self._cfg, self._branch = source, cfg, -1 if adapted else 0

    def __call__(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        return self._source.denoised(SourceStep(x, sigma, self._cfg))[self._branch].to(x.device)


def with_delta(
    target: Alone,
    model: Model,
    source: Source,
    base: Model,
    strength: Strength,
    settings: Settings,
    bridge: Bridge | None = None,
) -> DeltaDenoiser:
    """Return the target's denoiser with the delta added; ``bridge`` None chooses the one for the two families."""
    if bridge is None:
        known = base.parameterization.schedule.sigma_max
        # A target with zero terminal SNR starts at more noise than an ordinary base was trained on.
        beyond = model.parameterization.schedule.sigma_max > known or may_enlarge(base.family, model.family)
        # The embedded models draw at sizes for which released ones are not made.
        size: SideSize = "picture" if settings.size <= EMBEDDED_SIDE else "automatic"
        bridge = choose_bridge(base.family, model.family, known if beyond else None, size=size)
    levels = run_levels(settings.sampler, settings.steps, model.parameterization.schedule)
    cfg = settings.cfg if settings.source_cfg is None else settings.source_cfg
    return DeltaDenoiser(target, DeltaGuidance(strength, bridge, source), levels, cfg)


@torch.no_grad()
def draw(denoiser: Denoiser, model: Model, batch: Batch, settings: Settings, device: torch.device) -> Tensor:
    """Sample a batch and return its latents ``(N, C, H, W)``."""
    noise = batch.noise(model, settings).to(device)
    return sample(settings.sampler, denoiser, noise, settings.steps, model.parameterization.schedule, batch.seeds[0])


@torch.no_grad()
def decode(model: Model, latents: Tensor) -> Tensor:
    """Decode latents to pictures ``(N, 3, H, W)`` in [-1, 1], on the CPU, one by one if they are large.

    The autoencoder may be on another device than the latents.
    """
    if model.vae is None:
        raise CheckpointError(f"{model.name} has no autoencoder: a full checkpoint is needed to see pictures")
    rows = 64 if latents.shape[-1] <= 16 else 1
    scaled = latents.to(next(model.vae.parameters()).device, torch.float32) / model.family.scale_factor
    return torch.cat([model.vae.decode(part).clamp(-1, 1).cpu() for part in scaled.split(rows)])
