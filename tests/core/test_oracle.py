"""Final latents equal those that the method's published code gave (a ComfyUI node, run unmodified).

``data/oracle_*.safetensors`` hold its final latents (divided by the target's scale factor), the noise
levels, and for the toys the weights.  The UNets' weights and the conditioning are too large to keep,
and are made again from the rule they were made by: :func:`drawn`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lib_delta.bridges import Bridge, Crossing, ScaleBridge, choose_bridge
from lib_delta.core.conditioning import Conditioning
from lib_delta.core.deltas import Deltas
from lib_delta.core.guidance import DeltaDenoiser, DeltaGuidance, DeltaSource
from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.core.strength import Strength
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.parameterization import Parameterization, denoiser
from lib_delta.models.unet import UNet, UNetConfig, timestep_embedding
from tests.support.tiny_unet import adapt

Denoise = Callable[[Tensor, Tensor], Tensor]
# Gives eps for x (N, C, H, W) and t (N,), whose rows are equal parts told the positive (True) or negative prompt.
Network = Callable[[Tensor, Tensor, tuple[bool, ...]], Tensor]

DATA = Path(__file__).parent / "data"
EPS = Parameterization("eps")
SIGNS = {True: "positive", False: "negative"}

SD15 = UNetConfig.sd15(width=32)
SD21 = UNetConfig(**{**vars(SD15), "context_width": 1024, "linear_projection": True, "head_width": 16})
SDXL = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    levels=(32, 64, 128),
    res_blocks=(2, 2, 2),
    depth_in=(0, 0, 2, 2, 10, 10),
    depth_middle=10,
    depth_out=(10, 10, 10, 2, 2, 2, 0, 0, 0),
    context_width=2048,
    linear_projection=True,
    label_width=2816,
    head_width=16,
)


def drawn(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of the oracle: normal, from a generator of their own that the name seeds."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.randn(shape, generator=generator)


def drawn_difference(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter's random part, scaled by its kind: matrix or kernel, bias, or scale of a norm."""
    if len(shape) > 1:
        return drawn(seed, name, shape) / math.sqrt(math.prod(shape[1:]))
    return drawn(seed, name, shape) * (0.05 if name.endswith(".bias") else 0.1)


def drawn_unet(config: UNetConfig, seed: int) -> UNet:
    with torch.device("meta"):
        unet = UNet(config).requires_grad_(False).eval()
    weights = {name: drawn_difference(seed, name, tuple(w.shape)) for name, w in unet.state_dict().items()}
    norms = {name: w + 1 for name, w in weights.items() if w.ndim == 1 and name.endswith(".weight")}
    unet.load_state_dict({**weights, **norms}, assign=True)
    return unet.requires_grad_(False)


def guided(network: Network, cfg: float) -> Denoise:
    """Denoise with classifier-free guidance."""
    cond = denoiser(lambda x, t: network(x, t, (True,)), EPS, quantize=True)
    both = denoiser(lambda x, t: network(x, t, (True, False)), EPS, quantize=True)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if cfg == 1:
            return cond(x, sigma)
        with_prompt, without = both(x.repeat(2, 1, 1, 1), sigma.repeat(2)).chunk(2)
        return without + cfg * (with_prompt - without)

    return denoise


@dataclass(frozen=True)
class Case:
    """One target with its source, and what the published code made of them."""

    latents: dict[str, Tensor]
    target: Network
    source: Callable[[], DeltaSource]
    family: Family

    def published(self, key: str) -> Tensor:
        return self.latents[key] * self.family.scale_factor


@dataclass(frozen=True)
class ToySource:
    networks: tuple[Network, ...]

    def at_progress(self, progress: float) -> ToySource:
        return self

    def deltas(self, step: SourceStep) -> Deltas:
        base, adapted = (guided(network, step.cfg_scale)(step.x, step.sigma) for network in self.networks)
        delta = adapted - base
        return Deltas(delta, delta)


def rows(told: dict[bool, Tensor], parts: tuple[bool, ...], batch: int) -> Tensor:
    """Give each of ``batch`` rows what its part is told, ``(1, ...)`` each."""
    return torch.cat([told[on].expand(batch // len(parts), *told[on].shape[1:]) for on in parts])


def toy_network(tensors: dict[str, Tensor], role: str) -> Network:
    told_as = "target" if role == "target" else "source"
    told = {on: tensors[f"cond/{told_as}/{sign}"] for on, sign in SIGNS.items()}
    kernel, bias, v, u = (tensors[f"weights/{role}/{name}"] for name in ("conv.weight", "conv.bias", "V", "u"))

    def network(x: Tensor, t: Tensor, parts: tuple[bool, ...]) -> Tensor:
        shift = rows(told, parts, len(x)).mean(1) @ v + torch.cos(torch.pi * t[:, None] / 1000) * u
        return torch.tanh(torch.nn.functional.conv2d(x, kernel, bias, padding=1) + shift[..., None, None])

    return network


def unet_network(unet: UNet, told: dict[bool, Tensor], labels: dict[bool, Tensor] | None = None) -> Network:
    def network(x: Tensor, t: Tensor, parts: tuple[bool, ...]) -> Tensor:
        label = rows(labels, parts, len(x))[None] if labels else None
        return unet(x[None], t, rows(told, parts, len(x))[None], label)[0]

    return network


def contexts(seed: int, kind: str, width: int) -> dict[bool, Tensor]:
    return {on: drawn(seed, f"cond:{kind}:{sign}", (1, 77, width)) for on, sign in SIGNS.items()}


@cache
def sd15_and_adapted() -> UNet:
    unet = drawn_unet(SD15, 15)
    base = unet.state_dict()
    return adapt(unet, {name: w + 0.1 * drawn_difference(777, name, tuple(w.shape)) for name, w in base.items()})


def sd15_source() -> Source:
    told = contexts(1000, "sd15", 768)
    return Source(sd15_and_adapted(), EPS, Conditioning(told[True], told[False]), quantize=True)


@cache
def case(name: str) -> Case:
    latents = load_file(DATA / f"oracle_{name}.safetensors")
    if name == "toy":
        networks = {role: toy_network(latents, role) for role in ("source", "adapted", "target")}
        return Case(
            latents, networks["target"], lambda: ToySource((networks["source"], networks["adapted"])), Family.SD1
        )
    if name == "sd15_to_sd21":
        target = unet_network(drawn_unet(SD21, 21), contexts(2000, "sd21", 1024))
        return Case(latents, target, sd15_source, Family.SD2)
    # SDXL is told the original size, the crop and the target size; latents of 8x8 are 64 pixels.
    sizes = timestep_embedding(torch.tensor([64, 64, 0, 0, 64, 64]), 256).flatten()[None]
    pooled = {on: drawn(2000, f"cond:sdxl:{sign}:pooled", (1, 1280)) for on, sign in SIGNS.items()}
    labels = {on: torch.cat((p, sizes), 1) for on, p in pooled.items()}
    target = unet_network(drawn_unet(SDXL, 10), contexts(2000, "sdxl", 2048), labels)
    return Case(latents, target, sd15_source, Family.SDXL)


def sample(sampler: str, model: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """Run one of the oracle's samplers on ``x`` at the first of ``sigmas``."""
    if sampler == "ddim":
        return sample_ddim(model, x, sigmas)
    if sampler == "uni_pc":
        return sample_unipc(model, x, sigmas)
    sampling = pytest.importorskip("k_diffusion.sampling")
    return getattr(sampling, f"sample_{sampler}")(model, x, sigmas, disable=True)


def sample_ddim(model: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """Deterministic DDIM, which is Euler's method in this convention (arXiv 2010.02502, 4.3)."""
    for sigma, next_sigma in pairwise(sigmas):
        denoised = model(x, sigma.expand(len(x)))
        x = denoised + next_sigma / sigma * (x - denoised)
    return x


def sample_unipc(model: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """UniPC of order 3, variant bh1, on given noise levels; ComfyUI ends at sigma 0.001 instead of 0.

    The solver there knows a noise level by its signal level, in float32: ``1 - alpha_bar`` rounds sigma 0.001 by
    some percent, which is followed here (without it the toys differ by up to 1.3e-5).
    """
    diffusers = pytest.importorskip("diffusers")
    steps = len(sigmas) - 1
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=3, solver_type="bh1", prediction_type="sample")
    scheduler.set_timesteps(steps)
    alpha_bar = 1 / (torch.cat((sigmas[:-1], sigmas.new_tensor([0.001]))) ** 2 + 1)
    scheduler.sigmas = ((1 - alpha_bar) / alpha_bar) ** 0.5
    scheduler.timesteps = torch.arange(steps)
    vp = x / (sigmas[0] ** 2 + 1) ** 0.5
    for i, sigma in enumerate(sigmas[:-1]):
        denoised = model(vp * (sigma**2 + 1) ** 0.5, sigma.expand(len(x)))
        vp = scheduler.step(denoised, i, vp).prev_sample
    return vp * (0.001**2 + 1) ** 0.5


def final_latents(world: Case, sampler: str, scheduler: str, cfg: int, strength: float, bridge: Bridge) -> Tensor:
    sigmas = world.latents[f"sigmas/{sampler}/{scheduler}"]
    guidance = DeltaGuidance(Strength(strength), bridge, world.source())
    model = DeltaDenoiser(guided(world.target, cfg), guidance, sigmas, cfg)
    with torch.no_grad():
        return sample(sampler, model, world.latents["noise"] * (1 + sigmas[0] ** 2) ** 0.5, sigmas)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("strength", ["0", "0.5", "1"])
@pytest.mark.parametrize("cfg", [1, 7])
@pytest.mark.parametrize("scheduler", ["normal", "karras"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "ddim", "dpmpp_2m", "uni_pc"])
@pytest.mark.parametrize(("name", "tolerance"), [("toy", 1e-5), ("sd15_to_sd21", 1e-4)])
def test_final_latents_equal_the_published_code(
    name: str, tolerance: float, sampler: str, scheduler: str, cfg: int, strength: str
) -> None:
    world = case(name)
    bridge = choose_bridge(Family.SD1, world.family, form="same_snr")
    got = final_latents(world, sampler, scheduler, cfg, float(strength), bridge)
    error = relative_error(got, world.published(f"delta/{sampler}/{scheduler}/cfg{cfg}/lam{strength}"))
    print(f"relative error {error:.2e}")
    assert error < tolerance
    if strength == "0":
        assert relative_error(got, world.published(f"plain_target/{sampler}/{scheduler}/cfg{cfg}")) < tolerance


@dataclass(frozen=True)
class SecondLatent:
    """The published node's own way to SDXL: a latent of the source's, stepped by the target's solver from ``noise``.

    For solvers that are linear in x and the estimate, it is ``k * x + (1 - k) * noise`` with the noise
    scaled down as sigma falls.
    """

    k: float
    start: Tensor
    sigma_start: Tensor

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        noise = self.start * (sigma / self.sigma_start)[:, None, None, None]
        return self.k * x + (1 - self.k) * noise, sigma, Crossing(self.k * denoised)

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        return delta / self.k


K = Family.SD1.scale_factor / Family.SDXL.scale_factor


def sdxl_run(bridge: Bridge, strength: str) -> tuple[Tensor, Tensor, Tensor]:
    """Our final latents, the published ones, and those of the target alone."""
    world = case("sd15_to_sdxl")
    got = final_latents(world, "euler", "normal", 1, float(strength), bridge)
    published = world.published(f"delta/euler/normal/cfg1/lam{strength}")
    return got, published, world.published("plain_target/euler/normal/cfg1")


def test_sdxl_equals_the_published_code_given_its_second_latent() -> None:
    world = case("sd15_to_sdxl")
    sigma = world.latents["sigmas/euler/normal"][0]
    got, published, _ = sdxl_run(SecondLatent(K, world.latents["noise"] * (1 + sigma**2) ** 0.5, sigma), "1")
    error = relative_error(got, published)
    print(f"relative error {error:.2e}")
    assert error < 1e-4


@pytest.mark.parametrize(
    ("form", "most", "direction", "size"), [("published", 0.65, 0.75, 1.0), ("same_snr", 0.5, 0.99, K)]
)
def test_sdxl_without_a_second_latent_comes_near_the_published_code(
    form: str, most: float, direction: float, size: float
) -> None:
    """Neither form carries a second latent, so neither can equal it; this is how near they come.

    The networks are random: their estimate of x0, and so of the noise, is far off, and that is all the
    ``published`` form has to go by.  The ``same_snr`` form does not use it: it asks the source almost the same
    question, and its delta is larger by ``k``, as it is found at ``k * sigma``.
    """
    got, published, plain = sdxl_run(ScaleBridge(K, form), "1")
    ours, theirs = (got - plain).flatten(), (published - plain).flatten()
    error = relative_error(ours, theirs)
    cosine, ratio = float(torch.cosine_similarity(ours, theirs, 0)), float(ours.norm() / theirs.norm())
    print(f"{form}: final latents {relative_error(got, published):.4f}, effect {error:.3f}, {cosine:.4f}, {ratio:.3f}")
    assert error < most
    assert cosine > direction
    assert ratio == pytest.approx(size, rel=0.2)
